"""One pass over the cached rows: the softmax's normaliser, samples from it, and the best rows."""

from __future__ import annotations

import torch
from torch import Tensor

from negative_cache.retrieval.logs import say_once
from negative_cache.retrieval.matmul import describe
from negative_cache.retrieval.score_transform import Scale, factor_of
from negative_cache.retrieval.search import Guide, Limits, Retrieved, RowPool, ScoreTransform
from negative_cache.retrieval.tiled import retrieve_streaming

__all__ = ["Guide", "Limits", "Retrieved", "RowPool", "Scale", "ScoreTransform", "explain", "retrieve"]

FUSED = "fused kernel (Triton)."


@torch.no_grad()
def retrieve(
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
    """Score all rows against all queries, without gradient, and sample from each query's softmax.

    With `s = score_transform(queries @ rows.T)`, restricted to each query's candidates (and, with top_k,
    to the best row of each of k contiguous groups of rows): `lse = s.logsumexp(1)`, and `rows` are draws
    from `s.softmax(1)`, independent between queries and samples.

    Args:
        queries: `[batch, dim]`, on the pool's device.
        pool: The rows. Scores are computed in float32, or float64 for float64 rows.
        generator: CPU generator of all randomness; it advances.
        score_transform: Elementwise function of the dot products.
        excluded: int64 `[batch, n]`: rows that one query must not see; -1 for none.
        top_k: Number of groups; None for all rows.
        num_samples: Independent draws per query.
        num_top: How many of the best rows to return; with top_k they are chosen among its rows.
        limits: What makes a row too good to be a negative.

    Returns:
        `Retrieved`.

    Raises:
        ValueError: Wrong shape or device of the queries, top_k above the number of rows.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries = queries.detach()
        factor = factor_of(score_transform, queries.device, pool.score_dtype)
        score_transform = score_transform if factor is None else None
        reason = _why_not_fused(queries, pool, score_transform, num_samples, limits)
        say_once(f"Retrieval on {queries.device.type}: " + (reason or FUSED))
        if reason is None and factor is not None:
            from negative_cache.retrieval.fused.launch import retrieve_fused

            return retrieve_fused(
                queries,
                pool,
                generator=generator,
                factor=factor,
                excluded=excluded,
                top_k=top_k,
                num_samples=num_samples,
                num_top=num_top,
            )
        if factor is not None:
            queries = queries.to(pool.score_dtype) * factor
        return retrieve_streaming(
            queries,
            pool,
            generator=generator,
            score_transform=score_transform,
            excluded=excluded,
            top_k=top_k,
            num_samples=num_samples,
            num_top=num_top,
            limits=limits,
        )


def explain(queries: Tensor, pool: RowPool, num_samples: int = 1) -> str:
    """Which implementation `retrieve` runs for these and a scale, and why it is not the fused kernel."""
    return _why_not_fused(queries, pool, None, num_samples, None) or FUSED


def _why_not_fused(
    queries: Tensor, pool: RowPool, score_transform: ScoreTransform | None, num_samples: int, limits: Limits | None
) -> str | None:
    """What runs in place of the fused kernel, and why; None if that can run."""
    tiled = f"tiled PyTorch, {describe(pool)}"
    if queries.device.type != "cuda":
        return f"{tiled}."
    if score_transform is not None:
        return f"{tiled}: the score transform is no multiplication, which the fused kernel needs."
    if limits is not None or pool.biases:
        return f"{tiled}: the fused kernel knows no margins, guides or corrections."
    from negative_cache.retrieval.fused.launch import reason_against

    reason = reason_against(queries, pool, num_samples)
    return None if reason is None else f"{tiled}: {reason}."
