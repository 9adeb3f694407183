"""One pass over the cached rows: the logsumexp of each query's scores, draws from its softmax, and its best rows.

`retrieve` chooses the implementation: fused on a GPU, otherwise tiled. `dense` is the reference. Imports `cache/`.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from negative_cache.retrieval.score_transform import factor_of
from negative_cache.retrieval.search import Ceilings, Retrieved, RowPool, Scale, ScoreTransform, Search
from negative_cache.retrieval.tile_scores import describe
from negative_cache.retrieval.tiled import retrieve_tiled

__all__ = ["Ceilings", "Retrieved", "RowPool", "Scale", "ScoreTransform", "Search", "explain", "retrieve"]

FUSED = "fused kernel (Triton)."

logger = logging.getLogger("negative_cache")
_logged: set[str] = set()


@torch.no_grad()
def retrieve(search: Search, generator: torch.Generator) -> Retrieved:
    """Score all rows against all queries, without gradient, and sample from each query's softmax.

    Args:
        search: The queries, the rows, and what to return.
        generator: CPU generator for all draws; its state advances.

    Returns:
        `Retrieved`.

    Raises:
        ValueError: Wrong shape or device of the queries, or top_k above the number of rows.
    """
    queries, pool = search.queries.detach(), search.pool
    with torch.autocast(queries.device.type, enabled=False):
        transform = search.score_transform
        if isinstance(transform, Scale):
            factor: float | Tensor | None = transform.factor
        else:
            factor = factor_of(transform, queries.device, pool.score_dtype)
        search = search._replace(queries=queries, score_transform=transform if factor is None else None)
        reason = _why_not_fused(search)
        log_once(f"Retrieval on {queries.device.type}: " + (reason or FUSED))
        if reason is None and factor is not None:
            from negative_cache.retrieval.fused.launch import retrieve_fused

            return retrieve_fused(search, generator, factor)
        if factor is not None:  # multiplying the queries is cheaper than multiplying all scores
            search = search._replace(queries=queries.to(pool.score_dtype) * factor)
        return retrieve_tiled(search, generator)


def explain(search: Search) -> str:
    """Describe the implementation that `retrieve` runs if the score transform is a scale, and why it is not fused."""
    return _why_not_fused(search._replace(score_transform=None)) or FUSED


def _why_not_fused(search: Search) -> str | None:
    """Describe what runs instead of the fused kernel, and why; None if the fused kernel can run."""
    pool = search.pool
    tiled = f"tiled PyTorch, {describe(pool)}"
    if search.queries.device.type != "cuda":
        return f"{tiled}."
    if search.score_transform is not None:
        return f"{tiled}: the score transform is not a multiplication; the fused kernel needs one."
    from negative_cache.retrieval.fused.launch import reason_against

    reason = reason_against(search)
    return None if reason is None else f"{tiled}: {reason}."


def log_once(message: str) -> None:
    """Log a message at level INFO, unless it was logged before or the code is being compiled."""
    if not torch.compiler.is_compiling() and message not in _logged:
        _logged.add(message)
        logger.info(message)
