"""The tiled pass in plain PyTorch: one product per tile of rows, nothing of size batch x num_rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from negative_cache.features import is_free_to_read
from negative_cache.randomness import uniforms
from negative_cache.retrieval.pool import Retrieved, RowPool, ScoreTransform, check_queries, group_bounds
from negative_cache.retrieval.product import TileProduct, narrow_products
from negative_cache.retrieval.reference import exact_top_k, sample

# On a CPU a tile of scores is read several times: it should stay in a core's cache, and be long enough for the product
# to run at full speed. Elsewhere it should keep the device busy.
TILE_ELEMENTS = 8192 * 128
OTHER_TILE_ELEMENTS = 2**24
MIN_TILE_ROWS, MAX_TILE_ROWS = 256, 16384
# A draw from a tile chooses a block of so many rows first, so that only one block is looked at row by row.
BLOCK = 64


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
    with narrow_products(pool):
        tiles = _Tiles(queries, pool, score_transform, excluded, tile_rows)
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
            best.add(start, scores)
            reservoir.add_(start, scores)
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
    with narrow_products(pool):
        return _group_maxima(_Tiles(queries, pool, score_transform, excluded), top_k)


def _tile_rows(queries: Tensor) -> int:
    elements = TILE_ELEMENTS if queries.device.type in ("cpu", "meta") else OTHER_TILE_ELEMENTS
    return min(max(elements // max(len(queries), 1), MIN_TILE_ROWS), MAX_TILE_ROWS)


def tile_bytes(batch: int, dim: int, num_rows: int, row_dtype: torch.dtype) -> int:
    """Bytes of what a pass over the rows allocates on a CPU for its tiles."""
    device = torch.device("meta")
    rows = torch.empty(num_rows, dim, dtype=row_dtype, device=device)
    scales = torch.empty(num_rows, device=device) if row_dtype == torch.int8 else None
    queries = torch.empty(batch, dim, device=device)
    pool = RowPool([rows], [rows.new_empty(num_rows, dtype=torch.bool)], [scales])
    tiles = _Tiles(queries, pool)
    sums = 2 * (tiles.tile_rows // BLOCK + 1) * batch * 8
    return tiles.buffer.nbytes + tiles.product.nbytes + sums


class _Tiles:
    """Iterates over (first row, scores `[rows of the tile, batch]`). The next tile overwrites the last one's scores."""

    def __init__(
        self,
        queries: Tensor,
        pool: RowPool,
        score_transform: ScoreTransform | None = None,
        excluded: Tensor | None = None,
        tile_rows: int | None = None,
    ) -> None:
        tile_rows = tile_rows or _tile_rows(queries)
        self.pool = pool
        self.batch = len(queries)
        self.score_transform = score_transform
        self.excluded = None if excluded is None or excluded.shape[1] == 0 else excluded.T
        self.product = TileProduct(queries, pool, min(tile_rows, max(pool.num_rows, 1)))
        self.tile_rows = self.product.max_rows
        # One row more than a tile has: what is excluded elsewhere is written there.
        self.buffer = torch.empty(self.tile_rows + 1, self.batch, dtype=pool.score_dtype, device=queries.device)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, self.pool.num_rows, self.tile_rows):
            scores = self.scores(start, min(start + self.tile_rows, self.pool.num_rows))
            if scores is not None:
                yield start, scores

    def scores(self, start: int, stop: int) -> Tensor | None:
        """Scores of at most `tile_rows` rows; None if it is known, at no cost, that none of them is a candidate."""
        tile = self.pool.slice(start, stop)
        is_all = False
        if is_free_to_read(self.buffer):
            if not any(bool(candidates.any()) for candidates in tile.candidates):
                return None
            is_all = all(bool(candidates.all()) for candidates in tile.candidates)
        scores, at = self.buffer[: stop - start], 0
        for rows, scales in tile.parts:
            self.product(rows, scales, scores[at : at + len(rows)])
            at += len(rows)
        if self.score_transform is not None:
            scores.copy_(self.score_transform(scores))
        if not is_all:
            candidates = torch.cat(list(tile.candidates))
            scores += torch.where(candidates, 0.0, -torch.inf).to(scores.dtype)[:, None]
        if self.excluded is not None:
            inside = (self.excluded >= start) & (self.excluded < stop)
            self.buffer.scatter_(0, torch.where(inside, self.excluded - start, self.tile_rows), -torch.inf)
        return scores


class _Reservoir:
    """Running logsumexp, and samples from the softmax over all tiles seen so far.

    After a tile with logsumexp t and a running logsumexp r (t included), a sample moves into the tile
    with probability exp(t - r), to a row of it in proportion to exp(score).
    """

    def __init__(self, tiles: _Tiles, num_samples: int, generator: torch.Generator) -> None:
        device = tiles.buffer.device
        self.generator = generator
        # float64: over thousands of tiles a float32 sum would drift
        self.lse = torch.full((tiles.batch,), -torch.inf, dtype=torch.float64, device=device)
        self.rows = torch.zeros(tiles.batch, num_samples, dtype=torch.int64, device=device)

    def add_(self, start: int, scores: Tensor) -> None:
        """Take a tile in; its scores `[rows, batch]` are overwritten."""
        top = scores.amax(dim=0)
        weights = scores.sub_(torch.where(top > -torch.inf, top, 0)).exp_()
        blocks = _sums_of_blocks(weights)
        cumulative = blocks.to(torch.float64).cumsum(dim=0)
        tile_lse = top.double() + cumulative[-1].log()
        lse = torch.logaddexp(self.lse, tile_lse)
        chance = (tile_lse - torch.where(lse.isfinite(), lse, 0)).exp()
        self.lse = lse
        if self.rows.shape[1] == 0:
            return
        move, in_tile, in_block = uniforms((3, *self.rows.shape), self.generator, scores.device)
        moves = move < chance[:, None]
        if is_free_to_read(scores) and not bool(moves.any()):
            return
        block = _inverse_cdf(cumulative.T, in_tile)
        members = (block * BLOCK)[:, :, None] + torch.arange(BLOCK, device=block.device)
        query = torch.arange(len(block), device=block.device)[:, None, None]
        inside = weights[members.clamp(max=len(weights) - 1), query].to(torch.float64)
        inside = torch.where(members < len(weights), inside, 0).cumsum(dim=2)
        within = _inverse_cdf(inside.flatten(0, 1), in_block.reshape(-1, 1)).view_as(block)
        self.rows = torch.where(moves, start + members.gather(2, within[:, :, None]).squeeze(2), self.rows)


def _sums_of_blocks(weights: Tensor) -> Tensor:
    """Sums over each BLOCK rows of `[rows, batch]`, the last ones of fewer: `[blocks, batch]`."""
    whole = len(weights) // BLOCK * BLOCK
    sums = weights[:whole].view(-1, BLOCK, weights.shape[1]).sum(dim=1)
    if whole == len(weights):
        return sums
    return torch.cat([sums, weights[whole:].sum(dim=0, keepdim=True)])


def _inverse_cdf(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """Positions `[n, m]` drawn with `uniform [n, m]` from cumulative weights `[n, length]`; never one of weight 0."""
    cumulative = cumulative.contiguous()
    # `right=True` never ends on an element of weight 0: its cumulative sum equals that of the one before.
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    last = cumulative.argmax(dim=1, keepdim=True)  # the first position that has the full sum
    return torch.minimum(drawn, last)


class _Best:
    """The highest scoring rows of all tiles seen so far; of equal ones the lowest."""

    def __init__(self, tiles: _Tiles, count: int) -> None:
        self.count = count
        self.top_scores = tiles.buffer.new_full((tiles.batch, count), -torch.inf)
        self.top_rows = torch.full((tiles.batch, count), -1, device=tiles.buffer.device)

    def add(self, start: int, scores: Tensor) -> None:
        """Take a tile of scores `[rows, batch]` in."""
        if self.count == 0:
            return
        query = torch.arange(scores.shape[1], device=scores.device)
        if is_free_to_read(scores):  # most tiles have nothing better for most queries
            query = (scores.amax(dim=0) > self.top_scores[:, -1]).nonzero().squeeze(1)
            if len(query) == 0:
                return
            scores = scores[:, query]
        values, at = _exact_top_k_of_columns(scores, self.count)
        values = torch.cat([self.top_scores[query], values], dim=1)
        rows = torch.cat([self.top_rows[query], at + start], dim=1)
        self.top_scores[query], order = exact_top_k(values, self.count)
        self.top_rows[query] = rows.gather(1, order)

    def rows(self) -> Tensor:
        return torch.where(self.top_scores > -torch.inf, self.top_rows, -1)


def _exact_top_k_of_columns(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`exact_top_k` of `[rows, batch]` over rows: `[batch, at most k]`.

    The k best rows lie in the k blocks with the highest maxima, the first ones of equals.
    """
    rows, batch = scores.shape
    whole = rows // BLOCK
    if k * BLOCK >= rows:
        return exact_top_k(scores.T, k)
    maxima = scores[: whole * BLOCK].view(whole, BLOCK, batch).amax(dim=1)
    _, blocks = exact_top_k(maxima.T, k)
    blocks = blocks.sort(dim=1).values  # rows in order, so that the first ones of equals are found
    members = (blocks * BLOCK)[:, :, None] + torch.arange(BLOCK, device=scores.device)
    rest = torch.arange(whole * BLOCK, rows, device=scores.device).expand(batch, -1)
    members = torch.cat([members.flatten(1), rest], dim=1)
    values, at = exact_top_k(scores.T.gather(1, members), k)
    return values, members.gather(1, at)


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
    return torch.cat([scores for scores, _ in parts]).T, torch.cat([rows for _, rows in parts]).T


def _maxima(tiles: _Tiles, start: int, groups: int, length: int) -> tuple[Tensor, Tensor]:
    """Best scores and rows `[groups, batch]` of groups of `length` rows from `start` on, several if they fit a tile."""
    device = tiles.buffer.device
    best = tiles.buffer.new_full((groups, tiles.batch), -torch.inf)
    rows = torch.arange(start, start + groups * length, length, device=device)[:, None].repeat(1, tiles.batch)
    stop = start + groups * length
    step = groups * length if groups > 1 else tiles.tile_rows
    for first in range(start, stop, step):
        scores = tiles.scores(first, min(first + step, stop))
        if scores is None:
            continue
        values, at = _first_maxima(scores.view(groups, -1, tiles.batch))
        is_better = values > best
        best = torch.where(is_better, values, best)
        rows = torch.where(is_better, first + at + length * torch.arange(groups, device=device)[:, None], rows)
    return best, rows


def _first_maxima(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The largest values of `[groups, length, batch]` over `length`, and where they come first: `[groups, batch]`."""
    groups, length, batch = scores.shape
    if length % BLOCK or length < 4 * BLOCK:
        return scores.max(dim=1)
    # Maxima without positions are several times faster, so the position is looked for in one block alone.
    blocks = scores.view(groups, -1, BLOCK, batch)
    best = blocks.amax(dim=2).max(dim=1)
    at = best.indices[:, None, None].expand(-1, 1, BLOCK, -1)
    within = blocks.gather(1, at).squeeze(1).max(dim=1)
    return best.values, best.indices * BLOCK + within.indices
