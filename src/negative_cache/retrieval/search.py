"""The input and the output of a pass over the cached rows, for all implementations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from negative_cache.cache.columns import dequantize
from negative_cache.cache.index import is_in_row

ScoreTransform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Scale:
    """A score transform that multiplies by a factor: a float, or a tensor `[]`."""

    factor: float | Tensor

    def __call__(self, scores: Tensor) -> Tensor:
        return scores * self.factor


class RowPool(NamedTuple):
    """The embeddings of all rows, and which of them may be retrieved.

    Attributes:
        embeddings: `[num_rows, dim]`.
        is_candidate: bool `[num_rows]`; False for rows that no query may see.
        scales: float32 `[num_rows]`, factors of int8 rows; None for other dtypes.
        biases: float32 `[num_rows]`, added to the scores of each row; None for nothing.
    """

    embeddings: Tensor
    is_candidate: Tensor
    scales: Tensor | None = None
    biases: Tensor | None = None

    @property
    def num_rows(self) -> int:
        return self.embeddings.shape[0]

    @property
    def score_dtype(self) -> torch.dtype:
        """float64 for float64 rows, float32 for all narrower ones."""
        return torch.float64 if self.embeddings.dtype == torch.float64 else torch.float32

    def slice(self, start: int, stop: int) -> RowPool:
        """A range of the rows, as views."""
        at = slice(start, stop)
        scales = None if self.scales is None else self.scales[at]
        biases = None if self.biases is None else self.biases[at]
        return RowPool(self.embeddings[at], self.is_candidate[at], scales, biases)

    def select(self, rows: Tensor) -> RowPool:
        """Copy `rows [n]` to a pool in which all rows may be retrieved; int8 rows become float32."""
        biases = None if self.biases is None else self.biases[rows]
        return RowPool(self.gather(rows), torch.ones_like(rows, dtype=torch.bool), None, biases)

    def gather(self, rows: Tensor) -> Tensor:
        """Embeddings of `rows [n]`: `[n, dim]`; int8 rows become float32."""
        values = self.embeddings[rows]
        return values if self.scales is None else dequantize(values, self.scales[rows])


class Ceilings(NamedTuple):
    """The highest similarities that a negative of each query may have. Rows above them count as false negatives.

    Attributes:
        scores: `[batch]`: rows with a higher score (before biases) are hidden from the query; None for no limit.
        guide_queries: `[batch, guide_dim]`: a guide's embeddings of the queries; None without a guide.
        guide_pool: The guide's embeddings of all rows; None without a guide.
        guide_scores: `[batch]`: rows with a larger product of the guide's embeddings are hidden; None without a guide.
    """

    scores: Tensor | None = None
    guide_queries: Tensor | None = None
    guide_pool: RowPool | None = None
    guide_scores: Tensor | None = None


class Search(NamedTuple):
    """A pass over the rows of a pool, without gradient, that samples from each query's softmax.

    With `s = score_transform(queries @ rows.T) + biases`, restricted to the rows that a query may see (and, with
    top_k, to the best row of each of k contiguous groups of rows), the pass computes `s.logsumexp(1)` and draws from
    `s.softmax(1)`, independently for each query and sample.

    Attributes:
        queries: `[batch, dim]`, on the pool's device.
        pool: The rows. Scores are computed in float32, or in float64 for float64 rows.
        score_transform: Elementwise function of the dot products; None for the products themselves.
        excluded: int64 `[batch, n]`: rows that each query must not see, -1 for none; or None.
        ceilings: Limits above which a row counts as a false negative; None for no limit.
        top_k: Number of groups; None for all rows.
        num_samples: Draws per query.
        num_best: Number of highest-scoring rows to return; with top_k, out of the best rows of the groups.
    """

    queries: Tensor
    pool: RowPool
    score_transform: ScoreTransform | None = None
    excluded: Tensor | None = None
    ceilings: Ceilings | None = None
    top_k: int | None = None
    num_samples: int = 1
    num_best: int = 0

    def check(self) -> None:
        """Raise ValueError for queries that do not match the pool, or top_k above the number of rows."""
        queries, pool = self.queries, self.pool
        dim = pool.embeddings.shape[1]
        if queries.dim() != 2 or queries.shape[1] != dim:
            raise ValueError(f"Query embeddings have shape {list(queries.shape)}; expected [batch, {dim}].")
        if queries.device != pool.embeddings.device:
            raise ValueError(
                f"Query embeddings are on {queries.device}, the cache is on {pool.embeddings.device}. "
                "Move the handler or loss with .to(device)."
            )
        if self.top_k is not None and not 1 <= self.top_k <= pool.num_rows:
            raise ValueError(f"top_k is {self.top_k}; it must be from 1 to the {pool.num_rows} rows of the cache.")


class Retrieved(NamedTuple):
    """The result of a `Search` of `batch` queries.

    Attributes:
        lse: `[batch]`: logsumexp of the scores of all rows that the query sees (with top_k: of the best of each
            group); -inf for a query that sees no row.
        rows: int64 `[batch, num_samples]`: rows drawn from the softmax of the same scores; arbitrary but valid
            numbers where lse is -inf.
        best_rows: int64 `[batch, num_best]`: the highest-scoring rows in descending order, padded with -1.
        best_scores: `[batch, num_best]`: their scores, padded with -inf.
        num_hidden: int64 `[batch]`: how many rows the ceilings hide; None without ceilings.
    """

    lse: Tensor
    rows: Tensor
    best_rows: Tensor
    best_scores: Tensor
    num_hidden: Tensor | None = None


def group_bounds(num_rows: int, num_groups: int) -> tuple[int, int]:
    """Split rows into contiguous groups, the longer ones first.

    Returns:
        The length of the shorter groups, and how many groups are longer by one.
    """
    return num_rows // num_groups, num_rows % num_groups


def dense_scores(search: Search) -> Tensor:
    """The scores of all rows, -inf where a query must not see a row: `[batch, num_rows]` in the pool's score dtype."""
    pool, scores = search.pool, similarities(search)
    if search.ceilings is not None:
        scores = scores.masked_fill(is_above(scores, search.ceilings), -torch.inf)
    if pool.biases is not None:
        scores = scores + pool.biases
    scores = scores.masked_fill(~pool.is_candidate, -torch.inf)
    return scores if search.excluded is None else exclude(scores, search.excluded)


def score_rows(search: Search, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Score a few rows in the same way as the pass that drew them, which must not use top_k.

    Args:
        search: The search that drew the rows.
        rows: int64 `[n]`.

    Returns:
        The scores of the rows for all queries, `[batch, n]`, -inf where a query must not see a row; and the embeddings
        of the rows, `[n, dim]`.
    """
    assert search.top_k is None
    ceilings, pool = search.ceilings, search.pool.select(rows)
    if ceilings is not None and ceilings.guide_pool is not None:
        ceilings = ceilings._replace(guide_pool=ceilings.guide_pool.select(rows))
    scores = dense_scores(search._replace(pool=pool, excluded=None, ceilings=ceilings))
    if search.excluded is not None:
        scores = scores.masked_fill(is_in_row(rows, search.excluded), -torch.inf)
    return scores, pool.embeddings


def similarities(search: Search) -> Tensor:
    """Scores before biases, of all rows: `[batch, num_rows]`."""
    products = _products(search.queries, search.pool)
    return products if search.score_transform is None else search.score_transform(products)


def _products(queries: Tensor, pool: RowPool) -> Tensor:
    rows = pool.embeddings if pool.scales is None else dequantize(pool.embeddings, pool.scales)
    return queries.to(pool.score_dtype) @ rows.to(pool.score_dtype).T


def is_above(scores: Tensor, ceilings: Ceilings) -> Tensor:
    """bool `[batch, num_rows]`: which rows count as false negatives."""
    hidden = torch.zeros_like(scores, dtype=torch.bool)
    if ceilings.scores is not None:
        hidden = scores > ceilings.scores[:, None]
    if ceilings.guide_pool is not None and ceilings.guide_queries is not None and ceilings.guide_scores is not None:
        hidden = hidden | (_products(ceilings.guide_queries, ceilings.guide_pool) > ceilings.guide_scores[:, None])
    return hidden


def exclude(scores: Tensor, excluded: Tensor) -> Tensor:
    """Copy `scores [batch, num_rows]`, with -inf at the rows `excluded [batch, n]`; -1 excludes nothing."""
    width = scores.shape[1]
    at = torch.where(excluded >= 0, excluded, width)  # -1 writes to an extra column
    return torch.nn.functional.pad(scores, (0, 1)).scatter_(1, at, -torch.inf)[:, :width]
