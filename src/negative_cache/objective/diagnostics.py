"""How a run is doing: numbers that a step leaves behind, read when they are logged, and advice when they are bad."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from negative_cache import estimators
from negative_cache.cache.rows import NegativeCache
from negative_cache.sampling.one_process import Returned

# A relative squared distance of 0.5 is that of unit vectors with a cosine of 0.75: what was drawn is no more what the
# softmax was computed from. One of two encoders that gets ten times the gradient of the other leaves it behind.
STALE, UNEVEN = 0.5, 10.0
PATIENCE = 3  # readings in a row: a model from scratch moves far in its first steps

logger = logging.getLogger("negative_cache")


class Record(Protocol):
    """Small tensors of a step, without gradient, and the numbers that they give when somebody asks."""

    def numbers(self) -> dict[str, Tensor]: ...


class Health:
    """Numbers of the last training step: records of it are kept, and nothing is computed until `read`."""

    def __init__(self) -> None:
        self._latest: list[Record] = []
        self._gradients: dict[str, list[Tensor]] = {}
        self._readings = {"staleness": 0, "ratio": 0}  # bad ones in a row; a warning came if there are enough

    def take(self, records: Sequence[Record]) -> None:
        """Begin a step."""
        self._latest = list(records)

    def add(self, record: Record) -> None:
        """More of the same step."""
        self._latest.append(record)

    def watch(self, queries: Tensor, documents: list[Tensor]) -> None:
        """Note the norms of the gradients that the next backward pass gives to the two sides."""
        if torch.compiler.is_compiling():
            return
        self._gradients = {}
        for side, tensors in (("queries", [queries]), ("documents", documents)):
            for tensor in tensors:
                if tensor.requires_grad and len(tensor):
                    tensor.register_hook(self._note(side))  # type: ignore[no-untyped-call]

    def _note(self, side: str) -> Callable[[Tensor], None]:
        found = self._gradients  # of this step: a later one has a dict of its own

        def note(gradient: Tensor) -> None:
            found.setdefault(side, []).append(gradient.detach().float().norm())

        return note

    def read(self, cache: NegativeCache | None) -> dict[str, float]:
        """All numbers; waits for the device. Warns, once for each, of what is going wrong.

        Raises:
            ValueError: Embeddings that were not finite were kept out of the cache since the last call.
        """
        if cache is None:
            return {"interpretable_loss": 0.0, "staleness": 0.0, "fill": 0.0}
        _check_rejected(cache)
        with torch.no_grad():
            latest = {key: float(value) for record in self._latest for key, value in record.numbers().items()}
        numbers = {"staleness": 0.0, **latest, "fill": int(cache.num_filled) / cache.num_rows}
        if len(self._gradients) == 2:
            queries, documents = (math.hypot(*map(float, self._gradients[side])) for side in ("queries", "documents"))
            if documents > 0 and math.isfinite(queries + documents):  # else a GradScaler's scale was too high
                numbers["gradient_norm_ratio"] = queries / documents
        self._warn(numbers)
        return numbers

    def _warn(self, numbers: dict[str, float]) -> None:
        staleness, ratio = numbers.get("staleness", 0.0), numbers.get("gradient_norm_ratio", 1.0)
        if self._is_time_to_warn("staleness", staleness > STALE):
            logger.warning(
                f"Cached embeddings are far from what the encoder makes now: staleness {staleness:.2f}, above {STALE}. "
                "What is drawn are no longer the hard negatives. Lower the learning rate, warm it up for longer, set "
                "refresh_per_step, or use a smaller cache."
            )
        if self._is_time_to_warn("ratio", not 1 / UNEVEN < ratio < UNEVEN):
            side, other = ("queries", "documents") if ratio > 1 else ("documents", "queries")
            logger.warning(
                f"The gradient of the {side}' embeddings is {max(ratio, 1 / max(ratio, 1e-12)):.0f} times that of the "
                f"{other}'. One encoder will leave the other behind: lower its learning rate, clip gradients, use more "
                "num_samples, or train in both directions."
            )

    def _is_time_to_warn(self, what: str, is_bad: bool) -> bool:
        """Whether a reading is the last of so many bad ones in a row, for the first time."""
        if self._readings[what] < PATIENCE:
            count = self._readings[what] + 1 if is_bad else 0
            self._readings[what] = count
            return count == PATIENCE
        return False


def _check_rejected(cache: NegativeCache) -> None:
    rejected = int(cache.num_rejected)
    if rejected:
        cache.num_rejected.zero_()
        raise ValueError(
            f"{rejected} embeddings that were not finite were kept out of the cache; look for a learning "
            "rate that is too high or an overflow in half precision."
        )


class LimitRecord(NamedTuple):
    """How many of the filled rows, `[]`, were hidden from each query, `[batch]`."""

    num_limited: Tensor
    num_filled: Tensor

    def numbers(self) -> dict[str, Tensor]:
        return {"masked": self.num_limited.float().mean() / self.num_filled.clamp(min=1)}


class UpdateRecord(NamedTuple):
    """Rows `[n]` that are about to be updated.

    Attributes:
        cached, embeddings: `[n, dim]`: the cached embeddings, and those that come.
        age: `[n]`: how many steps ago they were written.
        mask: bool `[n]`: which of them count; None for all.
    """

    cached: Tensor
    embeddings: Tensor
    age: Tensor
    mask: Tensor | None

    def numbers(self) -> dict[str, Tensor]:
        """Staleness of these rows, by how long ago they were written.

        Returns:
            `staleness` (mean), `staleness_youngest` and `staleness_oldest` (means over the quarter of these rows
            written last, and that written longest ago), `age` (mean, in steps).
        """
        dtype = torch.promote_types(self.cached.dtype, torch.float32)
        staleness = estimators.staleness(self.cached, self.embeddings.to(dtype))
        counts = torch.ones_like(staleness) if self.mask is None else self.mask.to(staleness.dtype)
        age = self.age.to(staleness.dtype)
        order = age.argsort(stable=True)
        sorted_counts, sorted_staleness = counts[order], staleness[order]
        total = counts.sum()
        until = sorted_counts.cumsum(0)
        edge = (total / 4).ceil()

        def mean(weights: Tensor) -> Tensor:
            return (weights * sorted_staleness).sum() / weights.sum().clamp(min=1)

        return {
            "staleness": mean(sorted_counts),
            "staleness_youngest": mean(sorted_counts * (until <= edge)),
            "staleness_oldest": mean(sorted_counts * (until > total - edge)),
            "age": (counts * age).sum() / total.clamp(min=1),
        }


def record_updates(cache: NegativeCache, embedding_key: str, updated: Returned) -> UpdateRecord:
    """What is to be kept of rows before they are updated; copies, as embeddings may be views of more."""
    cached = cache.read(updated.rows, [embedding_key])[embedding_key]
    age = cache.step + 1 - cache.written[updated.rows]
    return UpdateRecord(cached, updated.embeddings.clone(), age, updated.mask)
