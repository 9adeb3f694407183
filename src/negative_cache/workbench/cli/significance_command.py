"""`negative-cache significance`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from negative_cache.workbench.cli import next_steps
from negative_cache.workbench.cli import options as opt
from negative_cache.workbench.cli.evaluate_command import split_of
from negative_cache.workbench.cli.tables import print_wide
from negative_cache.workbench.cli.terminal import Terminal
from negative_cache.workbench.counting import counted_queries
from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.evaluation.defaults import ALPHA
from negative_cache.workbench.model_names import about_begin
from negative_cache.workbench.training.record import RECORD, RunRecord

if TYPE_CHECKING:
    from rich.table import Table

    from negative_cache.workbench.data import RetrievalData
    from negative_cache.workbench.evaluation.significance import Significance
    from negative_cache.workbench.evaluation.systems import JudgeRun, PerMeasure

RUNS_HELP = (
    "Folders that train wrote, files of evaluate --per-query, or TREC runs. NAME=RUN,RUN names a system and gives its "
    "seeds. A folder that compare wrote stands for its losses. A single run is compared before and after training."
)


@opt.takes_data_options()
def significance(
    runs: Annotated[list[str], typer.Argument(help=RUNS_HELP, metavar="RUN...")],
    data: Annotated[str | None, typer.Option(help="Judgements for TREC runs. " + opt.DATA_HELP)] = None,
    split: Annotated[str | None, typer.Option(help="Split of the judgements; see evaluate.")] = None,
    metrics: Annotated[str, typer.Option(help="Measures to compare.")] = "MRR@10 nDCG@10",
    baseline: Annotated[
        str | None, typer.Option(help="Compare each system with this one only. Default: all pairs.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Significance level.")] = ALPHA,
    *,
    data_options: DataOptions,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Test whether systems differ by more than chance.

    They are compared query by query, by a randomisation test with Holm's correction.
    """
    terminal = Terminal(quiet, as_json)
    with terminal.running():
        with terminal.waiting("Loading libraries ..."):
            from negative_cache.workbench.evaluation import parse_measures
            from negative_cache.workbench.evaluation.significance import compare_systems
            from negative_cache.workbench.evaluation.systems import are_trec_runs, parse_systems, read_systems
        if not 0 < alpha < 1:
            raise ValueError(f"--alpha is {alpha:g}; expected a number between 0 and 1, such as 0.05.")
        measures, systems = parse_measures(metrics), parse_systems(runs)
        if baseline is not None and len(systems) > 1 and baseline not in systems:
            raise ValueError(f"--baseline is {baseline!r}; expected one of {', '.join(systems)}.")
        if data is None and (split is not None or data_options != DataOptions()):
            raise ValueError("--split and the options of the data have no effect without --data. Leave them out.")
        if data is not None and not are_trec_runs(systems):
            raise ValueError("--data has no effect: it gives judgements for TREC runs. Leave it out.")
        judge_run = None
        if data is not None:
            loaded = terminal.load_data(data, data_options)
            judge_run = _judge_of(terminal, loaded, split_of(terminal, loaded, data, split), measures)
        with terminal.waiting("Comparing ..."):
            values = read_systems(systems, measures, judge_run)
            found = {
                name: compare_systems({key: [seed[name] for seed in seeds] for key, seeds in values.items()}, baseline)
                for name in measures
            }
        terminal.result({"alpha": alpha, "measures": {name: one.as_dict() for name, one in found.items()}})
        _show(terminal, found, alpha, baseline)
        if len(runs) == 1 and (Path(runs[0]) / RECORD).is_file():
            _say_what_before_is(terminal, RunRecord.read(Path(runs[0])))
        of_data = [] if data is None else ["--data", data, *data_options.arguments()]
        of_data += [] if split is None else ["--split", split]
        terminal.inform(next_steps.after_significance(runs, of_data))


def _say_what_before_is(terminal: Terminal, record: RunRecord) -> None:
    """Say that "before" is not the model that the user has named, if so."""
    if about := about_begin(record.configuration["model"]):
        terminal.say(f"before: {about}")


def _judge_of(terminal: Terminal, data: RetrievalData, split: str, measures: Mapping[str, Any]) -> JudgeRun:
    """A function that judges the TREC run with a path, as `evaluate --run` does."""
    from negative_cache.workbench.data import DataError
    from negative_cache.workbench.evaluation import judge_split, matching_run
    from negative_cache.workbench.evaluation.trec import read_run

    def judge_run(path: Path) -> PerMeasure:
        try:
            run, notes = matching_run(data, split, read_run(path))
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        for note in notes:
            terminal.note(f"{path}: {note}")
        return judge_split(data, split, run, measures).per_query

    data.graded(split)  # raises an error if there are no judgements
    return judge_run


def _show(terminal: Terminal, found: dict[str, Significance], alpha: float, baseline: str | None) -> None:
    """Print the quality of the systems, and for each measure a table of the pairs and sentences."""
    print_wide(_systems_table(found), terminal.out)
    for measure, one in found.items():
        print_wide(_pairs_table(measure, one, alpha), terminal.out)
        best = one.best() if baseline is None else baseline
        for difference in one.differences:
            if best in difference.systems:
                terminal.say(f"{measure}: {difference.in_words(alpha)}")


def _systems_table(found: dict[str, Significance]) -> Table:
    """The mean of each system ± the standard deviation over its seeds."""
    from rich.table import Table

    table = Table(title=counted_queries(next(iter(found.values())).num_queries), title_justify="left")
    for name in ("system", "seeds", *found):
        table.add_column(name, justify="left" if name == "system" else "right")
    for name, system in next(iter(found.values())).systems.items():
        qualities = [one.systems[name] for one in found.values()]
        cells = (f"{of.mean:.4f}" + ("" if of.std is None else f" ± {of.std:.4f}") for of in qualities)
        table.add_row(name, str(system.seeds), *cells)
    return table


def _pairs_table(measure: str, found: Significance, alpha: float) -> Table:
    from rich.table import Table

    from negative_cache.workbench.evaluation.significance import COLUMNS

    number = len(found.differences)
    corrected = f"p is corrected for the number of pairs, {number} (Holm)" if number > 1 else None
    table = Table(title=measure, title_justify="left", caption=corrected, caption_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("pair", "verdict") else "right")
    for difference in found.differences:
        table.add_row(*difference.cells(alpha))
    return table
