"""Sampling in one process that has all rows; `distributed.many_ranks` does the same over several ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from negative_cache import estimators
from negative_cache.cache.update import RowUpdates
from negative_cache.cache.validation import reads_without_sync
from negative_cache.retrieval import Retrieved, Search
from negative_cache.retrieval.randomness import register, uniforms
from negative_cache.sampling.choose import (
    choose,
    fill_of,
    is_worth_it,
    measure_noise,
    number_to_choose,
    weigh_candidates,
)
from negative_cache.sampling.config import (
    DocumentWeights,
    Encoded,
    InBatch,
    RowSource,
    Sample,
    SamplingConfig,
    SamplingRequest,
)
from negative_cache.sampling.draw import draw, find_rows, make_search, mean_embedding, replace_missing
from negative_cache.sampling.encode import DocumentEncoder, encode, read_features


class OneProcess:
    """The part of a step that differs if ranks share a cache; here for one process, which sends nothing."""

    def in_batch_negatives(self, own: InBatch) -> InBatch:
        """The in-batch negatives of all ranks."""
        return own

    def sample(self, cache: RowSource, config: SamplingConfig, request: SamplingRequest) -> Sample:
        """Draw rows for each query, choose which of them to re-encode, and weigh them."""
        with torch.no_grad(), torch.autocast(request.queries.device.type, enabled=False):
            return sample_rows(cache, config, request)

    def encode(
        self,
        document_encoder: DocumentEncoder,
        config: SamplingConfig,
        sample: Sample,
        new_embeddings: Tensor,
        needs_gradient: bool,
    ) -> Encoded:
        """Re-encode the sampled documents.

        Args:
            document_encoder: Features -> embeddings.
            config: The settings of sampling.
            sample: The result of `sample`.
            new_embeddings: `[n, dim]`: embeddings of the documents that will be inserted.
            needs_gradient: Whether to raise for embeddings without gradient.
        """
        cached = sample.cached
        if sample.count == 0:
            return Encoded(cached, cached)
        shape, batch = (sample.count, cached.shape[1]), len(new_embeddings)
        own = encode(document_encoder, sample.features, shape, cached.dtype, needs_gradient, batch)
        stored = own.detach().to(cached.dtype)
        return Encoded(own, own, RowUpdates(sample.rows, {config.embedding_key: stored}, sample.is_update))

    def average_gradient(self, parameter: Tensor) -> Tensor:
        """Return the parameter, with its gradient averaged over ranks."""
        return parameter

    def mean(self, losses: Tensor) -> Tensor:
        """The mean of the losses `[batch]`, weighted so that its average over ranks is the mean over all queries."""
        return losses.mean()


@torch.no_grad()
def sample_rows(cache: RowSource, config: SamplingConfig, request: SamplingRequest) -> Sample:
    """See `OneProcess.sample`."""
    register(config.generator)
    document_rows, positive_rows = find_rows(cache, request)
    in_batch_rows = None if document_rows is None else document_rows[len(document_rows) - request.num_in_batch :]
    search = make_search(cache, config, request, in_batch_rows, positive_rows)
    has_rows = cache.has_rows()
    drawn = draw(search, config, has_rows)
    none = drawn.rows.flatten()[:0]
    sample = Sample(
        lse=drawn.lse,
        num_filled=cache.num_filled,
        cached=search.pool.gather(none),
        rows=none,
        lse_of_dims=[drawn.lse for _ in config.dims],
        num_hidden=drawn.num_hidden,
        document_rows=document_rows,
    )
    if config.num_best:
        keys = config.data_keys
        sample.best_features = [read_features(cache, best[best >= 0], keys) for best in drawn.best_rows]
    has_negatives = drawn.lse > -torch.inf
    if config.needs_mean and has_rows:
        mean = mean_embedding(search, drawn.lse)
        sample.weights = [DocumentWeights(mean[:, :0], mean)]
    if not has_rows or config.num_samples == 0 or (reads_without_sync(drawn.lse) and not bool(has_negatives.any())):
        return sample
    drawn = drawn._replace(rows=replace_missing(drawn.rows, has_negatives))
    if config.is_shared:
        _choose(sample, config, request, search, drawn)
    else:
        sample.rows, sample.cached = drawn.rows.flatten(), search.pool.gather(drawn.rows.flatten())
        sample.is_update = has_negatives.repeat_interleave(drawn.rows.shape[1])
    sample.count = len(sample.rows)
    sample.documents_per_query = sample.count / len(request.queries)
    if sample.count:
        sample.features = read_features(cache, sample.rows, config.data_keys)
    return sample


def _choose(sample: Sample, config: SamplingConfig, request: SamplingRequest, search: Search, drawn: Retrieved) -> None:
    """Choose the drawn rows to re-encode, for all queries together; none if cached documents do not count yet."""
    assert request.positive_scores is not None
    assert request.in_batch_lse is not None
    is_drawn = (drawn.lse > -torch.inf).repeat_interleave(search.num_samples)
    candidates = weigh_candidates(search, drawn.lse, drawn.rows.flatten(), is_drawn, dims=config.dims)
    shares = estimators.cache_share(request.positive_scores, drawn.lse, request.in_batch_lse)
    sizes, query = candidates.sizes(shares, request.queries)
    sample.noise = measure_noise(
        request,
        drawn.lse,
        shares,
        candidates.concentration,
        sizes,
        num_filled=sample.num_filled,
        num_in_batch=request.num_in_batch,
    )
    if config.is_waiting:
        fill = fill_of(sample.num_filled, search.pool.num_rows, sample.document_rows)
        if not is_worth_it(sample.noise, fill):
            sample.leave_cache_out()
            return
    count = number_to_choose(config.num_samples, len(request.queries))
    uniform = uniforms((), config.generator, drawn.lse.device, torch.int64)
    chosen = choose(sizes, query, count, uniform, num_steps=config.num_steps)
    sample.noise = sample.noise._replace(num_chosen=count, num_steps=config.num_steps)
    sample.rows, sample.is_update = candidates.rows[chosen.at], chosen.is_chosen
    sample.cached = candidates.views[0].cached[chosen.at].to(sample.cached.dtype)
    sample.weights = candidates.weigh(chosen.at, chosen.factors)
    sample.lse_of_dims = [view.lse for view in candidates.views[1:]]
