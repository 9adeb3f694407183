"""A pytest plugin that writes a row for each test when it ends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.gpu.results import Results
from benchmarks.gpu.works import VARIABLE

LONGEST_MESSAGE = 600  # characters
# Only the process that gets the reports of all tests writes.
_results = None if "PYTEST_XDIST_WORKER" in os.environ else Results(Path(os.environ[VARIABLE]))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Called with the outcome of each part of a test."""
    if report.when == "call" or not report.passed:
        _add(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Called for each file whose tests were collected."""
    if report.failed:
        _add(report)


def _add(report: pytest.TestReport | pytest.CollectReport) -> None:
    if _results is None:
        return
    _results.add(
        test=report.nodeid.removeprefix("tests/"),
        outcome=report.outcome,
        seconds=round(getattr(report, "duration", 0.0), 2),
        message="" if report.passed else report.longreprtext[-LONGEST_MESSAGE:].strip(),
    )
