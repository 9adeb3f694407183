"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from negative_cache.workbench.training.record import measures_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDTH_OF_A_FILE = 160  # columns, if the output is not a terminal


def metrics_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """A table with a row of metrics for each name."""
    from rich.table import Table

    table = Table(title=title)
    measures = list(dict.fromkeys(name for metrics in rows.values() for name in measures_of(dict(metrics))))
    for name in ("", *measures):
        table.add_column(name, justify="right" if name else "left")
    for name, metrics in rows.items():
        table.add_row(name, *(f"{metrics[measure]:.4f}" for measure in measures))
    return table


def bytes_table(title: str, sizes: Mapping[str, int]) -> Table:
    """A table with the megabytes of each name."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", min_width=len(title))
    table.add_column("")
    table.add_column("MB", justify="right")
    for name, size in sizes.items():
        table.add_row(name, f"{size / 1e6:,.1f}")
    return table


def print_comparison(result: dict[str, Any], console: Console) -> None:
    """Print the table of a comparison and the verdict."""
    from rich.table import Table

    from negative_cache.workbench.compare.table import (
        COLUMNS,
        NOTE_ON_STARS,
        rows_of,
        title_of,
        trained_losses,
        verdict,
    )

    table = Table(title=title_of(result), title_justify="left", caption_justify="left")
    notes = ["seconds: of training; they depend on what else the machine does"] if trained_losses(result) else []
    table.caption = "\n".join([*notes, NOTE_ON_STARS] if result["significance"] else notes)
    for number, heading in enumerate(COLUMNS):
        table.add_column(heading, justify="right" if number else "left", no_wrap=number == 0)
    for row in rows_of(result):
        table.add_row(*row)
    print_wide(table, console)
    if sentences := verdict(result):
        console.print(sentences, highlight=False, markup=False, soft_wrap=True)


def print_wide(table: Table, console: Console) -> None:
    """Print a table; if the output is not a terminal, with `WIDTH_OF_A_FILE` columns."""
    if not console.is_terminal:
        console.width = WIDTH_OF_A_FILE
    console.print(table)
