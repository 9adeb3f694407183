"""Which rows travel from their owners to which ranks: a list that every rank makes from the same numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from negative_cache.distributed.handshake import Meeting
from negative_cache.distributed.ranks import choose_shard
from negative_cache.retrieval.dense import exact_top_k
from negative_cache.sampling.draw import is_max_score
from negative_cache.sampling.one_process import Rules


@dataclass
class Entries:
    """The rows that travel from owners to the ranks of their queries: first the draws, then the best rows.

    Both are in the order of the queries of all ranks. Every rank has the same list.

    Attributes:
        query: int64 `[n]`: the query, numbered through all ranks.
        asker: int64 `[n]`: the rank of the query.
        owner: int64 `[n]`: the rank that has the row.
        candidate: int64 `[n]`: which of the owner's candidate rows it is.
        is_update: bool `[n]`: whether its new embedding goes back.
        num_draws: How many entries are draws.
    """

    query: Tensor
    asker: Tensor
    owner: Tensor
    candidate: Tensor
    is_update: Tensor
    num_draws: int

    def of_owner(self, rank: int) -> Tensor:
        """Positions of the entries that a rank has, by asker."""
        at = (self.owner == rank).nonzero().squeeze(1)
        return at[self.asker[at].argsort(stable=True)]

    def of_asker(self, rank: int) -> Tensor:
        """Positions of the entries that a rank wants, by owner."""
        at = (self.asker == rank).nonzero().squeeze(1)
        return at[self.owner[at].argsort(stable=True)]


def plan(rules: Rules, meeting: Meeting, lse: Tensor, top_scores: Tensor, uniform: Tensor) -> Entries:
    """Choose the owner of each draw, and of each of the best rows.

    Args:
        lse: `[ranks, batch of all]`.
        top_scores: `[ranks, batch of all, num_top or 1]`.
        uniform: `[batch of all, draws + 1]`.
    """
    num_ranks, batch = lse.shape
    num_samples, num_top = rules.num_draws, top_scores.shape[2]
    owner = choose_shard(lse, uniform[:, :num_samples])
    if is_max_score(rules.retrieval_fn) and num_samples:
        best = top_scores[:, :, 0].max(dim=0)
        owner = torch.where(best.values > -torch.inf, best.indices, -1)[:, None]
    owner = owner.flatten()
    query, candidate = torch.arange(batch).repeat_interleave(num_samples), torch.arange(batch * num_samples)
    is_update = owner >= 0
    if bool(is_update.any()):  # a query without negatives gets another's document, so that every rank encodes
        first = int(is_update.to(torch.uint8).argmax())
        candidate = torch.where(is_update, candidate, first)
        owner = torch.where(is_update, owner, owner[first])
    else:
        query, candidate, owner, is_update = query[:0], candidate[:0], owner[:0], is_update[:0]
    num_draws = len(query)
    if rules.num_top:
        # the best of all ranks' best: equal scores in the order of ranks, which is that of rows
        scores, at = exact_top_k(top_scores.transpose(0, 1).flatten(1), rules.num_top)
        top_query, slot = (scores > -torch.inf).nonzero().unbind(dim=1)
        at = at[top_query, slot]
        query = torch.cat([query, top_query])
        owner = torch.cat([owner, at // num_top])
        candidate = torch.cat([candidate, batch * num_samples + top_query * num_top + at % num_top])
        is_update = torch.cat([is_update, torch.zeros(len(top_query), dtype=torch.bool)])
    asker = torch.repeat_interleave(torch.arange(num_ranks), torch.tensor(meeting.batches))
    return Entries(query, asker[query], owner, candidate, is_update, num_draws)
