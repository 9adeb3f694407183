"""Scores of ranges of rows, in a buffer that is used again."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

import torch
from torch import Tensor

from negative_cache.cache.specs import is_free_to_read
from negative_cache.retrieval.matmul import TileProduct
from negative_cache.retrieval.search import Limits, RowPool, ScoreTransform

# On a CPU a chunk of scores is read several times: it should stay in a core's cache, and be long enough for the product
# to run at full speed. What is done per tile costs some dozen small operations. Elsewhere a tile is one chunk.
CHUNK_ELEMENTS, TILE_ELEMENTS, OTHER_TILE_ELEMENTS = 2048 * 128, 16384 * 128, 2**24
MIN_CHUNK_ROWS, MAX_TILE_ROWS = 256, 16384
# A draw from a tile chooses a block of so many rows first, so that only one block is looked at row by row.
BLOCK = 64


class Tiles:
    """Scores `[rows, batch]` of chunks of rows. The chunks of a tile stay in the buffer until the next tile.

    Args:
        queries: `[batch, dim]`.
        pool: The rows.
        score_transform: Elementwise function of the dot products.
        excluded: int64 `[batch, n]`: rows that are invisible to one query; -1 for none.
        tile_rows: Rows per tile.
        limits: What makes a row too good to be a negative.
    """

    def __init__(
        self,
        queries: Tensor,
        pool: RowPool,
        score_transform: ScoreTransform | None = None,
        excluded: Tensor | None = None,
        tile_rows: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.pool = pool
        self.batch = len(queries)
        self.score_transform = score_transform
        self.is_free = is_free_to_read(queries)
        self.is_all = self.is_free and all(bool(candidates.all()) for candidates in pool.candidates)
        self.excluded = None if excluded is None or excluded.shape[1] == 0 else _Excluded(excluded, self.is_free)
        is_cpu = queries.device.type in ("cpu", "meta")
        if tile_rows is None:
            tile_rows = _rows(TILE_ELEMENTS if is_cpu else OTHER_TILE_ELEMENTS, self.batch)
        self.tile_rows = min(tile_rows, max(pool.num_rows, 1))
        self.chunk_rows = min(_rows(CHUNK_ELEMENTS, self.batch) if is_cpu else self.tile_rows, self.tile_rows)
        self.product = TileProduct(queries, pool, self.chunk_rows)
        # One row more than a tile has: what is excluded elsewhere is written there.
        self.buffer = torch.empty(self.tile_rows + 1, self.batch, dtype=pool.score_dtype, device=queries.device)
        self.limits = None if limits is None else _Limiter(limits, self.batch, self.chunk_rows)

    @property
    def num_limited(self) -> Tensor | None:
        """int64 `[batch]`: how many candidates the limits hid so far."""
        return None if self.limits is None else self.limits.count

    def chunks_of(self, start: int) -> Iterator[tuple[int, int]]:
        """First row and end of each chunk of the tile that begins at row `start`."""
        end = min(start + self.tile_rows, self.pool.num_rows)
        for first in range(start, end, self.chunk_rows):
            yield first, min(first + self.chunk_rows, end)

    def scores(self, start: int, stop: int, at: int = 0) -> Tensor | None:
        """Scores of rows, which take their place in the buffer from its row `at` on; at most up to its end.

        Returns:
            `[stop - start, batch]`, or None if it is known, at no cost, that none of the rows is a candidate.
        """
        tile = self.pool.slice(start, stop)
        is_all = self.is_all
        if self.is_free and not is_all:
            if not any(bool(candidates.any()) for candidates in tile.candidates):
                return None
            is_all = all(bool(candidates.all()) for candidates in tile.candidates)
        scores, done = self.buffer[at : at + stop - start], 0
        for rows, scales in tile.parts:
            self.product(rows, scales, scores[done : done + len(rows)])
            done += len(rows)
        if self.score_transform is not None:
            scores.copy_(self.score_transform(scores))
        if self.excluded is not None and self.limits is not None:  # what is hidden anyway is not counted
            self.excluded.hide(self.buffer, start, stop, at)
        if self.limits is not None:
            self.limits.hide(scores, tile, start)
        if tile.biases:
            scores += torch.cat(list(tile.biases))[:, None]
        if not is_all:
            hidden = ~torch.cat(list(tile.candidates))
            if self.is_free:
                scores.index_fill_(0, hidden.nonzero().squeeze(1), -torch.inf)
            else:
                scores.masked_fill_(hidden[:, None], -torch.inf)
        if self.excluded is not None and self.limits is None:
            self.excluded.hide(self.buffer, start, stop, at)
        return scores


class _Excluded:
    """Rows that are invisible to one query, `[batch, n]`; in order where that can be looked at for free."""

    def __init__(self, rows: Tensor, is_free: bool) -> None:
        self.rows = rows.T
        self.is_free = is_free
        if is_free:
            self.ordered, order = rows.flatten().sort()
            self.query = order // rows.shape[1]
            self.numbers: list[int] = self.ordered.tolist()

    def hide(self, buffer: Tensor, start: int, stop: int, at: int) -> None:
        """Put -inf in a buffer in which the rows from `start` to `stop` begin `at` its row; its last row is of none."""
        if self.is_free:
            part = slice(bisect_left(self.numbers, start), bisect_left(self.numbers, stop))
            if part.start < part.stop:
                buffer[self.ordered[part] - (start - at), self.query[part]] = -torch.inf
            return
        inside = (self.rows >= start) & (self.rows < stop)
        buffer.scatter_(0, torch.where(inside, self.rows - (start - at), len(buffer) - 1), -torch.inf)


class _Limiter:
    """Hides what is too good to be a negative, and counts it."""

    def __init__(self, limits: Limits, batch: int, chunk_rows: int) -> None:
        self.ceilings, self.guide = limits.ceilings, limits.guide
        device = self.guide.queries.device if self.ceilings is None and self.guide else None
        device = self.ceilings.device if self.ceilings is not None else device
        self.count = torch.zeros(batch, dtype=torch.int64, device=device)
        if self.guide is not None:
            dtype = self.guide.rows.score_dtype
            self.product = TileProduct(self.guide.queries, self.guide.rows, chunk_rows)
            self.buffer = torch.empty(0, batch, dtype=dtype, device=device)

    def hide(self, scores: Tensor, tile: RowPool, start: int) -> None:
        """Put -inf in the scores `[rows, batch]` of a tile that begins at row `start`."""
        is_hidden = torch.zeros_like(scores, dtype=torch.bool) if self.ceilings is None else scores > self.ceilings
        if self.guide is not None:
            if len(self.buffer) < len(scores):
                self.buffer = self.buffer.new_empty(scores.shape)
            opinions, done = self.buffer[: len(scores)], 0
            for rows, scales in self.guide.rows.slice(start, start + len(scores)).parts:
                self.product(rows, scales, opinions[done : done + len(rows)])
                done += len(rows)
            is_hidden |= opinions > self.guide.ceilings
        counts = torch.cat(list(tile.candidates))[:, None] & (scores > -torch.inf)
        self.count += (is_hidden & counts).sum(dim=0)
        scores.masked_fill_(is_hidden, -torch.inf)


def _rows(elements: int, batch: int) -> int:
    return min(max(elements // max(batch, 1), MIN_CHUNK_ROWS), MAX_TILE_ROWS)


def tile_bytes(batch: int, dim: int, num_rows: int, row_dtype: torch.dtype) -> int:
    """Bytes of what a pass over the rows allocates on a CPU for its tiles."""
    device = torch.device("meta")
    rows = torch.empty(num_rows, dim, dtype=row_dtype, device=device)
    scales = torch.empty(num_rows, device=device) if row_dtype == torch.int8 else None
    queries = torch.empty(batch, dim, device=device)
    pool = RowPool([rows], [rows.new_empty(num_rows, dtype=torch.bool)], [scales])
    tiles = Tiles(queries, pool)
    sums = 3 * (tiles.tile_rows // BLOCK + 1) * batch * 8
    return tiles.buffer.nbytes + tiles.product.nbytes + sums
