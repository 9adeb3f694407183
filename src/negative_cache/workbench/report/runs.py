"""The runs of a report: read from their folders, each with the colour, dashes and marker of its curves."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from negative_cache.workbench.compare.comparison import BASELINES
from negative_cache.workbench.compare.table import (
    COLUMNS,
    NOTE_ON_STARS,
    missing_losses,
    rows_of,
    title_of,
    verdict,
)
from negative_cache.workbench.counting import counted
from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.evaluation.defaults import COMPARISON
from negative_cache.workbench.model_names import about_begin
from negative_cache.workbench.report.differences import Values, read_values
from negative_cache.workbench.report.folders import check_folders
from negative_cache.workbench.report.svg import DASHES_OF_SVG, GLYPHS, MAX_RUNS, NUM_COLOURS
from negative_cache.workbench.training.config import RunError, has_effect
from negative_cache.workbench.training.record import RECORD, RunRecord, read_json
from negative_cache.workbench.training.samples import SAMPLES

logger = logging.getLogger("negative_cache")


@dataclass
class Run:
    """A run on the page.

    Attributes:
        name: Its name on the page.
        record: The content of its `run.json`.
        folders: Its folder; in a comparison, those of all seeds, of which this run is the last one.
        samples: The content of its `samples.json`; empty if there is none.
        values: The values of its test queries, of all seeds; None if there are none.
        number: Its position on the page.
    """

    name: str
    record: RunRecord
    folders: list[Path] = field(default_factory=list)
    samples: dict[str, Any] = field(default_factory=dict)
    values: Values | None = None
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
        return str(self.record.configuration["loss"])

    @property
    def begin(self) -> str:
        """What the model was before training."""
        model = str(self.record.configuration["model"])
        return about_begin(model) or model

    @property
    def options(self) -> dict[str, Any]:
        """Its configuration, without options that have no effect on its loss, and defaults of the data's options."""
        given = {key: value for key, value in self.record.configuration.items() if has_effect(self.loss, key)}
        of_data, defaults = given.pop("data_options"), asdict(DataOptions())
        return given | {key: value for key, value in of_data.items() if value != defaults.get(key)}

    @property
    def searched(self) -> str:
        """The documents that the queries of the test split were searched in; empty if they were not."""
        if not self.record.after:
            return ""
        number = self.record.after["num_documents"]
        limit = self.record.configuration["data_options"]["eval_documents"]
        if limit is None or number < limit:  # fewer: the corpus has no more
            return f"the whole corpus of {counted(number, 'document')}"
        return f"a sample of {counted(number, 'document')} (--eval-documents)"


@dataclass
class Table:
    """The table of a comparison, its verdict, and what the stars in it mean, if it may have some."""

    title: str
    verdict: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def read_folders(folders: Sequence[Path]) -> tuple[list[Run], list[Table]]:
    """Read runs and comparisons.

    Args:
        folders: Folders that `train` or `compare` wrote. Of a comparison, the last run of each loss with its best
            learning rate is read.

    Returns:
        Runs, and a table for each comparison.

    Raises:
        RunError: A folder has neither a run nor a comparison, or is given twice; or there are too many runs.
    """
    check_folders(folders)
    runs: list[Run] = []
    tables = []
    for folder in folders:
        found, table = _read_folder(folder)
        runs += found
        tables += [table] if table else []
    if len(runs) > MAX_RUNS:
        raise RunError(f"There are {len(runs)} runs; at most {MAX_RUNS} fit on a page. Give fewer folders.")
    for number, run in enumerate(runs):
        run.number = number
    return runs, tables


def _read_folder(folder: Path) -> tuple[list[Run], Table | None]:
    if (folder / COMPARISON).is_file():
        return _read_comparison(folder)
    return [_read_run([folder], folder.resolve().name)], None


def _read_run(folders: list[Path], name: str) -> Run:
    """A run, from the folders of its seeds."""
    last = folders[-1]
    samples = read_json(last / SAMPLES) if (last / SAMPLES).is_file() else {}
    return Run(name, RunRecord.read(last), folders, samples, read_values(folders))


def _read_comparison(folder: Path) -> tuple[list[Run], Table]:
    result = read_json(folder / COMPARISON)
    try:
        note = NOTE_ON_STARS if result["significance"] else ""
        table = Table(title_of(result), verdict(result), note, COLUMNS, rows_of(result))
        trained = {spec: loss["runs"] for spec, loss in result["losses"].items() if spec not in BASELINES}
        names = {spec: [run["folder"] for run in runs] for spec, runs in trained.items() if runs}
    except (KeyError, TypeError) as error:
        raise RunError(f"{folder / COMPARISON} is not the result of a comparison: {error!r}.") from error
    if not names:
        raise RunError(_nothing_trained(folder, result))
    if missing_losses(result):
        logger.warning("%s: %s", folder, table.verdict)
    return [_read_run([folder / "runs" / name for name in own], spec) for spec, own in names.items()], table


def _nothing_trained(folder: Path, result: dict[str, Any]) -> str:
    """Why a comparison has no run to report: what it has, and what to do."""
    losses, wanted = result["losses"], [spec for spec in result["configuration"]["losses"] if spec not in BASELINES]
    words = [f"{folder} has no loss with finished runs to report."]
    if measured := [spec for spec in losses if spec in BASELINES]:
        words.append(f"Measured without training: {', '.join(measured)}; {COMPARISON} has the results.")
    if number := len(list(folder.glob(f"runs/*/{RECORD}"))):
        words.append(f"Finished: {counted(number, 'training run')} of losses that are not complete.")
    if not wanted:
        words.append("To train, too: the same compare with more --losses, such as in-batch,negative-cache.")
    elif left := [spec for spec in missing_losses(result) if spec in wanted]:
        continued = ["negative-cache", "compare", "--config", str(folder / COMPARISON), "--output", str(folder)]
        words.append(f"Not done: {', '.join(left)}. To continue: {shlex.join(continued)}")
    else:
        words.append(f"Training failed with {', '.join(wanted)}: try other --learning-rates, with another --output.")
    return " ".join(words)
