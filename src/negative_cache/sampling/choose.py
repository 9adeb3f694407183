"""Documents that serve every query of a batch: which of the drawn rows are encoded, and with which weights.

Rows are drawn for each query from its own softmax, several of them. A row counts for all queries, by the balance
heuristic. Few of them are chosen to be encoded, each at most once, with a probability in proportion to what it adds to
the gradient; those that were not chosen serve the queries by their cached embeddings. See `estimators`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from negative_cache import estimators
from negative_cache.cache.specs import is_free_to_read
from negative_cache.retrieval import Limits, RowPool, ScoreTransform
from negative_cache.retrieval.dense import scores_of


class Level(NamedTuple):
    """Candidates as seen by truncated embeddings.

    Attributes:
        lse: `[batch]`: an estimate of the logsumexp of the scores of each query's negatives.
        weights: `[batch, n]`.
        cached: `[n, dim]`: truncated.
    """

    lse: Tensor
    weights: Tensor
    cached: Tensor


class Serving(NamedTuple):
    """How encoded documents serve the queries.

    Attributes:
        weights: `[batch, n]`: with which each document's score counts.
        correction: `[batch, dim]`: a vector of mean 0 whose product with the query is added.
    """

    weights: Tensor
    correction: Tensor


class Candidates(NamedTuple):
    """Rows drawn for `batch` queries.

    Attributes:
        rows: int64 `[n]`; each counts once.
        positions: int64 `[n]`: where each stands among the draws.
        weights: `[batch, n]`: with which each row serves each query; 0 for a column that repeats another.
        log_probabilities: `[batch, n]`: log of the softmax of each query.
        cached: `[n, dim]`: the rows' embeddings, in the dtype of the weights.
        levels: The same for truncated embeddings.
    """

    rows: Tensor
    positions: Tensor
    weights: Tensor
    log_probabilities: Tensor
    cached: Tensor
    levels: tuple[Level, ...] = ()

    def sizes(self, shares: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """How much each row adds to the batch's gradient, `[n]`, and the query that it adds most to, int64 `[n]`."""
        sizes = estimators.importance(self.weights, shares, queries)
        return sizes, (self.weights * shares[:, None]).argmax(dim=0)

    def serve(self, at: Tensor, factors: Tensor) -> list[Serving]:
        """How the columns `at [n]`, that were chosen with probabilities `1 / factors [n]`, serve each query.

        For the whole embeddings, and then for each level.
        """
        result = []
        for weights, cached in [(self.weights, self.cached), *((level.weights, level.cached) for level in self.levels)]:
            chosen = weights[:, at] * factors.to(weights.dtype)
            result.append(Serving(chosen, weights @ cached - chosen @ cached[at]))
        return result


class Choice(NamedTuple):
    """Which candidates are encoded.

    Attributes:
        at: int64 `[count]`: their columns.
        is_chosen: bool `[count]`: whether each counts; one that does not stands for nothing.
        factors: `[count]`: one over the probability of being chosen, 0 where it does not count.
    """

    at: Tensor
    is_chosen: Tensor
    factors: Tensor


def candidates_of(
    queries: Tensor,
    pool: RowPool,
    lse: Tensor,
    rows: Tensor,
    is_drawn: Tensor,
    num_samples: int,
    score_transform: ScoreTransform | None = None,
    excluded: Tensor | None = None,
    limits: Limits | None = None,
    group_rows: Tensor | None = None,
    dims: Sequence[int] = (),
    merge: Callable[[Tensor], Tensor] | None = None,
) -> Candidates:
    """Weigh the rows that were drawn from a pool.

    Args:
        queries: `[batch, dim]`: all queries of the step.
        pool: The rows.
        lse: `[batch]`: logsumexp of the scores of each query's negatives, in this pool and elsewhere.
        rows: int64 `[n]`: the draws.
        is_drawn: bool `[n]`: which of them count.
        num_samples: Draws per query.
        score_transform, excluded, limits, group_rows: See `retrieve`; as the rows were drawn.
        dims: Truncated dimensions to weigh the rows for too.
        merge: From logsumexps of this pool's rows `[batch]` to those of all pools; None if this is the only one.
    """
    counts, positions = count_equal(rows, is_drawn), torch.arange(len(rows), device=rows.device)
    if is_free_to_read(rows):
        positions = counts.nonzero().squeeze(1)
        rows, counts = rows[positions], counts[positions]
    scores = scores_of(queries, pool, rows, score_transform, excluded, limits, group_rows)
    log_probabilities = (scores - lse[:, None]).masked_fill_(lse[:, None] == -torch.inf, -torch.inf)
    weights = estimators.balance_weights(log_probabilities, counts, num_samples)
    cached = pool.gather(rows).to(weights.dtype)
    levels = []
    if dims:
        expected = math.log(num_samples) + log_probabilities.logsumexp(dim=0)  # log of how often each row is drawn
        log_proposals = torch.where((counts > 0) & expected.isfinite(), counts.log() - expected, -torch.inf)
    for dim in dims:
        short = estimators.truncate(cached, dim)
        products = estimators.truncate(queries.to(short.dtype), dim) @ short.T
        products = products if score_transform is None else score_transform(products)
        products = products if not pool.biases else products + torch.cat(list(pool.biases))[rows]
        partial, logits = estimators.reweigh(log_proposals, products.masked_fill(scores == -torch.inf, -torch.inf))
        total = partial if merge is None else merge(partial)
        level_weights = (logits - torch.where(total.isfinite(), total, 0)[:, None]).exp()
        levels.append(Level(total, level_weights, short))
    return Candidates(rows, positions, weights, log_probabilities, cached, tuple(levels))


def choose(sizes: Tensor, query: Tensor, count: int, uniform: Tensor, is_trimmed: bool = True) -> Choice:
    """Choose `count` candidates to be encoded.

    Args:
        sizes: `[n]`: how much each adds to the batch's gradient.
        query: int64 `[n]`: the query that it adds most to; each query's candidates get their share of the choice.
        count: How many.
        uniform: float64 `[]` in [0, 1).
        is_trimmed: Whether, where that can be known for free, the choice has no entries that do not count.
    """
    chances = estimators.inclusion_probabilities(sizes, count)
    order = query.argsort(stable=True)
    at, is_chosen = estimators.systematic_sample(chances[order], count, uniform)
    if is_trimmed and is_free_to_read(at):
        at, is_chosen = at[is_chosen], is_chosen[is_chosen]
    at = order[at]
    factors = is_chosen / chances[at].clamp(min=torch.finfo(chances.dtype).tiny)
    return Choice(at, is_chosen, factors.to(sizes.dtype))


def count_equal(rows: Tensor, mask: Tensor) -> Tensor:
    """How often each of `rows [n]` occurs where `mask [n]` is True: int64 `[n]`, 0 but at its first occurrence."""
    keys = rows.masked_fill(~mask, -1)
    ordered, order = keys.sort(stable=True)
    begin = torch.searchsorted(ordered, keys)
    is_first = (order[begin] == torch.arange(len(rows), device=rows.device)) & mask
    return is_first * (torch.searchsorted(ordered, keys, right=True) - begin)
