"""Diagnostics of a run: values of the last step, computed when they are read, and warnings about bad values."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from negative_cache import estimators
from negative_cache.cache.hashing import hash_items
from negative_cache.cache.rows import NegativeCache
from negative_cache.cache.specs import Specs
from negative_cache.cache.validation import Items, check_features
from negative_cache.sampling.config import Noise

# Unit vectors with a cosine of 0.75 have a relative squared distance of 0.5. The draws then no longer follow the
# softmax of the new embeddings. If one of two encoders has ten times the gradient of the other, it learns much faster.
STALE, UNEVEN = 0.5, 10.0
UNRELATED = 1.0  # a cosine of 0.5
# The loss pulls a query to its positive and pushes it from the cached documents by their softmax weights. Copies of the
# positive with a weight of 0.05 cancel a twentieth of the pull, as if 3 queries of 64 had only copies as negatives.
DUPLICATED = 0.05
MASKED = 0.5  # the fraction of hidden rows above which a margin hides more than false negatives
PATIENCE = 3  # bad readings in a row until a warning: a model from scratch changes much in its first steps
LONG_PATIENCE = 10  # for `masked`: at first, positives are no more similar to their queries than other documents
NEAR_DUPLICATE = 0.99  # a document with at least this cosine to the positive counts as a copy of it
MAX_KEPT = 2**18  # number of products that a step keeps until `read`; with more, values are computed at once

Record = Callable[[], dict[str, Tensor]]
logger = logging.getLogger("negative_cache")


class Diagnostics:
    """Values of the last training step. Only records are kept; nothing is computed until `read`."""

    def __init__(self) -> None:
        self._records: list[Record] = []
        self._gradients: dict[str, list[Tensor]] = {}
        self._num_bad = dict.fromkeys(("staleness", "ratio", "near_duplicates", "masked"), 0)  # bad readings in a row
        self._has_warned_of_gradients = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave the values of the last step out of copies, as out of `state_dict`."""
        return {**self.__dict__, "_records": [], "_gradients": {}}

    def begin(self, records: Sequence[Record]) -> None:
        """Start a step with its first records."""
        self._records = list(records)

    def add(self, record: Record) -> None:
        """Add a record of the same step."""
        self._records.append(record)

    def watch(self, queries: Tensor, documents: Sequence[Tensor]) -> None:
        """Record the norms of the gradients of queries and documents in the next backward pass."""
        if torch.compiler.is_compiling():
            return
        self._gradients = {}
        for side, tensors in (("queries", [queries]), ("documents", documents)):
            for tensor in tensors:
                if tensor.requires_grad and len(tensor):
                    found = self._gradients.setdefault(side, [])  # of this step; a later step has its own lists
                    tensor.register_hook(partial(_append_norm, found))  # type: ignore[no-untyped-call]

    def warn_of_missing_gradients(self) -> None:
        """Warn once that no embedding of a training step has a gradient."""
        if not self._has_warned_of_gradients and not torch.compiler.is_compiling():
            self._has_warned_of_gradients = True
            logger.warning(
                "`query_embeddings` and `document_embeddings` have no gradient, so only re-encoded documents train the "
                "encoder. Compute them without no_grad, inference mode or detach; to evaluate, call loss_fn.eval()."
            )

    def read(self, cache: NegativeCache | None) -> dict[str, float]:
        """Return all values; synchronizes the device. Logs one warning per value that is bad several times in a row.

        Raises:
            ValueError: Embeddings that were not finite were kept out of the cache since the last call.
        """
        if cache is None:
            return {"interpretable_loss": 0.0, "staleness": 0.0, "fill": 0.0}
        raise_for_rejected(cache)
        with torch.no_grad():
            latest = {key: float(value) for record in self._records for key, value in record().items()}
        if "copies" in latest:  # with dropout, copies are not near each other
            latest["near_duplicates"] = max(latest.get("near_duplicates", 0.0), latest.pop("copies"))
        if latest.get("cache_share") == 0:  # the loss leaves the cache out
            latest.setdefault("near_duplicates", 0.0)
        numbers = {"staleness": 0.0, **latest, "fill": int(cache.num_filled) / cache.num_rows}
        if all(self._gradients.get(side) for side in ("queries", "documents")):
            queries, documents = (math.hypot(*map(float, self._gradients[side])) for side in ("queries", "documents"))
            if documents > 0 and math.isfinite(queries + documents):  # else a GradScaler's scale was too high
                numbers["gradient_norm_ratio"] = queries / documents
        self._warn(numbers)
        return numbers

    def _warn(self, numbers: dict[str, float]) -> None:
        staleness, ratio = numbers.get("staleness", 0.0), numbers.get("gradient_norm_ratio", 1.0)
        if self._is_time_to_warn("staleness", staleness > STALE):
            other = (
                " Or `document_encoder` is not the encoder of `document_embeddings`, or `document_features` are not "
                "its inputs: cached and new embeddings have little in common."
            )
            logger.warning(
                f"Cached embeddings are far from what the encoder computes now: staleness {staleness:.2f}, above "
                f"{STALE}. The sampled documents are no longer the hard negatives. Lower the learning rate, warm it up "
                f"for longer, set refresh_per_step, or use a smaller cache.{other if staleness > UNRELATED else ''}"
            )
        if self._is_time_to_warn("ratio", not 1 / UNEVEN < ratio < UNEVEN):
            side, other = ("queries", "documents") if ratio > 1 else ("documents", "queries")
            logger.warning(
                f"The gradient of the {side}' embeddings is {max(ratio, 1 / max(ratio, 1e-12)):.0f} times that of the "
                f"{other}'. One encoder will learn much faster than the other: lower its learning rate, clip "
                "gradients, use more num_samples, or train in both directions."
            )
        duplicates = numbers.get("near_duplicates", 0.0)
        if self._is_time_to_warn("near_duplicates", duplicates > DUPLICATED):
            logger.warning(
                f"Queries are trained against copies of their own positive: near_duplicates {duplicates:.2f}, above "
                f"{DUPLICATED}. Give each document one id in document_ids (with sentence-transformers, in the label "
                "column), or set relative_margin=0.05. If documents differ, the encoder gives all of them nearly the "
                "same embedding."
            )

        masked = numbers.get("masked", 0.0)
        if self._is_time_to_warn("masked", masked > MASKED, LONG_PATIENCE):
            logger.warning(
                f"Most of the cache is hidden as false negatives: masked {masked:.2f}, above {MASKED}. The margin or "
                "the guide hides hard negatives, too. Set a smaller margin, such as relative_margin=0.05."
            )

    def _is_time_to_warn(self, what: str, is_bad: bool, patience: int = PATIENCE) -> bool:
        """Whether this reading is the last of `patience` bad readings in a row, for the first time."""
        if self._num_bad[what] < patience:
            count = self._num_bad[what] + 1 if is_bad else 0
            self._num_bad[what] = count
            return count == patience
        return False


def _append_norm(found: list[Tensor], gradient: Tensor) -> None:
    found.append(gradient.detach().float().norm())


def raise_for_rejected(cache: NegativeCache, name: str = "") -> None:
    """Raise ValueError if non-finite embeddings were kept out since the last call; synchronizes the device."""
    rejected = int(cache.num_rejected)
    if rejected:
        cache.num_rejected.zero_()
        raise ValueError(
            f"{rejected} embeddings that were not finite were kept out of the cache{name}; look for a learning rate "
            "that is too high or an overflow in half precision."
        )


def loss_numbers(losses: Tensor, positive: Tensor, lse: Tensor, in_batch_lse: Tensor) -> dict[str, Tensor]:
    """Means over the batch of the loss, the positive's probability, and the softmax weight of the cache.

    Args:
        losses, positive, lse, in_batch_lse: `[batch]`: the losses, the positives' scores, the logsumexp over the cache
            and over the in-batch negatives.
    """
    return {
        "interpretable_loss": losses.mean(),
        "positive_probability": (-losses).exp().mean(),
        "cache_share": estimators.cache_share(positive, lse, in_batch_lse).mean(),
    }


def budget_numbers(documents_per_query: float, noise: Noise | None) -> dict[str, Tensor]:
    """The number of re-encoded documents per query, and the noise of the step relative to that of its batch.

    Args:
        documents_per_query: See `Sample`.
        noise: See `Sample`; None if no documents are shared.
    """
    numbers = {"documents_per_query": torch.tensor(documents_per_query, device="cpu")}
    if noise is not None:
        scale = noise.batch.clamp(min=torch.finfo(noise.batch.dtype).tiny)
        numbers["in_batch_noise"] = noise.in_batch / scale
        if noise.num_chosen:
            numbers["sampling_noise"] = estimators.choice_error(noise.sizes, noise.num_chosen, noise.num_steps) / scale
    return numbers


def hidden_numbers(num_hidden: Tensor, num_filled: Tensor) -> dict[str, Tensor]:
    """The fraction of filled rows, `[]`, that were hidden as false negatives, `[batch]`; the mean over queries."""
    return {"masked": num_hidden.float().mean() / num_filled.clamp(min=1)}


def document_numbers(
    *,
    products: Tensor,
    weights: Tensor | None,
    lse: Tensor,
    scale: Tensor | float,
    documents: Tensor,
    encoded: Tensor,
    is_corrected: bool,
) -> dict[str, Tensor]:
    """The effective number of negatives, and the softmax weight of near copies of the positives.

    Args:
        products: `[batch, n]`: the queries' products with the re-encoded documents.
        weights: `[batch, n]`: their weights; None for the mean over each query's own documents.
        lse: `[batch]`: logsumexp over the cache; -inf for a query without negatives.
        scale: Factor of the products.
        documents: `[batch, dim]`: the positives.
        encoded: `[n, dim]`, or `[batch * n, dim]` where each query has its own.
        is_corrected: Whether the scores include `log_q` corrections.
    """
    documents, encoded = (torch.nn.functional.normalize(side) for side in (documents, encoded))
    if weights is None:
        weights = torch.full_like(products, 1 / products.shape[1])
        cosines = estimators.dot(documents[:, None], encoded.view(len(documents), -1, documents.shape[1]))
    else:
        cosines = estimators.products(documents, encoded)
    values = {"near_duplicates": (cosines >= NEAR_DUPLICATE).to(weights.dtype)}
    if not is_corrected:  # the mean probability of a drawn row is the sum of squared probabilities
        values["concentration"] = (scale * products - lse[:, None]).clamp(max=0.0).exp()
    numbers = {name: _mean_over_draws(weights, value, lse) for name, value in values.items()}
    concentration = numbers.pop("concentration", None)
    if concentration is not None:
        numbers["effective_negatives"] = 1 / concentration.clamp(min=torch.finfo(concentration.dtype).tiny)
    return numbers


def copy_numbers(
    *, documents: Items, encoded: dict[str, Tensor], specs: Specs, weights: Tensor | None, lse: Tensor
) -> dict[str, Tensor]:
    """The softmax weight of the documents with the features of the positive: `copies`.

    Args:
        documents: Validated features of the batch's documents, the positives first; they have hashes.
        encoded: Features of the re-encoded documents, `[n, ...]`, or `[batch * n, ...]` where each query has its own.
        specs: Spec per feature.
        weights: `[batch, n]`: the weights of the documents; None for the mean over each query's own ones.
        lse: `[batch]`: logsumexp over the cache; -inf for a query without negatives.
    """
    positives = hash_items(documents, lse.device)[: len(lse), None]
    others = hash_items(check_features("document_features", encoded, specs), lse.device)
    others = others.view(len(lse), -1) if weights is None else others
    is_copy = positives == others
    weights = torch.full_like(lse, 1 / is_copy.shape[1])[:, None] if weights is None else weights
    return {"copies": _mean_over_draws(weights, is_copy.to(weights.dtype), lse)}


def _mean_over_draws(weights: Tensor, values: Tensor, lse: Tensor) -> Tensor:
    """The weighted sums of `values [batch, n]`, averaged over the queries that have negatives: `[]`."""
    has_negatives = lse > -torch.inf
    return torch.where(has_negatives, (weights * values).sum(dim=1), 0).sum() / has_negatives.sum().clamp(min=1)


def update_numbers(cached: Tensor, embeddings: Tensor, age: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Compute the staleness of updated rows, by their age.

    Args:
        cached: `[n, dim]`: the embeddings before the update.
        embeddings: `[n, dim]`: the re-encoded ones.
        age: int64 `[n]`, in steps.
        mask: bool `[n]`: which of them count; None for all.

    Returns:
        `staleness` (mean), `staleness_youngest` and `staleness_oldest` (means over the youngest and the oldest quarter
        of these rows), `age` (mean, in steps).
    """
    staleness = estimators.staleness(cached, embeddings.to(torch.promote_types(cached.dtype, torch.float32)))
    counts = torch.ones_like(staleness) if mask is None else mask.to(staleness.dtype)
    ages = age.to(staleness.dtype)
    order = ages.argsort(stable=True)
    sorted_counts, sorted_staleness = counts[order], staleness[order]
    total, until = counts.sum(), sorted_counts.cumsum(0)
    edge = (total / 4).ceil()

    def mean(weights: Tensor) -> Tensor:
        return (weights * sorted_staleness).sum() / weights.sum().clamp(min=1)

    return {
        "staleness": mean(sorted_counts),
        "staleness_youngest": mean(sorted_counts * (until <= edge)),
        "staleness_oldest": mean(sorted_counts * (until > total - edge)),
        "age": (counts * ages).sum() / total.clamp(min=1),
    }
