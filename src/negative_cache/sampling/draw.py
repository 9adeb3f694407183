"""Drawing negatives from caches and encoding them anew: the part of a step that all losses share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from negative_cache.cache.rows import NegativeCache
from negative_cache.cache.specs import (
    FeatureSpec,
    FixedLenFeature,
    RaggedFeature,
    RaggedRows,
    all_finite,
    is_free_to_read,
    padded,
    padding_value,
    to_device,
)
from negative_cache.retrieval import Limits, RowPool, ScoreTransform, retrieve
from negative_cache.retrieval.dense import dense_scores, exact_top_k
from negative_cache.retrieval.logs import say_once
from negative_cache.retrieval.tiled import mine_groups
from negative_cache.retrieval_fns import GumbelMaxRetrievalFn, MaxScoreRetrievalFn

DocumentEncoder = Callable[[dict[str, Tensor]], Tensor]
RetrievalFn = Callable[[Tensor], Tensor]


class Drawn(NamedTuple):
    """Rows drawn for `batch` queries.

    Attributes:
        lse: `[batch]`: logsumexp of the scores of each query's negatives, -inf where it has none.
        rows: int64 `[batch, num_samples]`, numbered through all caches; `[0, num_samples]` if no query
            has any negative.
        is_valid: bool `[batch]` (or `[0]`): False for a query without negatives; its rows are another query's.
        top_rows: int64 `[batch, num_top]`: the best rows, -1 where there are not so many.
        group_rows: See `Retrieved`.
        num_limited: See `Retrieved`.
    """

    lse: Tensor
    rows: Tensor
    is_valid: Tensor
    top_rows: Tensor
    group_rows: Tensor | None = None
    num_limited: Tensor | None = None


def is_max_score(retrieval_fn: RetrievalFn | None) -> bool:
    """Whether the retrieval function takes the best row."""
    return isinstance(retrieval_fn, MaxScoreRetrievalFn)


def is_softmax(retrieval_fn: RetrievalFn | None) -> bool:
    """Whether the retrieval function draws from the softmax of the scores themselves."""
    return retrieval_fn is None or (isinstance(retrieval_fn, GumbelMaxRetrievalFn) and retrieval_fn.inv_temp == 1.0)


def pool_of(
    caches: Sequence[NegativeCache],
    embedding_key: str,
    withheld: Tensor | None = None,
    bias_key: str | None = None,
) -> RowPool:
    """The rows of several caches as one pool.

    Args:
        caches: In the order of the row numbers.
        embedding_key: The feature that is scored.
        withheld: int64 `[n]`: rows of the first cache that no query may see; -1 for none.
        bias_key: The feature that is added to scores; None for nothing.
    """
    candidates = [cache.filled for cache in caches]
    if withheld is not None:
        visible = torch.cat([candidates[0], candidates[0].new_zeros(1)])
        candidates[0] = visible.index_fill_(0, withheld, False)[:-1]  # -1 is the element added at the end
    stored = [cache.stored(embedding_key) for cache in caches]
    biases = [] if bias_key is None else [cache.stored(bias_key)[0] for cache in caches]
    return RowPool([values for values, _ in stored], candidates, [scales for _, scales in stored], biases)


@torch.no_grad()
def draw_negatives(
    queries: Tensor,
    pool: RowPool,
    has_rows: bool,
    *,
    generator: torch.Generator,
    retrieval_fn: RetrievalFn | None = None,
    score_transform: ScoreTransform | None = None,
    excluded: Tensor | None = None,
    top_k: int | None = None,
    num_samples: int = 1,
    num_top: int = 0,
    limits: Limits | None = None,
) -> Drawn:
    """Draw rows for each query from the softmax over its candidates, or as `retrieval_fn` says.

    Args:
        queries: `[batch, dim]`.
        pool: The rows.
        has_rows: Whether any row is filled.
        generator: Source of randomness.
        retrieval_fn: Picks `[batch, 1]` from scores `[batch, n]`; None for draws from the softmax.
        score_transform: Elementwise function of the dot products.
        excluded: int64 `[batch, n]`: rows that are no negatives of one query; -1 for none.
        top_k: Restrict the softmax to the best row of each of top_k groups.
        num_samples: Draws per query.
        num_top: How many of the best rows to return beside.
        limits: What makes a row too good to be a negative; not with a retrieval function of one's own.
    """
    group_rows, num_limited = None, None
    is_max = is_max_score(retrieval_fn)
    if is_max or is_softmax(retrieval_fn) or not has_rows:
        lse, rows, top_rows, _, group_rows, num_limited = retrieve(
            queries,
            pool,
            generator=generator,
            score_transform=score_transform,
            excluded=excluded,
            top_k=top_k,
            num_samples=num_samples,
            num_top=max(num_top, int(is_max)),
            limits=limits,
        )
        rows = top_rows[:, :1].clamp(min=0) if is_max else rows
        top_rows = top_rows[:, :num_top]
    else:
        assert retrieval_fn is not None
        lse, rows, top_rows = _retrieve_custom(queries, pool, retrieval_fn, score_transform, excluded, top_k, num_top)
    is_valid = lse > -torch.inf
    if not has_rows or num_samples == 0 or (is_free_to_read(lse) and not bool(is_valid.any())):
        return Drawn(lse, rows[:0], is_valid[:0], top_rows, group_rows, num_limited)
    # A query without negatives gets a row that is safe to encode; its weight is 0 and nothing is written.
    safe = rows[is_valid.to(torch.uint8).argmax(dim=0, keepdim=True), :1]  # a number would be waited for
    return Drawn(lse, torch.where(is_valid[:, None], rows, safe), is_valid, top_rows, group_rows, num_limited)


def _retrieve_custom(
    queries: Tensor,
    pool: RowPool,
    retrieval_fn: RetrievalFn,
    score_transform: ScoreTransform | None,
    excluded: Tensor | None,
    top_k: int | None,
    num_top: int,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(queries.device.type, enabled=False):
        if top_k is not None:
            scores, rows = mine_groups(queries, pool, top_k, score_transform, excluded)
        else:
            say_once(
                f"{type(retrieval_fn).__name__} needs the scores of all rows at once: using the dense pass, "
                f"which allocates [batch, {pool.num_rows}]. Give top_k to avoid it."
            )
            scores = dense_scores(queries, pool, score_transform, excluded)
            rows = torch.arange(pool.num_rows, device=scores.device).expand_as(scores)
    picked = retrieval_fn(scores).to(rows.device, torch.int64)
    if picked.shape != (len(queries), 1):
        raise ValueError(f"The retrieval function returned shape {list(picked.shape)}; expected [{len(queries)}, 1].")
    top_scores, top = exact_top_k(scores, min(num_top, scores.shape[1]))
    top_rows = torch.where(top_scores > -torch.inf, rows.gather(1, top), -1)
    return scores.logsumexp(dim=1), rows.gather(1, picked), top_rows


def read_items(caches: Sequence[NegativeCache], rows: Tensor, keys: Sequence[str]) -> dict[str, Tensor | RaggedRows]:
    """Features of `rows [n]`, numbered through all caches, on the rows' device: `[n, ...]` each, or ragged."""
    result: dict[str, Tensor | RaggedRows] = {}
    start = 0
    for cache in caches:
        is_here = None if len(caches) == 1 else (rows >= start) & (rows < start + cache.num_rows)
        local = rows if is_here is None else torch.where(is_here, rows - start, 0)
        for key, value in cache.read_rows(local, keys).items():
            value = to_device(value, rows.device)
            if is_here is not None and key in result:
                value = _choose(is_here, value, result[key], cache.specs[key])
            result[key] = value
        start += cache.num_rows
    return result


def common_specs(caches: Sequence[NegativeCache], keys: Sequence[str]) -> dict[str, FeatureSpec]:
    """Specs of what `read_items` returns: where caches differ, the widest shape and the dtype that holds all."""
    result: dict[str, FeatureSpec] = {}
    for key in keys:
        specs = [cache.specs[key] for cache in caches]
        dtype = functools.reduce(torch.promote_types, [spec.dtype for spec in specs])
        shapes = [list(spec.shape) for spec in specs if not isinstance(spec, RaggedFeature)]
        if not shapes:
            result[key] = RaggedFeature(dtype, None, specs[0].default_value)
        elif len(shapes) < len(specs) or len({len(shape) for shape in shapes}) > 1:
            raise ValueError(f"The caches' features {key!r} do not fit together: {specs}.")
        else:
            widest = [max(sizes) for sizes in zip(*shapes, strict=True)]
            result[key] = FixedLenFeature(widest, dtype, specs[0].default_value)
    return result


def read_pool(caches: Sequence[NegativeCache], rows: Tensor, keys: Sequence[str]) -> dict[str, Tensor]:
    """`read_items`, the ragged ones padded to the longest of these rows."""
    return padded(read_items(caches, rows, keys))


def lengths_of(caches: Sequence[NegativeCache], rows: Tensor, key: str) -> Tensor:
    """Lengths of a ragged feature of `rows [n]`, numbered through all caches: int64 `[n]`."""
    result, start = torch.zeros_like(rows), 0
    for cache in caches:
        inside = (rows >= start) & (rows < start + cache.num_rows)
        lengths = cache.lengths(torch.where(inside, rows - start, 0), key).to(rows.device)
        result = torch.where(inside, lengths, result)
        start += cache.num_rows
    return result


def encode(
    document_encoder: DocumentEncoder,
    features: dict[str, Tensor],
    count: int,
    dim: int,
    needs_gradient: bool = False,
    must_be_finite: bool = True,
) -> Tensor:
    """Run the document encoder on rows and check what it returns: `[count, dim]`, with gradient.

    Args:
        needs_gradient: Whether to raise for embeddings without gradient, unless gradients are switched off.
        must_be_finite: Whether to raise for values that are not finite.
    """
    embeddings = document_encoder(features)
    if not isinstance(embeddings, Tensor):
        raise TypeError(
            f"The document encoder returned {type(embeddings).__name__}; expected a tensor [{count}, {dim}]."
        )
    if embeddings.shape != (count, dim):
        raise ValueError(f"The document encoder returned shape {list(embeddings.shape)}; expected [{count}, {dim}].")
    if must_be_finite:
        check_finite("The document encoder's output", embeddings)
    if needs_gradient and torch.is_grad_enabled() and not embeddings.requires_grad:
        raise ValueError(
            "The document encoder returned embeddings without gradient, but those of the batch's documents have one. "
            "Drawn documents must be encoded as the batch's are: without no_grad and detach."
        )
    return embeddings


def check_finite(name: str, values: Tensor) -> None:
    """Raise ValueError for NaN or infinity in a CPU tensor; elsewhere the cache masks and counts such rows."""
    if is_free_to_read(values) and not all_finite(values.detach()):
        raise ValueError(
            f"{name} has NaN or infinity. Nothing was written to the cache; look for a learning rate that is "
            "too high or an overflow in half precision."
        )


def _choose(
    condition: Tensor, new: Tensor | RaggedRows, old: Tensor | RaggedRows, spec: FeatureSpec
) -> Tensor | RaggedRows:
    """`where` over the first dimension; features of different widths are padded."""
    if isinstance(new, RaggedRows) and isinstance(old, RaggedRows):
        values = _choose(condition, new.values, old.values, spec)
        assert isinstance(values, Tensor)
        return RaggedRows(values, torch.where(condition, new.lengths, old.lengths))
    assert isinstance(new, Tensor)
    assert isinstance(old, Tensor)
    if new.dim() == 2 and new.shape[1] != old.shape[1]:
        width = max(new.shape[1], old.shape[1])
        new, old = (
            torch.nn.functional.pad(value, (0, width - value.shape[1]), value=padding_value(spec))
            for value in (new, old)
        )
    return torch.where(condition.reshape(-1, *[1] * (new.dim() - 1)), new, old)
