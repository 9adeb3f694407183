"""`step`: a training step of MiniLM in bfloat16: forward, backward, AdamW.

Beside the time, it measures what bounds a step: the number of kernel launches, the time in which the device is busy,
and the lines of the library that synchronize the device.
"""

from __future__ import annotations

import contextlib
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.encoders import VOCABULARY, full_cache_loss, random_encoder, random_texts
from benchmarks.gpu.machine import MODEL, peak_megabytes
from benchmarks.gpu.results import PROFILE, Results, Row
from benchmarks.timing import medians_in_turns, seconds

IN_BATCH = "in-batch"
OURS = "negative cache"
GRADIENT_CACHE = "gradient cache"
PROFILED = (IN_BATCH, f"{OURS}, bfloat16 rows")
ROUNDS, LEAST_ROUNDS, WARM_UP = 15, 3, 2
MOST_SECONDS = 1.0  # per loss and size; fewer rounds if they take longer
PROFILED_STEPS = 3
LONGEST_KERNELS = 10
# Files that synchronize on behalf of their callers, or report it.
NOT_THE_CAUSE = (str(Path(torch.__file__).parent), warnings.__file__, __file__)


@dataclass(frozen=True)
class Sizes:
    """The sizes to measure.

    Attributes:
        batches: Numbers of pairs of a step.
        length: Tokens of each text.
        rows: Rows of the cache.
        multiple: Ratio of the batch of gradient caching to that of the other losses.
    """

    batches: tuple[int, ...] = (64, 256)
    length: int = 64
    rows: int = 131_072
    multiple: int = 16


REHEARSAL = Sizes((4,), 8, 256, 2)


class Step:
    """A training step on texts of random tokens."""

    def __init__(self, loss: nn.Module, columns: int, count: int, length: int, device: torch.device) -> None:
        self.loss = loss
        self.count = count
        self.device = device
        self.texts = [[random_texts(count, length, device) for _ in range(columns)] for _ in range(4)]
        self.optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-5, fused=device.type == "cuda")
        self.number = 0

    def __call__(self) -> None:
        texts = [dict(column) for column in self.texts[self.number % len(self.texts)]]
        self.number += 1
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss: Tensor = self.loss(texts, None)
        torch.autograd.backward(loss)
        self.optimizer.step()


def run(results: Results, prepared: Path, device: torch.device, limit: float, is_rehearsal: bool) -> None:
    """Measure every loss at every batch, and profile two of them."""
    sizes = REHEARSAL if is_rehearsal else Sizes()
    torch.manual_seed(0)
    model, model_name = _small(sizes, device) if is_rehearsal else _model(prepared, sizes, device)
    for batch in sizes.batches:
        steps = make_steps(model, batch, sizes, device)
        slow = [name for name in steps if name.startswith(GRADIENT_CACHE)]
        fast = [name for name in steps if name not in slow]
        for losses, beside in ((fast, []), (slow, [IN_BATCH])):  # the slow losses come last
            times = medians({name: steps[name] for name in [*beside, *losses]}, device)
            for loss in losses:
                row = _row(loss, steps[loss], times, device, results.path.with_name(PROFILE))
                results.add(model=model_name, batch=batch, tokens=sizes.length, **row)
                print(results.rows[-1], flush=True)


def _row(loss: str, step: Step, times: dict[str, float], device: torch.device, profile_path: Path) -> Row:
    """The cost of a step, also relative to in-batch in the same rounds."""
    row: Row = {"loss": loss, "pairs": step.count, "ms": round(times[loss], 3)}
    row["of_in_batch"] = round(times[loss] / times[IN_BATCH], 3)
    row["pairs_per_second"] = round(1000 * step.count / times[loss])
    row["extra_mb"] = peak_megabytes(step, device)
    if device.type == "cuda" and loss in PROFILED:
        row |= profile_step(step, profile_path, f"{loss}, {step.count} pairs")
    return row


def make_steps(model: SentenceTransformer, batch: int, sizes: Sizes, device: torch.device) -> dict[str, Step]:
    """A step of each loss, by name."""
    gradient_cache = CachedMultipleNegativesRankingLoss(model, mini_batch_size=batch)
    losses: dict[str, tuple[nn.Module, int, int]] = {
        IN_BATCH: (MultipleNegativesRankingLoss(model), 2, batch),
        "in-batch, third column": (MultipleNegativesRankingLoss(model), 3, batch),
        f"{GRADIENT_CACHE}, {sizes.multiple} x": (gradient_cache, 2, sizes.multiple * batch),
    }
    for dtype in (torch.bfloat16, torch.int8):
        name = f"{OURS}, {str(dtype).removeprefix('torch.')} rows"
        losses[name] = (full_cache_loss(model, sizes.rows, sizes.length, dtype, device), 2, batch)
    auto = full_cache_loss(model, sizes.rows, sizes.length, torch.bfloat16, device, "auto")
    auto.cache_loss.is_waiting = False  # a step in which the cache counts
    losses[f"{OURS}, auto, bfloat16 rows"] = (auto, 2, batch)
    return {name: Step(loss, columns, count, sizes.length, device) for name, (loss, columns, count) in losses.items()}


def medians(steps: dict[str, Step], device: torch.device) -> dict[str, float]:
    """Median milliseconds of each step, until the device has finished it."""
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    return medians_in_turns(
        steps, lambda step: 1000 * seconds(step, device), ROUNDS, LEAST_ROUNDS, most_ms=1000 * MOST_SECONDS
    )


def profile_step(step: Callable[[], None], path: Path, title: str) -> Row:
    """Launches, busy time and synchronizations of a step; the longest kernels are appended to a file."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        started = time.perf_counter()
        for _ in range(PROFILED_STEPS):
            step()
        torch.cuda.synchronize()
        spent = time.perf_counter() - started
    kernels, launches, busy = _device_events(found)
    lines = [f"{title}: {launches / PROFILED_STEPS:.0f} launches a step; device busy for {busy / spent:.0%}"]
    lines += [
        f"  {1e3 * total / PROFILED_STEPS:8.3f} ms  {count / PROFILED_STEPS:6.1f} x  {name[:100]}"
        for name, (total, count) in sorted(kernels.items(), key=lambda item: -item[1][0])[:LONGEST_KERNELS]
    ]
    with path.open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n\n")
    ours, others = waits(step)
    return {
        "launches": round(launches / PROFILED_STEPS),
        "busy_ms": round(1e3 * busy / PROFILED_STEPS, 3),
        "waits_of_the_library": ours,
        "waits_of_others": others,
    }


def _device_events(found: Any) -> tuple[dict[str, tuple[float, int]], int, float]:
    """Seconds and number of each kernel or copy; their total number; and the seconds that the device was busy."""
    kernels: dict[str, tuple[float, int]] = {}
    spans = []
    for event in found.events():
        if str(event.device_type).endswith("CUDA"):
            begin, end = event.time_range.start, event.time_range.end
            total, count = kernels.get(event.name, (0.0, 0))
            kernels[event.name] = (total + (end - begin) / 1e6, count + 1)
            spans.append((begin, end))
    busy, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return kernels, len(spans), busy / 1e6


def waits(step: Callable[[], None]) -> tuple[int, int]:
    """Number of synchronizations in a step: those caused by the library, and all others."""
    ours = others = 0

    def note(message: Any, *_: Any, **__: Any) -> None:
        nonlocal ours, others
        if "synchroniz" not in str(message):
            return
        frames = [frame.filename for frame in traceback.extract_stack()[:-1]]
        last = next((name for name in reversed(frames) if not name.startswith(NOT_THE_CAUSE)), "")
        print(f"synchronizes: {last}", flush=True)
        if "negative_cache" in last and "benchmarks" not in last:
            ours += 1
        else:
            others += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return ours, others


def _small(sizes: Sizes, device: torch.device) -> tuple[SentenceTransformer, str]:
    return random_encoder(32, 1, sizes.length, device), "rehearsal"


def _model(prepared: Path, sizes: Sizes, device: torch.device) -> tuple[SentenceTransformer, str]:
    """MiniLM with float32 weights; with random weights if it was not prepared."""
    folder = prepared / MODEL
    if not folder.exists():
        return random_encoder(384, 6, sizes.length, device), "MiniLM's size, random weights"
    model = SentenceTransformer(str(folder), device=str(device)).float().train()
    with contextlib.suppress(AttributeError):
        assert model[0].auto_model.config.vocab_size >= VOCABULARY
    return model, "all-MiniLM-L6-v2"
