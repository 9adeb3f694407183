"""Scores of ranges of rows in a reused buffer, by the fastest product for the dtype of the rows."""

from __future__ import annotations

import contextlib
import threading
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from negative_cache.cache.columns import quantize
from negative_cache.cache.validation import reads_without_sync
from negative_cache.retrieval.search import Ceilings, RowPool, Search

# On a CPU, a chunk of scores is read several times: it should fit in a core's cache, and be long enough for the
# product to run at full speed. Each tile adds about a dozen small operations. On other devices, a tile is one chunk.
CHUNK_ELEMENTS, TILE_ELEMENTS, OTHER_TILE_ELEMENTS = 2048 * 128, 16384 * 128, 2**24
MIN_CHUNK_ROWS, MAX_TILE_ROWS = 256, 16384
# Elements of rows that are converted at once before the product: as many as fit in a CPU core's cache.
_CONVERTED_ELEMENTS = 2048 * 768
_HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
# A draw from a tile first chooses a block of this many rows, so that only one block is read row by row.
BLOCK = 64


class Tiles:
    """Scores `[rows, batch]` of chunks of rows. The chunks of a tile stay in the buffer until the next tile.

    Args:
        search: The queries and the rows.
        tile_rows: Rows per tile; None for a size that suits the device.
    """

    def __init__(self, search: Search, tile_rows: int | None = None) -> None:
        queries, pool, batch = search.queries, search.pool, len(search.queries)
        self.pool, self.batch, self.score_transform = pool, batch, search.score_transform
        self.is_free = reads_without_sync(queries)
        self.all_are_candidates = self.is_free and bool(pool.is_candidate.all())
        excluded = search.excluded
        self.excluded = None if excluded is None or excluded.shape[1] == 0 else _Excluded(excluded, self.is_free)
        is_cpu = queries.device.type in ("cpu", "meta")
        if tile_rows is None:
            tile_rows = _rows(TILE_ELEMENTS if is_cpu else OTHER_TILE_ELEMENTS, batch)
        self.tile_rows = min(tile_rows, max(pool.num_rows, 1))
        self.chunk_rows = min(_rows(CHUNK_ELEMENTS, batch) if is_cpu else self.tile_rows, self.tile_rows)
        self.product = TileProduct(queries, pool, self.chunk_rows)
        # One row more than a tile has, to which -inf is written for excluded rows of other tiles.
        self.buffer = torch.empty(self.tile_rows + 1, batch, dtype=pool.score_dtype, device=queries.device)
        self.ceilings = None if search.ceilings is None else _Ceilings(search.ceilings, batch, self.chunk_rows)

    @property
    def num_hidden(self) -> Tensor | None:
        """int64 `[batch]`: how many rows the ceilings have hidden so far; None without ceilings."""
        return None if self.ceilings is None else self.ceilings.count

    def chunks_of(self, start: int) -> Iterator[tuple[int, int]]:
        """Yield the first row and the end of each chunk of the tile that begins at row `start`."""
        end = min(start + self.tile_rows, self.pool.num_rows)
        for first in range(start, end, self.chunk_rows):
            yield first, min(first + self.chunk_rows, end)

    def scores(self, start: int, stop: int, at: int = 0) -> Tensor | None:
        """Compute the scores of rows `start` to `stop`, written to the buffer from its row `at`.

        Returns:
            `[stop - start, batch]`, or None if no query may see any of the rows and this is known without a sync.
        """
        tile = self.pool.slice(start, stop)
        all_are_candidates = self.all_are_candidates
        if self.is_free and not all_are_candidates:
            num_candidates = int(tile.is_candidate.sum())
            if num_candidates == 0:
                return None
            all_are_candidates = num_candidates == tile.num_rows
        scores = self.buffer[at : at + stop - start]
        self.product(tile, scores)
        if self.score_transform is not None:
            scores.copy_(self.score_transform(scores))
        if self.excluded is not None:  # before the ceilings: a row that is excluded anyway does not count as hidden
            self.excluded.hide(self.buffer, start, stop, at)
        if self.ceilings is not None:
            self.ceilings.hide(scores, tile, start)
        if tile.biases is not None:
            scores += tile.biases[:, None]
        if not all_are_candidates:
            hidden = ~tile.is_candidate
            if self.is_free:
                scores.index_fill_(0, hidden.nonzero().squeeze(1), -torch.inf)
            else:
                scores.masked_fill_(hidden[:, None], -torch.inf)
        return scores


class _Excluded:
    """Rows that each query must not see, `[batch, n]`; sorted if they can be read without a sync."""

    def __init__(self, rows: Tensor, is_free: bool) -> None:
        self.rows = rows.T
        self.is_free = is_free
        if is_free:
            self.ordered, order = rows.flatten().sort()
            self.query = order // rows.shape[1]
            self.numbers: list[int] = self.ordered.tolist()

    def hide(self, buffer: Tensor, start: int, stop: int, at: int) -> None:
        """Write -inf to a buffer that holds rows `start` to `stop` from its row `at`.

        The last row of the buffer is not a row of the cache.
        """
        if self.is_free:
            part = slice(bisect_left(self.numbers, start), bisect_left(self.numbers, stop))
            if part.start < part.stop:
                buffer[self.ordered[part] - (start - at), self.query[part]] = -torch.inf
            return
        inside = (self.rows >= start) & (self.rows < stop)
        buffer.scatter_(0, torch.where(inside, self.rows - (start - at), len(buffer) - 1), -torch.inf)


class _Ceilings:
    """Hides false negatives and counts them."""

    def __init__(self, ceilings: Ceilings, batch: int, chunk_rows: int) -> None:
        self.scores, self.guide_scores, self.guide_pool = ceilings.scores, ceilings.guide_scores, ceilings.guide_pool
        limits = self.guide_scores if self.scores is None else self.scores
        self.count = torch.zeros(batch, dtype=torch.int64, device=None if limits is None else limits.device)
        if self.guide_pool is not None and ceilings.guide_queries is not None:
            self.product = TileProduct(ceilings.guide_queries, self.guide_pool, chunk_rows)
            self.buffer = self.count.new_empty(0, batch, dtype=self.guide_pool.score_dtype)

    def hide(self, scores: Tensor, tile: RowPool, start: int) -> None:
        """Write -inf to the scores `[rows, batch]` of false negatives, in a tile that begins at row `start`."""
        is_hidden = torch.zeros_like(scores, dtype=torch.bool) if self.scores is None else scores > self.scores
        if self.guide_pool is not None and self.guide_scores is not None:
            if len(self.buffer) < len(scores):
                self.buffer = self.buffer.new_empty(scores.shape)
            products = self.buffer[: len(scores)]
            self.product(self.guide_pool.slice(start, start + len(scores)), products)
            is_hidden |= products > self.guide_scores
        is_seen = tile.is_candidate[:, None] & (scores > -torch.inf)
        self.count += (is_hidden & is_seen).sum(dim=0)
        scores.masked_fill_(is_hidden, -torch.inf)


class TileProduct:
    """`rows @ queries.T` for tiles of rows, in float32 (float64 for float64 rows).

    Rows come first, because oneDNN is faster that way and the reductions that follow run over rows. On CPUs with
    AVX-512, int8 rows are multiplied as integers with queries that are rounded to int8; elsewhere they are multiplied
    as float32. bfloat16 rows are multiplied as bfloat16 with float32 sums on CPUs that support it.

    Args:
        queries: `[batch, dim]`.
        pool: The rows.
        max_rows: Maximum number of rows per product if rows or products have to be converted.
    """

    def __init__(self, queries: Tensor, pool: RowPool, max_rows: int) -> None:
        device, (batch, dim) = queries.device, queries.shape
        self.dtype = pool.score_dtype
        self.queries = queries.to(self.dtype).T
        self.is_integer = pool.scales is not None and multiplies_integers(device)
        self.max_rows = max(min(max_rows, _CONVERTED_ELEMENTS // dim), 1)
        self.integers = torch.empty(self.max_rows if self.is_integer else 0, batch, dtype=torch.int32, device=device)
        if self.is_integer:
            rounded, self.scales = quantize(queries)
            self.rounded = rounded.T
        is_converted = pool.embeddings.dtype != self.dtype and not self.is_integer
        self.converted = torch.empty(self.max_rows if is_converted else 0, dim, dtype=self.dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes that a product allocates besides its result. For integers, oneDNN also copies the tile."""
        copied = len(self.integers) * len(self.queries)
        return copied + self.integers.nbytes + self.converted.nbytes

    def __call__(self, pool: RowPool, out: Tensor) -> None:
        """Write the products of the pool's n rows to `out [n, batch]`."""
        rows, scales = pool.embeddings, pool.scales
        if rows.dtype == self.dtype:
            torch.mm(rows, self.queries, out=out)
            return
        for start in range(0, len(rows), self.max_rows):
            part = slice(start, start + self.max_rows)
            self._convert(rows[part], None if scales is None else scales[part], out[part])

    def _convert(self, rows: Tensor, scales: Tensor | None, out: Tensor) -> None:
        if scales is not None and self.is_integer:
            integers = self.integers[: len(rows)]
            out.copy_(torch._int_mm(rows, self.rounded, out=integers))
            out *= self.scales
        else:
            torch.mm(self.converted[: len(rows)].copy_(rows), self.queries, out=out)
        if scales is not None:
            out *= scales[:, None]


def multiplies_integers(device: torch.device) -> bool:
    """Whether int8 products are faster than float32 ones on this device; "meta" stands for the CPU."""
    return device.type in ("cpu", "meta") and _HAS_AVX512


def describe(pool: RowPool) -> str:
    """How tiles of these rows are multiplied, for a log line."""
    dtype = str(pool.embeddings.dtype).removeprefix("torch.")
    how = " in integers" if dtype == "int8" and multiplies_integers(pool.embeddings.device) else ""
    return f"{dtype} rows{how}"


@contextlib.contextmanager
def narrow_products(pool: RowPool) -> Iterator[None]:
    """Let CPUs multiply bfloat16 rows, and int8 rows without integer products, in bfloat16.

    The setting applies to the whole process. It is restored when the last running pass ends.
    """
    mkldnn: Any = torch.backends.mkldnn
    settings = mkldnn.matmul
    is_narrow = pool.embeddings.dtype in (torch.bfloat16, torch.int8)
    if not is_narrow or pool.embeddings.device.type != "cpu" or torch.compiler.is_compiling():
        yield
        return
    with _setting.lock:
        if _setting.depth == 0:
            _setting.before = settings.fp32_precision
            if _setting.before == mkldnn.fp32_precision:
                _setting.before = "none"  # inherited: it must keep following the global setting
            settings.fp32_precision = "bf16"
        _setting.depth += 1
    try:
        yield
    finally:
        with _setting.lock:
            _setting.depth -= 1
            if _setting.depth == 0:
                settings.fp32_precision = _setting.before


class _Setting:
    """The number of running passes that need the changed setting, and its previous value."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.depth = 0
        self.before = "none"


_setting = _Setting()


def _rows(elements: int, batch: int) -> int:
    return min(max(elements // max(batch, 1), MIN_CHUNK_ROWS), MAX_TILE_ROWS)


def tile_bytes(batch: int, dim: int, num_rows: int, row_dtype: torch.dtype) -> int:
    """Bytes that a pass over the rows allocates on a CPU for its tiles."""
    device = torch.device("meta")
    rows = torch.empty(num_rows, dim, dtype=row_dtype, device=device)
    scales = torch.empty(num_rows, device=device) if row_dtype == torch.int8 else None
    pool = RowPool(rows, rows.new_empty(num_rows, dtype=torch.bool), scales)
    tiles = Tiles(Search(torch.empty(batch, dim, device=device), pool))
    sums = 4 * (tiles.tile_rows // BLOCK + 1) * batch * tiles.buffer.itemsize  # plain, scaled, cumulative, contiguous
    return tiles.buffer.nbytes + tiles.product.nbytes + sums
