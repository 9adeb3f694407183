"""The dense pass: the plain formulas with a `[batch, num_rows]` matrix. The oracle of the fast ones."""

from __future__ import annotations

import torch
from torch import Tensor

from negative_cache.cache.index import is_in_row
from negative_cache.cache.specs import dequantize
from negative_cache.retrieval.randomness import uniforms
from negative_cache.retrieval.search import (
    Limits,
    Retrieved,
    RowPool,
    ScoreTransform,
    check_queries,
    group_bounds,
    group_of,
)


def dense_scores(
    queries: Tensor,
    pool: RowPool,
    score_transform: ScoreTransform | None = None,
    excluded: Tensor | None = None,
    limits: Limits | None = None,
) -> Tensor:
    """`score_transform(queries @ rows.T)`, with -inf where a row may not be retrieved.

    Args:
        queries: `[batch, dim]`.
        pool: The rows.
        score_transform: Elementwise function of the dot products.
        excluded: int64 `[batch, n]`: rows that are invisible to one query; -1 for none.
        limits: What makes a row too good to be a negative.

    Returns:
        `[batch, num_rows]` in the pool's score dtype.
    """
    scores = _products(queries, pool)
    if score_transform is not None:
        scores = score_transform(scores)
    scores = scores.masked_fill(_is_limited(scores, limits), -torch.inf) if limits is not None else scores
    if pool.biases:
        scores = scores + torch.cat(list(pool.biases))
    scores = scores.masked_fill(~torch.cat(list(pool.candidates)), -torch.inf)
    if excluded is not None:
        scores = exclude(scores, excluded, 0)
    return scores


def _products(queries: Tensor, pool: RowPool) -> Tensor:
    parts = [rows if scales is None else dequantize(rows, scales) for rows, scales in pool.parts]
    return queries.to(pool.score_dtype) @ torch.cat([part.to(pool.score_dtype) for part in parts]).T


def _is_limited(scores: Tensor, limits: Limits) -> Tensor:
    """bool `[batch, num_rows]`: what the limits hide."""
    is_hidden = torch.zeros_like(scores, dtype=torch.bool)
    if limits.ceilings is not None:
        is_hidden = scores > limits.ceilings[:, None]
    if limits.guide is not None:
        is_hidden |= _products(limits.guide.queries, limits.guide.rows) > limits.guide.ceilings[:, None]
    return is_hidden


def scores_of(
    queries: Tensor,
    pool: RowPool,
    rows: Tensor,
    score_transform: ScoreTransform | None = None,
    excluded: Tensor | None = None,
    limits: Limits | None = None,
    group_rows: Tensor | None = None,
) -> Tensor:
    """The scores of `rows [n]` for all queries, -inf where the pass does not count a row: `[batch, n]`.

    Args:
        group_rows: See `Retrieved`: with top_k only the best row of each group counts.
    """
    limits = None if limits is None else limits.select(rows)
    scores = dense_scores(queries, pool.select(rows), score_transform, limits=limits)
    if excluded is not None:
        scores = scores.masked_fill(is_in_row(rows, excluded), -torch.inf)
    if group_rows is not None:
        groups = group_of(rows, pool.num_rows, group_rows.shape[1])
        scores = scores.masked_fill(group_rows[:, groups] != rows, -torch.inf)
    return scores


def exclude(scores: Tensor, excluded: Tensor, start: int) -> Tensor:
    """Put -inf at the `excluded [batch, n]` rows of `scores [batch, rows from start on]`, in a copy."""
    width = scores.shape[1]
    at = excluded - start
    at = torch.where((at >= 0) & (at < width), at, width)
    wide = torch.nn.functional.pad(scores, (0, 1))
    return wide.scatter_(1, at, -torch.inf)[:, :width]


def grouped_top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best element of each of k contiguous groups, the first one of equals.

    Args:
        scores: `[batch, n]`, n at least k. Where k does not divide n the last groups are shorter.
        k: Number of groups.

    Returns:
        Scores and int64 positions, `[batch, k]`.
    """
    size, num_longer = group_bounds(scores.shape[1], k)
    long, short = scores[:, : num_longer * (size + 1)], scores[:, num_longer * (size + 1) :]
    best = [
        part.reshape(len(part), groups, length).max(dim=2)
        for part, groups, length in ((long, num_longer, size + 1), (short, k - num_longer, size))
        if groups
    ]
    lengths = torch.full((k,), size, device=scores.device)
    lengths[:num_longer] += 1
    starts = lengths.cumsum(0) - lengths
    return torch.cat([b.values for b in best], 1), torch.cat([b.indices for b in best], 1) + starts


def exact_top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest elements of `scores [batch, n]`, the first ones of equals, in falling order."""
    values, positions = torch.sort(scores, dim=1, descending=True, stable=True)
    return values[:, :k], positions[:, :k]


def sample(scores: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
    """Draw positions from the softmax of `scores [batch, n]` by inverse CDF: int64 `[batch, num_samples]`.

    The cumulative sums and the uniforms are float64, so that rare rows are neither lost nor tied. Rows
    without a finite score give arbitrary positions.
    """
    top = scores.amax(dim=1, keepdim=True)
    weights = (scores - torch.where(top.isfinite(), top, 0)).to(torch.float64).exp()
    uniform = uniforms((scores.shape[0], num_samples), generator, scores.device)
    return inverse_cdf(weights.cumsum(dim=1), uniform)


def inverse_cdf(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """Draw positions in proportion to weights: int64 `[batch, n]`, never one of weight 0 if there is another.

    Args:
        cumulative: `[batch, length]`: cumulative sums of the weights.
        uniform: `[batch, n]` in [0, 1), in the same dtype.
    """
    cumulative = cumulative.contiguous()
    # `right=True` never ends on an element of weight 0: its cumulative sum equals that of the one before.
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    last = cumulative.argmax(dim=1, keepdim=True)  # the first position that has the full sum
    return torch.minimum(drawn, last)


def retrieve_dense(
    queries: Tensor,
    pool: RowPool,
    *,
    generator: torch.Generator,
    score_transform: ScoreTransform | None = None,
    excluded: Tensor | None = None,
    top_k: int | None = None,
    num_samples: int = 1,
    num_top: int = 0,
    limits: Limits | None = None,
) -> Retrieved:
    """See `negative_cache.retrieval.retrieve`, which this equals in distribution."""
    check_queries(queries, pool, top_k)
    scores = dense_scores(queries, pool, score_transform, excluded, limits)
    rows = torch.arange(pool.num_rows, device=scores.device).expand_as(scores)
    num_limited = None
    if limits is not None:
        raw = _products(queries, pool)
        is_hidden = _is_limited(raw if score_transform is None else score_transform(raw), limits)
        counts = torch.cat(list(pool.candidates)).expand_as(raw)
        if excluded is not None:
            counts = exclude(counts.to(raw.dtype), excluded, 0) > 0
        num_limited = (is_hidden & counts).sum(dim=1)
    if top_k is not None:
        scores, rows = grouped_top_k(scores, top_k)
    top_scores, top = exact_top_k(scores, min(num_top, scores.shape[1]))
    return Retrieved(
        lse=scores.logsumexp(dim=1),
        rows=rows.gather(1, sample(scores, num_samples, generator)),
        top_rows=torch.where(top_scores > -torch.inf, rows.gather(1, top), -1),
        top_scores=top_scores,
        group_rows=None if top_k is None else rows,
        num_limited=num_limited,
    )
