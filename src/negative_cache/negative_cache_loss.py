"""`NegativeCacheLoss`: one step, from embeddings to the loss and the update of the cache. Start reading here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from negative_cache.cache.rows import NegativeCache
from negative_cache.cache.specs import Features, Specs, check_embedding_dtype, check_specs
from negative_cache.cache.update import check_new_items, update_rows
from negative_cache.distributed import separate
from negative_cache.distributed.handshake import NUM_INTEGERS, Handshake, summarize
from negative_cache.distributed.many_ranks import ManyRanks
from negative_cache.objective.batch import BIAS, EMBEDDING, GUIDE, SCORED, Batch, BatchInputs, make_batch
from negative_cache.objective.cache_module import CacheModule
from negative_cache.objective.diagnostics import Diagnostics, hidden_numbers, record_updates
from negative_cache.objective.loss import FalseNegativeLimits, cache_loss, score_batch
from negative_cache.retrieval import Scale
from negative_cache.retrieval.randomness import new_generator
from negative_cache.sampling.config import (
    Encoded,
    InBatch,
    Sample,
    SamplingConfig,
    SamplingRequest,
    default_candidates,
)
from negative_cache.sampling.encode import DocumentEncoder, check_filling, check_room, refresh
from negative_cache.sampling.one_process import OneProcess


class Step(NamedTuple):
    """A validated step: the batch, its in-batch negatives, the cache, and the settings and input of sampling."""

    batch: Batch
    in_batch: InBatch
    cache: NegativeCache
    sampling: SamplingConfig
    request: SamplingRequest


class NegativeCacheLoss(CacheModule):
    """Cross-entropy of each query's positive against all cached documents, at the cost of one extra encoding per query.

    With `s(q, d) = scale * <q, d>`, the loss is `-s(q, positive) + logsumexp(s(q, positive), {s(q, document)})`. The
    documents are those in filled rows and the batch's other documents, each counted once, without known positives of
    the query. The value is computed from the cached embeddings. The gradient equals the exact gradient in expectation
    over the sampled rows. By default, the batch's documents have exact gradients, and a re-encoded document is shared
    by all queries (see docs/how-it-works.md). `in_batch=False, shared=False` is the method of Lindgren et al. (NeurIPS
    2021). After the loss is computed, re-encoded documents update their rows, and the batch's documents replace the
    oldest rows. In eval mode, or with gradients disabled, nothing is written.

    `state_dict` holds the cache, a learnable scale and the state of the generator, but not the encoder.

    Args:
        document_encoder: Features `{key: [n, ...]}` -> embeddings `[n, dim]`. It is called with sampled documents.
        cache_size: Number of rows.
        scale: Factor of the dot products (inverse temperature). The default assumes normalized embeddings.
        learnable_scale: Whether to learn the scale. The parameter is its logarithm, `log_scale`.
        num_samples: Cached documents to re-encode per query.
        in_batch: Whether the batch's documents are in-batch negatives of its other queries, with exact gradients.
        shared: Whether all queries share each re-encoded document; if False, each query has `num_samples` of its own.
        absolute_margin: A document counts as a false negative of a query, and is hidden from it, if its similarity
            (before the scale) exceeds that of the positive minus this margin; None for no such limit.
        relative_margin: The same, with the margin relative to the positive's similarity: 0.05 means above 95 % of it.
        guide_margin: The absolute margin for a guide's similarities, if a guide's embeddings are given.
        matryoshka_dims: Add the losses of embeddings truncated to these dimensions and rescaled to the full norm. They
            use the same re-encoded documents, weighted by importance sampling. In evaluation, only the loss of full
            embeddings is computed.
        refresh_per_step: Number of rows to re-encode in each step without gradient. All rows take turns.
        use_lru: Replace the least recently used rows; if False, the rows that were inserted first.
        specs: Spec per document feature. None infers them from the first batch, see `infer_specs`; tensors other than
            token inputs then have the fixed shape of the first batch.
        embedding_dtype: Stored dtype of embeddings: float32, bfloat16, float16, float64, or int8 with a scale per row.
        feature_device: Where document features are kept, such as "cpu"; None for the device of the embeddings.
        seed: Seed of the draws; None takes one from torch's global generator.
        process_group: The ranks that share the cache: a group, or "world" for the default group, looked up at the first
            step. Without a group, the cache is not shared. Each rank holds `cache_size / ranks` rows, and queries see
            the rows of all ranks. Every call is then collective; each rank passes its own part of the batch.

    Raises:
        ValueError: An argument is out of range, or `specs` has a key that the cache uses itself.
        TypeError: `embedding_dtype` is not a dtype.
    """

    def __init__(
        self,
        document_encoder: DocumentEncoder,
        cache_size: int,
        scale: float = 20.0,
        *,
        learnable_scale: bool = False,
        num_samples: int = 1,
        in_batch: bool = True,
        shared: bool = True,
        absolute_margin: float | None = None,
        relative_margin: float | None = None,
        guide_margin: float = 0.0,
        matryoshka_dims: Sequence[int] = (),
        refresh_per_step: int = 0,
        use_lru: bool = True,
        specs: Specs | None = None,
        embedding_dtype: torch.dtype = torch.float32,
        feature_device: torch.device | str | None = None,
        seed: int | None = None,
        process_group: dist.ProcessGroup | Literal["world"] | None = None,
    ) -> None:
        super().__init__(
            document_encoder,
            cache_size,
            specs,
            embedding_dtype=embedding_dtype,
            feature_device=feature_device,
            generator=new_generator(seed),
            process_group=process_group,
        )
        self.num_samples = num_samples
        self.in_batch = in_batch
        self.shared = shared
        self.limits = FalseNegativeLimits(absolute_margin, relative_margin, guide_margin)
        self.matryoshka_dims = (matryoshka_dims,) if isinstance(matryoshka_dims, int) else tuple(matryoshka_dims)
        self.refresh_per_step = refresh_per_step
        self.use_lru = use_lru
        self._fixed_scale = scale
        self._check_settings()
        # Rows drawn per query; the rows to re-encode are chosen from them. Not an option, but benchmarks change it.
        self.num_candidates = default_candidates(num_samples)
        self.log_scale = nn.Parameter(torch.tensor(scale).log()) if learnable_scale else None
        self.diagnostics = Diagnostics()

    @property
    def scale(self) -> Tensor | float:
        """The factor of the dot products; with gradient if it is learnable."""
        return self._fixed_scale if self.log_scale is None else self.log_scale.exp()

    def forward(
        self,
        query_embeddings: Tensor,
        document_embeddings: Tensor,
        document_features: Features,
        document_ids: Tensor | None = None,
        positive_ids: Tensor | None = None,
        negative_embeddings: Tensor | None = None,
        negative_features: Features | None = None,
        negative_ids: Tensor | None = None,
        *,
        log_q: Tensor | None = None,
        guide_queries: Tensor | None = None,
        guide_documents: Tensor | None = None,
    ) -> Tensor:
        """Compute the mean loss of a batch, then update the cache.

        Args:
            query_embeddings: `[batch, dim]`, with gradient.
            document_embeddings: `[batch, dim]`, with gradient: the positive of each query.
            document_features: Feature name -> `[batch, ...]`: the inputs of `document_encoder` for these documents.
            document_ids: int `[batch]`, -1 for unknown. A query's own document in the cache is not its negative. A
                document that already has a row is written to that row.
            positive_ids: int `[batch, n]`, padded with -1: further documents that are not negatives of the query.
            negative_embeddings: `[m, dim]`, with gradient: documents that are negatives of every query of the batch,
                except of queries whose known positives they are. Their gradients are exact.
            negative_features: Their features; required with `negative_embeddings`.
            negative_ids: int `[m]`: their ids.
            log_q: `[batch + m]`: log of the probability that a training pair has this document (for the last m: that a
                given negative is this document). The scores become `s - log(n q)`, with n the number of negatives, so
                that popular documents, which are negatives more often, do not count more. Give it in every step or in
                none, and not with ids.
            guide_queries: `[batch, guide_dim]`: another model's embeddings of the queries. A document is not a negative
                of a query if its similarity by this guide exceeds that of the positive minus `guide_margin`.
            guide_documents: `[batch + m, guide_dim]`: the guide's embeddings of documents and given negatives, which
                the cache stores. Give both in every step or in none.

        Returns:
            Scalar, with gradient to all embeddings, the encoder and the scale.

        Raises:
            ValueError: Wrong keys, shapes, sizes, devices or ids, or values that are not finite. The cache is left
                unchanged.
            TypeError: Wrong dtypes.
        """
        inputs = BatchInputs(
            query_embeddings,
            document_embeddings,
            document_features,
            document_ids=document_ids,
            positive_ids=positive_ids,
            negative_embeddings=negative_embeddings,
            negative_features=negative_features,
            negative_ids=negative_ids,
            log_q=log_q,
            guide_queries=guide_queries,
            guide_documents=guide_documents,
        )
        world, step = self._begin(inputs)  # validated once; an error is raised on every rank
        batch, in_batch, cache, sampling, request = step
        scale = self._scale_over(world, batch.queries.device)
        in_batch = world.in_batch_negatives(in_batch)
        scores = score_batch(batch, in_batch, scale, self.limits)
        sample = world.sample(cache, sampling, scores.complete(request))  # rows to re-encode, and their weights
        needs_gradient = batch.documents.requires_grad
        encoded = world.encode(self.document_encoder, sampling, sample, batch.new_items[EMBEDDING], needs_gradient)
        losses, records = cache_loss(batch, in_batch, scores, sample, encoded, sampling.dims)
        if sampling.num_samples:  # training
            self.diagnostics.begin(records)
            self._update(cache, sampling, batch, sample, encoded)
        return world.mean(losses)

    def metrics(self) -> dict[str, float]:
        """Return diagnostics of the last training step; synchronizes the device. Bad values log a warning once.

        Returns:
            `interpretable_loss` (mean of `-log` of the positive's probability), `positive_probability` (its mean),
            `cache_share` (mean total softmax weight of the cached documents), `fill` (fraction of filled rows),
            `staleness` (mean relative squared distance between cached and new embeddings of re-encoded rows),
            `staleness_youngest` and `staleness_oldest` (over the youngest and oldest quarter of these rows), `age`
            (their mean age in steps), `effective_negatives` (the inverse of the mean sum of squares of the cache's
            softmax), `near_duplicates` (softmax weight of cached documents that nearly equal the positive), `masked`
            (fraction of filled rows hidden by margins or the guide), `gradient_norm_ratio` (query embeddings over
            document embeddings, after the backward pass). Values that a step does not have are left out. With several
            ranks, each rank reports the means of its own queries, and `staleness`, `age` and `fill` of its own rows.

        Raises:
            ValueError: Embeddings that were not finite were kept out of the cache since the last call.
        """
        return self.diagnostics.read(self.cache)

    @torch.no_grad()
    def fill_from(self, batches: Iterable[Mapping[str, Any]]) -> int:
        """Encode documents, such as a whole corpus, and insert them into the cache before training.

        Args:
            batches: Dicts with `document_features`, `document_ids` (int `[n]`, at least 0) and, if steps have a guide,
                `guide_documents`, as in `forward`. Each rank passes and keeps its own part of the documents.

        Returns:
            The number of filled rows of this rank.

        Raises:
            ValueError: More documents than rows (earlier batches stay in the cache), or invalid inputs as in `forward`.
        """
        begin = self.step_number()
        for given in batches:
            check_filling(given)
            embeddings = self.document_encoder(dict(given["document_features"]))
            guide = given.get("guide_documents")
            inputs = BatchInputs(embeddings, embeddings, **{"guide_queries": guide, **given})
            step = self._prepare(inputs, is_writing=True)
            batch, cache = step.batch, step.cache
            check_room(cache, given["document_ids"])
            cache.step.fill_(begin)  # all batches count as one step, the same on all ranks
            update_rows(cache, use_lru=self.use_lru, new_items=batch.new_items, document_ids=batch.new_ids)
            self.cache = cache
        return 0 if self.cache is None else int(self.cache.num_filled)

    def _restart(self) -> None:
        """Return to the state before the first step: no rows, the first draws, the initial scale."""
        del self.cache
        self.set_extra_state(self._first_state)
        self.diagnostics = Diagnostics()
        if self.log_scale is not None:
            with torch.no_grad():
                self.log_scale.fill_(math.log(self._fixed_scale))

    def _scale_over(self, world: OneProcess | ManyRanks, device: torch.device) -> Tensor | float:
        """The scale; if it is learnable, its gradient is averaged over ranks."""
        if self.log_scale is None:
            return self._fixed_scale
        return world.average_gradient(self.log_scale.to(device)).exp()

    def _begin(self, inputs: BatchInputs) -> tuple[OneProcess | ManyRanks, Step]:
        """Validate a step; with several ranks, all ranks validate together."""
        is_writing = self.training and torch.is_grad_enabled()
        if self.process_group is None or self.ranks.size == 1:
            return OneProcess(), self._prepare(inputs, is_writing)

        def prepare() -> tuple[Step, list[int]]:
            step = self._prepare(inputs, is_writing)
            needs_gradient = step.in_batch.embeddings.requires_grad
            summary = summarize(
                step.sampling, step.cache, step.request, is_writing=is_writing, needs_gradient=needs_gradient
            )
            return step, summary

        device = inputs.query_embeddings.device
        step, table = self.ranks.run_checked(self.step_number, device, prepare, NUM_INTEGERS)
        return ManyRanks(Handshake(self.ranks, table), step.request, self.step_number), step

    def _prepare(self, inputs: BatchInputs, is_writing: bool) -> Step:
        """Validate a step. A new cache is stored only after it has been written."""
        cache, specs = self.cache, self._specs_for(inputs.document_features)
        batch = make_batch(inputs, specs)
        device = batch.queries.device
        if cache is None:
            specs = {**batch.scored_specs(self.embedding_dtype), **specs}
            check_specs(specs)
            cache = self._new_cache(specs, device)
            separate(self.generator, self._first_state)
        if cache.device != device:
            raise ValueError(
                f"`query_embeddings` is on {device}, the cache on {cache.device}. Move the loss: "
                f"loss.to({str(device)!r})."
            )
        dim = cache.stored(EMBEDDING)[0].shape[1]
        if dim != batch.queries.shape[1]:
            raise ValueError(
                f"`query_embeddings` has {batch.queries.shape[1]} dimensions, the cached embeddings have {dim}. Encode "
                "with the model that filled the cache, or make a new loss."
            )
        batch.check_against(specs, self.matryoshka_dims)
        if is_writing:
            embeddings = batch.new_items[EMBEDDING]  # checked in `make_batch`; a narrower dtype may overflow
            known_finite = (EMBEDDING,) if embeddings.dtype == specs[EMBEDDING].dtype else ()
            new_items = check_new_items(cache, specs, batch.new_items, known_finite=known_finite)
            batch = batch._replace(new_items=new_items)
        in_batch = batch.in_batch(self.in_batch)
        sampling = self._sampling(batch, [key for key in specs if key not in SCORED], is_writing)
        return Step(batch, in_batch, cache, sampling, batch.request(len(in_batch.embeddings)))

    def _sampling(self, batch: Batch, data_keys: Sequence[str], is_writing: bool) -> SamplingConfig:
        """The sampling settings of this step; in evaluation nothing is drawn."""
        return SamplingConfig(
            EMBEDDING,
            data_keys,
            self.generator,
            score_transform=Scale(self._fixed_scale if self.log_scale is None else self.log_scale.detach().exp()),
            num_samples=self.num_samples if is_writing else 0,
            num_draws=(self.num_candidates if self.shared else self.num_samples) if is_writing else 0,
            is_shared=self.shared,
            bias_key=None if batch.log_q is None else BIAS,
            guide_key=None if batch.guide_queries is None else GUIDE,
            dims=self.matryoshka_dims if is_writing else (),
            other_settings=(self.in_batch, self.limits, self.refresh_per_step),
        )

    def _update(
        self, cache: NegativeCache, sampling: SamplingConfig, batch: Batch, sample: Sample, encoded: Encoded
    ) -> None:
        """Write re-encoded embeddings to their rows, and the batch's documents over the oldest rows."""
        updates = encoded.updates
        if updates is not None and len(updates.rows):
            cached = sample.cached if len(sample.rows) else None  # over ranks, other rows than those of `updates`
            self.diagnostics.add(record_updates(cache, EMBEDDING, updates, cached))
        if sample.num_hidden is not None:
            self.diagnostics.add(partial(hidden_numbers, sample.num_hidden, sample.num_filled))
        negatives = [] if batch.negatives is None else [batch.negatives]
        self.diagnostics.watch(batch.queries, [batch.documents, *negatives, encoded.own])
        update_rows(
            cache,
            use_lru=self.use_lru,
            new_items=batch.new_items,
            new_items_mask=sample.new_items_mask,
            document_ids=batch.new_ids,
            document_rows=sample.document_rows,
            updates=updates,
            reinserted=encoded.reinserted,
        )
        self.cache = cache
        if self.refresh_per_step:
            count = -(-self.refresh_per_step // (1 if self.process_group is None else self.ranks.size))
            refresh(cache, EMBEDDING, sampling.data_keys, self.document_encoder, count)

    def _check_settings(self) -> None:
        """Raise for arguments of the constructor that are out of range."""
        size, dims = self.cache_size, self.matryoshka_dims
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"`cache_size` is {size}; it must be an integer of at least 1.")
        if not (math.isfinite(self._fixed_scale) and self._fixed_scale > 0):
            raise ValueError(f"`scale` is {self._fixed_scale}; it must be a positive number.")
        if not isinstance(self.num_samples, int) or self.num_samples < 1:
            raise ValueError(f"`num_samples` is {self.num_samples}; it must be an integer of at least 1.")
        if dims and not self.shared:
            raise ValueError("`matryoshka_dims` needs shared=True: truncated embeddings use the draws of all queries.")
        if any(dim < 1 for dim in dims) or len(set(dims)) < len(dims):
            raise ValueError(f"`matryoshka_dims` is {list(dims)}; expected numbers of components, each once.")
        if not 0 <= self.refresh_per_step <= size:
            raise ValueError(f"`refresh_per_step` is {self.refresh_per_step}; it must be from 0 to the {size} rows.")
        self.limits.check()
        check_embedding_dtype(self.embedding_dtype)
        for key in SCORED:
            if self.specs is not None and key in self.specs:
                raise ValueError(f"`specs` has the key {key!r}, which the cache uses itself. Rename the feature.")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if (prefix + "log_scale" in state_dict) != (self.log_scale is not None):
            saved, mine = ("is", "is not") if self.log_scale is None else ("is not", "is")
            raise ValueError(f"The scale of the saved loss {saved} learnable, that of this one {mine}.")
        super()._load_from_state_dict(state_dict, prefix, *args)
