"""The tiled pass in plain PyTorch: one product per tile of rows, nothing of size batch x num_rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from negative_cache.features import dequantize, is_free_to_read
from negative_cache.retrieval.pool import Retrieved, RowPool, ScoreTransform, check_queries, group_bounds
from negative_cache.retrieval.reference import exact_top_k, exclude, grouped_top_k, sample, uniforms

# A tile of scores is read several times: it should stay in a CPU core's cache, and be long enough for
# the product to run at full speed.
TILE_ELEMENTS = 2048 * 128
MIN_TILE_ROWS, MAX_TILE_ROWS = 256, 8192


def retrieve_streaming(
    queries: Tensor,
    pool: RowPool,
    *,
    generator: torch.Generator,
    score_transform: ScoreTransform | None = None,
    excluded: Tensor | None = None,
    top_k: int | None = None,
    num_samples: int = 1,
    num_top: int = 0,
    tile_rows: int | None = None,
) -> Retrieved:
    """See `negative_cache.retrieval.retrieve`.

    Args:
        tile_rows: Rows per tile; the distribution of the result does not depend on it.
    """
    check_queries(queries, pool, top_k)
    tiles = _Tiles(queries, pool, score_transform, excluded, tile_rows or _tile_rows(queries))
    if top_k is not None:
        scores, rows = _group_maxima(tiles, top_k)
        drawn = rows.gather(1, sample(scores, num_samples, generator))
        lse = scores.logsumexp(dim=1)
        top_scores, top = exact_top_k(scores, min(num_top, top_k))
        top_rows = torch.where(top_scores > -torch.inf, rows.gather(1, top), -1)
        return Retrieved(lse, drawn, top_rows, top_scores)
    reservoir = _Reservoir(tiles, num_samples, generator)
    best = _Best(tiles, min(num_top, pool.num_rows))
    for start, scores in tiles:
        reservoir.add(start, scores)
        best.add(start, scores)
    return Retrieved(reservoir.lse.to(pool.score_dtype), reservoir.rows, best.rows(), best.top_scores)


def mine_groups(
    queries: Tensor,
    pool: RowPool,
    top_k: int,
    score_transform: ScoreTransform | None = None,
    excluded: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Score and row of the best candidate of each of top_k contiguous groups of rows: `[batch, top_k]`."""
    check_queries(queries, pool, top_k)
    return _group_maxima(_Tiles(queries, pool, score_transform, excluded, _tile_rows(queries)), top_k)


def _tile_rows(queries: Tensor) -> int:
    return min(max(TILE_ELEMENTS // max(len(queries), 1), MIN_TILE_ROWS), MAX_TILE_ROWS)


class _Tiles:
    """Iterates over (first row, scores `[batch, rows of the tile]`)."""

    def __init__(
        self,
        queries: Tensor,
        pool: RowPool,
        score_transform: ScoreTransform | None,
        excluded: Tensor | None,
        tile_rows: int,
    ) -> None:
        self.queries = queries.to(pool.score_dtype)
        self.pool = pool
        self.score_transform = score_transform
        self.excluded = excluded
        self.tile_rows = tile_rows

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, self.pool.num_rows, self.tile_rows):
            scores = self.scores(start, min(start + self.tile_rows, self.pool.num_rows))
            if scores is not None:
                yield start, scores

    def scores(self, start: int, stop: int) -> Tensor | None:
        """Scores of a range of rows; None if it is known, at no cost, that none of them is a candidate."""
        tile = self.pool.slice(start, stop)
        candidates = torch.cat(list(tile.candidates))
        rows = torch.cat([r if s is None else dequantize(r, s) for r, s in tile.parts])
        is_all = False
        if is_free_to_read(candidates):
            if not bool(candidates.any()):
                return None
            is_all = bool(candidates.all())
        scores = self.queries @ rows.to(self.queries.dtype).T
        if self.score_transform is not None:
            scores = self.score_transform(scores)
        if not is_all:
            scores = scores.masked_fill(~candidates, -torch.inf)
        return scores if self.excluded is None else exclude(scores, self.excluded, start)


class _Reservoir:
    """Running logsumexp, and samples from the softmax over all tiles seen so far.

    After a tile with logsumexp t and a running logsumexp r (t included), a sample moves into the tile
    with probability exp(t - r), to a row of it in proportion to exp(score).
    """

    def __init__(self, tiles: _Tiles, num_samples: int, generator: torch.Generator) -> None:
        batch = len(tiles.queries)
        self.generator = generator
        # float64: over thousands of tiles a float32 sum would drift
        self.lse = tiles.queries.new_full((batch,), -torch.inf, dtype=torch.float64)
        self.rows = torch.zeros(batch, num_samples, dtype=torch.int64, device=tiles.queries.device)

    def add(self, start: int, scores: Tensor) -> None:
        tile_lse = scores.logsumexp(dim=1).double()
        lse = torch.logaddexp(self.lse, tile_lse)
        chance = (tile_lse - torch.where(lse.isfinite(), lse, 0)).exp()
        moves = uniforms(tuple(self.rows.shape), self.generator, scores.device) < chance[:, None]
        self.lse = lse
        if not is_free_to_read(scores):  # then the queries that move cannot be picked out
            drawn = start + sample(scores, moves.shape[1], self.generator)
            self.rows = torch.where(moves, drawn, self.rows)
            return
        moving = moves.any(dim=1).nonzero().squeeze(1)
        if len(moving):
            drawn = start + sample(scores[moving], moves.shape[1], self.generator)
            self.rows[moving] = torch.where(moves[moving], drawn, self.rows[moving])


class _Best:
    """The highest scoring rows of all tiles seen so far; of equal ones the lowest."""

    def __init__(self, tiles: _Tiles, count: int) -> None:
        batch, device = len(tiles.queries), tiles.queries.device
        self.count = count
        self.top_scores = tiles.queries.new_full((batch, count), -torch.inf)
        self.top_rows = torch.full((batch, count), -1, device=device)

    def add(self, start: int, scores: Tensor) -> None:
        if self.count == 0:
            return
        values, at = exact_top_k(scores, self.count)
        values = torch.cat([self.top_scores, values], dim=1)
        rows = torch.cat([self.top_rows, at + start], dim=1)
        self.top_scores, order = exact_top_k(values, self.count)
        self.top_rows = rows.gather(1, order)

    def rows(self) -> Tensor:
        return torch.where(self.top_scores > -torch.inf, self.top_rows, -1)


def _group_maxima(tiles: _Tiles, k: int) -> tuple[Tensor, Tensor]:
    """`grouped_top_k` over all rows: scores and rows, `[batch, k]`."""
    size, num_longer = group_bounds(tiles.pool.num_rows, k)
    boundary = num_longer * (size + 1)
    parts = []
    for start, groups, length in ((0, num_longer, size + 1), (boundary, k - num_longer, size)):
        step = max(tiles.tile_rows // length, 1)
        for first in range(0, groups, step):
            count = min(step, groups - first)
            parts.append(_maxima(tiles, start + first * length, count, length))
    return torch.cat([scores for scores, _ in parts], 1), torch.cat([rows for _, rows in parts], 1)


def _maxima(tiles: _Tiles, start: int, groups: int, length: int) -> tuple[Tensor, Tensor]:
    """Best score and row of `groups` groups of `length` rows from `start` on; several only if they fit a tile."""
    batch, device = len(tiles.queries), tiles.queries.device
    best = tiles.queries.new_full((batch, groups), -torch.inf)
    rows = torch.arange(start, start + groups * length, length, device=device).repeat(batch, 1)
    stop = start + groups * length
    step = groups * length if groups > 1 else tiles.tile_rows  # several groups fit one tile together
    for first in range(start, stop, step):
        scores = tiles.scores(first, min(first + step, stop))
        if scores is None:
            continue
        values, at = grouped_top_k(scores, groups)
        is_better = values > best
        best = torch.where(is_better, values, best)
        rows = torch.where(is_better, at + first, rows)
    return best, rows
