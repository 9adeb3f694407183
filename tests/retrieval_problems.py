"""Random searches, and statistical checks of draws, for the tests of the passes over the rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from negative_cache.cache.columns import quantize
from negative_cache.retrieval import RowPool, Search
from negative_cache.retrieval.dense import grouped_top_k
from negative_cache.retrieval.search import dense_scores
from stats import chi_square, independence

DIM = 6
NUM_DRAWS = 40_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pool_of(embeddings: Tensor, scales: Tensor | None = None) -> RowPool:
    """A pool in which all rows are candidates."""
    return RowPool(embeddings, torch.ones(len(embeddings), dtype=torch.bool), scales)


def random_search(
    batch: int,
    rows: int,
    dtype: torch.dtype,
    dim: int = DIM,
    *,
    query_dtype: torch.dtype | None = None,
    has_integers: bool = False,
    has_masks: bool = False,
) -> Search:
    """Random queries and rows.

    Args:
        batch: Number of queries.
        rows: Number of rows.
        dtype: Of the rows; int8 rows get scales.
        dim: Of the embeddings.
        query_dtype: Default: that of the rows.
        has_integers: Embeddings are small integers: their dot products are exact in every dtype and often equal.
        has_masks: Some rows are no candidates, and some are excluded for each query.
    """
    rng = generator(batch * 10_000 + rows + dim)

    def embeddings(count: int) -> Tensor:
        if has_integers:
            return torch.randint(-2, 3, (count, dim), generator=rng).double()
        return torch.randn(count, dim, generator=rng, dtype=torch.float64)

    queries, table = embeddings(batch).to(query_dtype or dtype), embeddings(rows)
    values, scales = quantize(table.float()) if dtype == torch.int8 else (table.to(dtype), None)
    pool, excluded = pool_of(values, scales), None
    if has_masks:
        pool = pool._replace(is_candidate=torch.rand(rows, generator=rng) < 0.7)
        excluded = torch.randint(-1, rows, (batch, 3), generator=rng)
    return Search(queries, pool, excluded=excluded)


def in_float64(search: Search) -> Search:
    """The same search with float64 queries and rows; int8 rows are multiplied by their scales."""
    pool, rows = search.pool, search.pool.embeddings.double()
    if pool.scales is not None:
        rows = rows * pool.scales.double()[:, None]
    return search._replace(queries=search.queries.double(), pool=pool._replace(embeddings=rows, scales=None))


class Population(NamedTuple):
    """A search with few distinct queries, each many times in the batch.

    Attributes:
        search: The queries, grouped by their value, and the rows.
        probabilities: float64 `[distinct, num_rows]`: the exact probability of each row for each distinct query.
        repeats: How often each distinct query occurs.
    """

    search: Search
    probabilities: Tensor
    repeats: int

    def of_query(self, drawn: Tensor, query: int) -> Tensor:
        """The draws `[repeats, ...]` of one distinct query."""
        return drawn[query * self.repeats : (query + 1) * self.repeats]


def make_population(
    dtype: torch.dtype = torch.float64,
    *,
    rows: int = 40,
    distinct: int = 2,
    has_masks: bool = True,
    top_k: int | None = None,
    repeats: int = NUM_DRAWS // 2,
) -> Population:
    """A population of queries and rows of a dtype."""
    rng = generator(17)
    table = (0.7 * torch.randn(rows, DIM, generator=rng, dtype=torch.float64)).to(dtype)
    queries = torch.randn(distinct, DIM, generator=rng, dtype=torch.float64).to(dtype)
    pool, excluded = pool_of(table), None
    if has_masks:
        pool.is_candidate[5::9] = False
        excluded = torch.stack([torch.tensor([1 + query, -1, rows - 1]) for query in range(distinct)])
    search = Search(queries, pool, excluded=excluded, top_k=top_k)
    scores = dense_scores(in_float64(search))
    if top_k is not None:
        best, at = grouped_top_k(scores, top_k)
        scores = torch.full_like(scores, -torch.inf).scatter(1, at, best)
    many = None if excluded is None else excluded.repeat_interleave(repeats, 0)
    search = search._replace(queries=queries.repeat_interleave(repeats, 0), excluded=many)
    return Population(search, scores.softmax(1), repeats)


def worst_p_value(population: Population, drawn: Tensor) -> float:
    """The lowest p-value of each query's and each sample's draws `[batch, num_samples]` under the softmax."""
    return min(
        chi_square(population.of_query(drawn, query)[:, sample], population.probabilities[query])
        for query in range(len(population.probabilities))
        for sample in range(drawn.shape[1])
    )


def worst_independence(drawn: Tensor, probabilities: Tensor) -> float:
    """The lowest p-value of draws `[batch, num_samples]` of one query being independent.

    It compares neighbours in the batch, draws half a batch apart, and samples of the same query.
    """
    half = len(drawn) // 2
    pairs = [(drawn[0::2, 0], drawn[1::2, 0]), (drawn[:half, 0], drawn[half:, 0])]
    pairs += [(drawn[:, 0], drawn[:, sample]) for sample in range(1, drawn.shape[1])]
    return min(independence(first, second, probabilities) for first, second in pairs)
