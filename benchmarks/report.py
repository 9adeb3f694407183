"""Tables on the terminal, CSV files and plots."""

from __future__ import annotations

import csv
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

Value = str | int | float | None
Row = dict[str, Value]

# Okabe and Ito's colours, told apart with any colour vision; each series has its own marker besides.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH_OF_A_FILE = 200  # columns where the output is no terminal


@dataclass(frozen=True)
class Table:
    """Rows to print and to write as CSV.

    Attributes:
        name: File name without ending.
        title: Shown above.
        columns: Key -> heading, with the unit.
        rows: A value, or None, for each key.
        note: Shown below.
    """

    name: str
    title: str
    columns: Mapping[str, str]
    rows: Sequence[Row]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What a command found.

    Attributes:
        tables: The first one has the measurements.
        plot: Draws them; its file is named after the first table.
    """

    tables: Sequence[Table]
    plot: Callable[[Figure], None]

    def show(self, device: torch.device) -> None:
        """Print everything to stdout, the machine first."""
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = WIDTH_OF_A_FILE
        console.print("   ".join(f"{key}: {value}" for key, value in describe_machine(device).items()), soft_wrap=True)
        for table in self.tables:
            console.print()
            console.print(_rich(table))
            if table.note:
                console.print(table.note)

    def save(self, folder: Path, device: torch.device) -> list[Path]:
        """Write CSV files and the plot; a file is there whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        machine = describe_machine(device)
        paths = []
        for table in self.tables:
            paths.append(folder / f"{table.name}.csv")
            with _beside(paths[-1]).open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, [*table.columns, *machine], extrasaction="ignore")
                writer.writeheader()
                writer.writerows({**row, **machine} for row in table.rows)
        figure = Figure(figsize=(9, 5), layout="constrained")
        self.plot(figure)
        paths.append(folder / f"{self.tables[0].name}.png")
        figure.savefig(_beside(paths[-1]), dpi=150, format="png")
        for path in paths:
            os.replace(_beside(path), path)
        return paths


def describe_machine(device: torch.device) -> dict[str, str]:
    """What numbers depend on, beside the sizes."""
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
    """Whether a target, the highest value allowed, is met; empty where there is none."""
    if target is None or value is None:
        return ""
    return "met" if value <= target else "NOT MET"


def ratio(value: float | None, base: float | None) -> float | None:
    """`value / base`, None where one of them was not measured."""
    return None if value is None or base is None else value / base


def style(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Titles, and a grid that stays behind."""
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def row_ticks(axes: Axes, counts: Sequence[int]) -> None:
    """A logarithmic x axis with the counts written out."""
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


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
