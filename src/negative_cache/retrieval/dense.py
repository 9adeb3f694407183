"""The dense pass: the plain formulas, with a `[batch, num_rows]` matrix. It is the reference for the fast passes."""

from __future__ import annotations

import torch
from torch import Tensor

from negative_cache.retrieval.randomness import sample
from negative_cache.retrieval.search import (
    Retrieved,
    Search,
    dense_scores,
    exclude,
    group_bounds,
    is_above,
    similarities,
)


def retrieve_dense(search: Search, generator: torch.Generator) -> Retrieved:
    """Equal in distribution to `negative_cache.retrieval.retrieve`; see there."""
    search.check()
    scores, num_hidden = dense_scores(search), None
    rows = torch.arange(search.pool.num_rows, device=scores.device).expand_as(scores)
    if search.ceilings is not None:
        before = similarities(search)
        is_seen = search.pool.is_candidate.expand_as(scores)
        if search.excluded is not None:
            is_seen = exclude(is_seen.to(scores.dtype), search.excluded) > 0
        num_hidden = (is_above(before, search.ceilings) & is_seen).sum(dim=1)
    if search.top_k is not None:
        scores, rows = grouped_top_k(scores, search.top_k)
    best_scores, best = exact_top_k(scores, min(search.num_best, scores.shape[1]))
    return Retrieved(
        lse=scores.logsumexp(dim=1),
        rows=rows.gather(1, sample(scores, search.num_samples, generator)),
        best_rows=torch.where(best_scores > -torch.inf, rows.gather(1, best), -1),
        best_scores=best_scores,
        num_hidden=num_hidden,
    )


def grouped_top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the best element of each of k contiguous groups; of equal elements, the first.

    Args:
        scores: `[batch, n]`, n at least k. If k does not divide n, the last groups are shorter by one.
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
    """The k highest of `scores [batch, n]` in descending order; of equal scores, the first (unlike `torch.topk`)."""
    values, positions = torch.sort(scores, dim=1, descending=True, stable=True)
    return values[:, :k], positions[:, :k]
