"""The runs that a report shows: read from their folders, with what each is drawn with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from negative_cache.workbench.compare import RESULT, Comparison
from negative_cache.workbench.compare_report import COLUMNS, rows_of, title_of, verdict
from negative_cache.workbench.config import RunError, has_effect
from negative_cache.workbench.report_charts import DASHES_OF_SVG, GLYPHS, MAX_RUNS, NUM_COLOURS
from negative_cache.workbench.samples import SAMPLES
from negative_cache.workbench.training import RECORD

_NEEDED = {"configuration", "steps", "seconds", "peak_memory_bytes", "history"}


@dataclass
class Run:
    """A run as the page shows it.

    Attributes:
        name: What to call it.
        record: The content of its `run.json`.
        samples: The content of its `samples.json`; empty without one.
        number: Its place on the page.
    """

    name: str
    record: dict[str, Any]
    samples: dict[str, Any] = field(default_factory=dict)
    number: int = 0

    @property
    def letter(self) -> str:
        return chr(ord("A") + self.number) if self.number < 26 else f"A{chr(ord('A') + self.number - 26)}"

    @property
    def colour(self) -> int:
        return self.number % NUM_COLOURS

    @property
    def dashes(self) -> str:
        return DASHES_OF_SVG[self.number % len(DASHES_OF_SVG)]

    @property
    def glyph(self) -> str:
        return GLYPHS[self.number % len(GLYPHS)]

    @property
    def loss(self) -> str:
        return str(self.record["configuration"]["loss"])

    @property
    def before(self) -> dict[str, Any] | None:
        """Metrics on the test split before training; None where they were not measured."""
        return self.record.get("before")

    @property
    def after(self) -> dict[str, Any] | None:
        """Metrics on the test split after training; None where it failed."""
        return self.record.get("after") or self.record.get("test")

    @property
    def options(self) -> dict[str, Any]:
        """Its configuration, without what has no effect on it."""
        return {key: value for key, value in self.record["configuration"].items() if has_effect(self.loss, key)}


@dataclass
class Table:
    """A comparison's table, and what it says in a sentence."""

    title: str
    verdict: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def read_folders(folders: Sequence[Path]) -> tuple[list[Run], list[Table]]:
    """The runs in folders as `train` leaves them; of a comparison for each loss the last with its best learning rate.

    Returns:
        Runs, and a table for each comparison.

    Raises:
        RunError: A folder that is none of these, or is given twice; too many runs.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise RunError(f"A folder is given twice: {', '.join(map(str, folders))}.")
    runs: list[Run] = []
    tables = []
    for folder in folders:
        found, table = _read_folder(folder)
        runs += found
        tables += [table] if table else []
    if len(runs) > MAX_RUNS:
        raise RunError(f"There are {len(runs)} runs, of which {MAX_RUNS} can be told apart. Give fewer folders.")
    for number, run in enumerate(runs):
        run.number = number
    return runs, tables


def _read_folder(folder: Path) -> tuple[list[Run], Table | None]:
    if (folder / RESULT).is_file():
        return _read_comparison(folder)
    if (folder / RECORD).is_file():
        return [_read_run(folder, folder.resolve().name)], None
    if not folder.is_dir():
        raise RunError(f"{folder} is no folder. Give the --output of a train or a compare.")
    raise RunError(
        f"{folder} has neither {RECORD} nor {RESULT}: it is no run that is complete, and no comparison. A run that was "
        "stopped goes on with train --resume; tensorboard shows one that is not complete."
    )


def _read_run(folder: Path, name: str) -> Run:
    record = _read_json(folder / RECORD)
    if not set(record) >= _NEEDED or not isinstance(record["configuration"], dict):
        raise RunError(f"{folder / RECORD} is no record of a run: it has not all of {', '.join(sorted(_NEEDED))}.")
    samples = _read_json(folder / SAMPLES) if (folder / SAMPLES).is_file() else {}
    return Run(name, record, samples)


def _read_comparison(folder: Path) -> tuple[list[Run], Table]:
    """The last run of each loss with its best learning rate, and the table of all."""
    result = _read_json(folder / RESULT)
    try:
        options = {**result["configuration"], "losses": tuple(result["losses"])}
        rates = options["learning_rates"]
        comparison = Comparison(**{**options, "learning_rates": None if rates is None else tuple(rates)})
        jobs = [
            (spec, comparison.job(spec, loss["learning_rate"], loss["runs"][-1]["seed"]))
            for spec, loss in result["losses"].items()
            if loss["runs"]
        ]
        table = Table(title_of(result), verdict(result), COLUMNS, rows_of(result))
    except (KeyError, TypeError) as error:
        raise RunError(f"{folder / RESULT} is no result of a comparison: {error!r}.") from error
    if not jobs:
        raise RunError(f"{folder / RESULT} has no run that is complete.")
    # The comparison may have been moved since.
    return [_read_run(folder / "runs" / Path(job.config.output).name, spec) for spec, job in jobs], table


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}.") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged: expected an object, got {type(content).__name__}.")
    return content
