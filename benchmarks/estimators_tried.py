"""Estimators that were tried and are not in the library; they use the dense softmax over all rows.

Each is a function of a `Situation` and a generator that returns a `Sample`: the documents to encode, their weights for
each query, and a correction of the query's gradient. The expectation of the sum of the weighted gradients is
`E_{j ~ rho_i}[grad s_ij]` for each query, as in `negative_cache.estimators`. The batch's documents may stand in for
those that are not encoded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from negative_cache import estimators
from negative_cache.sampling.choose import number_to_choose


class Situation(NamedTuple):
    """A batch and all rows of its cache.

    Attributes:
        probabilities: `[batch, n]`: rho, the softmax over the rows; 0 where a row is not a negative of a query.
        shares: `[batch]`: the softmax weight of all rows together, see `estimators.cache_share`.
        queries: `[batch, dim]`, without gradient.
        cached: `[n, dim]`.
    """

    probabilities: Tensor
    shares: Tensor
    queries: Tensor
    cached: Tensor


class Sample(NamedTuple):
    """The documents to encode.

    Attributes:
        rows: int64 `[count]`.
        weights: `[batch, count]`: their weights for each query.
        correction: `[batch, dim]`: added to the weighted sum of documents in the gradient of the query.
        missing_weight: `[batch]`: see `estimators.stand_in_weights`; None if no documents stand in.
    """

    rows: Tensor
    weights: Tensor
    correction: Tensor
    missing_weight: Tensor | None = None


class Candidates(NamedTuple):
    """The rows among which those to encode are chosen.

    Attributes:
        weights: `[batch, n]`: weights with which they estimate the expectation of each query.
        shares: See `Situation`.
        queries: See `Situation`.
        cached: `[n, dim]`.
    """

    weights: Tensor
    shares: Tensor
    queries: Tensor
    cached: Tensor

    @property
    def contributions(self) -> Tensor:
        """`[batch, n]`: the factor of each row's gradient in the gradient of the batch's loss."""
        return self.weights * self.shares[:, None]


Order = Callable[[Candidates, Tensor, torch.Generator], Tensor]


def gumbel_top_k(situation: Situation, generator: torch.Generator, count: int = 1) -> Sample:
    """Each query draws `count` rows of its own without replacement (Kool et al., 2019).

    The rows have the highest scores after Gumbel noise is added. The next highest score is the threshold: a row exceeds
    it with the probability `q = 1 - exp(-exp(log rho - threshold))`, and its weight is `rho / q`.
    """
    probabilities = situation.probabilities
    uniform = torch.rand(probabilities.shape, generator=generator, dtype=torch.float64)
    noisy = probabilities.double().log() - (-uniform.to(probabilities.device).log()).log()
    best, rows = noisy.topk(count + 1, dim=1)
    rows = rows[:, :count]
    own = probabilities.gather(1, rows).double()
    weights = own / -torch.expm1(-(own.log() - best[:, count:]).exp())
    return Sample(rows.flatten(), on_diagonal(weights.to(probabilities.dtype)), torch.zeros_like(situation.queries))


def shared_draws(situation: Situation, generator: torch.Generator, count: int = 1) -> Sample:
    """Every draw serves all queries (balance heuristic); the control variate covers all rows."""
    drawn = draw(situation.probabilities, independent(len(situation.queries), count, generator))
    rows, weights = _share(situation.probabilities, drawn, count)
    expected = situation.probabilities @ situation.cached
    return Sample(rows, weights, expected - weights @ situation.cached[rows])


def independent(batch: int, count: int, generator: torch.Generator) -> Tensor:
    """Uniforms of independent draws: `[batch, count]`."""
    return torch.rand(batch, count, generator=generator, dtype=torch.float64)


def by_query(candidates: Candidates, sizes: Tensor, generator: torch.Generator) -> Tensor:
    """Order rows by the query to which they contribute most, as in the library."""
    return candidates.contributions.argmax(dim=0).argsort(stable=True)


def at_random(candidates: Candidates, sizes: Tensor, generator: torch.Generator) -> Tensor:
    """A random order."""
    return torch.randperm(len(sizes), generator=generator).to(sizes.device)


def two_phase(
    situation: Situation,
    generator: torch.Generator,
    *,
    num_samples: float = 1,
    num_candidates: int | None = 8,
    order: Order = by_query,
    control: Literal["candidates", "rows"] | None = "candidates",
    has_stand_ins: bool = True,
) -> Sample:
    """Choose documents from the draws of all queries, or from all rows, by a systematic sample.

    Args:
        situation: The batch.
        generator: Source of randomness.
        num_samples: Documents to choose per query.
        num_candidates: Draws per query; None for all rows with their probabilities as weights.
        order: Computes the order in which the systematic sample goes through the candidates.
        control: The rows whose cached embeddings are the control variate: the candidates, all rows, or none.
        has_stand_ins: Whether the batch's documents stand in for those that are not chosen, as a further control
            variate; it needs `control`.
    """
    rows, candidates = first_phase(situation, generator, num_candidates)
    count = number_to_choose(num_samples, len(situation.queries))
    size = estimators.importance(candidates.weights, candidates.shares, candidates.queries)
    units, step = estimators.inclusion_probabilities(size, count)
    ordered = order(candidates, size, generator)
    uniform = torch.randint(2**62, (), generator=generator).to(units.device)
    at, is_chosen = estimators.systematic_sample(units[ordered], step, count, uniform)
    at = ordered[at[is_chosen]]
    weights = (candidates.weights[:, at] * step / units[at]).to(situation.cached.dtype)
    if control is None:
        return Sample(rows[at], weights, torch.zeros_like(situation.queries))
    all_weights, cached = situation.probabilities, situation.cached
    if control == "candidates":
        all_weights, cached = candidates.weights, candidates.cached
    correction = all_weights @ cached - weights @ candidates.cached[at]
    missing_weight = all_weights.sum(dim=1) - weights.sum(dim=1)
    return Sample(rows[at], weights, correction, missing_weight if has_stand_ins else None)


def first_phase(
    situation: Situation, generator: torch.Generator, num_candidates: int | None
) -> tuple[Tensor, Candidates]:
    """The rows among which those to encode are chosen: int64 `[n]`, and their contributions.

    Args:
        situation: The batch.
        generator: Source of randomness.
        num_candidates: Draws per query; None for all rows with their probabilities as weights.
    """
    probabilities, shares, queries, cached = situation
    if num_candidates is None:
        return torch.arange(len(cached), device=cached.device), Candidates(probabilities, shares, queries, cached)
    drawn = draw(probabilities, independent(len(queries), num_candidates, generator))
    rows, weights = _share(probabilities, drawn, num_candidates)
    return rows, Candidates(weights, shares, queries, cached[rows])


def _share(probabilities: Tensor, drawn: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Distinct rows of `count` draws per query, `[n]`, and their weights for each query, `[batch, n]`."""
    rows, counts = torch.unique(drawn, return_counts=True)
    return rows, estimators.balance_weights(probabilities[:, rows].log(), counts, count)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Rows drawn by inverse CDF: int64 `[batch * count]` from `[batch, n]` and uniforms `[batch, count]`."""
    cumulative = probabilities.double().cumsum(dim=1)
    points = uniform.to(cumulative) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, points, right=True).clamp(max=probabilities.shape[1] - 1).flatten()


def on_diagonal(weights: Tensor) -> Tensor:
    """Spread the weights `[batch, m]` of documents that serve only the query that drew them: `[batch, batch * m]`."""
    batch, count = weights.shape
    return (torch.eye(batch, device=weights.device)[:, :, None] * weights).view(batch, batch * count)
