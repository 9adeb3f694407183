"""Search one rank's rows for the queries of all ranks, and choose the documents to re-encode on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from negative_cache import estimators
from negative_cache.distributed import shard_sizes
from negative_cache.distributed.collectives import Ranks
from negative_cache.distributed.handshake import Handshake
from negative_cache.distributed.routes import Routes
from negative_cache.retrieval import Retrieved, Search
from negative_cache.sampling.choose import (
    Candidates,
    Choice,
    Fill,
    choose,
    is_worth_it,
    measure_noise,
    number_to_choose,
    weigh_candidates,
)
from negative_cache.sampling.config import DocumentWeights, Noise, RowSource, SamplingConfig, SamplingRequest
from negative_cache.sampling.draw import draw, find_rows, make_search


class Shard(NamedTuple):
    """This rank's part of a search.

    Attributes:
        search: The search of this rank's rows, with the queries of all ranks.
        drawn: Its result. Rows are numbered as in this rank's cache, and the best rows are padded to `num_best`.
        found: int64 `[n]`: this rank's rows of the new documents of all ranks, -1 for none.
        uniform: int64 `[batch of all, draws + 1]`: uniforms of all ranks in fixed point, which choose the owners of the
            draws. The last uniform of the first query chooses the documents to re-encode.
    """

    search: Search
    drawn: Retrieved
    found: Tensor
    uniform: Tensor


class Chosen(NamedTuple):
    """The documents that all ranks chose to re-encode.

    Attributes:
        routes: The routes of the chosen documents, then those of the best rows.
        weights: The weights of the documents for the queries of this rank, see `Sample`; empty if cached documents do
            not count yet.
        lse_of_dims: See `Sample`.
        noise: See `Sample`.
    """

    routes: Routes
    weights: list[DocumentWeights]
    lse_of_dims: list[Tensor]
    noise: Noise


def top_k_of_shard(top_k: int, num_rows: Sequence[int], rank: int) -> int:
    """The number of top_k groups in one shard: in proportion to its rows, and at least one if it has rows."""
    return min(max(shares_of(top_k, num_rows)[rank], 1), num_rows[rank])


def search_shard(
    handshake: Handshake, cache: RowSource, config: SamplingConfig, request: SamplingRequest, uniform: Tensor
) -> Shard:
    """Search this rank's rows.

    Args:
        handshake: The sizes of all ranks.
        cache: This rank's rows; all rows, if they are replicated.
        config: How to sample.
        request: The queries and ids of all ranks.
        uniform: See `Shard`.
    """
    rank = handshake.ranks.rank
    found, positive_rows = find_rows(cache, request)
    if found is None:
        found = torch.empty(0, dtype=torch.int64, device=request.queries.device)
    in_batch_rows = handshake.in_batch_part(found) if any(handshake.num_in_batch) else None
    search = make_search(cache, config, request, in_batch_rows, positive_rows)
    first, num_rows = 0, handshake.num_rows
    if config.is_replicated:
        num_rows = shard_sizes(search.pool.num_rows, handshake.ranks.size)
        first = sum(num_rows[:rank])
        search = search._replace(pool=search.pool.slice(first, first + num_rows[rank]))
    if config.top_k is not None:
        search = search._replace(top_k=top_k_of_shard(config.top_k, num_rows, rank))
    drawn = draw(search, config, has_rows=bool(handshake.summaries[rank].has_rows))
    missing = search.num_best - drawn.best_rows.shape[1]
    best_rows = torch.where(drawn.best_rows >= 0, drawn.best_rows + first, -1)
    drawn = drawn._replace(
        rows=drawn.rows + (first if search.pool.num_rows else 0),  # an empty part has no row of its own
        best_rows=torch.nn.functional.pad(best_rows, (0, missing), value=-1),
        best_scores=torch.nn.functional.pad(drawn.best_scores, (0, missing), value=-torch.inf),
    )
    return Shard(search, drawn, found, uniform)


def choose_together(
    handshake: Handshake,
    config: SamplingConfig,
    request: SamplingRequest,
    shard: Shard,
    routes: Routes,
    fill: Fill,
) -> Chosen:
    """Choose the documents to re-encode from the draws of all ranks; collective. Each rank then encodes its part.

    The choice has the same distribution as with one process.

    Args:
        handshake: The sizes of all ranks.
        config: How to sample.
        request: The queries of all ranks.
        shard: This rank's part of the search, with `drawn.lse` over the rows of all ranks.
        routes: The routes of the draws, then those of the best rows.
        fill: How much the cache holds.
    """
    assert request.positive_scores is not None
    assert request.in_batch_lse is not None
    ranks, lse = handshake.ranks, shard.drawn.lse
    owner, candidate = routes.owner[: routes.num_draws], routes.candidate[: routes.num_draws]
    mine = (owner == ranks.rank).nonzero().squeeze(1)
    candidates = weigh_candidates(
        shard.search,
        lse,
        shard.drawn.rows.flatten()[candidate[mine].to(lse.device)],
        routes.is_update[mine].to(lse.device),
        dims=config.dims,
        merge=lambda partial: merge_lse(ranks, partial),
    )
    shares = estimators.cache_share(request.positive_scores, lse, request.in_batch_lse)
    sizes, query = _sizes_of_all(ranks, owner, candidates, candidates.sizes(shares, request.queries))
    concentration = ranks.sum(candidates.concentration)
    noise = measure_noise(
        request,
        lse,
        shares,
        concentration,
        sizes,
        num_filled=fill.num_filled,
        num_in_batch=sum(handshake.num_in_batch),
    )
    best = slice(routes.num_draws, None)
    lse_of_dims = [view.lse[handshake.own_queries] for view in candidates.views[1:]]
    if config.is_waiting and not is_worth_it(noise, fill):  # the same on all ranks
        return Chosen(routes.only(best), [], lse_of_dims, noise)
    count = max(number_to_choose(config.num_samples, len(request.queries)), ranks.size)
    choice = choose(sizes, query, count, shard.uniform[0, -1].cpu(), is_trimmed=False, num_steps=config.num_steps)
    # Every rank encodes at least one document, because an encoder may have collectives of its own, as with FSDP.
    parts = 1 + torch.tensor(shares_of(count - ranks.size, handshake.batches), device="cpu")
    chosen = Routes(
        query=torch.cat([torch.full_like(choice.at, -1), routes.query[best]]),
        requester=torch.cat([torch.repeat_interleave(parts), routes.requester[best]]),
        owner=torch.cat([owner[choice.at], routes.owner[best]]),
        candidate=torch.cat([candidate[choice.at], routes.candidate[best]]),
        is_update=torch.cat([choice.is_chosen, routes.is_update[best]]),
        num_draws=len(choice.at),
    )
    noise = noise._replace(num_chosen=count, num_steps=config.num_steps)
    return Chosen(chosen, _weights_of_all(handshake, owner, candidates, choice), lse_of_dims, noise)


def shares_of(count: int, sizes: Sequence[int]) -> list[int]:
    """Divide `count` in proportion to sizes; the parts sum to `count`, or are 0 if all sizes are."""
    ends = [round(count * sum(sizes[: number + 1]) / max(sum(sizes), 1)) for number in range(len(sizes))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def merge_lse(ranks: Ranks, lse: Tensor) -> Tensor:
    """Combine logsumexps over each rank's rows, `[batch of all]`, into those over the rows of all ranks; collective."""
    (gathered,) = ranks.gather([lse], [[len(lse)]] * ranks.size)
    return gathered.view(ranks.size, -1).logsumexp(dim=0)


def _sizes_of_all(
    ranks: Ranks, owner: Tensor, candidates: Candidates, own: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Gather `Candidates.sizes` of the draws of all ranks, on the CPU; collective.

    Args:
        ranks: The ranks.
        owner: int64 `[n]`: the rank that has each draw; the same list on all ranks, on the CPU.
        candidates: The draws that this rank owns. A draw that repeats another may be missing; its size is 0.
        own: Their sizes and queries, see `Candidates.sizes`.
    """
    order, counts = _by_owner(owner, ranks.size)
    mine = [values.new_zeros(counts[ranks.rank]).index_copy(0, candidates.positions, values) for values in own]
    gathered = ranks.gather(mine, [[count, count] for count in counts])
    back = order.argsort()  # `order` maps a place in the order of owners to a draw, `back` maps a draw to its place
    sizes, query = (values.cpu()[back] for values in gathered)
    return sizes, query


def _weights_of_all(
    handshake: Handshake, owner: Tensor, candidates: Candidates, choice: Choice
) -> list[DocumentWeights]:
    """The weights of the chosen documents of all ranks for the queries of this rank; collective."""
    ranks, device = handshake.ranks, candidates.rows.device
    order, counts = _by_owner(owner, ranks.size)
    chosen_owner = owner[choice.at]
    chosen_order, chosen_counts = _by_owner(chosen_owner, ranks.size)
    mine = (chosen_owner == ranks.rank).nonzero().squeeze(1)
    # Map each draw to its place among its owner's draws, and each place to its column. A draw that repeats another has
    # no column of its own and gets column 0. It was not chosen.
    place = order.argsort() - sum(counts[: ranks.rank])
    column_of = torch.zeros(counts[ranks.rank], dtype=torch.int64, device=device)
    column_of[candidates.positions] = torch.arange(len(candidates.rows), device=device)
    columns = column_of[place[choice.at[mine]].to(device)]
    back = chosen_order.argsort().to(device)
    result = []
    for weights, correction, missing in candidates.weigh(columns, choice.factors[mine].to(device)):
        assert missing is not None
        (gathered,) = ranks.gather([weights.T.contiguous()], [[count] for count in chosen_counts])
        own = handshake.own_queries
        total = ranks.sum(torch.cat([correction, missing[:, None]], dim=1))[own]
        result.append(DocumentWeights(gathered[back][:, own].T, total[:, :-1], total[:, -1]))
    return result


def _by_owner(owner: Tensor, num_ranks: int) -> tuple[Tensor, list[int]]:
    """Return the positions sorted by owner, and the number of positions of each owner."""
    counts: list[int] = torch.bincount(owner, minlength=num_ranks).tolist()
    return owner.argsort(stable=True), counts
