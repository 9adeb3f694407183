"""From scores and samples to losses: pure functions.

Notation: `s_pos` the positive's score, `lse` the logsumexp of the negatives' scores, rho the softmax over
the negatives alone. The exact loss is `softplus(lse - s_pos)`, its gradient
`(1 - pi) * (E_{j ~ rho}[grad s_j] - grad s_pos)` with `1 - pi = sigmoid(lse - s_pos)`
(Lindgren et al., NeurIPS 2021). An average over m draws from rho estimates the expectation without bias.
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
    positive_scores: Tensor, negative_scores: Tensor, lse: Tensor, fresh_scores: Tensor | None = None
) -> Tensor:
    """A loss with the value of the exact one and, in expectation, its gradient.

    Without `fresh_scores` its gradient equals that of `sampled_softmax_loss`. Scores of fresh negatives are
    part of the softmax and differentiated exactly; the cache's part of it is sampled.

    Args:
        positive_scores: `[batch]`, with gradient.
        negative_scores: `[batch, m]`: scores of rows drawn from the cache's softmax, with gradient.
        lse: `[batch]`: logsumexp over the cache, without gradient.
        fresh_scores: `[batch, n]`, with gradient; -inf where a document is no negative of the query.

    Returns:
        `[batch]`.
    """
    drawn = negative_scores.mean(dim=1)
    all_negatives = lse.detach() + (drawn - drawn.detach())  # the value of lse, the gradient of the draws
    if fresh_scores is not None:
        # logsumexp of nothing but -inf has no gradient, of very small numbers it has the gradient 0
        floor = torch.finfo(all_negatives.dtype).min / 4
        all_negatives = torch.cat([fresh_scores, all_negatives[:, None]], dim=1).clamp(min=floor).logsumexp(dim=1)
    return softplus(all_negatives - positive_scores)


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
