"""A step over ranks that each hold a part of the rows; it equals `sampling.one_process` in distribution.

Besides a few integers, a step sends the queries to all ranks, each shard's logsumexp to all ranks, the drawn documents
to the ranks of their queries, and their new embeddings to the ranks that own the rows. No message grows with the size
of the cache. All ranks compute the same routes, from numbers that every rank has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from negative_cache.cache.index import is_first_of_equal, is_last_of_equal
from negative_cache.cache.specs import NO_ID, RaggedFeature
from negative_cache.cache.update import RowUpdates
from negative_cache.cache.validation import Items, RaggedRows, padded, select, to_device
from negative_cache.distributed.handshake import Handshake
from negative_cache.distributed.packing import bytes_of, pack_rows, unpack_rows
from negative_cache.distributed.routes import Routes, plan_routes
from negative_cache.distributed.shard_search import choose_together, search_shard
from negative_cache.retrieval.randomness import uniforms
from negative_cache.sampling.choose import fill_of
from negative_cache.sampling.config import (
    DocumentWeights,
    Encoded,
    InBatch,
    Noise,
    RowSource,
    Sample,
    SamplingConfig,
    SamplingRequest,
)
from negative_cache.sampling.draw import mean_embedding
from negative_cache.sampling.encode import DocumentEncoder, encode, read_features


@dataclass
class RoutedSample(Sample):
    """A sample of the rows of all ranks.

    Attributes:
        routes: Which rows were sent from which rank to which rank.
        candidate_rows: int64 `[n]`: this rank's rows that `Routes.candidate` refers to.
        arrivals: The new documents of all ranks, and where they are written.
    """

    routes: Routes = field(kw_only=True)
    candidate_rows: Tensor = field(kw_only=True)
    arrivals: Arrivals = field(kw_only=True)


@dataclass(frozen=True)
class Arrivals:
    """The new documents of all ranks, on the CPU. Every rank has the same list.

    If a document occurs several times, its last occurrence counts if it has a row, otherwise its first.

    Attributes:
        owner: int64 `[n]`: the rank that has a row of the document; -1 for none.
        origin_rank: int64 `[n]`: the rank whose batch has it.
        counts: bool `[n]`: whether it is written.
        rows: int64 `[ranks, n]`: its row on each rank, -1 for none.
    """

    owner: Tensor
    origin_rank: Tensor
    counts: Tensor
    rows: Tensor

    @property
    def remote(self) -> Tensor:
        """Positions of the documents whose row is on another rank than the one whose batch has them."""
        return (self.counts & (self.owner >= 0) & (self.owner != self.origin_rank)).nonzero().squeeze(1)

    def inserted_by(self, rank: int) -> Tensor:
        """bool `[n of the rank]`: which of its documents a rank writes itself."""
        return (self.counts & ((self.owner < 0) | (self.owner == rank)))[self.origin_rank == rank]


class ManyRanks:
    """One step over ranks, with the methods of `OneProcess`. All of them are collective.

    Args:
        handshake: The summaries of all ranks.
        request: The queries and ids of this rank; other fields are not used.
        step: Function that returns the current step, for error messages.
    """

    def __init__(self, handshake: Handshake, request: SamplingRequest, step: Callable[[], int]) -> None:
        self.handshake = handshake
        self.ranks = handshake.ranks
        self.step = step
        self.device = request.queries.device
        self.has_ids = request.new_ids is not None
        self.new_ids = self._gather_ids(request.new_ids)

    def _gather_ids(self, own: Tensor | None) -> Tensor:
        """Ids of the new documents of all ranks: int64 `[n]`, or `[n, k]` with k ids per document; -1 for unknown."""
        counts, rank, num_ids = self.handshake.num_new, self.ranks.rank, self.handshake.num_ids
        if own is None:
            shape = (counts[rank], num_ids) if num_ids > 1 else (counts[rank],)
            own = torch.full(shape, NO_ID, dtype=torch.int64, device=self.device)
        return self.ranks.gather([own], [[count] for count in counts])[0] if any(counts) else own

    def in_batch_negatives(self, own: InBatch) -> InBatch:
        counts, rank = self.handshake.num_in_batch, self.ranks.rank
        if not any(counts):
            return own
        extras = {"biases": own.biases, "guide": own.guide}
        given = {name: value for name, value in extras.items() if value is not None}
        sizes = [[count] * len(given) for count in counts]
        gathered = dict(zip(given, self.ranks.gather(list(given.values()), sizes), strict=True)) if given else {}
        embeddings = own.embeddings
        if self.handshake.needs_gradient and not embeddings.requires_grad:
            embeddings = embeddings.detach().requires_grad_()  # all ranks take part in the backward pass, or none
        return InBatch(
            embeddings=self.ranks.gather_with_gradient(embeddings, counts),
            ids=self.handshake.in_batch_part(self.new_ids),
            first_own=own.first_own if own.first_own < 0 else sum(counts[:rank]),
            biases=gathered.get("biases"),
            guide=gathered.get("guide"),
        )

    def sample(self, cache: RowSource, config: SamplingConfig, request: SamplingRequest) -> Sample:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self._sample(cache, config, request)

    def _sample(self, cache: RowSource, config: SamplingConfig, request: SamplingRequest) -> Sample:
        ranks, handshake, own = self.ranks, self.handshake, self.handshake.own_queries
        width = config.num_draws + 1 if config.num_draws else 0  # an evaluation does not advance the generator
        uniform = uniforms((len(request.queries), width), config.generator, self.device, torch.int64)
        of_all, uniform = self._gather_requests(request, uniform)
        shard = search_shard(handshake, cache, config, of_all, uniform)
        drawn = shard.drawn
        candidate_rows = torch.cat([drawn.rows.flatten(), drawn.best_rows.flatten()])
        ragged = [key for key in sorted(config.data_keys) if isinstance(cache.specs[key], RaggedFeature)]
        layouts = self._layouts(cache, candidate_rows, ragged)
        hidden = shard.found.new_empty(0) if drawn.num_hidden is None else drawn.num_hidden
        sent = [drawn.lse, drawn.best_scores, shard.found, layouts, hidden, cache.num_filled[None]]
        results = ranks.gather(sent, [[len(tensor) for tensor in sent]] * ranks.size)
        # Every rank computes the same routes, on the CPU, in float64.
        lse, best_scores, found, layouts, hidden, filled = (
            value.cpu().view(ranks.size, *tensor.shape) for value, tensor in zip(results, sent, strict=True)
        )
        lse = lse.double()
        routes = plan_routes(config, handshake, lse, best_scores.double(), (uniform.cpu() >> 9).double() * 2.0**-53)
        merged = lse.logsumexp(dim=0).to(self.device, drawn.lse.dtype)
        shard = shard._replace(drawn=drawn._replace(lse=merged))
        num_filled = filled.sum().to(self.device)
        weights: list[DocumentWeights] = []
        noise: Noise | None = None
        lse_of_dims = [merged[own] for _ in config.dims]
        if config.needs_mean:
            mean = ranks.sum(mean_embedding(shard.search, merged))[own]
            weights = [DocumentWeights(mean[:, :0], mean)]
        elif config.is_shared and len(routes.query):
            fill = fill_of(num_filled, sum(handshake.num_rows), found.amax(dim=0).to(self.device))
            routes, weights, lse_of_dims, noise = choose_together(handshake, config, of_all, shard, routes, fill)
        arrivals = self._arrivals(found)
        own_found = torch.split(shard.found, handshake.num_new)[ranks.rank]
        none = candidate_rows[:0]
        no_features = read_features(cache, none, config.data_keys) if config.num_best else {}
        sample = RoutedSample(
            lse=merged[own],
            num_filled=num_filled,
            cached=shard.search.pool.gather(none),
            rows=none,
            weights=weights,
            lse_of_dims=lse_of_dims,
            documents_per_query=routes.num_draws / len(of_all.queries),
            noise=noise,
            num_hidden=None if drawn.num_hidden is None else hidden.sum(dim=0)[own].to(self.device),
            document_rows=own_found if self.has_ids else None,
            new_items_mask=arrivals.inserted_by(ranks.rank).to(self.device) if self.has_ids else None,
            best_features=[no_features for _ in request.queries] if config.num_best else [],
            routes=routes,
            candidate_rows=candidate_rows,
            arrivals=arrivals,
        )
        if noise is not None and not weights:
            sample.leave_cache_out()
        widths = {}
        for key, (width, pads_left) in zip(ragged, layouts.amax(dim=0).tolist(), strict=True):
            widths[key] = width
            cache.note_side(key, bool(pads_left))  # a rank without padding learns the side from the others
        if len(routes.query):  # the same on all ranks
            self._fetch(sample, cache, config, widths)
        return sample

    def _gather_requests(self, request: SamplingRequest, uniform: Tensor) -> tuple[SamplingRequest, Tensor]:
        """Gather the requests of all ranks, and their uniforms."""
        width = max(self.handshake.num_positives)
        positives = request.positive_ids
        if positives is None:
            positives = torch.full((len(request.queries), 0), NO_ID, dtype=torch.int64, device=self.device)
        positives = torch.nn.functional.pad(positives, (0, width - positives.shape[1]), value=NO_ID)
        optional = ("positive_scores", "in_batch_lse", "ceilings", "guide_queries", "guide_ceilings")
        given: dict[str, Any] = {name: getattr(request, name) for name in optional}
        given = {name: value for name, value in given.items() if value is not None}
        sent = [uniform, positives, request.queries, *given.values()]
        result = self.ranks.gather(sent, [[batch] * len(sent) for batch in self.handshake.batches])
        others: dict[str, Any] = dict(zip(given, result[3:], strict=True))
        new_ids = self.new_ids if len(self.new_ids) else None
        return SamplingRequest(result[2], result[1] if width else None, new_ids, **others), result[0]

    def _layouts(self, cache: RowSource, rows: Tensor, ragged: Sequence[str]) -> Tensor:
        """The length of the longest of `rows [n]` in each ragged feature, and `pads_left`: int64 `[len(ragged), 2]`."""
        layouts = torch.zeros(len(ragged), 2, dtype=torch.int64, device=self.device)
        if ragged and len(rows):
            layouts[:, 0] = torch.stack([cache.lengths(rows.clamp(min=0), key).amax() for key in ragged])
        if ragged:
            layouts[:, 1] = torch.stack([cache.pads_left(key) for key in ragged])
        return layouts

    def _arrivals(self, rows: Tensor) -> Arrivals:
        """Make the `Arrivals` from the rows of the new documents on each rank, `[ranks, n]`."""
        first_ids = self.new_ids if self.new_ids.dim() == 1 else self.new_ids[:, 0]
        ids, is_here = first_ids.cpu(), rows >= 0
        is_known = is_here.any(dim=0)
        owner = torch.where(is_known, is_here.to(torch.uint8).argmax(dim=0), -1)
        origin_rank = torch.repeat_interleave(torch.tensor(self.handshake.num_new, device="cpu"))
        is_first = is_first_of_equal(ids, ~is_known & (ids >= 0))
        return Arrivals(owner, origin_rank, is_last_of_equal(ids, is_known) | is_first | (ids < 0), rows)

    def _fetch(self, sample: RoutedSample, cache: RowSource, config: SamplingConfig, widths: dict[str, int]) -> None:
        """Send the chosen rows to the ranks that requested them, and receive the rows that this rank requested."""
        routes, ranks = sample.routes, self.ranks
        keys = [*config.data_keys, *([] if config.is_shared else [config.embedding_key])]
        sent, wanted = routes.of_owner(ranks.rank), routes.of_requester(ranks.rank)
        rows = sample.candidate_rows[routes.candidate[sent].to(self.device)]
        items = {key: to_device(value, self.device) for key, value in cache.read_rows(rows, keys).items()}
        raw = ranks.exchange(
            pack_rows(items, widths),
            _counts(routes.requester[sent], ranks.size),
            _counts(routes.owner[wanted], ranks.size),
        )
        received = unpack_rows(raw, {key: cache.specs[key] for key in keys}, widths)
        # Rows arrive sorted by owner. `route` lists this rank's routes in order, `arrival` where each of them arrived.
        arrival, route = wanted.argsort().to(self.device), wanted.sort().values
        is_draw = route < routes.num_draws
        drawn = _pick(received, arrival[is_draw.to(self.device)])
        sample.count = int(is_draw.sum())
        sample.cached = drawn.pop(config.embedding_key, sample.cached)
        sample.features = drawn
        if config.num_best:
            first, batch = self.handshake.own_queries.start, len(sample.lse)
            counts = _counts(routes.query[route[~is_draw]] - first, batch)
            data = {key: received[key] for key in config.data_keys}
            best = torch.split(arrival[~is_draw.to(self.device)], counts)
            sample.best_features = [_pick(data, at) for at in best]

    def encode(
        self,
        document_encoder: DocumentEncoder,
        config: SamplingConfig,
        sample: Sample,
        new_embeddings: Tensor,
        needs_gradient: bool,
    ) -> Encoded:
        assert isinstance(sample, RoutedSample)
        cached, error = sample.cached, None
        own = new_embeddings.new_empty(0, cached.shape[1])
        if config.num_samples == 0:
            return Encoded(own, own)
        if sample.count:
            try:
                shape, batch = (sample.count, cached.shape[1]), len(new_embeddings)
                own = encode(document_encoder, sample.features, shape, cached.dtype, needs_gradient, batch)
            except Exception as caught:  # raised on all ranks in `_write_back`
                error = caught
        updates, reinserted = self._write_back(config, sample, own.detach().to(cached.dtype), new_embeddings, error)
        documents = own
        if config.is_shared and sample.routes.num_draws:
            counts = _counts(sample.routes.requester[: sample.routes.num_draws], self.ranks.size)
            documents = self.ranks.gather_with_gradient(own, counts)
        return Encoded(own, documents, updates, reinserted)

    def _write_back(
        self,
        config: SamplingConfig,
        sample: RoutedSample,
        own: Tensor,
        new_embeddings: Tensor,
        error: Exception | None,
    ) -> tuple[RowUpdates | None, RowUpdates | None]:
        """Send new embeddings to the owners of their rows. If a rank could not encode, all ranks raise.

        Args:
            config: The settings of sampling.
            sample: The result of `sample`.
            own: `[count, dim]`: what this rank encoded, without gradient, in the dtype of the cache.
            new_embeddings: `[n, dim]`: embeddings of the new documents of this rank.
            error: The error of this rank's encoder; None for none.
        """
        routes, arrivals, ranks, rank = sample.routes, sample.arrivals, self.ranks, self.ranks.rank
        remote = arrivals.remote
        if not routes.num_draws and not len(remote):
            return None, None  # the same on all ranks
        # Each message starts with a row that tells whether its sender failed. Sampled rows follow, then new documents,
        # each in the order of routes. `to` is the receiver of each row that is sent, `origin` the sender of each row
        # that is received.
        everyone = torch.arange(ranks.size, device="cpu")
        is_draw = torch.arange(len(routes.owner), device="cpu") < routes.num_draws
        first_draw = int((routes.requester[is_draw] < rank).sum())
        first_new = sum(self.handshake.num_new[:rank])
        drawn = (routes.is_update & (routes.requester == rank)).nonzero().squeeze(1)
        own_remote = remote[arrivals.origin_rank[remote] == rank]
        to = torch.cat([everyone, routes.owner[drawn], arrivals.owner[own_remote]])
        owned = (routes.is_update & (routes.owner == rank)).nonzero().squeeze(1)
        known = remote[arrivals.owner[remote] == rank]
        origin = torch.cat([everyone, routes.requester[owned], arrivals.origin_rank[known]])

        device, dim = own.device, own.shape[1]
        if error is not None:
            own = own.new_zeros(sample.count, dim)
        rows = [own.new_full((ranks.size, dim), float(error is not None)), own[(drawn - first_draw).to(device)]]
        if self.has_ids:
            rows.append(new_embeddings[(own_remote - first_new).to(device)].to(own.dtype))
        message = torch.cat(rows)[to.argsort(stable=True).to(device)]
        raw = ranks.exchange(bytes_of(message), _counts(to, ranks.size), _counts(origin, ranks.size))
        received = raw.view(own.dtype)[origin.argsort(stable=True).argsort().to(device)]
        failed, updates, reinserted = torch.split(received, [ranks.size, len(owned), len(known)])
        ranks.raise_together([flag != 0 for flag in failed[:, 0].tolist()], error, self.step, device)
        rows_here = sample.candidate_rows[routes.candidate[owned].to(device)]
        return (
            RowUpdates(rows_here, {config.embedding_key: updates}),
            RowUpdates(
                arrivals.rows[rank][known].to(device),
                {config.embedding_key: reinserted},
                document_ids=self.new_ids[known.to(device)] if self.new_ids.dim() > 1 else None,
            ),
        )

    def average_gradient(self, parameter: Tensor) -> Tensor:
        return self.ranks.average_gradient(parameter)

    @property
    def weight(self) -> float:
        """The factor that makes the average of the ranks' mean losses equal to the mean over all queries."""
        batches = self.handshake.batches
        return batches[self.ranks.rank] * len(batches) / sum(batches)

    def mean(self, losses: Tensor) -> Tensor:
        return losses.mean() * self.weight


def _counts(values: Tensor, length: int) -> list[int]:
    counts: list[int] = torch.bincount(values, minlength=length).tolist()
    return counts


def _pick(items: Mapping[str, Tensor | RaggedRows], index: Tensor) -> dict[str, Tensor]:
    """Select received items at `index [n]`, `[n, ...]` each; ragged ones are cut to the longest selected item."""
    picked: Items = select(items, index)
    cut = {
        key: value._replace(values=value.values[:, : int(value.lengths.amax()) if len(index) else 0])
        if isinstance(value, RaggedRows)
        else value
        for key, value in picked.items()
    }
    return padded(cut)
