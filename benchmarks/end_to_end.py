"""`end-to-end`: whole training steps of a transformer, with a negative cache and with plain in-batch negatives."""

from __future__ import annotations

from functools import partial

import torch
from matplotlib.figure import Figure
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import nn

from benchmarks.report import COLOURS, Report, Row, Table, ratio, style, verdict
from benchmarks.sizes import END_TO_END_TARGET, SizeSet, TrainingSizes
from benchmarks.timing import median_ms
from benchmarks.training_step import IN_BATCH, cache_loss, pretrained_model, random_model, training_step

THREE_COLUMNS = f"{IN_BATCH}, third column"
COLUMNS = {
    "model": "model",
    "loss": "loss",
    "batch": "B",
    "length": "tokens",
    "rows": "N",
    "step_ms": "training step, ms",
    "ratio": "step / in-batch",
    "target": "target",
    "met": "",
}


def run(sizes: SizeSet, device: torch.device) -> Report:
    """Measure forward, backward and AdamW of each model."""
    given = sizes.end_to_end
    torch.manual_seed(0)
    target = END_TO_END_TARGET if sizes.is_judged else None
    rows: list[Row] = []
    for found in (random_model(given, device), pretrained_model(given, device)):
        if found is not None:
            rows += _measure(*found, given, sizes.repeats, target, device)
    title = "A training step: forward, backward, AdamW; texts of random tokens"
    note = (
        f"{IN_BATCH}: sentence-transformers' MultipleNegativesRankingLoss. A third column of texts costs one more "
        "encoding per pair, as the negative cache does with num_samples=1, which has the target. auto: the default, "
        "once the cache counts in the loss; see also `budget`. Medians of steps that take turns."
    )
    return Report([Table("end-to-end", title, COLUMNS, rows, note)], partial(_plot, rows))


def _measure(
    name: str,
    model: SentenceTransformer,
    sizes: TrainingSizes,
    repeats: int,
    target: float | None,
    device: torch.device,
) -> list[Row]:
    in_batch = MultipleNegativesRankingLoss(model)
    losses: dict[str, nn.Module] = {IN_BATCH: in_batch, THREE_COLUMNS: in_batch}
    targets: dict[str, float | None] = {}
    for dtype in sizes.dtypes:
        losses[f"negative cache, {dtype}"] = cache_loss(model, sizes, dtype, 1, device)
        losses[f"negative cache, {dtype}, auto"] = cache_loss(model, sizes, dtype, "auto", device)
        targets[f"negative cache, {dtype}"] = target
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    calls = {
        loss: training_step(module, optimizer, sizes, device, num_columns=3 if loss == THREE_COLUMNS else 2)
        for loss, module in losses.items()
    }
    times = median_ms(calls, repeats, device, name)
    return [
        {
            "model": name,
            "loss": loss,
            "batch": sizes.batch,
            "length": sizes.length,
            "rows": None if module is in_batch else sizes.rows,
            "step_ms": times.get(loss),
            "ratio": ratio(times.get(loss), times.get(IN_BATCH)),
            "target": targets.get(loss),
            "met": verdict(ratio(times.get(loss), times.get(IN_BATCH)), targets.get(loss)),
        }
        for loss, module in losses.items()
    ]


def _plot(rows: list[Row], figure: Figure) -> None:
    models = list(dict.fromkeys(str(row["model"]) for row in rows))
    losses = list(dict.fromkeys(str(row["loss"]) for row in rows))
    figure.set_size_inches(11, 5)
    axes = figure.subplots()
    width = 0.8 / len(losses)
    for number, loss in enumerate(losses):
        for at, model in enumerate(models):
            row = next(r for r in rows if (r["model"], r["loss"]) == (model, loss))
            value = float(row["step_ms"] or 0)
            place = at + (number - (len(losses) - 1) / 2) * width
            axes.bar(place, value, 0.95 * width, color=COLOURS[number], label=loss if at == 0 else None)
            text = f"{value:,.0f} ms" + ("" if loss == IN_BATCH else f"\n{float(row['ratio'] or 0):.2f} x")
            axes.annotate(text, (place, value), (0, 3), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xticks(range(len(models)), models)
    first = rows[-1]
    title = f"A training step (B={first['batch']}, {first['length']} tokens, N={int(first['rows'] or 0):,})"
    style(axes, title, "model", "time per training step, ms")
    axes.grid(False, axis="x")
    axes.margins(y=0.2)
    axes.legend(frameon=False)
