"""The rows of one or several caches, seen as one numbered pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from negative_cache.cache.specs import dequantize

ScoreTransform = Callable[[Tensor], Tensor]


class RowPool(NamedTuple):
    """Embeddings of all rows, and which of them may be retrieved.

    Attributes:
        embeddings: Tensors `[num_rows, dim]`, concatenated in thought: row numbers run through all of them.
        candidates: bool `[num_rows]` each; False rows are invisible.
        scales: float32 `[num_rows]` for a tensor of int8 rows, which are multiplied with them; None for others.
        biases: float32 `[num_rows]` each: what is added to the scores of a row; empty for nothing.
    """

    embeddings: Sequence[Tensor]
    candidates: Sequence[Tensor]
    scales: Sequence[Tensor | None] = ()
    biases: Sequence[Tensor] = ()

    @property
    def num_rows(self) -> int:
        return sum(len(part) for part in self.embeddings)

    @property
    def score_dtype(self) -> torch.dtype:
        """float64 for float64 rows, float32 for all narrower ones."""
        return torch.float64 if self.embeddings[0].dtype == torch.float64 else torch.float32

    @property
    def parts(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Each tensor of rows with its scales."""
        return zip(self.embeddings, self.scales or [None] * len(self.embeddings), strict=True)

    def slice(self, start: int, stop: int) -> RowPool:
        """A range of the rows, as views."""
        pieces: list[tuple[Tensor, Tensor, Tensor | None]] = []
        biases: list[Tensor] = []
        offset = 0
        for number, ((part, scales), candidates) in enumerate(zip(self.parts, self.candidates, strict=True)):
            low, high = max(start - offset, 0), min(stop - offset, len(part))
            if low < high or (start == stop and not pieces):
                at = slice(low, max(low, high))
                pieces.append((part[at], candidates[at], None if scales is None else scales[at]))
                biases.extend(bias[at] for bias in self.biases[number : number + 1])
            offset += len(part)
        embeddings, visible, scales_of_parts = zip(*pieces, strict=True)
        return RowPool(embeddings, visible, scales_of_parts, biases)

    def select(self, rows: Tensor) -> RowPool:
        """`rows [n]` as a pool of their own, in which all are candidates."""
        biases = [torch.cat(list(self.biases))[rows]] if self.biases else []
        return RowPool([self.gather(rows)], [torch.ones_like(rows, dtype=torch.bool)], biases=biases)

    def gather(self, rows: Tensor) -> Tensor:
        """Embeddings of `rows [n]`: `[n, dim]`, int8 ones multiplied with their scales."""
        if len(self.embeddings) == 1:
            return _rows_of(*next(self.parts), rows)
        gathered, start = None, 0
        for part, scales in self.parts:
            inside = (rows >= start) & (rows < start + len(part))
            values = _rows_of(part, scales, torch.where(inside, rows - start, 0))
            gathered = values if gathered is None else torch.where(inside[:, None], values, gathered)
            start += len(part)
        assert gathered is not None
        return gathered


def _rows_of(part: Tensor, scales: Tensor | None, rows: Tensor) -> Tensor:
    return part[rows] if scales is None else dequantize(part[rows], scales[rows])


class Guide(NamedTuple):
    """Products of other embeddings, by which a row may be taken for a false negative.

    Attributes:
        queries: `[batch, guide_dim]`.
        rows: The guide's embeddings of all rows.
        ceilings: `[batch]`: rows with a larger product are hidden from the query.
    """

    queries: Tensor
    rows: RowPool
    ceilings: Tensor


class Limits(NamedTuple):
    """What makes a row too good to be a negative of a query.

    Attributes:
        ceilings: `[batch]`: rows with a larger score (before biases) are hidden from the query; None for no limit.
        guide: The same by other embeddings.
    """

    ceilings: Tensor | None = None
    guide: Guide | None = None

    def select(self, rows: Tensor) -> Limits:
        """The limits for `rows [n]` alone, as numbered in `RowPool.select`."""
        guide = None if self.guide is None else self.guide._replace(rows=self.guide.rows.select(rows))
        return self._replace(guide=guide)


class Retrieved(NamedTuple):
    """What one pass over the pool gives for `batch` queries.

    Attributes:
        lse: `[batch]`: logsumexp of the scores of each query's candidates (of the top_k rows where that
            is given); -inf for a query without candidates.
        rows: int64 `[batch, num_samples]`: rows drawn from the softmax over the same scores; arbitrary but
            valid numbers where lse is -inf.
        top_rows: int64 `[batch, num_top]`: the highest scoring rows in falling order, -1 where there are
            not so many candidates.
        top_scores: `[batch, num_top]`: their scores, -inf where there are not so many candidates.
        group_rows: int64 `[batch, top_k]`: the best row of each group, arbitrary for one without candidates; None
            without top_k.
        num_limited: int64 `[batch]`: how many candidates the limits hide; None without limits.
    """

    lse: Tensor
    rows: Tensor
    top_rows: Tensor
    top_scores: Tensor
    group_rows: Tensor | None = None
    num_limited: Tensor | None = None


def group_bounds(num_rows: int, num_groups: int) -> tuple[int, int]:
    """Split rows into contiguous groups, the longer ones first.

    Returns:
        The length of the shorter groups, and how many groups are longer by one.
    """
    return num_rows // num_groups, num_rows % num_groups


def group_of(rows: Tensor, num_rows: int, num_groups: int) -> Tensor:
    """The group of each of `rows [n]`: int64 `[n]`."""
    size, num_longer = group_bounds(num_rows, num_groups)
    boundary = num_longer * (size + 1)
    return torch.where(rows < boundary, rows // (size + 1), num_longer + (rows - boundary) // size)


def check_queries(queries: Tensor, pool: RowPool, top_k: int | None) -> None:
    """Raise ValueError for queries that do not match the pool, or a pool smaller than top_k."""
    dim = pool.embeddings[0].shape[1]
    if queries.dim() != 2 or queries.shape[1] != dim:
        raise ValueError(f"Query embeddings have shape {list(queries.shape)}; expected [batch, {dim}].")
    if queries.device != pool.embeddings[0].device:
        raise ValueError(
            f"Query embeddings are on {queries.device}, the cache is on {pool.embeddings[0].device}. "
            "Move the handler or loss with .to(device)."
        )
    if top_k is not None and not 1 <= top_k <= pool.num_rows:
        raise ValueError(f"top_k is {top_k}; it must be from 1 to the {pool.num_rows} rows of the cache.")
