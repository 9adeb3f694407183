"""The files of a comparison: the table as Markdown, and two plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from negative_cache.workbench.compare.comparison import BASELINES
from negative_cache.workbench.compare.running import MAX_EXTENSIONS, failures_of
from negative_cache.workbench.compare.table import (
    COLUMNS,
    NOTE_ON_STARS,
    best_loss,
    command_of_best,
    differences_of,
    rows_of,
    title_of,
    trained_losses,
    verdict,
    with_spread,
)
from negative_cache.workbench.counting import counted, counted_queries
from negative_cache.workbench.evaluation.defaults import ALPHA
from negative_cache.workbench.evaluation.significance import COLUMNS as PAIR_COLUMNS
from negative_cache.workbench.figures import COLOURS, MARKERS, save_figure, style
from negative_cache.workbench.files import write_text

NOTE = (
    "Mean ± sample standard deviation over {seeds} on the test split. {rates} Seconds "
    "are training time. Documents encoded: a document counts each time that the encoder processes it in training; "
    "gradient caching encodes each document twice (once with a static model, which needs no gradient cache). Both "
    "include what a guide encodes, and mining, which encodes the corpus and the training queries."
)
NOTE_ON_BASELINES = "On the test split, without training. ± is the sample standard deviation over random weights."
SIGNIFICANCE = (
    "Fisher's randomisation test of the paired differences over {queries}, each averaged over the "
    "seeds, two-sided, with Holm's correction over the pairs. The interval is the BCa bootstrap's over the "
    "queries, without a correction. Significant: p < {alpha:g}."
)
PLOTS = (
    ("quality-seconds.png", "seconds", "seconds of training"),
    ("quality-documents.png", "documents_encoded", "documents encoded in training"),
)


def write_output(result: dict[str, Any], command: str) -> list[Path]:
    """Write `compare.md` to the folder of a comparison, and the plots if it has training runs; return their paths."""
    folder = Path(result["configuration"]["output"])
    written = [write_text(folder / "compare.md", _markdown(result, command))]
    if not trained_losses(result):
        return written
    for file, cost, label in PLOTS:
        figure = Figure(figsize=(8, 5), layout="constrained")
        _draw(figure.subplots(), result, cost, label)
        written.append(save_figure(figure, folder / file))
    return written


def _markdown(result: dict[str, Any], command: str) -> str:
    lines = [
        f"# {title_of(result)}",
        "",
        f"    {command}",
        "",
        *_table(COLUMNS, rows_of(result)),
        "",
        f"{_note(result)} {NOTE_ON_STARS}",
    ]
    if sentence := verdict(result):
        lines += ["", sentence]
    if command := command_of_best(result):
        lines += ["", f"To train with {best_loss(result)}, the best of the losses:", "", f"    {command}"]
    if failed := failures_of(result):
        lines += ["", "Failed, and left out:", "", *(f"- {' '.join(sentence.split())}" for sentence in failed)]
    if result["significance"]:
        (num_queries,) = {found["num_queries"] for found in result["significance"].values()}
        lines += [
            "",
            "## Significance",
            "",
            SIGNIFICANCE.format(queries=counted_queries(num_queries, "test"), alpha=ALPHA),
        ]
    for measure in result["significance"]:
        pairs = [found.cells() for found in differences_of(result, measure)]
        lines += ["", f"{measure}:", "", *_table(PAIR_COLUMNS, pairs)]
    return "\n".join(lines) + "\n"


def _note(result: dict[str, Any]) -> str:
    """What the numbers of the table are."""
    if not trained_losses(result):
        return NOTE_ON_BASELINES
    seeds = counted(result["configuration"]["seeds"], "seed")
    return NOTE.format(seeds=seeds, rates=_rates_in_words(result["learning_rates"]))


def _rates_in_words(rates: Sequence[float]) -> str:
    if len(rates) == 1:
        return f"The learning rate is {rates[0]:g}."
    tried = ", ".join(f"{rate:g}" for rate in rates)
    return (
        f"The learning rate is the best of {tried} on the dev split with seed 0; if that was the lowest or highest "
        f"one, up to {MAX_EXTENSIONS} more were tried."
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *(f"| {' | '.join(row)} |" for row in rows)]


def _draw(axes: Axes, result: dict[str, Any], cost: str, label: str) -> None:
    """Quality against a cost: the curve of the last seed, and the mean over all seeds; a line for a baseline."""
    for number, (name, loss) in enumerate(result["losses"].items()):
        if name in BASELINES:
            mean, colour = loss["summary"]["MRR@10"], COLOURS[number % len(COLOURS)]
            axes.axhline(mean["mean"], color=colour, linestyle=":", label=f"{name}: {with_spread(mean)}")
        elif loss["runs"]:
            _draw_loss(axes, number, name, loss, cost)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}" if value < 1e6 else f"{value / 1e6:,g} M")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(label)
    axes.set_ylabel("MRR@10 on the test split")
    options, data = result["configuration"], result["data"]
    axes.set_title(
        f"{data['name']}, {options['model']}: lines are one seed, large marks the mean of "
        f"{counted(options['seeds'], 'seed')}"
    )
    axes.legend(loc="best")
    style(axes)


def _draw_loss(axes: Axes, number: int, name: str, loss: dict[str, Any], cost: str) -> None:
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    final = loss["summary"]
    axes.plot(
        [point[cost] for point in loss["curve"]],
        [point["test"]["MRR@10"] for point in loss["curve"]],
        color=colour,
        linestyle="-" if number < len(COLOURS) else "--",
        marker=marker,
        markersize=4,
        linewidth=1.5,
    )
    axes.errorbar(
        final[cost]["mean"],
        final["MRR@10"]["mean"],
        yerr=final["MRR@10"]["std"],
        color=colour,
        marker=marker,
        markersize=9,
        markeredgecolor="black",
        capsize=5,
        linestyle="none",
        label=f"{name}: {with_spread(final['MRR@10'])}",
        zorder=3,
    )
