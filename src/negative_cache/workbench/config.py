"""What determines a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

LOSSES = ("negative-cache", "in-batch", "gradcache", "memory-bank")
EMBEDDING_DTYPES = ("float32", "bfloat16", "float16", "int8")

# Fields that mean something to one loss or two alone.
CACHE_FIELDS = {
    "top_k", "num_samples", "in_batch", "shared", "num_candidates", "absolute_margin", "relative_margin", "symmetric",
    "refresh_per_step", "use_lru", "embedding_dtype",
}  # fmt: skip
FIELDS_OF = {"negative-cache": {*CACHE_FIELDS, "cache_size"}, "memory-bank": {"cache_size"}}


class RunError(ValueError):
    """A configuration that cannot be run."""


class RunFailedError(RuntimeError):
    """A run that began, and failed."""


def has_effect(loss: str, field: str) -> bool:
    """Whether a field of `RunConfig` means something to a loss."""
    return field in FIELDS_OF.get(loss, ()) or field not in FIELDS_OF["negative-cache"]


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run; checked when it is made.

    Attributes:
        data: See `load_data`.
        model: See `load_model`.
        loss: One of `LOSSES`.
        output: Folder that the trained model is written to; must not exist.
        cache_size: Rows of the cache, or of the memory bank's queue.
        batch_size: Queries per step, on each rank.
        epochs: Passes over the training pairs.
        max_steps: Stop after so many steps; None for all epochs.
        learning_rate: Peak of the schedule (warm-up over a tenth, then linear to 0); None for the model's usual one.
        scale: Factor of the similarities, the same for all losses.
        top_k: See `NegativeCacheRankingLoss`.
        num_samples: See `NegativeCacheRankingLoss`.
        in_batch: See there.
        shared: See there; with in_batch=False, shared=False is the paper's estimator.
        num_candidates: See there.
        absolute_margin: See there.
        relative_margin: See there.
        symmetric: See there.
        refresh_per_step: See there.
        use_lru: See there.
        embedding_dtype: How the cache stores embeddings: float32, bfloat16, float16 or int8.
        seed: Seed of weights, data order and draws.
        eval_steps: Evaluate on the dev split every so many steps; None for never.
        save_steps: Write a checkpoint every so many steps; None for never.
    """

    data: str
    model: str
    loss: str
    output: str
    cache_size: int = 16_384
    batch_size: int = 64
    epochs: float = 3.0
    max_steps: int | None = None
    learning_rate: float | None = None
    scale: float = 20.0
    top_k: int | None = None
    num_samples: int = 1
    in_batch: bool = True
    shared: bool = True
    num_candidates: int | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = None
    symmetric: bool = False
    refresh_per_step: int = 0
    use_lru: bool = True
    embedding_dtype: str = "float32"
    seed: int = 0
    eval_steps: int | None = None
    save_steps: int | None = 500

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise RunError(f"--loss is {self.loss!r}; expected one of {', '.join(LOSSES)}.")
        if self.embedding_dtype not in EMBEDDING_DTYPES:
            raise RunError(
                f"--embedding-dtype is {self.embedding_dtype!r}; expected one of {', '.join(EMBEDDING_DTYPES)}."
            )
        for name in ("cache_size", "batch_size", "num_samples", "epochs", "scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise RunError(f"--{_flag(name)} is {getattr(self, name)}; it must be positive.")
        for name in ("max_steps", "learning_rate", "top_k", "num_candidates", "eval_steps", "save_steps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise RunError(f"--{_flag(name)} is {value}; it must be positive.")
        for field in fields(self):
            if getattr(self, field.name) != field.default and not has_effect(self.loss, field.name):
                losses = " and ".join(loss for loss in LOSSES if field.name in FIELDS_OF.get(loss, ()))
                raise RunError(
                    f"--{_flag(field.name)} has no effect on --loss {self.loss}, only on {losses}. Leave it out."
                )
        if self.num_candidates is not None and not self.shared:
            raise RunError("--num-candidates has no effect with --no-shared: each query then has draws of its own.")
        if self.loss == "negative-cache" and self.batch_size > self.cache_size:
            raise RunError(f"--batch-size {self.batch_size} is larger than --cache-size {self.cache_size}.")
        if self.top_k is not None and self.top_k > self.cache_size:
            raise RunError(f"--top-k {self.top_k} is larger than --cache-size {self.cache_size}.")
        if not 0 <= self.seed < 2**32:
            raise RunError(f"--seed is {self.seed}; it must be from 0 to 2**32 - 1.")


def _flag(field: str) -> str:
    return field.replace("_", "-")
