"""From scores and samples to weights and losses: pure functions.

Notation: `s_pos` the positive's score, `lse` the logsumexp of the negatives' scores, rho_i the softmax over the
negatives of query i alone. The exact loss is `softplus(lse - s_pos)`, its gradient
`(1 - pi) * (E_{j ~ rho_i}[grad s_ij] - grad s_pos)` with `1 - pi = sigmoid(lse - s_pos)`
(Lindgren et al., NeurIPS 2021). Every estimator here replaces the expectation by a sum over a few documents,
`sum_k V_ik grad s_ik`, whose mean over the draws is the expectation:

- own draws: V_ik = 1/m for the m documents that query i drew from rho_i (the paper's, m = 1);
- shared draws: every document serves every query, by the balance heuristic (Veach, Guibas 1995), `balance_weights`;
- two-phase sampling (Neyman 1938): many shared draws, of which a few are chosen to be encoded, each with a
  probability p_k in proportion to what it contributes: V_ik = W_ik / p_k, `inclusion_probabilities` and
  `systematic_sample`. What was not chosen still serves the queries by its cached embedding, as a control variate:
  `sum_j W_ij c_j - sum_k V_ik c_k` has the mean 0 and nearly cancels the choice's error in the gradient of the query.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def dot(queries: Tensor, documents: Tensor) -> Tensor:
    """Dot products over the last dimension, in at least float32."""
    dtype = torch.promote_types(torch.float32, torch.promote_types(queries.dtype, documents.dtype))
    return (queries.to(dtype) * documents.to(dtype)).sum(dim=-1)


def interpretable_loss(positive_scores: Tensor, lse: Tensor) -> Tensor:
    """`-log pi = softplus(lse - s_pos)`, without gradient.

    Args:
        positive_scores: `[batch]`.
        lse: `[batch]`; -inf for a query without negatives, whose loss is 0.

    Returns:
        `[batch]`, at least 0.
    """
    return softplus(lse - positive_scores).detach()


def sampled_softmax_loss(positive_scores: Tensor, negative_scores: Tensor, lse: Tensor) -> Tensor:
    """The paper's training loss: `stopgrad(1 - pi) * (mean_m s_neg - s_pos)`.

    Its gradient is that of `softplus(lse - s_pos)` in expectation; its value means nothing.

    Args:
        positive_scores: `[batch]`, with gradient.
        negative_scores: `[batch, m]`: scores of rows drawn from rho, with gradient.
        lse: `[batch]`; where it is -inf the loss and its gradient are 0.

    Returns:
        `[batch]`.
    """
    weight = torch.sigmoid(lse - positive_scores).detach()
    return weight * (negative_scores.mean(dim=1) - positive_scores)


def readable_loss(
    positive_scores: Tensor, drawn_scores: Tensor, lse: Tensor, fresh_scores: Tensor | None = None
) -> Tensor:
    """A loss with the value of the exact one and, in expectation, its gradient.

    Without `fresh_scores` its gradient equals that of `sampled_softmax_loss`. Scores of fresh negatives are
    part of the softmax and differentiated exactly; the cache's part of it is sampled.

    Args:
        positive_scores: `[batch]`, with gradient.
        drawn_scores: `[batch]`, with gradient: the weighted sum of drawn scores, whose gradient is in expectation that
            of `lse`; its value does not matter.
        lse: `[batch]`: logsumexp over the cache, without gradient.
        fresh_scores: `[batch, n]`, with gradient; -inf where a document is no negative of the query.

    Returns:
        `[batch]`.
    """
    all_negatives = lse.detach() + (drawn_scores - drawn_scores.detach())  # value of lse, gradient of the draws
    if fresh_scores is not None:
        # logsumexp of nothing but -inf has no gradient, of very small numbers it has the gradient 0
        floor = torch.finfo(all_negatives.dtype).min / 4
        all_negatives = torch.cat([fresh_scores, all_negatives[:, None]], dim=1).clamp(min=floor).logsumexp(dim=1)
    return softplus(all_negatives - positive_scores)


def cache_share(positive_scores: Tensor, lse: Tensor, fresh_lse: Tensor) -> Tensor:
    """The factor of rho in the gradient of the loss: the softmax weight of all cached rows together.

    Args:
        positive_scores: `[batch]`.
        lse: `[batch]`: logsumexp over the cache; -inf where there is nothing, then the share is 0.
        fresh_lse: `[batch]`: logsumexp over negatives that are differentiated exactly; -inf for none.

    Returns:
        `[batch]`, without gradient.
    """
    everything = torch.logaddexp(torch.logaddexp(lse, fresh_lse), positive_scores)
    return (lse - everything).exp().detach()


def balance_weights(log_probabilities: Tensor, counts: Tensor, num_samples: int) -> Tensor:
    """Weights with which documents drawn for all queries estimate the expectation of each: the balance heuristic.

    `W_ij = n_j rho_i(j) / (num_samples * sum_l rho_l(j))`, where n_j is how often j was drawn, num_samples times from
    each rho_l. `sum_j W_ij f(j)` has the mean `E_{j ~ rho_i}[f(j)]`, and no weight of a single draw is above
    1 / num_samples.

    Args:
        log_probabilities: `[batch, n]`: log rho_i(j); -inf where j is no negative of query i.
        counts: int64 `[n]`: n_j; 0 for a column that is to be ignored.
        num_samples: Draws per query.

    Returns:
        `[batch, n]`.
    """
    probabilities = log_probabilities.exp()
    total = num_samples * probabilities.sum(dim=0)
    return probabilities * (counts / total.clamp(min=torch.finfo(total.dtype).tiny))


def truncate(embeddings: Tensor, dim: int) -> Tensor:
    """The first `dim` components of `[..., n]`, brought to the length of the whole vectors; zeros for the rest."""
    is_kept = torch.arange(embeddings.shape[-1], device=embeddings.device) < dim
    kept = torch.where(is_kept, embeddings, 0)
    norm = kept.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(embeddings.dtype).tiny)
    return kept * (embeddings.norm(dim=-1, keepdim=True) / norm)


def reweigh(log_proposals: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights for another softmax than the one that was drawn from: self-normalised importance sampling.

    With `u_j` such that `sum_j u_j f(j)` has the mean `sum over all rows of f`, `Z_i = sum_j u_j exp(s_ij)` estimates
    the normaliser, and `u_j exp(s_ij) / Z_i` the softmax. The ratio has a bias that falls with the number of documents.

    Args:
        log_proposals: `[n]`: log u_j; -inf for a column that is to be ignored.
        scores: `[batch, n]`: -inf where j is no negative of query i.

    Returns:
        `log Z [batch]`, and `log(u_j exp(s_ij)) [batch, n]`.
    """
    logits = scores + log_proposals
    return logits.logsumexp(dim=1), logits


def importance(weights: Tensor, shares: Tensor, queries: Tensor) -> Tensor:
    """How much each document adds to the gradient of the batch: `sqrt(sum_i (a_i W_ij |q_i|)^2)`.

    Args:
        weights: `[batch, n]`: W.
        shares: `[batch]`: a, see `cache_share`.
        queries: `[batch, dim]`.

    Returns:
        `[n]`.
    """
    factors = shares * queries.norm(dim=1).to(shares.dtype)
    return (weights * factors[:, None]).square().sum(dim=0).sqrt()


def inclusion_probabilities(sizes: Tensor, count: int) -> Tensor:
    """Probabilities `min(1, t * size)` with the sum `count`, or 1 where there are no more than `count` sizes above 0.

    Args:
        sizes: `[n]`, at least 0.
        count: How many are to be chosen, at least 1.

    Returns:
        float64 `[n]`; 0 for a size of 0.
    """
    sizes, limits = sizes.double(), torch.finfo(torch.float64)
    rest = sizes.sort().values.cumsum(0)  # of each and of all smaller ones
    # If just the larger ones are certain, t is what they leave over that sum. It is the highest such t: for any t, the
    # sum of the probabilities is the lowest of all `number of larger ones + t * rest`.
    left = torch.arange(count - len(sizes) + 1, count + 1, device=sizes.device)
    t = (left / rest.clamp(min=limits.tiny)).amax().clamp(max=limits.max)
    return (t * sizes).clamp(max=1.0)


def systematic_sample(probabilities: Tensor, count: int, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Choose elements, each with its own probability and at most once: a grid of step 1 over the running sum.

    Elements that are alike should stand side by side: then each neighbourhood gets its share.

    Args:
        probabilities: float64 `[n]`: from 0 to 1, with a sum of at most `count`.
        count: Number of grid points.
        uniform: float64 `[]` in [0, 1): where the grid begins.

    Returns:
        Positions, int64 `[count]` in rising order, and whether each of them counts: a grid point behind the sum of
        all probabilities does not (its position is that of the likeliest element).
    """
    cumulative = probabilities.cumsum(0)
    total = cumulative[-1].round()  # of probabilities that are meant to fill the grid, which may fall short by rounding
    points = torch.arange(count, device=cumulative.device) + uniform
    is_chosen = points < total
    scale = cumulative[-1] / total.clamp(min=1)
    at = torch.searchsorted(cumulative, points * scale, right=True).clamp(max=len(cumulative) - 1)
    return torch.where(is_chosen, at, probabilities.argmax()), is_chosen


def staleness(cached: Tensor, fresh: Tensor) -> Tensor:
    """Squared distance of cached and fresh embeddings, relative to the fresh one's squared norm.

    Args:
        cached: `[n, dim]`.
        fresh: `[n, dim]`.

    Returns:
        `[n]`, 0 for equal embeddings, without gradient.
    """
    fresh = fresh.detach()
    error = (cached.to(fresh.dtype) - fresh).square().sum(dim=1)
    return error / fresh.square().sum(dim=1).clamp(min=torch.finfo(fresh.dtype).tiny)
