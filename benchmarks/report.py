"""Tables on the terminal, CSV files and plots."""

from __future__ import annotations

import csv
import io
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import rich.box
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.commit import commit
from benchmarks.gpu.results import Row, Value
from negative_cache.workbench import figures
from negative_cache.workbench.figures import COLOURS, MARKERS, save_figure
from negative_cache.workbench.files import write_text

__all__ = ["COLOURS", "MARKERS", "Report", "Row", "Table", "Value", "save_figure"]

FILE_WIDTH = 200  # columns, where the output is not a terminal


@dataclass(frozen=True)
class Table:
    """Rows that are printed, and written to a CSV file.

    Attributes:
        name: File name without ending.
        title: Printed above the table.
        columns: Key -> heading, with the unit.
        rows: A value, or None, for each key.
        note: Printed below the table.
    """

    name: str
    title: str
    columns: Mapping[str, str]
    rows: Sequence[Row]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """The results of a command.

    Attributes:
        tables: The first one has the measurements.
        plot: Draws them into a figure; its file is named after the first table.
    """

    tables: Sequence[Table]
    plot: Callable[[Figure], None]

    def show(self, device: torch.device) -> None:
        """Print everything to stdout, beginning with the machine."""
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = FILE_WIDTH
        console.print("   ".join(f"{key}: {value}" for key, value in describe_machine(device).items()), soft_wrap=True)
        for table in self.tables:
            console.print()
            console.print(_rich(table))
            if table.note:
                console.print(table.note)

    def save(self, folder: Path, device: torch.device) -> list[Path]:
        """Write the CSV files and the plot, and return their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        machine = describe_machine(device)
        figure = Figure(figsize=(9, 5), layout="constrained")
        self.plot(figure)
        paths = [write_text(folder / f"{table.name}.csv", _csv(table, machine)) for table in self.tables]
        return [*paths, save_figure(figure, folder / f"{self.tables[0].name}.png")]


def describe_machine(device: torch.device) -> dict[str, str]:
    """The machine and the versions that results depend on."""
    found = {
        "cpu": _cpu_name(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    if name := commit():
        found["commit"] = name
    return found


def verdict(value: float | None, target: float | None) -> str:
    """Whether a value is at most its target; empty if one of them is None."""
    if target is None or value is None:
        return ""
    return "met" if value <= target else "NOT MET"


def ratio(value: float | None, base: float | None) -> float | None:
    """`value / base`; None if one of them was not measured."""
    return None if value is None or base is None else value / base


def style(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Set the titles and the style of a plot."""
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    figures.style(axes)


def row_ticks(axes: Axes, counts: Sequence[int]) -> None:
    """Make the x axis logarithmic, with the counts written out."""
    axes.set_xscale("log", base=2)
    shown = sorted(set(counts))
    axes.set_xticks(shown, [f"{count:,}" for count in shown], rotation=30, ha="right")
    axes.minorticks_off()


def _rich(table: Table) -> RichTable:
    shown = RichTable(title=table.title, title_justify="left", box=rich.box.SIMPLE_HEAD)
    for key, heading in table.columns.items():
        is_text = all(isinstance(row.get(key), str | None) for row in table.rows)
        shown.add_column(heading, justify="left" if is_text else "right")
    for row in table.rows:
        shown.add_row(*(_format(row.get(key)) for key in table.columns))
    return shown


def _format(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value


def _csv(table: Table, machine: Mapping[str, str]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, [*table.columns, *machine], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **machine} for row in table.rows)
    return file.getvalue()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
