"""Tables that several commands print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

METRIC_NAMES = ("mrr@10", "ndcg@10", "recall@1", "recall@10", "recall@100")


def metrics_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row of metrics for each name."""
    table = Table(title=title)
    for name in ("", *METRIC_NAMES):
        table.add_column(name, justify="right" if name else "left")
    for name, metrics in rows.items():
        table.add_row(name, *(f"{metrics[metric]:.4f}" for metric in METRIC_NAMES))
    return table


def bytes_table(title: str, sizes: Mapping[str, int]) -> Table:
    """A row of megabytes for each name."""
    table = Table(title=title, title_justify="left", min_width=len(title))
    table.add_column("")
    table.add_column("MB", justify="right")
    for name, size in sizes.items():
        table.add_row(name, f"{size / 1e6:,.1f}")
    return table
