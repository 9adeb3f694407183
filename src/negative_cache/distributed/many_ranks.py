"""Negatives from the caches of all ranks as one pool.

A step sends, beside a few integers: the queries to all ranks, each shard's logsumexp to all, the drawn documents to
the ranks of their queries, and their new embeddings to the ranks that own the rows. Nothing as long as the cache
ever travels. Who sends what to whom follows from numbers that all ranks have, so nobody is told.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from negative_cache.cache.index import is_first_of_equal, is_last_of_equal
from negative_cache.cache.rows import NO_ID, NegativeCache
from negative_cache.cache.specs import RaggedFeature, RaggedRows, padded, select
from negative_cache.distributed.handshake import Meeting, num_new
from negative_cache.distributed.ranks import Ranks, bytes_of, pack_rows, unpack_rows
from negative_cache.distributed.routing import Entries, plan
from negative_cache.distributed.shard_search import Search
from negative_cache.retrieval.randomness import uniforms
from negative_cache.sampling.choose import Serving
from negative_cache.sampling.draw import common_specs, lengths_of, read_items, read_pool
from negative_cache.sampling.one_process import Asked, Negatives, Returned, Rules


@torch.no_grad()
def draw_from_ranks(
    ranks: Ranks,
    meeting: Meeting,
    rules: Rules,
    caches: Sequence[NegativeCache],
    asked: Asked,
    step: Callable[[], int],
) -> Negatives:
    """Draw from the caches of all ranks as one pool: that of rank 0, then that of rank 1, and so on.

    In distribution this equals `draw_here` on one process that has all rows and all queries. All ranks call
    it with the same rules. Ids are those of the first cache of each rank.
    """
    queries, batch = asked.queries, len(asked.queries)
    width = rules.num_draws + 1 if rules.num_draws else 0  # an evaluation changes no random numbers
    uniform = uniforms((batch, width), rules.generator, queries.device)
    of_all, all_uniform = _share_queries(ranks, meeting, asked, uniform)
    new_ids = queries.new_empty(0, dtype=torch.int64) if of_all.new_ids is None else of_all.new_ids
    found = caches[0].find(new_ids) if len(new_ids) else new_ids
    document_rows = None if asked.new_ids is None else torch.split(found, meeting.num_new)[ranks.rank]
    search = Search(ranks, meeting, rules, caches, of_all, withheld(meeting, found))
    shard = search.result
    candidates = torch.cat([shard.rows.flatten(), shard.top_rows.flatten()])
    ragged = [key for key in sorted(rules.data_keys) if isinstance(caches[0].specs[key], RaggedFeature)]
    longest = [lengths_of(caches, candidates.clamp(min=0), key).amax() for key in ragged if len(candidates)]
    widths = torch.stack(longest) if longest else torch.zeros(len(ragged), dtype=torch.int64, device=queries.device)
    limited = torch.zeros_like(found[:0]) if shard.num_limited is None else shard.num_limited
    filled = torch.stack([cache.num_filled for cache in caches])
    told = [shard.lse.double(), shard.top_scores.double(), found, widths, limited, filled]
    results = ranks.gather(told, [[len(tensor) for tensor in told]] * ranks.size)
    # Who sends what is found out on the CPU, on every rank alike.
    lse, top_scores, found, widths, limited, filled = (
        value.cpu().view(ranks.size, *own.shape) for value, own in zip(results, told, strict=True)
    )
    entries = plan(rules, meeting, lse, top_scores, all_uniform.cpu())
    own = meeting.queries_of(ranks.rank)
    none = torch.empty(0, dtype=torch.int64, device=queries.device)
    merged = lse.logsumexp(dim=0).to(queries.device, shard.lse.dtype)
    serving: list[Serving] = []
    lse_of_dims = [merged[own] for _ in rules.dims]
    if rules.num_candidates and len(entries.query):
        entries, serving, lse_of_dims = search.choose(entries, merged, all_uniform[0, -1])
    negatives = _FromRanks(
        lse=merged[own],
        is_valid=merged[own] > -torch.inf,
        count=0,
        features={},
        cached=queries.new_empty(0, queries.shape[1]),
        serving=serving,
        lse_of_dims=lse_of_dims,
        top_features=[read_pool(caches, none, rules.data_keys) for _ in range(batch)] if rules.num_top else [],
        num_limited=None if shard.num_limited is None else limited.sum(dim=0)[own].to(queries.device),
        num_filled=filled.sum().to(queries.device),
        document_rows=document_rows,
        is_shared=rules.num_candidates > 0,
        ranks=ranks,
        meeting=meeting,
        entries=entries,
        candidates=candidates,
        new_ids=new_ids.cpu(),
        found=found,
        has_ids=asked.new_ids is not None,
        step=step,
    )
    if len(entries.query):  # the same on all ranks
        negatives.bring(rules, caches, dict(zip(ragged, widths.amax(dim=0).tolist(), strict=True)))
    return negatives


def share_ids(ranks: Ranks, meeting: Meeting | None, asked: Asked) -> Tensor | None:
    """Ids of the new documents of all ranks: int64 `[n]`, -1 for unknown; None where there is one process."""
    if meeting is None:
        return None
    new_ids = asked.new_ids
    if not any(meeting.num_new):
        return torch.empty(0, dtype=torch.int64, device=asked.queries.device)
    if new_ids is None:
        new_ids = torch.full((num_new(asked),), NO_ID, dtype=torch.int64, device=asked.queries.device)
    return ranks.gather([new_ids], [[count] for count in meeting.num_new])[0]


def _share_queries(ranks: Ranks, meeting: Meeting, asked: Asked, uniform: Tensor) -> tuple[Asked, Tensor]:
    """What all ranks ask, and their uniforms."""
    device, width = asked.queries.device, max(meeting.num_positives)
    positives = asked.positives
    if positives is None:
        positives = torch.full((len(asked.queries), 0), -1, dtype=torch.int64, device=device)
    positives = torch.nn.functional.pad(positives, (0, width - positives.shape[1]), value=-1)
    optional = ("positive_scores", "fresh_lse", "ceilings", "guide_queries", "guide_ceilings")
    given: dict[str, Any] = {name: getattr(asked, name) for name in optional if getattr(asked, name) is not None}
    told = [uniform, positives, asked.queries, *given.values()]
    result = ranks.gather(told, [[batch] * len(told) for batch in meeting.batches])
    others: dict[str, Any] = dict(zip(given, result[3:], strict=True))
    return Asked(result[2], result[1] if width else None, asked.ids_of_all, **others), result[0]


def withheld(meeting: Meeting, new_ids: Tensor) -> Tensor | None:
    """The ids of documents that no query may see, of all ranks; or their rows, from those of all new documents."""
    if not any(meeting.num_withheld):
        return None
    parts = torch.split(new_ids, meeting.num_new)
    return torch.cat([part[len(part) - n :] for part, n in zip(parts, meeting.num_withheld, strict=True)])


@dataclass
class _FromRanks(Negatives):
    """Drawn from the caches of all ranks.

    Attributes:
        candidates: int64 `[n]`: this rank's candidate rows, numbered through its caches.
        new_ids: int64 `[n]`: ids of the new documents of all ranks.
        found: int64 `[ranks, n]`: their rows on each rank, -1 where they have none.
        has_ids: Whether this rank gave ids.
        step: Says the current step, for an error's message.
        is_shared: Whether every document serves the queries of all ranks.
    """

    is_shared: bool
    ranks: Ranks
    meeting: Meeting
    entries: Entries
    candidates: Tensor
    new_ids: Tensor
    found: Tensor
    has_ids: bool
    step: Callable[[], int]

    def of_all(self, fresh: Tensor) -> Tensor:
        if not self.is_shared or not self.entries.num_draws:
            return fresh
        return self.ranks.gather_with_gradient(
            fresh, _counts(self.entries.asker[: self.entries.num_draws], self.ranks.size)
        )

    def bring(self, rules: Rules, caches: Sequence[NegativeCache], widths: dict[str, int]) -> None:
        """Send the chosen rows to the ranks of their queries, and take in what arrives."""
        entries, ranks, device = self.entries, self.ranks, self.candidates.device
        keys = [*rules.data_keys, *([] if self.is_shared else [rules.embedding_key])]
        sent, wanted = entries.of_owner(ranks.rank), entries.of_asker(ranks.rank)
        rows = self.candidates[entries.candidate[sent].to(device)]
        raw = ranks.exchange(
            pack_rows(read_items(caches, rows, keys), widths),
            _counts(entries.asker[sent], ranks.size),
            _counts(entries.owner[wanted], ranks.size),
        )
        specs = common_specs(caches, keys)
        came = unpack_rows(raw, specs, widths)
        arrival = wanted.argsort().to(device)  # where each entry arrived, in the order of entries
        entry = wanted.sort().values
        is_draw = entry < entries.num_draws
        drawn = _pick(came, arrival[is_draw.to(device)])
        self.count = int(is_draw.sum())
        self.cached = drawn.pop(rules.embedding_key, self.cached)
        self.features = drawn
        if rules.num_top:
            first, batch = sum(self.meeting.batches[: ranks.rank]), len(self.lse)
            counts = _counts(entries.query[entry[~is_draw]] - first, batch)
            data = {key: came[key] for key in rules.data_keys}
            tops = torch.split(arrival[~is_draw.to(device)], counts)
            self.top_features = [_pick(data, top) for top in tops]

    def give_back(
        self, fresh: Tensor, new_embeddings: Tensor | None = None, error: Exception | None = None
    ) -> tuple[Returned | None, Returned | None]:
        entries, ranks = self.entries, self.ranks
        new_owner, new_asker, _ = self._fate_of_new
        travelling = self._travelling
        if not entries.num_draws and not len(travelling):
            return None, None  # the same on all ranks
        # What this rank sends and what it gets: each message begins with a row that says whether its sender
        # failed, then come drawn rows, then new documents; each in the order of entries.
        everyone = torch.arange(ranks.size)
        first_draw = int((entries.asker[: entries.num_draws] < ranks.rank).sum())
        first_new = sum(self.meeting.num_new[: ranks.rank])
        drawn = (entries.is_update & (entries.asker == ranks.rank)).nonzero().squeeze(1)
        brought = travelling[new_asker[travelling] == ranks.rank]
        to = torch.cat([everyone, entries.owner[drawn], new_owner[brought]])
        owned = (entries.is_update & (entries.owner == ranks.rank)).nonzero().squeeze(1)
        known = travelling[new_owner[travelling] == ranks.rank]
        origin = torch.cat([everyone, entries.asker[owned], new_asker[known]])

        device, dim = fresh.device, fresh.shape[1]
        if error is not None:
            fresh = fresh.new_zeros(self.count, dim)
        rows = [fresh.new_full((ranks.size, dim), float(error is not None)), fresh[(drawn - first_draw).to(device)]]
        if new_embeddings is not None:
            rows.append(new_embeddings[(brought - first_new).to(device)].to(fresh.dtype))
        message = torch.cat(rows)[to.argsort(stable=True).to(device)]
        came = ranks.exchange(bytes_of(message), _counts(to, ranks.size), _counts(origin, ranks.size))
        came = came.view(fresh.dtype)[origin.argsort(stable=True).argsort().to(device)]
        failed, updates, refreshes = torch.split(came, [ranks.size, len(owned), len(known)])
        ranks.raise_together([flag != 0 for flag in failed[:, 0].tolist()], error, self.step, device)
        rows_here = self.candidates[entries.candidate[owned].to(device)]
        return Returned(updates, rows_here), Returned(refreshes, self.found[ranks.rank][known].to(device))

    def new_items_mask(self) -> Tensor | None:
        if not self.has_ids:
            return None
        owner, asker, counts = self._fate_of_new
        is_mine = asker == self.ranks.rank
        return (counts & ((owner < 0) | (owner == self.ranks.rank)))[is_mine].to(self.candidates.device)

    @functools.cached_property
    def _fate_of_new(self) -> tuple[Tensor, Tensor, Tensor]:
        """For the new documents of all ranks: who has a row of it (or -1), who brought it, and whether it counts.

        Of a document that several bring, the last counts if it has a row, and the first if not.
        """
        is_known = (self.found >= 0).any(dim=0)
        owner = torch.where(is_known, (self.found >= 0).to(torch.uint8).argmax(dim=0), -1)
        asker = torch.repeat_interleave(torch.arange(self.ranks.size), torch.tensor(self.meeting.num_new))
        is_new = ~is_known & (self.new_ids >= 0)
        is_first = is_first_of_equal(self.new_ids, is_new)
        return owner, asker, is_last_of_equal(self.new_ids, is_known) | is_first | (self.new_ids < 0)

    @property
    def _travelling(self) -> Tensor:
        """Positions of the new documents that have their row on another rank than the one that brings them."""
        owner, asker, counts = self._fate_of_new
        return (counts & (owner >= 0) & (owner != asker)).nonzero().squeeze(1)


def _counts(values: Tensor, length: int) -> list[int]:
    counts: list[int] = torch.bincount(values, minlength=length).tolist()
    return counts


def _pick(items: Mapping[str, Tensor | RaggedRows], index: Tensor) -> dict[str, Tensor]:
    """Items `[n]` of those that arrived, ragged ones cut to the longest of them."""
    picked = select(items, index)
    for key, value in picked.items():
        if isinstance(value, RaggedRows):
            width = int(value.lengths.amax()) if len(index) else 0
            picked[key] = RaggedRows(value.values[:, :width], value.lengths)
    return padded(picked)
