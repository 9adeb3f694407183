"""`negative-cache report`: one page of one run, or of several side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from negative_cache.version import __version__
from negative_cache.workbench.compare.table import gigabytes
from negative_cache.workbench.files import write_text
from negative_cache.workbench.report.charts import charts_of
from negative_cache.workbench.report.runs import Run, Table, read_folders
from negative_cache.workbench.report.svg import short
from negative_cache.workbench.training.config import RunError
from negative_cache.workbench.training.record import measures_of

REPORT = "report.html"


def write_report(folders: Sequence[Path], output: Path | None = None) -> tuple[Path, list[Run]]:
    """Write the page.

    Args:
        folders: See `read_folders`.
        output: The file; None for `report.html` in the folder, if there is one folder.

    Returns:
        The file, and the runs on the page.

    Raises:
        RunError: See `read_folders`; or the output cannot be written.
    """
    runs, tables = read_folders(folders)
    if output is None:
        if len(folders) > 1:
            raise RunError(f"{len(folders)} folders have no common place for their page. Give --output FILE.html.")
        output = folders[0] / REPORT
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise RunError(
            f"--output {output} cannot be written: it is a directory, or its directory does not exist. Give a file in "
            "an existing directory."
        )
    return write_text(output, render(runs, tables)), runs


def render(runs: Sequence[Run], tables: Sequence[Table] = ()) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=PackageLoader("negative_cache.workbench.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    best = _best(runs)
    environment.filters |= {"short": short, "gigabytes": gigabytes}
    return environment.get_template("report.html").render(
        runs=runs,
        tables=tables,
        metrics=list(best),
        best=best,
        charts=charts_of(runs),
        options=_options(runs),
        hits=_by_query(runs, "after"),
        negatives=_by_query(runs, "negatives"),
        are_of_one_data=len({_sizes(run) for run in runs if run.record.after}) <= 1,
        version=__version__,
    )


def _sizes(run: Run) -> tuple[Any, ...]:
    return tuple((run.record.after or {}).get(key) for key in ("num_queries", "num_documents"))


def _best(runs: Sequence[Run]) -> dict[str, float]:
    """The best value of each metric; infinity if there is only one run with metrics."""
    found = [run.record.after for run in runs if run.record.after]
    names = dict.fromkeys(name for metrics in found for name in measures_of(metrics))
    return {name: max(metrics[name] for metrics in found) if len(found) > 1 else math.inf for name in names}


def _options(runs: Sequence[Run]) -> list[tuple[str, list[Any], bool]]:
    """(name, value of each run, whether the values differ) of the options and the environment; differing ones first."""
    found: list[dict[str, Any]] = []
    for run in runs:
        about = {key: getattr(run.record, key) for key in ("device", "ranks", "threads")}
        versions = {f"version of {name}": value for name, value in run.record.versions.items()}
        found.append({**run.options, **about, **versions})
    rows: list[tuple[str, list[Any], bool]] = []
    for name in dict.fromkeys(key for options in found for key in options):
        values = [options.get(name, "-") for options in found]
        rows.append((name, values, any(value != values[0] for value in values) and name != "output"))
    return sorted(rows, key=lambda row: not row[2])


def _by_query(runs: Sequence[Run], key: str) -> list[dict[str, Any]]:
    """For each query, its text and the results of each run that has the query, before and after training."""
    queries: dict[tuple[str, str], dict[str, Any]] = {}
    for run in runs:
        before = {entry["query"]: entry for entry in run.samples.get("before", [])}
        for entry in run.samples.get(key, []):
            query = queries.setdefault((entry["query"], entry["text"]), {**entry, "of_runs": []})
            query["of_runs"].append({"run": run, "entry": entry, "before": before.get(entry["query"])})
    return list(queries.values())
