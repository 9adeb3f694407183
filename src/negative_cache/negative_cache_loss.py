"""`NegativeCacheLoss`: one step, from embeddings to the loss and the update of the cache. Start reading here."""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from negative_cache import estimators
from negative_cache.cache.hashing import features_without_hash, hash_items
from negative_cache.cache.rows import NegativeCache
from negative_cache.cache.specs import Features, Specs, check_embedding_dtype, check_specs
from negative_cache.cache.update import RowUpdates, check_new_items, update_rows
from negative_cache.cache.validation import (
    check_features,
    check_integer,
    check_keys,
    check_number,
    refuse_other_options,
)
from negative_cache.distributed import separate
from negative_cache.distributed import world as default_group
from negative_cache.distributed.collectives import Ranks
from negative_cache.distributed.handshake import NUM_INTEGERS, Handshake, summarize
from negative_cache.distributed.many_ranks import ManyRanks
from negative_cache.objective.advice import Advice, advise_on_settings
from negative_cache.objective.batch import BIAS, EMBEDDING, GUIDE, SCORED, Batch, BatchInputs, make_batch
from negative_cache.objective.cache_module import CacheModule
from negative_cache.objective.diagnostics import (
    Diagnostics,
    budget_numbers,
    hidden_numbers,
    update_numbers,
)
from negative_cache.objective.loss import FalseNegativeLimits, cache_loss, record_copies, score_batch
from negative_cache.retrieval import Scale
from negative_cache.retrieval.randomness import new_generator
from negative_cache.sampling.config import (
    AUTO_STEPS,
    Encoded,
    InBatch,
    Sample,
    SamplingConfig,
    SamplingRequest,
    check_num_samples,
    documents_per_query,
    draws_per_query,
    is_auto,
)
from negative_cache.sampling.encode import DocumentEncoder, check_room, encode_for_filling, refresh, try_encoder
from negative_cache.sampling.one_process import OneProcess

logger = logging.getLogger("negative_cache")


class Step(NamedTuple):
    """A validated step: the batch, its in-batch negatives, the cache, and the settings and input of sampling."""

    batch: Batch
    in_batch: InBatch
    cache: NegativeCache
    sampling: SamplingConfig
    request: SamplingRequest


class NegativeCacheLoss(CacheModule):
    """Cross-entropy of each query's positive against all cached documents, at the cost of re-encoding a few of them.

    With `s(q, d) = scale * <q, d>`, the loss is `-s(q, positive) + logsumexp(s(q, positive), {s(q, document)})`. The
    documents are those in filled rows and the batch's other documents, each counted once, without known positives of
    the query. The value is computed from the cached embeddings. If `num_samples` is a number, the gradient equals the
    exact gradient in expectation over the sampled rows. By default, the batch's documents have exact gradients, and a
    re-encoded document is shared by all queries (see docs/how-it-works.md). `in_batch=False, shared=False` is the
    method of Lindgren et al. (NeurIPS 2021). After the loss is computed, re-encoded documents update their rows, and
    the batch's documents replace the oldest rows.

    In eval mode, or with gradients disabled, nothing is written or re-encoded. In eval mode with gradients, those of
    the queries and of the scale are exact, with cached rows as constants. The value grows while the cache fills:
    to compare checkpoints, use `in_batch_loss` or a retrieval metric.

    `state_dict` holds the cache, a learnable scale and the state of the generator, but not the encoder.

    Args:
        document_encoder: Features `{key: [n, ...]}` -> embeddings `[n, dim]`. It is called with sampled documents. With
            `num_samples="auto"`, the first step tries it with two documents of the batch.
        cache_size: Number of rows.
        scale: Factor of the dot products (inverse temperature). The default assumes normalized embeddings.
        learnable_scale: Whether to learn the scale. The parameter is its logarithm, `log_scale`.
        num_samples: Cached documents to re-encode per query of the batch (of all ranks); may be a fraction, such as
            0.25, if they are shared. At least one is re-encoded per step (and rank). "auto" leaves the cache out of the
            loss until in-batch negatives alone represent it badly, and then re-encodes a quarter of a document per
            query, with weights that are biased in favor of less noise (see docs/how-it-works.md). With a number, the
            gradient is unbiased. Without shared documents or in-batch negatives, "auto" is 1. Ranks that do not share
            their cache do not wait.
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
        TypeError: An argument has the wrong type: an encoder that is not callable, something else than a number, an
            integer, a flag, a dtype or specs.
    """

    @refuse_other_options
    def __init__(
        self,
        document_encoder: DocumentEncoder,
        cache_size: int,
        scale: float = 20.0,
        *,
        learnable_scale: bool = False,
        num_samples: float | Literal["auto"] = "auto",
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
            generator=new_generator(None if seed is None else check_integer("seed", seed, -(2**63), 2**64 - 1)),
            process_group=process_group,
        )
        self._is_seeded = seed is not None
        self.num_samples = num_samples
        self.in_batch = in_batch
        self.shared = shared
        self.limits = FalseNegativeLimits(absolute_margin, relative_margin, guide_margin)
        self.matryoshka_dims = _checked_dims(matryoshka_dims)
        self.refresh_per_step = refresh_per_step
        self.use_lru = use_lru
        self._fixed_scale = scale
        self._check_settings(learnable_scale)
        budget = (self.num_samples, shared, in_batch)
        self._is_auto, self._documents_per_query = is_auto(*budget), documents_per_query(*budget)
        self.is_waiting = self._is_auto  # until the cache counts in the loss
        # Rows drawn per query; the rows to re-encode are chosen from them. Not an option, but benchmarks change it.
        self.num_candidates = draws_per_query(self._documents_per_query, shared)
        # Of shape [1], because FSDP cannot shard a scalar.
        self.log_scale = nn.Parameter(torch.full([1], math.log(self._fixed_scale))) if learnable_scale else None
        self.averages_scale = False  # over the ranks of the default group, if each of them has its own cache
        self.diagnostics = Diagnostics()
        self.advice = Advice()
        advise_on_settings(self._fixed_scale, self.limits.relative)

    def extra_repr(self) -> str:
        """The settings that `print` shows."""
        num_samples = "'auto'" if self._is_auto else f"{self._documents_per_query:g}"
        return (
            f"cache_size={self.cache_size}, scale={self._fixed_scale:g}, num_samples={num_samples}, "
            f"in_batch={self.in_batch}, shared={self.shared}, embedding_dtype={self.embedding_dtype}"
        )

    def reset_parameters(self) -> None:
        """Set a learnable scale to its initial value, after `to_empty`. The cache is left unchanged."""
        if self.log_scale is not None:
            nn.init.constant_(self.log_scale, math.log(self._fixed_scale))

    def _after_from_pretrained(self) -> None:
        super()._after_from_pretrained()
        self.reset_parameters()  # keeps a loaded value, because transformers replaces the functions of `nn.init`

    def get_extra_state(self) -> Tensor:
        """The generator's state, and whether the cache is still left out of the loss; uint8."""
        state = super().get_extra_state()
        return torch.cat([state, state.new_tensor([self.is_waiting])])

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the state of `get_extra_state`."""
        length = len(self.generator.get_state())  # earlier versions saved nothing else
        super().set_extra_state(state[:length])
        self.is_waiting = self._is_auto and bool(state[length:].any())  # the saved run may have had another budget

    @property
    def scale(self) -> Tensor | float:
        """The factor of the dot products; with gradient if it is learnable."""
        return self._fixed_scale if self.log_scale is None else self.log_scale[0].exp()

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
                document that already has a row is written to that row. Or int `[batch, k]`, for documents with several
                ids in one name space: the first identifies a document, and a query's positives are recognized by all.
                Without any ids and without `log_q`, a hash of the features takes their place, if all features are
                integers, such as tokens, of at most 2**15 values per document. Padding does not matter. Otherwise
                documents are unknown, with a warning.
            positive_ids: int `[batch, n]`, padded with -1: further documents that are not negatives of the query.
            negative_embeddings: `[m, dim]`, with gradient: documents that are negatives of every query of the batch,
                except of queries whose known positives they are. Their gradients are exact.
            negative_features: Their features; required with `negative_embeddings`.
            negative_ids: int `[m]`, or `[m, k]` as `document_ids`: their ids.
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
            self.diagnostics.begin([*records, partial(budget_numbers, sample.documents_per_query, sample.noise)])
            self._update(cache, sampling, batch, sample, encoded)
            if sampling.is_waiting and sample.documents_per_query:
                self.is_waiting = False
                logger.info("The cache counts in the loss from now on, with %d cached documents.", sample.num_filled)
        return world.mean(losses)

    def in_batch_loss(
        self,
        query_embeddings: Tensor,
        document_embeddings: Tensor,
        *,
        document_ids: Tensor | None = None,
        positive_ids: Tensor | None = None,
        negative_embeddings: Tensor | None = None,
        negative_ids: Tensor | None = None,
        guide_queries: Tensor | None = None,
        guide_documents: Tensor | None = None,
    ) -> Tensor:
        """Compute the mean loss of a batch against its own documents alone, without reading or writing the cache.

        Values of different times are comparable, also with those of losses without a cache. Use it for a validation
        loss. Over ranks, each rank computes the loss of its own part of the batch; nothing is sent.

        Args:
            query_embeddings: `[batch, dim]`.
            document_embeddings: `[batch, dim]`: the positive of each query, a negative of the others.
            document_ids, positive_ids: See `forward`. Without features, there is no hash of them: without ids, a
                document that occurs twice in the batch is a negative of its own query.
            negative_embeddings, negative_ids: See `forward`.
            guide_queries, guide_documents: See `forward`.

        Returns:
            Scalar, with gradient to all embeddings and the scale.

        Raises:
            ValueError: Wrong shapes, sizes, devices or ids, or values that are not finite.
            TypeError: Wrong dtypes.
        """
        inputs = BatchInputs(
            query_embeddings,
            document_embeddings,
            {},
            document_ids=document_ids,
            positive_ids=positive_ids,
            negative_embeddings=negative_embeddings,
            negative_features=None if negative_embeddings is None else {},
            negative_ids=negative_ids,
            guide_queries=guide_queries,
            guide_documents=guide_documents,
        )
        batch = make_batch(inputs, {})
        scale = self.scale.to(batch.queries.device) if isinstance(self.scale, Tensor) else self.scale
        scores = score_batch(batch, batch.in_batch(has_documents=True), scale, self.limits)
        no_rows = torch.full_like(scores.positive, -torch.inf)
        return estimators.readable_loss(scores.positive, scores.positive * 0, no_rows, scores.in_batch).mean()

    def metrics(self) -> dict[str, float]:
        """Return diagnostics of the last training step; synchronizes the device. Bad values log a warning once.

        Returns:
            `interpretable_loss` (mean of `-log` of the positive's probability), `positive_probability` (its mean),
            `cache_share` (mean total softmax weight of the cached documents), `fill` (fraction of filled rows),
            `staleness` (mean relative squared distance between cached and new embeddings of re-encoded rows),
            `staleness_youngest` and `staleness_oldest` (over the youngest and oldest quarter of these rows), `age`
            (their mean age in steps), `effective_negatives` (the inverse of the mean sum of squares of the cache's
            softmax), `near_duplicates` (softmax weight of cached documents that nearly equal the positive by their
            embeddings or, in one process, have its integer features), `masked`
            (fraction of filled rows hidden by margins or the guide), `documents_per_query` (re-encoded documents),
            `in_batch_noise` (the noise that the gradient would have if in-batch negatives had to represent the cache,
            relative to that of the batch; with num_samples="auto", the cache counts once it exceeds 4),
            `sampling_noise` (the noise that the choice of re-encoded documents adds instead, relative to the same),
            `gradient_norm_ratio` (query embeddings over document embeddings, after the backward pass). Values that a
            step does not have are left out. With several ranks, each rank reports the means of its own queries, and
            `staleness`, `age` and `fill` of its own rows.

        Raises:
            ValueError: Embeddings that were not finite were kept out of the cache since the last call.
        """
        self.advice.catch_up()
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
            embeddings = encode_for_filling(self.document_encoder, given)
            guide = given.get("guide_documents")
            inputs = BatchInputs(embeddings, embeddings, **{"guide_queries": guide, **given})
            step = self._prepare(inputs, is_writing=True)
            batch, cache = step.batch, step.cache
            check_room(cache, given["document_ids"])
            cache.step.fill_(begin)  # all batches count as one step, the same on all ranks
            update_rows(cache, use_lru=self.use_lru, new_items=batch.new_items, document_ids=batch.new_ids)
            self.cache = cache
        return 0 if self.cache is None else int(self.cache.num_filled)

    def _seed_draws(self, seed: int) -> None:
        """Seed the draws as a trainer does, unless the constructor was given a seed or something was drawn."""
        if not self._is_seeded and torch.equal(self.generator.get_state(), self._first_state):
            self.generator.manual_seed(seed)
            self._first_state = self.generator.get_state()

    def _restart(self) -> None:
        """Return to the state before the first step: no rows, the first draws, the initial scale."""
        del self.cache
        self.generator.set_state(self._first_state)
        self.is_waiting = self._is_auto
        self.diagnostics, self.advice = Diagnostics(), Advice()
        self.reset_parameters()

    def _scale_over(self, world: OneProcess | ManyRanks, device: torch.device) -> Tensor | float:
        """The scale; if it is learnable, its gradient is averaged over ranks."""
        if self.log_scale is None:
            return self._fixed_scale
        log_scale = world.average_gradient(self.log_scale.to(device))[0]
        return (Ranks(default_group()).average_gradient(log_scale) if self.averages_scale else log_scale).exp()

    def _begin(self, inputs: BatchInputs) -> tuple[OneProcess | ManyRanks, Step]:
        """Validate a step; with several ranks, all ranks validate together."""
        is_writing = self.training and torch.is_grad_enabled()
        if self.is_waiting and self.process_group is None and Ranks(default_group()).size > 1:
            # Ranks with a cache each would not end the waiting in the same step. A wrapped encoder, as with DDP or
            # FSDP, must be called equally often on all ranks.
            self.is_waiting = False
        if self.process_group is None or self.ranks.size == 1:
            return OneProcess(), self._prepare(inputs, is_writing)

        def prepare() -> tuple[Step, list[int]]:
            step = self._prepare(inputs, is_writing)
            needs_gradient = step.in_batch.embeddings.requires_grad
            summary = summarize(
                step.sampling, step.cache, step.request, is_writing=is_writing, needs_gradient=needs_gradient
            )
            return step, summary

        given = inputs.query_embeddings
        device = given.device if isinstance(given, Tensor) else self.ranks.device  # what is no tensor raises below
        step, table = self.ranks.run_checked(self.step_number, device, prepare, NUM_INTEGERS)
        return ManyRanks(Handshake(self.ranks, table), step.request, self.step_number), step

    def _prepare(self, inputs: BatchInputs, is_writing: bool) -> Step:
        """Validate a step. A new cache is stored only after it has been written."""
        if callable(inputs.query_embeddings):  # the first argument of the earlier implementations
            raise TypeError(
                "`query_embeddings` is an encoder. It was given to the constructor: call loss(query_embeddings, "
                "document_embeddings, document_features)."
            )
        cache, specs = self.cache, self._specs_for(inputs.document_features)
        batch = make_batch(inputs, specs)
        device = batch.queries.device
        if cache is None:
            specs = {**batch.scored_specs(self.embedding_dtype), **specs}
            check_specs(specs)
            cache = self._new_cache(specs, device, 1 if batch.new_ids is None else batch.new_ids[:1].numel())
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
        batch.check_against(specs, self.matryoshka_dims, cache.document_ids[:1].numel())
        if is_writing:
            if len(batch.embeddings) > cache.num_rows:
                raise self._too_few_rows(len(batch.embeddings), cache.num_rows)
            embeddings = batch.new_items[EMBEDDING]  # checked in `make_batch`; a narrower dtype may overflow
            known_finite = (EMBEDDING,) if embeddings.dtype == specs[EMBEDDING].dtype else ()
            check_keys("document_features", set(batch.new_items).difference(SCORED), set(specs).difference(SCORED))
            new_items = check_new_items(
                cache, specs, batch.new_items, known_finite=known_finite, name="document_features"
            )
            batch = batch._replace(new_items=new_items)
        if batch.new_ids is None and batch.positive_ids is None and batch.log_q is None and cache.num_ids == 1:
            batch = self._identified(batch, specs, is_writing)
        in_batch = batch.in_batch(self.in_batch)
        sampling = self._sampling(batch, [key for key in specs if key not in SCORED], is_writing)
        return Step(batch, in_batch, cache, sampling, batch.request(len(in_batch.embeddings)))

    def _try_encoder(self, cache: NegativeCache, sampling: SamplingConfig, batch: Batch) -> Tensor:
        """Embeddings of some documents of the batch, from the encoder that is first needed when the waiting ends."""
        documents = {key: batch.new_items[key] for key in sampling.data_keys}
        rows, needs_gradient = cache.stored(EMBEDDING)[0][:0], batch.documents.requires_grad
        return try_encoder(self.document_encoder, documents, rows, needs_gradient)

    def _too_few_rows(self, count: int, num_rows: int) -> ValueError:
        """The error for a batch of `count` documents, more than the `num_rows` rows of this rank."""
        share = "" if num_rows == self.cache_size else f", of which this rank has {num_rows} rows"
        return ValueError(
            f"`cache_size` is {self.cache_size}{share}; the batch has {count} documents, given negatives included. "
            "Use a cache that is at least as large as the batch, usually much larger."
        )

    def _identified(self, batch: Batch, specs: Specs, is_writing: bool) -> Batch:
        """A batch without ids, with hashes of the features as ids, if all features have one."""
        names = [key for key in specs if key not in SCORED]
        if not set(names) <= set(batch.new_items):
            return batch  # only in evaluation, which does not need the features
        items = {key: batch.new_items[key] for key in names}
        if not is_writing:
            items = check_features("document_features", items, specs)
        without_hash = features_without_hash(items)
        if is_writing:
            self.advice.describe_ids(names, without_hash)
        return batch if without_hash else batch.with_hashes(hash_items(items, batch.queries.device))

    def _sampling(self, batch: Batch, data_keys: Sequence[str], is_writing: bool) -> SamplingConfig:
        """The sampling settings of this step; in evaluation nothing is drawn."""
        has_gradient = torch.is_grad_enabled() and (batch.queries.requires_grad or self.log_scale is not None)
        return SamplingConfig(
            EMBEDDING,
            data_keys,
            self.generator,
            score_transform=Scale(self._fixed_scale if self.log_scale is None else self.log_scale.detach()[0].exp()),
            num_samples=self._documents_per_query if is_writing else 0,
            num_draws=self.num_candidates if is_writing else 0,
            num_steps=AUTO_STEPS if self._is_auto else math.inf,
            is_waiting=self.is_waiting and is_writing,
            is_shared=self.shared,
            bias_key=None if batch.log_q is None else BIAS,
            guide_key=None if batch.guide_queries is None else GUIDE,
            dims=self.matryoshka_dims if is_writing else (),
            needs_mean=has_gradient and not is_writing,
            other_settings=(self.in_batch, self.limits, self.refresh_per_step),
        )

    def _update(
        self, cache: NegativeCache, sampling: SamplingConfig, batch: Batch, sample: Sample, encoded: Encoded
    ) -> None:
        """Write re-encoded embeddings to their rows, and the batch's documents over the oldest rows."""
        updates = encoded.updates
        if updates is not None and len(updates.rows):
            # over ranks, the draws are other rows than the updates
            cached = sample.cached if len(sample.rows) else cache.read(updates.rows, [EMBEDDING])[EMBEDDING]
            self._look_at_updates(cached, updates, cache.step + 1 - cache.written[updates.rows])
        if len(sample.rows) and not batch.has_hashes and batch.new_ids is not None:
            documents = {key: batch.new_items[key] for key in sampling.data_keys}
            if not features_without_hash(documents):
                self.diagnostics.add(record_copies(documents, sample, cache.specs))
        if sample.num_hidden is not None:
            self.diagnostics.add(partial(hidden_numbers, sample.num_hidden, sample.num_filled))
        negatives = [] if batch.negatives is None else [batch.negatives]
        if not (batch.queries.requires_grad or batch.embeddings.requires_grad or self.log_scale is not None):
            self.diagnostics.warn_of_missing_gradients()
        if not self.advice.has_seen_ids and not batch.has_hashes and batch.new_ids is not None:
            self.advice.look_at_ids(batch.new_ids, {key: batch.new_items[key] for key in sampling.data_keys})
        if self.advice.is_pending:
            is_first_wait = sampling.is_waiting and self.cache is None and not len(encoded.own)
            tried = self._try_encoder(cache, sampling, batch) if is_first_wait else encoded.own
            self.advice.look_at(batch, tried, self.document_encoder, self._fixed_scale)
            if is_first_wait:
                self.advice.look_at_trial(batch.documents[: len(tried)], tried)
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

    def _look_at_updates(self, cached: Tensor, updates: RowUpdates, age: Tensor) -> None:
        """Compare the cached embeddings of rows, `[n, dim]`, of an age in steps, `[n]`, with their new values."""
        embeddings = updates.items[EMBEDDING]
        assert isinstance(embeddings, Tensor)
        # a copy, because embeddings may be views of larger tensors, or change in place later
        self.diagnostics.add(partial(update_numbers, cached, embeddings.clone(), age, updates.mask))
        if self.advice.is_pending:
            is_new = age == 1 if updates.mask is None else updates.mask & (age == 1)
            self.advice.look_at_updates(cached, embeddings, is_new)

    def _check_settings(self, learnable_scale: bool) -> None:
        """Raise for arguments of the constructor of a wrong type or out of range, and convert numbers of NumPy."""
        flags = {"learnable_scale": learnable_scale, "in_batch": self.in_batch, "shared": self.shared}
        for name, flag in {**flags, "use_lru": self.use_lru}.items():
            if not isinstance(flag, bool):
                raise TypeError(f"`{name}` is {flag!r}; expected True or False.")
        self.cache_size = check_integer("cache_size", self.cache_size, 1)
        self.num_samples = check_num_samples(self.num_samples, self.shared)
        self.refresh_per_step = check_integer("refresh_per_step", self.refresh_per_step, 0, self.cache_size)
        self._fixed_scale = check_number("scale", self._fixed_scale, " To learn it, set learnable_scale=True.")
        smallest, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
        if not smallest <= self._fixed_scale <= largest:
            raise ValueError(f"`scale` is {self._fixed_scale}; it must be positive, {smallest:.1e} to {largest:.1e}.")
        if self.matryoshka_dims and not self.shared:
            raise ValueError("`matryoshka_dims` needs shared=True: truncated embeddings use the draws of all queries.")
        self.limits = self.limits.checked()
        check_embedding_dtype(self.embedding_dtype)
        if self.feature_device is not None:
            _check_device("feature_device", self.feature_device)
        if isinstance(self._process_group, str | bool) and self._process_group != "world":
            raise ValueError(
                f'`process_group` is {self._process_group!r}; expected a process group, "world" for the default one, '
                "or None."
            )
        for key in SCORED:
            if self.specs is not None and key in self.specs:
                raise ValueError(
                    f"`specs` has the key {key!r}, which the cache adds itself. Leave it out, or rename your feature."
                )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if (prefix + "log_scale" in state_dict) != (self.log_scale is not None):
            saved, mine = ("is", "is not") if self.log_scale is None else ("is not", "is")
            raise ValueError(f"The scale of the saved loss {saved} learnable, that of this one {mine}.")
        if self.log_scale is not None:  # earlier versions saved a scalar
            state_dict[prefix + "log_scale"] = state_dict[prefix + "log_scale"].view(1)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _checked_dims(dims: Sequence[int] | int) -> tuple[int, ...]:
    """Validate `matryoshka_dims` and return them as a tuple."""
    values = [dims] if isinstance(dims, numbers.Real) else dims
    if not isinstance(values, Iterable):
        raise TypeError(f"`matryoshka_dims` is {dims!r}; expected a sequence of integers, () for none.")
    checked = tuple(check_integer("matryoshka_dims", dim, 1) for dim in values)
    if len(set(checked)) < len(checked):
        raise ValueError(f"`matryoshka_dims` is {list(checked)}; expected numbers of components, each once.")
    return checked


def _check_device(name: str, device: torch.device | str) -> None:
    try:
        torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"`{name}` is {device!r}; expected a device such as 'cpu' or 'cuda:0', or None.") from None
