"""Second phase: choose the drawn rows to re-encode, and compute the weight of each document for every query.

Each query draws several rows from its own softmax. A drawn row counts for all queries, with the weights of the balance
heuristic. A few of the drawn rows are chosen to be re-encoded, each at most once, with a probability proportional to
its contribution to the gradient. The other drawn rows contribute by their cached embeddings. See `estimators`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from negative_cache import estimators
from negative_cache.cache.validation import reads_without_sync
from negative_cache.retrieval import Search
from negative_cache.retrieval.search import score_rows
from negative_cache.sampling.config import PAYS_ABOVE, DocumentWeights, Noise, SamplingRequest


class View(NamedTuple):
    """The weights of the drawn rows, for full or for truncated embeddings.

    Attributes:
        lse: `[batch]`: logsumexp of the scores of each query's negatives; for truncated embeddings, an estimate of it.
        weights: `[batch, n]`: the weight of each row for each query; 0 for a column that repeats an earlier one.
        cached: `[n, dim]`: the cached embeddings, in the dtype of the weights.
    """

    lse: Tensor
    weights: Tensor
    cached: Tensor


class Candidates(NamedTuple):
    """Rows drawn for `batch` queries.

    Attributes:
        rows: int64 `[n]`.
        positions: int64 `[n]`: the position of each row among the draws.
        views: One for full embeddings, then one for each of `SamplingConfig.dims`.
        concentration: `[batch]`: an estimate of `sum_j rho_ij^2`, from these rows.
    """

    rows: Tensor
    positions: Tensor
    views: list[View]
    concentration: Tensor

    def sizes(self, shares: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return each row's contribution to the gradient of the batch, `[n]`, and the query it contributes most to.

        Args:
            shares: `[batch]`: see `estimators.cache_share`.
            queries: `[batch, dim]`.
        """
        weights = self.views[0].weights
        return estimators.importance(weights, shares, queries), (weights * shares[:, None]).argmax(dim=0)

    def weigh(self, at: Tensor, factors: Tensor) -> list[DocumentWeights]:
        """Return, for each view, the weights of the columns `at [n]`, multiplied by `factors [n]`."""
        result = []
        for _, weights, cached in self.views:
            chosen = weights[:, at] * factors.to(weights.dtype)
            missing = weights.sum(dim=1) - chosen.sum(dim=1)
            result.append(DocumentWeights(chosen, weights @ cached - chosen @ cached[at], missing))
        return result


class Choice(NamedTuple):
    """The candidates that are re-encoded.

    Attributes:
        at: int64 `[count]`: their columns.
        is_chosen: bool `[count]`: whether each of them counts; an entry that does not count is a placeholder.
        factors: `[count]`: see `estimators.choice_weights`; 0 for a placeholder.
    """

    at: Tensor
    is_chosen: Tensor
    factors: Tensor


def weigh_candidates(
    search: Search,
    lse: Tensor,
    rows: Tensor,
    is_drawn: Tensor,
    *,
    dims: Sequence[int] = (),
    merge: Callable[[Tensor], Tensor] | None = None,
) -> Candidates:
    """Compute the weights of drawn rows for all queries.

    Args:
        search: The search that drew the rows, with the queries of all ranks.
        lse: `[batch]`: logsumexp of the scores of each query's negatives, over the rows of all ranks.
        rows: int64 `[n]`: the drawn rows.
        is_drawn: bool `[n]`: which of the drawn rows count.
        dims: Truncated dimensions for which weights are computed as well.
        merge: Function from logsumexps over the rows of this process, `[batch]`, to logsumexps over the rows of all
            ranks; None if this process has all rows.
    """
    counts, positions = count_equal(rows, is_drawn), torch.arange(len(rows), device=rows.device)
    if reads_without_sync(rows):
        positions = counts.nonzero().squeeze(1)
        rows, counts = rows[positions], counts[positions]
    scores, cached = score_rows(search, rows)
    log_probabilities = (scores - lse[:, None]).masked_fill_(lse[:, None] == -torch.inf, -torch.inf)
    weights = estimators.balance_weights(log_probabilities, counts, search.num_samples)
    concentration = torch.bmm(weights[:, None], log_probabilities.exp()[:, :, None])[:, 0, 0]
    views = [View(lse, weights, cached.to(weights.dtype))]
    if dims:
        # log of each row's expected number of draws, whose inverse is the importance weight of a draw
        expected = math.log(search.num_samples) + log_probabilities.logsumexp(dim=0)
        log_proposals = torch.where((counts > 0) & expected.isfinite(), counts.log() - expected, -torch.inf)
        biases = None if search.pool.biases is None else search.pool.biases[rows]
        for dim in dims:
            products = estimators.products(
                estimators.truncate(search.queries.to(weights.dtype), dim), estimators.truncate(views[0].cached, dim)
            )
            products = products if search.score_transform is None else search.score_transform(products)
            products = products if biases is None else products + biases
            products = products.masked_fill(scores == -torch.inf, -torch.inf)
            views.append(_reweighed(log_proposals, products, estimators.truncate(views[0].cached, dim), merge))
    return Candidates(rows, positions, views, concentration)


def _reweighed(log_proposals: Tensor, scores: Tensor, cached: Tensor, merge: Callable[[Tensor], Tensor] | None) -> View:
    """The view for truncated embeddings, by importance sampling: the rows were drawn with full embeddings."""
    lse, logits = estimators.reweigh(log_proposals, scores)
    total = lse if merge is None else merge(lse)
    return View(total, (logits - torch.where(total.isfinite(), total, 0)[:, None]).exp(), cached)


class Fill(NamedTuple):
    """How much the cache of all ranks holds.

    Attributes:
        num_filled: int64 `[]`.
        is_complete: bool `[]`: whether the cache is full, or the batch has no new document.
    """

    num_filled: Tensor
    is_complete: Tensor


def fill_of(num_filled: Tensor, num_rows: int, document_rows: Tensor | None) -> Fill:
    """Compare a cache with its size and with the documents of the batch.

    Args:
        num_filled: int64 `[]`.
        num_rows: Its size.
        document_rows: int64 `[n]`: the rows of the new documents, -1 for none; None, or no element, without ids.
    """
    is_complete = num_filled >= num_rows
    if document_rows is not None and len(document_rows):
        is_complete = is_complete | (document_rows >= 0).all()
    return Fill(num_filled, is_complete)


def is_worth_it(noise: Noise, fill: Fill) -> bool:
    """Whether in-batch negatives represent the cache badly, or the cache holds all that it will; synchronizes."""
    return bool((noise.in_batch > PAYS_ABOVE * noise.batch) | fill.is_complete)


def measure_noise(
    request: SamplingRequest,
    lse: Tensor,
    shares: Tensor,
    concentration: Tensor,
    sizes: Tensor,
    *,
    num_filled: Tensor,
    num_in_batch: int,
) -> Noise:
    """Measure the noise of a step.

    Args:
        request: The queries of all ranks.
        lse: `[batch]`: logsumexp over the cache.
        shares: `[batch]`: see `estimators.cache_share`.
        concentration: `[batch]`: see `Candidates`.
        sizes: `[n]`: see `Candidates.sizes`.
        num_filled: `[]`: the number of cached documents.
        num_in_batch: The number of in-batch negatives, a query's own document included.
    """
    assert request.positive_scores is not None
    assert request.in_batch_lse is not None
    others = max(num_in_batch - 1, 0)
    return Noise(
        batch=estimators.batch_noise(request.positive_scores, lse, request.in_batch_lse, request.queries),
        in_batch=estimators.in_batch_noise(shares, concentration, request.queries, num_filled, others),
        sizes=sizes,
    )


def number_to_choose(num_samples: float, batch: int) -> int:
    """Shared documents to re-encode for `batch` queries: `num_samples * batch`, rounded, but at least 1."""
    return max(1, round(num_samples * batch))


def choose(
    sizes: Tensor, query: Tensor, count: int, uniform: Tensor, is_trimmed: bool = True, num_steps: float = math.inf
) -> Choice:
    """Choose `count` candidates to re-encode, each with a probability in proportion to its size.

    Args:
        sizes: `[n]`: how much each candidate contributes to the gradient of the batch.
        query: int64 `[n]`: the query that each candidate contributes most to. The choice is stratified by this query.
        count: How many to choose.
        uniform: int64 `[]`: a uniform in fixed point, see `randomness.uniforms`.
        is_trimmed: Whether to drop placeholders, if that does not synchronize the device.
        num_steps: See `estimators.choice_weights`.
    """
    units, step = estimators.inclusion_probabilities(sizes, count)
    # Candidates of one query are adjacent, so that the grid gives each query close to its expected number.
    order = query.argsort(stable=True)
    at, is_chosen = estimators.systematic_sample(units[order], step, count, uniform)
    if is_trimmed and reads_without_sync(sizes):
        at, is_chosen = at[is_chosen], is_chosen[is_chosen]
    at = order[at]
    probabilities = units[at].clamp(min=1) / step.to(sizes.dtype)
    return Choice(at, is_chosen, is_chosen * estimators.choice_weights(probabilities, num_steps))


def count_equal(rows: Tensor, mask: Tensor) -> Tensor:
    """Count each of `rows [n]` where `mask [n]` is True: int64 `[n]`, 0 except at the row's first occurrence."""
    keys = rows.masked_fill(~mask, -1)
    ordered, order = keys.sort(stable=True)
    begin = torch.searchsorted(ordered, keys)
    is_first = (order[begin] == torch.arange(len(rows), device=rows.device)) & mask
    return is_first * (torch.searchsorted(ordered, keys, right=True) - begin)
