"""Data for the tests of the workbench."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_line import write_beir


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    return write_beir(tmp_path / "set")
