"""Which rows are sent from which rank to which rank. Every rank computes the same list from the same numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from negative_cache.distributed.handshake import Handshake
from negative_cache.retrieval.dense import exact_top_k
from negative_cache.retrieval.randomness import inverse_cdf
from negative_cache.sampling.config import SamplingConfig


class Routes(NamedTuple):
    """The rows that are sent from their owners to the ranks that requested them: first the draws, then the best rows.

    Both are in the order of the queries of all ranks. Every rank has the same list, on the CPU.

    Attributes:
        query: int64 `[n]`: the query, numbered across all ranks; -1 for a document that all queries share.
        requester: int64 `[n]`: the rank that gets the row.
        owner: int64 `[n]`: the rank that has the row.
        candidate: int64 `[n]`: its position among the owner's candidate rows.
        is_update: bool `[n]`: whether its new embedding is written back.
        num_draws: How many of the routes are draws.
    """

    query: Tensor
    requester: Tensor
    owner: Tensor
    candidate: Tensor
    is_update: Tensor
    num_draws: int

    def of_owner(self, rank: int) -> Tensor:
        """Positions of the routes that start at a rank, sorted by requester."""
        at = (self.owner == rank).nonzero().squeeze(1)
        return at[self.requester[at].argsort(stable=True)]

    def only(self, part: slice) -> Routes:
        """Some of the routes, none of which are draws."""
        query, requester, owner, candidate, is_update = (values[part] for values in self[:-1])
        return Routes(query, requester, owner, candidate, is_update, num_draws=0)

    def of_requester(self, rank: int) -> Tensor:
        """Positions of the routes that end at a rank, sorted by owner."""
        at = (self.requester == rank).nonzero().squeeze(1)
        return at[self.owner[at].argsort(stable=True)]


def plan_routes(
    config: SamplingConfig, handshake: Handshake, lse: Tensor, best_scores: Tensor, uniform: Tensor
) -> Routes:
    """Choose the owner of each draw and of each best row.

    Args:
        config: The settings of sampling.
        handshake: The sizes of all ranks.
        lse: `[ranks, batch of all]`: logsumexp over each shard.
        best_scores: `[ranks, batch of all, num_best]`.
        uniform: float64 `[batch of all, draws + 1]` in [0, 1).
    """
    batch = lse.shape[1]
    num_draws, num_best = config.num_draws, best_scores.shape[2]
    if config.takes_best and num_draws:
        best = best_scores[:, :, 0].max(dim=0)
        owner = torch.where(best.values > -torch.inf, best.indices, -1)
    else:
        owner = choose_shard(lse, uniform[:, :num_draws]).flatten()
    candidate = torch.arange(batch * num_draws, device="cpu")
    query = torch.arange(batch, device="cpu").repeat_interleave(num_draws)
    is_update = owner >= 0
    if bool(is_update.any()):  # a query without negatives gets another query's document, so that every rank encodes
        first = int(is_update.to(torch.uint8).argmax())
        candidate = torch.where(is_update, candidate, first)
        owner = torch.where(is_update, owner, owner[first])
    else:
        query, candidate, owner, is_update = query[:0], candidate[:0], owner[:0], is_update[:0]
    num_routed_draws = len(query)
    if config.num_best:
        # Select the best of all ranks' best rows. Equal scores stay in rank order, which is the order of rows. Column
        # r * num_best + k is the k-th best row of rank r. An owner's candidate rows are its draws, then its best rows.
        scores, at = exact_top_k(best_scores.transpose(0, 1).flatten(1), config.num_best)
        best_query, slot = (scores > -torch.inf).nonzero().unbind(dim=1)
        at = at[best_query, slot]
        query = torch.cat([query, best_query])
        owner = torch.cat([owner, at // num_best])
        candidate = torch.cat([candidate, batch * num_draws + best_query * num_best + at % num_best])
        is_update = torch.cat([is_update, torch.zeros(len(best_query), dtype=torch.bool, device="cpu")])
    requester = torch.repeat_interleave(torch.tensor(handshake.batches, device="cpu"))
    return Routes(query, requester[query], owner, candidate, is_update, num_draws=num_routed_draws)


def choose_shard(lse: Tensor, uniform: Tensor) -> Tensor:
    """Draw shards for each query with probability proportional to `exp(lse)`, by inverse CDF.

    Every rank computes the same answer from the same numbers, so that nothing has to be sent.

    Args:
        lse: float64 `[shards, batch]`: logsumexp of each shard's scores, -inf if the query sees none of its rows.
        uniform: float64 `[batch, num_samples]` in [0, 1).

    Returns:
        int64 `[batch, num_samples]`: a shard with rows that the query sees, or -1 if there is none.
    """
    top = lse.amax(dim=0)
    cumulative = (lse - torch.where(top.isfinite(), top, 0)).exp().cumsum(dim=0).T
    return torch.where(top.isfinite()[:, None], inverse_cdf(cumulative, uniform), -1)
