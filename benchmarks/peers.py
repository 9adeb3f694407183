"""`peers`: losses of other libraries, with the same number of negatives per query.

All train the same small transformer with random weights; a step is forward and backward. In-batch losses need a batch
as large as the number of negatives; losses with a memory keep a small batch. CrossBatchMemory adds documents to its
memory and compares queries with it: its documents get no gradient, so they are encoded without one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn
from torch.nn.functional import normalize

from benchmarks import child
from benchmarks.encoders import full_cache_loss, random_encoder, random_texts
from benchmarks.peak import available_bytes, peak_bytes, used_bytes
from benchmarks.report import COLOURS, MARKERS, Report, Row, Table, ratio, row_ticks, style
from benchmarks.sizes import PeerSizes, SizeSet
from benchmarks.timing import progress, seconds
from benchmarks.workload import unit_rows

TEMPERATURE = 0.05  # of all losses; equal to a scale of 20
LONG_STEP = 5.0  # seconds; a longer step is measured once, without a warm-up
SHARE_OF_MEMORY = 0.75
OURS = "negative cache, float32"
COLUMNS = {
    "method": "loss",
    "negatives": "negatives per query",
    "batch": "batch",
    "step_ms": "step, ms",
    "query_ms": "per query, ms",
    "ratio": f"per query / {OURS}",
    "peak_mb": "peak memory, MB",
    "note": "",
}

Step = Callable[[], object]


class Method(NamedTuple):
    """A loss to compare.

    Attributes:
        make: (encoder, sizes, number of negatives, device) -> a training step without an optimizer's.
        is_in_batch: Whether the batch is as large as the number of negatives.
    """

    make: Callable[[SentenceTransformer, PeerSizes, int, torch.device], Step]
    is_in_batch: bool


def run(sizes: SizeSet, device: torch.device) -> Report:
    """Measure each method with each number of negatives, each in its own process."""
    given = sizes.peers
    rows: list[Row] = []
    for name in METHODS:
        last: Row | None = None
        for negatives in given.negatives:
            progress(f"{name}, {negatives} negatives")
            row = _row(name, given, negatives, sizes.repeats, last, device)
            rows.append(row)
            last = row if row["step_ms"] is not None else last
    ours = {row["negatives"]: row["query_ms"] for row in rows if row["method"] == OURS}
    for row in rows:
        row["ratio"] = ratio(_number(row["query_ms"]), _number(ours[row["negatives"]]))
    title = (
        f"The same number of negatives per query: forward and backward of a transformer ({given.layers} layers x "
        f"{given.hidden}, random weights, texts of {given.length} tokens)"
    )
    note = "peak memory: of a step, beyond the encoder, including the memory of past documents."
    return Report([Table("peers", title, COLUMNS, rows, note)], partial(_plot, rows))


def measure(
    method: str, sizes: PeerSizes, negatives: int, repeats: int, device: torch.device
) -> dict[str, float | None]:
    """Milliseconds of a step, and bytes beyond the encoder; called in its own process."""
    torch.manual_seed(0)
    encoder = random_encoder(sizes.hidden, sizes.layers, sizes.length, device)
    encoder(random_texts(2, sizes.length, device))["sentence_embedding"].sum().backward()  # loads libraries
    encoder.zero_grad()
    base = used_bytes(device)
    step = METHODS[method].make(encoder, sizes, negatives, device)
    taken: list[float] = []
    peak = peak_bytes(lambda: taken.append(seconds(step, device)), device, base)
    if taken[0] < LONG_STEP:
        started = time.perf_counter()
        taken = [seconds(step, device)]
        while len(taken) < repeats and time.perf_counter() - started < sizes.seconds / 10:
            taken.append(seconds(step, device))
        again = peak_bytes(step, device, base)
        peak = None if peak is None or again is None else max(peak, again)
    return {"ms": 1000 * sorted(taken)[len(taken) // 2], "bytes": peak}


def _row(name: str, sizes: PeerSizes, negatives: int, repeats: int, last: Row | None, device: torch.device) -> Row:
    """The measurement of a method; `last` is its row with fewer negatives."""
    limit = SHARE_OF_MEMORY * available_bytes(device)
    note = _too_much(sizes, negatives, last, limit)
    found: dict[str, float | None] = {"ms": None, "bytes": None}
    if note is None:
        arguments = name, sizes, negatives, repeats, device
        try:
            found = child.run(measure, *arguments, seconds=sizes.seconds, num_bytes=limit)
        except child.LimitError as error:
            note = f"not run: would need {error}"
        except RuntimeError as error:  # the other methods are measured all the same
            note = f"failed: {str(error).splitlines()[-1]}"
    batch = negatives if METHODS[name].is_in_batch else sizes.batch
    return {
        "method": name,
        "negatives": negatives,
        "batch": batch,
        "step_ms": found["ms"],
        "query_ms": ratio(found["ms"], batch),
        "peak_mb": ratio(found["bytes"], 1e6),
        "note": note,
    }


def _too_much(sizes: PeerSizes, negatives: int, last: Row | None, limit: float) -> str | None:
    """Why a size is skipped; None if it is not. Large times and memory grow at least as the number of negatives."""
    if last is None:
        return None
    factor = negatives / float(last["negatives"] or 1)
    needed = 1e6 * factor * float(last["peak_mb"] or 0)
    if needed > limit:
        return f"not run: would need at least {needed / 1e9:.0f} GB"
    needed = factor * float(last["step_ms"] or 0) / 1000
    if last["batch"] == last["negatives"] and needed > sizes.seconds:
        return f"not run: would need at least {needed:.0f} s a step"
    return None


def _in_batch(encoder: SentenceTransformer, sizes: PeerSizes, negatives: int, device: torch.device) -> Step:
    return _texts_step(MultipleNegativesRankingLoss(encoder, scale=1 / TEMPERATURE), negatives, sizes.length, device)


def _gradient_caching(encoder: SentenceTransformer, sizes: PeerSizes, negatives: int, device: torch.device) -> Step:
    loss = CachedMultipleNegativesRankingLoss(encoder, scale=1 / TEMPERATURE, mini_batch_size=sizes.batch)
    return _texts_step(loss, negatives, sizes.length, device)


def _negative_cache(
    dtype: torch.dtype, encoder: SentenceTransformer, sizes: PeerSizes, negatives: int, device: torch.device
) -> Step:
    loss = full_cache_loss(encoder, negatives, sizes.length, dtype, device)
    return _texts_step(loss, sizes.batch, sizes.length, device)


def _texts_step(loss: nn.Module, batch: int, length: int, device: torch.device) -> Step:
    def step() -> None:
        loss.zero_grad()
        loss([random_texts(batch, length, device) for _ in range(2)], None).backward()

    return step


def _cross_batch_memory(
    name: str, encoder: SentenceTransformer, sizes: PeerSizes, negatives: int, device: torch.device
) -> Step:
    from pytorch_metric_learning import losses  # here, as tests of other benchmarks run without it

    inner = losses.NTXentLoss(TEMPERATURE) if name == "NTXentLoss" else losses.ContrastiveLoss()
    loss = losses.CrossBatchMemory(inner, encoder.get_embedding_dimension(), memory_size=negatives).to(device)
    loss.add_to_memory(
        unit_rows(negatives, encoder.get_embedding_dimension(), device),
        -1 - torch.arange(negatives, device=device),
        negatives,
    )
    is_document = torch.arange(2 * sizes.batch, device=device) >= sizes.batch
    labels = torch.arange(sizes.batch, device=device).repeat(2)

    def embed() -> Tensor:
        embeddings = encoder(random_texts(sizes.batch, sizes.length, device))["sentence_embedding"]
        return normalize(embeddings, dim=1)

    def step() -> None:
        encoder.zero_grad()
        with torch.no_grad():
            documents = embed()
        labels.add_(sizes.batch)  # labels that no earlier document has
        loss(torch.cat([embed(), documents]), labels, enqueue_mask=is_document).backward()

    return step


METHODS = {
    OURS: Method(partial(_negative_cache, torch.float32), False),
    "negative cache, int8": Method(partial(_negative_cache, torch.int8), False),
    "MultipleNegativesRankingLoss": Method(_in_batch, True),
    "CachedMultipleNegativesRankingLoss": Method(_gradient_caching, True),
    "CrossBatchMemory(NTXentLoss)": Method(partial(_cross_batch_memory, "NTXentLoss"), False),
    "CrossBatchMemory(ContrastiveLoss)": Method(partial(_cross_batch_memory, "ContrastiveLoss"), False),
}


def _number(value: object) -> float | None:
    return value if isinstance(value, float) else None


def _plot(rows: list[Row], figure: Figure) -> None:
    """Draw the time per query and the peak memory of each method."""
    figure.set_size_inches(11, 5)
    panels = figure.subplots(1, 2)
    for axes, key, title, label in (
        (panels[0], "query_ms", "Time per query", "forward and backward per query, ms"),
        (panels[1], "peak_mb", "Peak memory beyond the encoder", "peak memory, MB"),
    ):
        for number, name in enumerate(METHODS):
            mine = [row for row in rows if row["method"] == name and row[key] is not None]
            xs, ys = [float(row["negatives"] or 0) for row in mine], [float(row[key] or 0) for row in mine]
            line = "-" if name.startswith("negative cache") else "--"
            axes.plot(xs, ys, line, marker=MARKERS[number], color=COLOURS[number], label=name)
        row_ticks(axes, [int(row["negatives"] or 0) for row in rows])
        axes.set_yscale("log")
        style(axes, title, "negatives per query", label)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
