"""Documents that serve the queries of all ranks: chosen by all of them together from what each shard drew."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from negative_cache import estimators
from negative_cache.distributed.handshake import Meeting
from negative_cache.distributed.ranks import Ranks
from negative_cache.sampling.choose import Candidates, Choice, Serving, choose


class Shared(NamedTuple):
    """What all ranks chose.

    Attributes:
        at: int64 `[count]`: positions among the draws, on the CPU, the same on all ranks.
        is_chosen: bool `[count]`: whether each counts.
        serving: How they serve the queries of this rank, see `Negatives`.
    """

    at: Tensor
    is_chosen: Tensor
    serving: list[Serving]


def choose_together(
    ranks: Ranks,
    meeting: Meeting,
    owner: Tensor,
    candidates: Candidates,
    queries: Tensor,
    positive_scores: Tensor,
    fresh_lse: Tensor,
    lse: Tensor,
    count: int,
    uniform: Tensor,
) -> Shared:
    """Choose the documents to encode; collective. In distribution it equals the choice of one process.

    Args:
        owner: int64 `[n]`: the rank that has each draw; every rank has the same list, on the CPU.
        candidates: Those draws that this rank owns, weighed for the queries of all ranks.
        queries: `[batch of all, dim]`.
        positive_scores, fresh_lse, lse: `[batch of all]`: see `cache_share`.
        count: How many to choose.
        uniform: float64 `[]`, the same on all ranks.
    """
    device = queries.device
    order, sizes_of_ranks = _by_owner(owner, ranks.size)
    num_mine = sizes_of_ranks[ranks.rank]
    sizes, query = candidates.sizes(estimators.cache_share(positive_scores, lse, fresh_lse), queries)
    told = [
        torch.zeros(num_mine, dtype=sizes.dtype, device=device).index_copy(0, candidates.positions, sizes),
        torch.zeros(num_mine, dtype=torch.int64, device=device).index_copy(0, candidates.positions, query),
    ]
    gathered = ranks.gather(told, [[size, size] for size in sizes_of_ranks])
    back = order.argsort()
    all_sizes, all_query = (values.cpu()[back] for values in gathered)
    choice = choose(all_sizes, all_query, count, uniform.cpu(), is_trimmed=False)
    return _columns(ranks, meeting, owner, order, sizes_of_ranks, candidates, choice)


def _columns(
    ranks: Ranks,
    meeting: Meeting,
    owner: Tensor,
    order: Tensor,
    sizes_of_ranks: list[int],
    candidates: Candidates,
    choice: Choice,
) -> Shared:
    """Bring the weights of the chosen documents from their owners to all ranks."""
    device, num_mine = candidates.rows.device, sizes_of_ranks[ranks.rank]
    chosen_owner = owner[choice.at]
    chosen_order, chosen_sizes = _by_owner(chosen_owner, ranks.size)
    mine = (chosen_owner == ranks.rank).nonzero().squeeze(1)
    # A draw's place among those of its owner, and there its column (of a repeated draw, whatever: it was not chosen).
    place = order.argsort() - sum(sizes_of_ranks[: ranks.rank])
    column_of = torch.zeros(num_mine, dtype=torch.int64, device=device)
    column_of[candidates.positions] = torch.arange(len(candidates.rows), device=device)
    columns = column_of[place[choice.at[mine]].to(device)]
    own = meeting.queries_of(ranks.rank)
    back = chosen_order.argsort().to(device)
    serving = []
    for weights, correction in candidates.serve(columns, choice.factors[mine].to(device, candidates.weights.dtype)):
        (gathered,) = ranks.gather([weights.T.contiguous()], [[size] for size in chosen_sizes])
        serving.append(Serving(gathered[back][:, own].T, ranks.sum(correction)[own]))
    return Shared(choice.at, choice.is_chosen, serving)


def _by_owner(owner: Tensor, num_ranks: int) -> tuple[Tensor, list[int]]:
    """Positions in the order of owners, and how many each owner has."""
    counts: list[int] = torch.bincount(owner, minlength=num_ranks).tolist()
    return owner.argsort(stable=True), counts
