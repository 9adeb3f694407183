"""What a comparison found, on the terminal, as Markdown and drawn."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from negative_cache.workbench.compare import FIXED_FIELDS, MAX_EXTENSIONS, failures_of
from negative_cache.workbench.config import RunConfig

# Okabe and Ito's colours, told apart with any colour vision; each series has its own marker besides.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
QUALITIES = {"mrr@10": "MRR@10", "ndcg@10": "nDCG@10", "recall@100": "Recall@100"}
COLUMNS = ("loss", "rate", *QUALITIES.values(), "seconds", "documents encoded", "peak memory")
WIDTH_OF_A_FILE = 160  # columns where the output is no terminal
AS_IT_IS: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}
NOTE = (
    "Mean ± sample standard deviation over {seeds} seed(s) on the test split. The learning rate is the one of {rates} "
    "that is best on the dev split with seed 0; where that was the first or last one, up to {extensions} more were "
    "tried. Seconds are of training alone. Documents encoded: every time the encoder met a document in training; "
    "gradient caching encodes each twice (with a static model once, as it needs no cache)."
)


class RunBar:
    """Shows how a comparison goes on: a bar of the steps of a run, and a line for each run that has ended."""

    def __init__(self, console: Console) -> None:
        self.console = console
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True)
        self._task = self._bar.add_task("preparing", total=None)

    def __enter__(self) -> RunBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, name: str, num_left: int) -> None:
        """A run begins; so many are left, it included."""
        self._bar.reset(self._task, total=None, description=f"{num_left} runs left  {name}")

    def step(self, step: int, steps: int) -> None:
        """A step was done."""
        self._bar.update(self._task, completed=step, total=steps)

    def end(self, name: str, record: dict[str, Any], was_there: bool) -> None:
        """A run has ended."""
        self.console.print(f"{name}: {_line(record)}{' (was there)' if was_there else ''}", **AS_IT_IS)


def title_of(result: dict[str, Any]) -> str:
    """What was compared, in one line."""
    options, data = result["configuration"], result["data"]
    return (
        f"{data['name']}, {options['model']}: batch size {options['batch_size']}, epochs {options['epochs']:g}, "
        f"{data['pairs']:,} pairs; {data['test_queries']:,} test queries, {data['documents']:,} documents"
    )


def show(result: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(title=title_of(result), title_justify="left")
    for number, heading in enumerate(COLUMNS):
        table.add_column(heading, justify="right" if number else "left", no_wrap=number == 0)
    for row in rows_of(result):
        table.add_row(*row)
    if not console.is_terminal:
        console.width = WIDTH_OF_A_FILE
    console.print(table)
    if said := verdict(result):
        console.print(said, **AS_IT_IS)
        console.print(f"To train it: {command_of_best(result)}", **AS_IT_IS)


def write_report(result: dict[str, Any], command: str) -> list[Path]:
    """Write `compare.md` and two plots into the folder of the comparison.

    Returns:
        The files.
    """
    folder = Path(result["configuration"]["output"])
    options = result["configuration"]
    note = NOTE.format(
        extensions=MAX_EXTENSIONS,
        seeds=options["seeds"],
        rates=", ".join(f"{rate:g}" for rate in result["learning_rates"]),
    )
    heading = " | ".join(COLUMNS)
    lines = [
        f"# {title_of(result)}",
        "",
        f"    {command}",
        "",
        f"| {heading} |",
        f"|{'---|' * len(COLUMNS)}",
        *(f"| {' | '.join(row)} |" for row in rows_of(result)),
        "",
        note,
    ]
    if said := verdict(result):
        lines += ["", said, "", f"    {command_of_best(result)}"]
    if failed := failures_of(result):
        lines += ["", "Failed, and left out:", "", *(f"- {' '.join(sentence.split())}" for sentence in failed)]
    written = [_write(folder / "compare.md", "\n".join(lines) + "\n")]
    for file, cost, label in (
        ("quality-seconds.png", "seconds", "seconds of training"),
        ("quality-documents.png", "documents_encoded", "documents encoded in training"),
    ):
        figure = Figure(figsize=(8, 5), layout="constrained")
        _draw(figure.subplots(), result, cost, label)
        written.append(save_figure(figure, folder / file))
    return written


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a picture that is there whole or not at all."""
    beside = path.with_name(path.name + ".tmp")
    figure.savefig(beside, dpi=150, format="png")
    return beside.replace(path)


def style(axes: Axes) -> None:
    """A grid that stays behind, and no frame."""
    axes.grid(True, color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def with_spread(value: dict[str, float | None]) -> str:
    """A mean ± its standard deviation."""
    return f"{value['mean']:.4f}" + ("" if value["std"] is None else f" ± {value['std']:.4f}")


def _draw(axes: Axes, result: dict[str, Any], cost: str, label: str) -> None:
    """Quality against a cost: the last seed's way, and the mean of all seeds at the end."""
    for number, (name, loss) in enumerate(result["losses"].items()):
        if not loss["runs"]:
            continue
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        curve, final = loss["curve"], loss["summary"]
        axes.plot(
            [point[cost] for point in curve],
            [point["test"]["mrr@10"] for point in curve],
            color=colour,
            linestyle="-" if number < len(COLOURS) else "--",
            marker=marker,
            markersize=4,
            linewidth=1.5,
        )
        axes.errorbar(
            final[cost]["mean"],
            final["mrr@10"]["mean"],
            yerr=final["mrr@10"]["std"],
            color=colour,
            marker=marker,
            markersize=9,
            markeredgecolor="black",
            capsize=5,
            linestyle="none",
            label=f"{name}: {with_spread(final['mrr@10'])}",
            zorder=3,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}" if value < 1e6 else f"{value / 1e6:,g} M")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(label)
    axes.set_ylabel("MRR@10 on the test split")
    options, data = result["configuration"], result["data"]
    axes.set_title(
        f"{data['name']}, {options['model']}: lines are one seed, large marks the mean of {options['seeds']}"
    )
    axes.legend(loc="best")
    style(axes)


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """The cells of the table: a row for each loss, with the headings `COLUMNS`."""
    rows = []
    for name, loss in result["losses"].items():
        if not loss["runs"]:
            rows.append([name, "failed", *[""] * (len(COLUMNS) - 2)])
            continue
        found = loss["summary"]
        rate = f"{loss['learning_rate']:g}" + (" (edge)" if loss["at_the_edge"] else "")
        if loss.get("failed_runs"):
            rate += f" ({len(loss['failed_runs'])} seeds failed)"
        qualities = [with_spread(found[key]) for key in QUALITIES]
        costs = [f"{found['seconds']['mean']:,.1f}", f"{found['documents_encoded']['mean']:,.0f}"]
        rows.append([name, rate, *qualities, *costs, _bytes(found["peak_memory_bytes"]["mean"])])
    return rows


def ranked(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The losses that trained, by their MRR@10 on the test split, the best first."""
    trained = [(name, loss) for name, loss in result["losses"].items() if loss["runs"]]
    return sorted(trained, key=lambda item: -item[1]["summary"]["mrr@10"]["mean"])


def verdict(result: dict[str, Any]) -> str:
    """Which loss is best, and by how much, in one sentence; empty with less than two losses."""
    losses = ranked(result)
    if len(losses) < 2:
        return ""
    (best, first), (second, next_one) = losses[:2]
    found, other = first["summary"]["mrr@10"], next_one["summary"]["mrr@10"]
    lead = found["mean"] - other["mean"]
    spread = ((found["std"] or 0) ** 2 + (other["std"] or 0) ** 2) ** 0.5
    seeds = min(len(first["runs"]), len(next_one["runs"]))
    doubt = ""
    if seeds < 2:
        doubt = "; one seed cannot tell whether that is chance"
    elif lead < 2 * spread / seeds**0.5:
        doubt = "; with this spread over the seeds that may be chance"
    share = f"{lead / other['mean']:.1%}" if other["mean"] else "all"
    return f"Best: {best}, MRR@10 {found['mean']:.4f}, {share} above {second} ({other['mean']:.4f}){doubt}."


def command_of_best(result: dict[str, Any]) -> str:
    """The command that trains with the best loss, with its learning rate and all options that are not the defaults."""
    _, loss = ranked(result)[0]
    options, comparison = loss["configuration"], result["configuration"]
    words = ["negative-cache", "train", "--data", comparison["data"], "--model", comparison["model"]]
    words += ["--loss", options["loss"], "--learning-rate", f"{loss['learning_rate']:g}"]
    for field in fields(RunConfig):
        value, flag = options.get(field.name, field.default), f"--{field.name.replace('_', '-')}"
        if field.name in FIXED_FIELDS - {"epochs"} or value == field.default:
            continue
        if isinstance(field.default, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    for column in ("query_column", "positive_column"):
        if comparison.get(column) is not None:
            words += [f"--{column.replace('_', '-')}", comparison[column]]
    return shlex.join([*words, "--output", "MODEL"])


def _line(record: dict[str, Any]) -> str:
    if "failed" in record:
        return f"failed: {record['failed']}"
    dev, test = record["dev"]["mrr@10"], record["test"]["mrr@10"]
    return (
        f"MRR@10 dev {dev:.4f} test {test:.4f}, {record['steps']:,} steps in {record['seconds']:.1f} s, "
        f"{record['documents_encoded']:,} documents encoded, peak {_bytes(record['peak_memory_bytes'])}"
    )


def _bytes(number: float) -> str:
    return f"{number / 1e9:.2f} GB"


def _write(path: Path, text: str) -> Path:
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    return beside.replace(path)
