"""`budget`: whole training steps of a transformer for each number of documents to re-encode per query."""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import torch
from matplotlib.figure import Figure
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import nn

from benchmarks.peak import peak_bytes
from benchmarks.report import COLOURS, MARKERS, Report, Row, Table, ratio, style, verdict
from benchmarks.sizes import BUDGET_TARGETS, SizeSet, TrainingSizes
from benchmarks.timing import median_ms, progress
from benchmarks.training_step import IN_BATCH, cache_loss, keep_waiting, pretrained_model, random_model, training_step
from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss

COLUMNS = {
    "model": "model",
    "budget": "num_samples",
    "batch": "B",
    "length": "tokens",
    "rows": "N",
    "documents": "re-encoded per query",
    "step_ms": "training step, ms",
    "ratio": "step / in-batch",
    "target": "target",
    "met": "",
    "peak_mb": "peak memory, MB",
}


class Budget(NamedTuple):
    """A setting of the loss.

    Attributes:
        num_samples: See `NegativeCacheLoss`.
        is_waiting: Whether the cache is still left out of the loss.
        target: Highest ratio to the time of a step with in-batch negatives alone; None for no target.
    """

    num_samples: float | Literal["auto"]
    is_waiting: bool = False
    target: float | None = None


BUDGETS = {
    "auto, waiting": Budget("auto", is_waiting=True, target=BUDGET_TARGETS["auto"]),
    "auto, counting": Budget("auto", target=BUDGET_TARGETS["auto"]),
    "1/8": Budget(1 / 8),
    "1/4": Budget(1 / 4, target=BUDGET_TARGETS["1/4"]),
    "1/2": Budget(1 / 2),
    "1": Budget(1),
}


def run(sizes: SizeSet, device: torch.device) -> Report:
    """Measure forward, backward and AdamW of MiniLM, or of a transformer with random weights in its place."""
    given = sizes.budget
    torch.manual_seed(0)
    name, model = pretrained_model(given, device) or random_model(given, device)
    rows = _measure(name, model, given, sizes, device)
    title = "A training step for each budget: forward, backward, AdamW; texts of random tokens, a full cache"
    note = (
        f"{IN_BATCH}: sentence-transformers' MultipleNegativesRankingLoss. auto, the default: waiting, while the cache "
        "is left out of the loss, and counting, after that. Medians of steps that take turns. Peak memory: of a step, "
        "beyond the memory in use before it."
    )
    return Report([Table("budget", title, COLUMNS, rows, note)], partial(_plot, rows))


def _measure(
    name: str, model: SentenceTransformer, given: TrainingSizes, sizes: SizeSet, device: torch.device
) -> list[Row]:
    """A row for in-batch negatives alone, and a row per budget."""
    (dtype,) = given.dtypes
    losses: dict[str, nn.Module] = {IN_BATCH: MultipleNegativesRankingLoss(model)}
    for key, budget in BUDGETS.items():
        losses[key] = cache_loss(model, given, dtype, budget.num_samples, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    calls = {key: training_step(loss, optimizer, given, device) for key, loss in losses.items()}
    for key, loss in losses.items():
        if key in BUDGETS and BUDGETS[key].is_waiting and isinstance(loss, NegativeCacheRankingLoss):
            calls[key] = keep_waiting(loss, calls[key])
    times = median_ms(calls, sizes.repeats, device, name)
    rows: list[Row] = []
    for key, loss in losses.items():
        progress(f"{name}: memory of {key}")
        peak = peak_bytes(calls[key], device) if key in times else None
        found = ratio(times.get(key), times.get(IN_BATCH))
        target = BUDGETS[key].target if key in BUDGETS and sizes.is_judged else None
        rows.append(
            {
                "model": name,
                "budget": key,
                "batch": given.batch,
                "length": given.length,
                "rows": given.rows if key in BUDGETS else None,
                "documents": _documents(loss),
                "step_ms": times.get(key),
                "ratio": found,
                "target": target,
                "met": verdict(found, target),
                "peak_mb": ratio(peak, 1e6),
            }
        )
    return rows


def _documents(loss: nn.Module) -> float:
    """Cached documents per query that the last step re-encoded."""
    return loss.cache_loss.metrics()["documents_per_query"] if isinstance(loss, NegativeCacheRankingLoss) else 0.0


def _plot(rows: list[Row], figure: Figure) -> None:
    """Draw the ratio to in-batch against the documents that are re-encoded: a line for numbers, markers for auto."""
    axes = figure.subplots()
    shown = [row for row in rows if row["ratio"] is not None]
    points = {str(row["budget"]): (float(row["documents"] or 0), float(row["ratio"] or 0)) for row in shown}
    autos = [name for name in points if name.startswith("auto")]
    numbers = sorted(point for name, point in points.items() if name not in autos)
    label = "a number; 0: in-batch"
    axes.plot(*zip(*numbers, strict=True), color=COLOURS[0], marker=MARKERS[0], label=label)
    for name, colour, marker in zip(autos, COLOURS[1:], MARKERS[1:], strict=False):
        axes.plot(*points[name], color=colour, marker=marker, markersize=9, linestyle="none", label=name)
    first = rows[-1]
    title = f"{first['model']} (B={first['batch']}, {first['length']} tokens, N={int(first['rows'] or 0):,})"
    style(axes, title, "cached documents re-encoded per query", "training step / in-batch")
    axes.set_xlim(left=-0.03)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="lower right")
