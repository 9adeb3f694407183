"""Pure functions that compute weights and losses from scores and samples.

Notation: `s_pos` is the positive's score, `lse` is the logsumexp of the negatives' scores, and rho_i is the softmax
over the negatives of query i, without the positive. The exact loss is `softplus(lse - s_pos)`. Its gradient is
`(1 - pi) * (E_{j ~ rho_i}[grad s_ij] - grad s_pos)` with `1 - pi = sigmoid(lse - s_pos)`
(Lindgren et al., NeurIPS 2021). Every estimator here replaces the expectation with a sum over a few re-encoded
documents, `sum_k V_ik grad s_ik`. The mean of this sum over the draws is the expectation.

- Own draws: V_ik = 1/m for the m documents that query i drew from rho_i. The paper uses m = 1.
- Shared draws: every document has a weight W_ij for every query, from the balance heuristic (Veach, Guibas 1995). See
  `balance_weights`.
- Two-phase sampling (Neyman 1938): of many shared draws, a few are chosen and re-encoded, each with a probability p_k
  proportional to its contribution. Then V_ik = W_ik / p_k. See `inclusion_probabilities` and `systematic_sample`. The
  cached embeddings c_j of all draws provide a control variate: `sum_j W_ij c_j - sum_k V_ik c_k` has mean 0, and
  nearly cancels the error that the choice causes in the gradient of the query. The batch's documents provide another
  one for the gradient of the documents, see `stand_in_weights`.

How many documents to re-encode follows from the error that the choice causes, see `choice_error`, and from the noise
that a step has anyway, see `batch_noise`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import softplus


def dot(queries: Tensor, documents: Tensor) -> Tensor:
    """Dot products over the last dimension, in at least float32."""
    dtype = torch.promote_types(torch.float32, torch.promote_types(queries.dtype, documents.dtype))
    return (queries.to(dtype) * documents.to(dtype)).sum(dim=-1)


def products(queries: Tensor, documents: Tensor) -> Tensor:
    """Dot products of all pairs of `[batch, dim]` and `[n, dim]`, in at least float32: `[batch, n]`."""
    dtype = torch.promote_types(torch.float32, torch.promote_types(queries.dtype, documents.dtype))
    with torch.autocast(queries.device.type, enabled=False):
        return queries.to(dtype) @ documents.to(dtype).T


def interpretable_loss(positive_scores: Tensor, lse: Tensor) -> Tensor:
    """`-log pi = softplus(lse - s_pos)`, without gradient.

    Args:
        positive_scores: `[batch]`.
        lse: `[batch]`; -inf for a query without negatives, which has a loss of 0.

    Returns:
        `[batch]`, at least 0.
    """
    return softplus(lse - positive_scores).detach()


def sampled_softmax_loss(positive_scores: Tensor, negative_scores: Tensor, lse: Tensor) -> Tensor:
    """The paper's training loss: `stopgrad(1 - pi) * (mean_m s_neg - s_pos)`.

    Its gradient equals that of `softplus(lse - s_pos)` in expectation. Its value has no meaning.

    Args:
        positive_scores: `[batch]`, with gradient.
        negative_scores: `[batch, m]`: scores of rows drawn from rho, with gradient.
        lse: `[batch]`; where it is -inf, the loss and its gradient are 0.

    Returns:
        `[batch]`.
    """
    weight = torch.sigmoid(lse - positive_scores).detach()
    return weight * (negative_scores.mean(dim=1) - positive_scores)


def readable_loss(
    positive_scores: Tensor, drawn_scores: Tensor, lse: Tensor, in_batch_scores: Tensor | None = None
) -> Tensor:
    """Compute a loss with the value of the exact loss and, in expectation, its gradient.

    Without `in_batch_scores` its gradient equals that of `sampled_softmax_loss`. In-batch negatives are part of the
    softmax and are differentiated exactly; the cache's part of the softmax is sampled.

    Args:
        positive_scores: `[batch]`, with gradient.
        drawn_scores: `[batch]`, with gradient: the weighted sum of the drawn rows' scores. Its gradient equals that of
            `lse` in expectation; its value is not used.
        lse: `[batch]`: logsumexp over the cache, without gradient.
        in_batch_scores: `[batch, n]`, with gradient; -inf where a document is not a negative of the query.

    Returns:
        `[batch]`.
    """
    all_negatives = lse.detach() + (drawn_scores - drawn_scores.detach())  # value of lse, gradient of the draws
    if in_batch_scores is not None:
        # logsumexp over only -inf is not differentiable; over very small finite numbers its gradient is 0
        floor = torch.finfo(all_negatives.dtype).min / 4
        all_negatives = torch.cat([in_batch_scores, all_negatives[:, None]], dim=1).clamp(min=floor).logsumexp(dim=1)
    return softplus(all_negatives - positive_scores)


def cache_share(positive_scores: Tensor, lse: Tensor, in_batch_lse: Tensor) -> Tensor:
    """The total softmax weight of all cached rows, which is the factor of rho in the gradient of the loss.

    Args:
        positive_scores: `[batch]`.
        lse: `[batch]`: logsumexp over the cache; -inf for a query that sees no row, which has a share of 0.
        in_batch_lse: `[batch]`: logsumexp over in-batch negatives; -inf for none.

    Returns:
        `[batch]`, without gradient.
    """
    everything = torch.logaddexp(torch.logaddexp(lse, in_batch_lse), positive_scores)
    return (lse - everything).exp().detach()


def balance_weights(log_probabilities: Tensor, counts: Tensor, num_samples: int) -> Tensor:
    """Weights of the balance heuristic, with which the draws of all queries estimate each query's expectation.

    `W_ij = n_j rho_i(j) / (num_samples * sum_l rho_l(j))`, where n_j is how often j was drawn in total, with
    num_samples draws from each rho_l. `sum_j W_ij f(j)` has the mean `E_{j ~ rho_i}[f(j)]`. The weight of a single
    draw is at most 1 / num_samples.

    Args:
        log_probabilities: `[batch, n]`: log rho_i(j); -inf where j is not a negative of query i.
        counts: int64 `[n]`: n_j; 0 for a column to ignore.
        num_samples: Draws per query.

    Returns:
        `[batch, n]`.
    """
    probabilities = log_probabilities.exp()
    total = num_samples * probabilities.sum(dim=0)
    return probabilities * (counts / total.clamp(min=torch.finfo(total.dtype).tiny))


def truncate(embeddings: Tensor, dim: int) -> Tensor:
    """Keep the first `dim` components of `[..., n]`, rescaled to the norm of the full vectors; set the rest to 0."""
    is_kept = torch.arange(embeddings.shape[-1], device=embeddings.device) < dim
    kept = torch.where(is_kept, embeddings, 0)
    norm = kept.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(embeddings.dtype).tiny)
    return kept * (embeddings.norm(dim=-1, keepdim=True) / norm)


def reweigh(log_proposals: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights for a softmax other than the one that was sampled, by self-normalized importance sampling.

    Let `sum_j u_j f(j)` have the mean `sum over all rows of f`. Then `Z_i = sum_j u_j exp(s_ij)` estimates the
    normalizer, and `u_j exp(s_ij) / Z_i` estimates the softmax. The ratio has a bias that decreases with the number of
    documents.

    Args:
        log_proposals: `[n]`: log u_j; -inf for a column to ignore.
        scores: `[batch, n]`: -inf where j is not a negative of query i.

    Returns:
        `log Z [batch]`, and `log(u_j exp(s_ij)) [batch, n]`.
    """
    logits = scores + log_proposals
    return logits.logsumexp(dim=1), logits


def importance(weights: Tensor, shares: Tensor, queries: Tensor) -> Tensor:
    """How much each document contributes to the gradient of the batch: `sqrt(sum_i (a_i W_ij |q_i|)^2)`.

    Args:
        weights: `[batch, n]`: W.
        shares: `[batch]`: a, see `cache_share`.
        queries: `[batch, dim]`.

    Returns:
        `[n]`.
    """
    factors = shares * queries.norm(dim=1).to(shares.dtype)
    return (weights * factors[:, None]).square().sum(dim=0).sqrt()


def inclusion_probabilities(sizes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Probabilities `min(1, t * size)` that sum to `count`; if at most `count` sizes are above 0, those get 1.

    They are fractions of integers, so that sums over many of them are exact on every device: element k has the
    probability `units[k] / step`. It deviates from the formula by a factor of at most 1 - 2^-19, and by 2^-29. It is 0
    only for a size of 0, and the sum is never above `count`.

    Args:
        sizes: `[n]`, at least 0, for n below 2^23.
        count: How many to choose, at least 1.

    Returns:
        Units, int64 `[n]`, from 0 to the step, and the step, int64 `[]`, from 1 to about 2^30.
    """
    order, places = sizes.argsort(), torch.arange(len(sizes) + 1, device=sizes.device)
    rest = torch.nn.functional.pad(sizes[order].cumsum(0), (1, 0))  # the sum of the n - k smallest, for k from n to 0
    left = count - len(sizes) + places  # count - k
    # If exactly the k largest sizes get probability 1, the others share the remainder: 1 / t = rest / (count - k). The
    # correct 1 / t is the smallest of these over all k: for any t, the probabilities sum to the minimum over k of
    # k + t * rest, because each probability is the minimum of 1 and t * size.
    steps = torch.where(rest > 0, rest / left, 0).masked_fill(left < 0, torch.inf)
    scale, num_rest = steps.min(dim=0)
    # The limit of 2 is above every probability of 1, in spite of the rounding errors of the scale.
    shares = (sizes / scale.clamp(min=torch.finfo(sizes.dtype).tiny)).clamp(max=2)
    units = (shares * 2**30).round().long().clamp(min=1) * (sizes != 0)
    # The same for the integers, at one k. Any k gives a step that is large enough: k * step + rest is an upper bound of
    # the sum of min(step, units). It is rounded up by more than the rounding errors of float32.
    rest_units = (units[order] * (places[:-1] < num_rest)).sum()
    step = (rest_units / (count - len(sizes) + num_rest).clamp(min=1) * (1 + 2**-20)).long() + 1
    return torch.minimum(units, step), step


def systematic_sample(units: Tensor, step: Tensor, count: int, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Choose elements, each at most once and with its own probability, by a grid over the cumulative sum.

    Similar elements should be adjacent: each run then gets a number of choices close to its expected number.

    Args:
        units: int64 `[n]`, from 0 to the step, with a sum of at most `count * step`: element k has the probability
            `units[k] / step`.
        step: int64 `[]`, from 1 to 2^32: the distance of the grid points.
        count: Number of grid points.
        uniform: int64 `[]` from 0 to 2^62 - 1: uniform in fixed point, which gives the start of the grid.

    Returns:
        Positions, int64 `[count]`, and which of them count, bool `[count]`; those that count are in ascending order. A
        grid point beyond the sum of all units does not count and has the position of the most probable element.
    """
    cumulative = units.cumsum(0)
    # uniform * step / 2^62, rounded down, by halves of 31 bits: the product itself may have 94 bits.
    start = ((uniform >> 31) * step + ((uniform & (2**31 - 1)) * step >> 31)) >> 31
    points = torch.arange(count, device=units.device) * step + start
    is_chosen = points < cumulative[-1]
    at = torch.searchsorted(cumulative, points, right=True).clamp(max=len(cumulative) - 1)
    return torch.where(is_chosen, at, units.argmax()), is_chosen


def choice_weights(probabilities: Tensor, num_steps: float = math.inf) -> Tensor:
    """Factors of the weights of chosen documents: `T / (T p + 1 - p)`, with T = `num_steps`; `1 / p` for infinity.

    A gradient is in effect averaged over several steps. Let each of T steps choose a document with probability p and
    give it the factor w. The mean of the T estimates has the squared bias `(1 - p w)^2` and the variance
    `p (1 - p) w^2 / T`, relative to the squared contribution of the document. This w minimizes their sum. For infinity,
    the estimate is unbiased; for a finite number of steps, no factor exceeds T.

    Args:
        probabilities: `[n]`: p, above 0.
        num_steps: T, at least 1.

    Returns:
        `[n]`, 1 where p = 1.
    """
    if num_steps == math.inf:
        return 1 / probabilities
    return num_steps / (num_steps * probabilities + 1 - probabilities)


def choice_error(sizes: Tensor, count: int, num_steps: float = math.inf) -> Tensor:
    """The error that choosing documents adds to the gradient of a step: `sum_k s_k^2 (1 - p_k) w_k`.

    For an infinite number of steps, it is the variance of independent choices with the factors `1 / p`. Otherwise it is
    T times the mean squared error of the mean over T steps with the factors of `choice_weights`, so that it can be
    added to the variance of a single step. The errors of different documents are assumed to be orthogonal.

    Args:
        sizes: `[n]`: s, see `importance`.
        count: Documents to choose, at least 1.
        num_steps: T, see `choice_weights`.

    Returns:
        `[]`: 0 if all documents with a size above 0 are chosen.
    """
    units, step = inclusion_probabilities(sizes, count)
    probabilities = units / step.to(sizes.dtype)
    errors = sizes.square() * (1 - probabilities) * choice_weights(probabilities, num_steps)
    return torch.where(units > 0, errors, 0).sum()


def error_removed(sizes: Tensor, count: int, num_steps: float = math.inf) -> Tensor:
    """The decrease of `choice_error` by the last of `count` documents, at least 2: `[]`.

    For an infinite number of steps it is about the square of the common size `s_k / p_k` of the documents that are not
    certain to be chosen: the sum S of their sizes divided by the number m of choices among them; its exact value is
    `S^2 / (m (m - 1))`.
    """
    return choice_error(sizes, count - 1, num_steps) - choice_error(sizes, count, num_steps)


def batch_noise(positive_scores: Tensor, lse: Tensor, in_batch_lse: Tensor, queries: Tensor) -> Tensor:
    """The noise that a gradient has because it is that of one batch: `sum_i ((1 - pi_i) |q_i|)^2`.

    These are the squared norms of the gradients of single queries with respect to their positives, in the unit of
    `importance`.

    Args:
        positive_scores, lse, in_batch_lse: `[batch]`, see `cache_share`.
        queries: `[batch, dim]`.

    Returns:
        `[]`.
    """
    missing = torch.sigmoid(torch.logaddexp(lse, in_batch_lse) - positive_scores)
    return (missing * queries.norm(dim=1).to(missing.dtype)).square().sum()


def in_batch_noise(
    shares: Tensor, concentration: Tensor, queries: Tensor, num_rows: Tensor, num_in_batch: int
) -> Tensor:
    """The noise of a gradient in which in-batch negatives represent the cache: `sum_i (a_i |q_i|)^2 N c_i / n`.

    The n in-batch negatives of a query are a uniform sample of the documents, of which the cache holds N. Importance
    sampling of the softmax over the cache from them gives negative j the weight `N rho_ij / n`. The sum of the squared
    weights has the mean `N sum_j rho_ij^2 / n`: 1 / n if all documents are equally hard, N / n if a single one matters.

    Args:
        shares: `[batch]`: a, see `cache_share`.
        concentration: `[batch]`: `c_i = sum_j rho_ij^2`, the inverse of the effective number of negatives.
        queries: `[batch, dim]`.
        num_rows: `[]`: N.
        num_in_batch: n; for 0, the noise is infinite, or NaN if all shares are 0.

    Returns:
        `[]`, in the unit of `importance`.
    """
    squares = (shares * queries.norm(dim=1).to(shares.dtype)).square()
    return (squares * concentration).sum() * num_rows / num_in_batch


def best_count(
    sizes: Tensor, counts: Iterable[int], noise: float, batch_cost: float, num_steps: float = math.inf
) -> int:
    """The number of documents to re-encode with the smallest error per cost: it minimizes `(noise + error) (cost + k)`.

    With a given number of encoded texts, the number of steps is inversely proportional to the cost of a step, and the
    error of the mean gradient over these steps is proportional to the product. The best count is 1 if the cache is
    empty or its share of the softmax is small, and for certain choices, because more documents remove no error.

    Args:
        sizes: `[n]`: see `importance`.
        counts: The numbers k to compare.
        noise: The noise of a step in which the choice adds none, see `batch_noise`.
        batch_cost: The cost of encoding the batch, in documents.
        num_steps: See `choice_error`.

    Returns:
        One of the counts, the smallest in a tie.
    """
    return min(counts, key=lambda count: (noise + float(choice_error(sizes, count, num_steps))) * (batch_cost + count))


def stand_in_weights(missing: Tensor, missing_weight: Tensor, documents: Tensor) -> Tensor:
    """Weights with which the batch's documents stand in for cached documents that are not re-encoded.

    The gradient of query i with respect to the encoder's weights is `sum_j W_ij J_j^T q_i`, up to a factor, with the
    Jacobian J_j of document j. Only re-encoded documents have one. Ridge regression of the cached embeddings on those
    of the batch, `c_j ~ sum_b A_jb d_b` with `sum_b A_jb = 1`, gives coefficients with which `J_j ~ sum_b A_jb J_b`.
    The weights are `U_ib = sum_j (W_ij - V_ij) A_jb`. Adding `sum_b U_ib J_b^T q_i` to `sum_k V_ik J_k^T q_i` is a
    control variate: its mean is 0 if that of V is W. It replaces what was not re-encoded if V is smaller than W.

    The coefficients are linear in the cached embeddings, so that the weights follow from two sums. The ridge is the
    mean squared norm of the documents.

    Args:
        missing: `[batch, dim]`: `sum_j (W_ij - V_ij) c_j`.
        missing_weight: `[batch]`: `sum_j (W_ij - V_ij)`.
        documents: `[n, dim]`: d.

    Returns:
        `[batch, n]`, without gradient.
    """
    documents = documents.detach().to(missing.dtype)
    count, dim = documents.shape
    center, ridge = documents.mean(dim=0), documents.square().sum(dim=1).mean()
    centered, wanted = documents - center, missing - missing_weight[:, None] * center
    with torch.autocast(missing.device.type, enabled=False):
        gram = centered @ centered.T if count <= dim else centered.T @ centered
        gram.diagonal().add_(ridge.clamp(min=torch.finfo(gram.dtype).tiny))
        factor = torch.linalg.cholesky_ex(gram).L  # does not synchronize; the ridge makes it positive definite
        if count <= dim:
            weights = torch.cholesky_solve(centered @ wanted.T, factor).T
        else:
            weights = torch.cholesky_solve(wanted.T, factor).T @ centered.T
    return weights + missing_weight[:, None] / count


def staleness(cached: Tensor, encoded: Tensor) -> Tensor:
    """Squared distance between cached and re-encoded embeddings, relative to the re-encoded ones' squared norm.

    Args:
        cached: `[n, dim]`.
        encoded: `[n, dim]`.

    Returns:
        `[n]`, 0 for equal embeddings, without gradient.
    """
    encoded = encoded.detach()
    error = (cached.to(encoded.dtype) - encoded).square().sum(dim=1)
    return error / encoded.square().sum(dim=1).clamp(min=torch.finfo(encoded.dtype).tiny)
