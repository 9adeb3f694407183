"""`negative-cache report`: one page of one run, or of several side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from negative_cache.version import __version__
from negative_cache.workbench.compare.table import gigabytes
from negative_cache.workbench.counting import counted, counted_queries
from negative_cache.workbench.evaluation.systems import PER_QUERY
from negative_cache.workbench.files import write_text
from negative_cache.workbench.report.charts import charts_of
from negative_cache.workbench.report.differences import Difference, baseline_of, differences_of, pairs_of
from negative_cache.workbench.report.runs import Run, Table, read_folders
from negative_cache.workbench.report.svg import short
from negative_cache.workbench.training.config import RunError
from negative_cache.workbench.training.record import measures_of

REPORT = "report.html"
MAX_FILES = 4  # that are named


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
    measures = _measures(runs)
    baseline = baseline_of([run.loss for run in runs])
    environment.filters |= {
        "short": short,
        "gigabytes": gigabytes,
        "counted": counted,
        "counted_queries": counted_queries,
    }
    return environment.get_template("report.html").render(
        runs=runs,
        tables=tables,
        measures=measures,
        baseline=baseline,
        differences=_differences(runs, measures, baseline),
        values_in=_files_of_values(runs),
        charts=charts_of(runs),
        options=_options(runs),
        hits=_with_ranks(_by_query(runs, "after"), runs),
        changes=[(run, found) for run in runs if (found := run.samples.get("changes"))],
        negatives=_by_query(runs, "negatives"),
        likely_false=[(run, *found) for run in runs if (found := _likely_false(run))[0]],
        searched=_searched(runs),
        are_of_one_data=len({_sizes(run) for run in runs if run.record.after}) <= 1,
        version=__version__,
    )


def _sizes(run: Run) -> tuple[Any, ...]:
    return tuple((run.record.after or {}).get(key) for key in ("num_queries", "num_documents"))


def _searched(runs: Sequence[Run]) -> str:
    """What the runs searched; with the letters of the runs if they searched several things."""
    letters: dict[str, list[str]] = {}
    for run in runs:
        if run.searched:
            letters.setdefault(run.searched, []).append(run.letter)
    if len(letters) == 1:
        return next(iter(letters))
    return "; ".join(f"{', '.join(own)}: {searched}" for searched, own in letters.items())


def _measures(runs: Sequence[Run]) -> list[str]:
    """The names of the measures of all runs."""
    return list(dict.fromkeys(name for run in runs if run.record.after for name in measures_of(run.record.after)))


def _differences(
    runs: Sequence[Run], measures: Sequence[str], baseline: int
) -> dict[int, list[tuple[Run | None, dict[str, Difference]]]]:
    """For each run, by its number: what it is compared with (None for itself before training), and the differences."""
    pairs = pairs_of([run.values for run in runs], baseline)
    found: dict[int, list[tuple[Run | None, dict[str, Difference]]]] = {run.number: [] for run in runs}
    for pair, differences in zip(pairs, differences_of(pairs, measures), strict=True):
        found[pair.run].append((None if pair.baseline is None else runs[pair.baseline], differences))
    return found


def _files_of_values(runs: Sequence[Run]) -> str:
    """The files with the values of queries; the first ones if there are many."""
    files = [str(folder / PER_QUERY) for run in runs if run.values is not None for folder in run.folders]
    others = f" and {counted(len(files) - MAX_FILES, 'more file')}" if len(files) > MAX_FILES else ""
    return ", ".join(files[:MAX_FILES]) + others


def _likely_false(run: Run) -> tuple[int, int]:
    """The number of shown training queries with a negative that is more similar than the positive, and of all."""
    entries = run.samples.get("negatives", [])
    is_above = [
        any(row["similarity"] > entry["positive"]["similarity"] for row in entry["negatives"]) for entry in entries
    ]
    return sum(is_above), len(entries)


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


def _with_ranks(queries: list[dict[str, Any]], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The queries, each with the ranks in those runs that show other queries, as far as they are known."""
    corpora = {run.values.corpus for run in runs if run.values is not None}
    for query in queries:
        shown = [found["run"] for found in query["of_runs"]]
        query["other_ranks"] = [
            (run, _rank(run.values.after[-1], query["query"]))
            for run in runs
            if len(corpora) == 1 and run not in shown and run.values is not None
        ]
    return queries


def _rank(values: Mapping[str, Mapping[str, float]], query: str) -> str:
    """The rank of the best relevant document, from the reciprocal rank."""
    reciprocal = values["MRR@10"][query]
    return str(round(1 / reciprocal)) if reciprocal else "> 10"
