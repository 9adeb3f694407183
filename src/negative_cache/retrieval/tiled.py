"""The tiled pass in plain PyTorch: one product per chunk of rows, and no tensor of size batch x num_rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from negative_cache.retrieval.dense import exact_top_k
from negative_cache.retrieval.randomness import inverse_cdf, sample, uniforms
from negative_cache.retrieval.search import Retrieved, Search, group_bounds
from negative_cache.retrieval.tile_scores import BLOCK, Tiles, narrow_products


def retrieve_tiled(search: Search, generator: torch.Generator, tile_rows: int | None = None) -> Retrieved:
    """See `negative_cache.retrieval.retrieve`.

    Args:
        search: The queries, the rows, and what to return.
        generator: Source of randomness.
        tile_rows: Rows per tile; the distribution of the result does not depend on it.
    """
    search.check()
    pool = search.pool
    with narrow_products(pool):
        tiles = Tiles(search, tile_rows)
        if search.top_k is not None:
            return _best_of_groups(tiles, search, search.top_k, generator)
        reservoir = _Reservoir(tiles, search.num_samples, generator)
        best = _Best(tiles, min(search.num_best, pool.num_rows))
        for start in range(0, pool.num_rows, tiles.tile_rows):
            for first, stop in tiles.chunks_of(start):
                chunk = tiles.scores(first, stop, at=first - start)
                if chunk is not None:
                    best.add(first, chunk)
                    reservoir.add_(first - start, chunk)
            reservoir.draw(start, min(start + tiles.tile_rows, pool.num_rows))
        lse = reservoir.highest + reservoir.total.log()
        return Retrieved(lse, reservoir.rows, best.rows(), best.best_scores, tiles.num_hidden)


def _best_of_groups(tiles: Tiles, search: Search, top_k: int, generator: torch.Generator) -> Retrieved:
    scores, rows = _group_maxima(tiles, top_k)
    best_scores, best = exact_top_k(scores, min(search.num_best, top_k))
    return Retrieved(
        lse=scores.logsumexp(dim=1),
        rows=rows.gather(1, sample(scores, search.num_samples, generator)),
        best_rows=torch.where(best_scores > -torch.inf, rows.gather(1, best), -1),
        best_scores=best_scores,
        num_hidden=tiles.num_hidden,
    )


def mine_groups(search: Search, top_k: int) -> tuple[Tensor, Tensor]:
    """Score and position of the best row of each of top_k contiguous groups: `[batch, top_k]` each."""
    search._replace(top_k=top_k).check()
    with narrow_products(search.pool):
        scores, rows = _group_maxima(Tiles(search), top_k)
        return scores.contiguous(), rows.contiguous()


class _Reservoir:
    """Running sum of exp(score), and samples from the softmax over all tiles seen so far.

    A sample moves into a tile with probability t / r, to one of its rows in proportion to exp(score). t is the sum over
    the tile, and r the running sum including t. Sums are relative to the exponential of the highest score so far and
    have the dtype of the scores. float32 is exact enough for them: a tile adds one rounding error to r, and a draw uses
    sums over at most a few hundred numbers.
    """

    def __init__(self, tiles: Tiles, num_samples: int, generator: torch.Generator) -> None:
        device, batch = tiles.buffer.device, tiles.batch
        self.tiles = tiles
        self.generator = generator
        self.highest = tiles.buffer.new_full((batch,), -torch.inf)
        self.total = tiles.buffer.new_zeros(batch)
        self.rows = torch.zeros(batch, num_samples, dtype=torch.int64, device=device)
        # for each chunk of a tile: the highest score, and the sums of exp(score - highest) over blocks
        num_chunks, num_blocks = -(-tiles.tile_rows // tiles.chunk_rows), -(-tiles.chunk_rows // BLOCK)
        self.top = tiles.buffer.new_empty(num_chunks, batch)
        self.sums = tiles.buffer.new_empty(num_chunks, num_blocks, batch)
        self.maxima = tiles.buffer.new_empty(num_blocks, batch)
        self._clear()

    def _clear(self) -> None:
        self.top.fill_(-torch.inf)
        self.sums.zero_()
        self.is_empty = True

    def add_(self, at: int, scores: Tensor) -> None:
        """Add the chunk that begins `at` rows into its tile. Its scores `[rows, batch]` are overwritten by weights."""
        chunk = at // self.tiles.chunk_rows
        _reduce_blocks(torch.amax, scores, self.maxima)
        top = torch.amax(self.maxima[: -(-len(scores) // BLOCK)], dim=0, out=self.top[chunk])
        weights = scores.sub_(top.clamp(min=torch.finfo(top.dtype).min)).exp_()
        _reduce_blocks(torch.sum, weights, self.sums[chunk])
        self.is_empty = False

    def draw(self, start: int, stop: int) -> None:
        """Finish the tile of rows `start` to `stop`, and move some samples into it."""
        if self.is_empty:
            return
        limits, before = torch.finfo(self.top.dtype), self.highest
        self.highest = torch.maximum(before, self.top.amax(dim=0))
        finite = self.highest.clamp(min=limits.min)
        cumulative = (self.sums * (self.top - finite).exp()[:, None]).flatten(0, 1).cumsum(dim=0)
        self.total = self.total * (before - finite).exp() + cumulative[-1]
        if self.rows.shape[1]:
            chance = cumulative[-1] / self.total.clamp(min=limits.tiny)
            shape, dtype = (3, *self.rows.shape), chance.dtype
            move, in_tile, in_block = uniforms(shape, self.generator, chance.device, dtype)
            self._move(move < chance[:, None], start, stop, cumulative.T, in_tile, in_block)
        self._clear()

    def _move(
        self, moves: Tensor, start: int, stop: int, cumulative: Tensor, in_tile: Tensor, in_block: Tensor
    ) -> None:
        """Move the samples `moves [batch, num_samples]` into a tile, by a uniform for the block and one within it."""
        query = torch.arange(len(moves), device=moves.device)
        if self.tiles.is_free:  # in most tiles most samples stay where they are
            query = moves.any(dim=1).nonzero().squeeze(1)
            if len(query) == 0:
                return
            moves, cumulative, in_tile, in_block = (x[query] for x in (moves, cumulative, in_tile, in_block))
        tiles, num_blocks = self.tiles, self.sums.shape[1]
        # Blocks are numbered across the chunks of the tile, with num_blocks per chunk, even if the last one is shorter.
        # So block b lies in chunk b // num_blocks of the tile.
        block = inverse_cdf(cumulative, in_tile)
        begin = block // num_blocks * tiles.chunk_rows
        end = (begin + tiles.chunk_rows).clamp(max=stop - start)[:, :, None]
        members = (begin + block % num_blocks * BLOCK)[:, :, None] + torch.arange(BLOCK, device=block.device)
        weights = tiles.buffer[members.clamp(max=tiles.tile_rows - 1), query[:, None, None]]
        inside = torch.where(members < end, weights, 0).cumsum(dim=2)
        within = inverse_cdf(inside.flatten(0, 1), in_block.reshape(-1, 1)).view_as(block)
        drawn = start + members.gather(2, within[:, :, None]).squeeze(2)
        self.rows[query] = torch.where(moves, drawn, self.rows[query])


def _reduce_blocks(reduce: Callable[..., Tensor], values: Tensor, out: Tensor) -> None:
    """Reduce every BLOCK rows of `[rows, batch]` into `out [blocks, batch]`; the last block may have fewer rows.

    Each thread then reduces the values that it wrote, which are still in its cache. A single reduction over all rows
    would distribute them differently.
    """
    whole = len(values) // BLOCK
    if whole:
        reduce(values[: whole * BLOCK].view(whole, BLOCK, -1), dim=1, out=out[:whole])
    if whole * BLOCK < len(values):
        reduce(values[whole * BLOCK :], dim=0, out=out[whole])


class _Best:
    """The highest-scoring rows of all tiles seen so far; of equal scores, the lowest row."""

    def __init__(self, tiles: Tiles, count: int) -> None:
        self.count = count
        self.is_free = tiles.is_free
        self.best_scores = tiles.buffer.new_full((tiles.batch, count), -torch.inf)
        self.best_rows = torch.full((tiles.batch, count), -1, device=tiles.buffer.device)

    def add(self, start: int, scores: Tensor) -> None:
        """Add a chunk of scores `[rows, batch]`."""
        if self.count == 0:
            return
        query = torch.arange(scores.shape[1], device=scores.device)
        if self.is_free:  # most tiles have nothing better for most queries
            query = (scores.amax(dim=0) > self.best_scores[:, -1]).nonzero().squeeze(1)
            if len(query) == 0:
                return
            scores = scores[:, query]
        values, at = _exact_top_k_of_columns(scores, self.count)
        values = torch.cat([self.best_scores[query], values], dim=1)
        rows = torch.cat([self.best_rows[query], at + start], dim=1)
        self.best_scores[query], order = exact_top_k(values, self.count)
        self.best_rows[query] = rows.gather(1, order)

    def rows(self) -> Tensor:
        return torch.where(self.best_scores > -torch.inf, self.best_rows, -1)


def _exact_top_k_of_columns(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`exact_top_k` of `[rows, batch]` over rows: `[batch, at most k]`.

    The k best rows lie in the k blocks with the highest maxima; of equal maxima, the first blocks.
    """
    rows, batch = scores.shape
    whole = rows // BLOCK
    if k * BLOCK >= rows:
        return exact_top_k(scores.T, k)
    maxima = scores[: whole * BLOCK].view(whole, BLOCK, batch).amax(dim=1)
    _, blocks = exact_top_k(maxima.T, k)
    blocks = blocks.sort(dim=1).values  # rows in order, so that the first of equal scores are found
    members = (blocks * BLOCK)[:, :, None] + torch.arange(BLOCK, device=scores.device)
    rest = torch.arange(whole * BLOCK, rows, device=scores.device).expand(batch, -1)
    members = torch.cat([members.flatten(1), rest], dim=1)
    values, at = exact_top_k(scores.T.gather(1, members), k)
    return values, members.gather(1, at)


def _group_maxima(tiles: Tiles, k: int) -> tuple[Tensor, Tensor]:
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


def _maxima(tiles: Tiles, start: int, groups: int, length: int) -> tuple[Tensor, Tensor]:
    """Best scores and rows `[groups, batch]` of `groups` groups of `length` rows each, from row `start`."""
    stop = start + groups * length
    starts = torch.arange(start, stop, length, device=tiles.buffer.device)[:, None]
    best = tiles.buffer.new_full((groups, tiles.batch), -torch.inf)
    rows = starts.repeat(1, tiles.batch)
    for first in range(start, stop, tiles.tile_rows):  # several iterations only for one group longer than a tile
        end = min(first + tiles.tile_rows, stop)
        scores = tiles.scores(first, end)
        if scores is None:
            continue
        values, at = _first_maxima(scores.view(groups, (end - first) // groups, tiles.batch))
        is_better = values > best
        best = torch.where(is_better, values, best)
        rows = torch.where(is_better, first - start + starts + at, rows)
    return best, rows


def _first_maxima(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The largest values of `[groups, length, batch]` over `length`, and their first positions: `[groups, batch]`."""
    groups, length, batch = scores.shape
    if length % BLOCK or length < 4 * BLOCK:
        return scores.max(dim=1)
    # Maxima without positions are several times faster, so the position is searched in one block only.
    blocks = scores.view(groups, length // BLOCK, BLOCK, batch)
    best = blocks.amax(dim=2).max(dim=1)
    at = best.indices[:, None, None].expand(-1, 1, BLOCK, -1)
    within = blocks.gather(1, at).squeeze(1).max(dim=1)
    return best.values, best.indices * BLOCK + within.indices
