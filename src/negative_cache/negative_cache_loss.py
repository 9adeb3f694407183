"""`NegativeCacheLoss`: cache, draws, loss and updates in one module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from negative_cache.cache.specs import (
    Features,
    Specs,
)
from negative_cache.distributed.handshake import NUM_TOLD, Meeting, tell
from negative_cache.distributed.many_ranks import draw_from_ranks, share_ids
from negative_cache.distributed.ranks import separate
from negative_cache.negative_cache import CacheManager
from negative_cache.objective import loss as objective
from negative_cache.objective.batch import BIAS, EMBEDDING, GUIDE, Batch, Step, check_embeddings, make_batch
from negative_cache.objective.cache_module import RanksCache
from negative_cache.objective.diagnostics import Health, LimitRecord, record_updates
from negative_cache.objective.settings import check_settings, default_candidates
from negative_cache.retrieval import Scale
from negative_cache.retrieval.randomness import new_generator
from negative_cache.sampling.draw import DocumentEncoder, check_finite, encode
from negative_cache.sampling.one_process import Asked, Negatives, Returned, Rules, draw_here
from negative_cache.sampling.refresh import check_filling, check_room, refresh


class NegativeCacheLoss(RanksCache):
    """Cross-entropy of each query's positive against all cached documents, at the price of one more encoding.

    With `s(q, d) = scale * <q, d>`, the loss is `-s(q, positive) + logsumexp(s(q, positive), {s(q, row)})`
    over the filled rows and the batch's other documents, each document once, that are no known positives of the query.
    Its value is computed from the cached embeddings; its gradient is the exact one in expectation over the rows drawn.
    By default the batch's documents are differentiated exactly and what is encoded serves every query (see
    docs/how-it-works.md); `in_batch=False, shared=False` is the method of Lindgren et al. (NeurIPS 2021).
    After the loss the encoded rows get their new embeddings and the batch's documents replace the
    oldest rows. In eval mode, or where gradients are switched off, nothing is written.

    `state_dict` holds the cache, a learnable scale and the state of the generator, but not the encoder.

    Args:
        document_encoder: Features `{key: [n, ...]}` -> embeddings `[n, dim]`. Called with drawn rows.
        cache_size: Number of rows.
        scale: Factor of the dot products, the inverse temperature. Normalise embeddings for the usual 20.
        learnable_scale: Make the scale a parameter (its logarithm, `log_scale`).
        top_k: Restrict the softmax to the best row of each of top_k groups of rows: faster on a GPU, approximate.
        num_samples: Cached documents encoded per query.
        in_batch: Whether the batch's documents are negatives of its other queries, differentiated exactly.
        shared: Whether an encoded document serves all queries; if not, each query has `num_samples` of its own.
        num_candidates: Rows drawn per query from which those to encode are chosen, where they are shared; None for
            twice `num_samples`, but from 8 to 16, or as many as those.
        absolute_margin: A document whose similarity (before the scale) is above that of the positive less this is taken
            for a false negative, and no query's negative; None for no such limit.
        relative_margin: The same above the positive's similarity less this share of it: 0.05 means 95 %.
        guide_margin: Where a guide's embeddings are given: the same by its similarities, less this.
        matryoshka_dims: Add the losses of embeddings that are cut to so many first components (and brought to their old
            length); from the same encoded documents, weighed for the shorter embeddings by importance sampling. In
            evaluation only the whole embeddings count.
        warmup_fill: Share of filled rows from which cached documents count in full; with fewer their weight in the
            softmax is less, in proportion.
        refresh_per_step: Rows encoded anew in each step, without gradient, in turn.
        use_lru: Replace the least recently used rows; if False, the first that came.
        specs: Spec per document feature. Without it they are taken from the first batch, see `infer_specs`:
            other inputs than a transformer's then keep the shape that they have there.
        embedding_dtype: Stored dtype of embeddings: float32, bfloat16, float16, float64, or int8 with a scale per row.
        feature_device: Where document features are kept, such as "cpu"; None for where the embeddings are.
        feature_folder: Folder in which document features are kept, in files without a name that go with the process.
        seed: Seed of the draws; None takes one from torch's global generator.
        process_group: Share the cache among the ranks of this group, or of the default one ("world", looked up
            at the first step; one process if there is none): each rank holds `cache_size / ranks` rows, queries see
            all of them. Then every call is collective, with the rank's own part of the batch.
    """

    def __init__(
        self,
        document_encoder: DocumentEncoder,
        cache_size: int,
        scale: float = 20.0,
        *,
        learnable_scale: bool = False,
        top_k: int | None = None,
        num_samples: int = 1,
        in_batch: bool = True,
        shared: bool = True,
        num_candidates: int | None = None,
        absolute_margin: float | None = None,
        relative_margin: float | None = None,
        guide_margin: float = 0.0,
        matryoshka_dims: Sequence[int] = (),
        warmup_fill: float = 0.0,
        refresh_per_step: int = 0,
        use_lru: bool = True,
        specs: Specs | None = None,
        embedding_dtype: torch.dtype = torch.float32,
        feature_device: torch.device | str | None = None,
        feature_folder: str | Path | None = None,
        seed: int | None = None,
        process_group: dist.ProcessGroup | Literal["world"] | None = None,
    ) -> None:
        check_settings(
            cache_size=cache_size,
            scale=scale,
            top_k=top_k,
            num_samples=num_samples,
            num_candidates=num_candidates,
            shared=shared,
            matryoshka_dims=matryoshka_dims,
            warmup_fill=warmup_fill,
            refresh_per_step=refresh_per_step,
            absolute_margin=absolute_margin,
            relative_margin=relative_margin,
            guide_margin=guide_margin,
            embedding_dtype=embedding_dtype,
            specs=specs,
            feature_folder=feature_folder,
            feature_device=feature_device,
        )
        stored = (embedding_dtype, feature_device, feature_folder)
        super().__init__(document_encoder, cache_size, specs, *stored, new_generator(seed), process_group)
        self.top_k = top_k
        self.num_samples = num_samples
        self.in_batch = in_batch
        self.shared = shared
        self.num_candidates = num_candidates or default_candidates(num_samples)
        self.margins = objective.Margins(absolute_margin, relative_margin)
        self.guide_margins = objective.Margins(guide_margin)
        self.matryoshka_dims = tuple(matryoshka_dims)
        self.warmup_fill = warmup_fill
        self.refresh_per_step = refresh_per_step
        self.use_lru = use_lru
        self._fixed_scale = scale
        self.log_scale = nn.Parameter(torch.tensor(scale).log()) if learnable_scale else None
        self.health = Health()

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
            document_features: Feature name -> `[batch, ...]`: what `document_encoder` made them from.
            document_ids: int `[batch]`, -1 for unknown. Rows that hold the query's own document are not its
                negatives, and a document that has a row already is written there.
            positive_ids: int `[batch, n]`, filled up with -1: further documents that are no negatives.
            negative_embeddings: `[m, dim]`, with gradient: documents that are negatives of every query of
                the batch (but of those they are known positives of), differentiated exactly.
            negative_features: Their features; needed with `negative_embeddings`.
            negative_ids: int `[m]`: their ids.
            log_q: `[batch + m]`: log of the probability with which a training pair has the document (or, for the last
                m, with which a given negative is it). Popular documents, which are negatives more often, then count
                like all others: `s - log(n q)`, n the number of negatives. In every step or in none; not with ids.
            guide_queries: `[batch, guide_dim]`: another model's embeddings of the queries. What is to that model more
                similar to the query than its positive less `guide_margin` is not its negative.
            guide_documents: `[batch + m, guide_dim]`: its embeddings of documents and given negatives, kept in the
                cache. Give both in every step or in none.

        Returns:
            Scalar, with gradient to all embeddings, the encoder and the scale.

        Raises:
            ValueError: Wrong keys, shapes, sizes, devices or ids, or values that are not finite; the cache
                is as it was then.
            TypeError: Wrong dtypes.
        """
        device, ranks = query_embeddings.device, self.ranks

        def prepare() -> tuple[Step, list[int]]:
            check_embeddings(query_embeddings, document_embeddings, negative_embeddings)
            specs = self._specs_for(document_features)
            batch = make_batch(
                query_embeddings,
                document_embeddings,
                document_features,
                specs,
                document_ids,
                positive_ids,
                negative_embeddings,
                negative_features,
                negative_ids,
                log_q,
                guide_queries,
                guide_documents,
            )
            step = self._prepare(batch, specs)
            if ranks.size == 1:
                return step, []
            own = batch.fresh(self.in_batch)
            needs_gradient = own is not None and own.requires_grad
            return step, tell(step.rules, [step.cache], step.asked, step.is_writing, needs_gradient)

        step, table = ranks.meet(self.step_number, device, prepare, NUM_TOLD)
        batch, cache = step.batch, step.cache
        meeting = Meeting(table) if ranks.size > 1 else None
        scale = self.scale
        if self.log_scale is not None:
            scale = ranks.average_gradient(self.log_scale.to(device)).exp()
        asked = replace(step.asked, ids_of_all=share_ids(ranks, meeting, step.asked))
        fresh = objective.gather_fresh(ranks, meeting, batch, asked, self.in_batch)
        scores = objective.score_batch(batch, scale, fresh, self.margins, self.guide_margins)
        asked = replace(
            asked,
            positive_scores=scores.positive.detach(),
            fresh_lse=scores.fresh_lse,
            ceilings=scores.ceilings,
            guide_ceilings=scores.guide_ceilings,
        )
        negatives: Negatives
        with torch.autocast(device.type, enabled=False):
            if meeting is None:
                negatives = draw_here(step.rules, [cache], asked)
            else:
                negatives = draw_from_ranks(ranks, meeting, step.rules, [cache], asked, self.step_number)
        encoded, error = batch.queries.new_empty(0, batch.queries.shape[1]), None
        written_dtype = cache.specs[EMBEDDING].dtype
        if negatives.count:
            try:
                dim, needs_gradient = encoded.shape[1], batch.documents.requires_grad
                encoded = encode(self.document_encoder, negatives.features, negatives.count, dim, needs_gradient)
                check_finite(f"The new embeddings, as {self.embedding_dtype},", encoded.to(written_dtype))
            except Exception as caught:
                error = caught
        updated = refreshed = None
        if step.is_writing:  # else nothing was drawn
            stored = encoded.detach().to(written_dtype)
            updated, refreshed = negatives.give_back(stored, batch.new_embeddings, error)
        loss = self._loss(step, scale, scores, fresh, negatives, encoded)
        if step.is_writing:
            self._write(step, negatives, updated, refreshed)
        return loss.mean() * (1.0 if meeting is None else meeting.weight(ranks.rank))

    def metrics(self) -> dict[str, float]:
        """Health of the last training step; waits for the device. Warns once of what is going wrong, with advice.

        Returns:
            `interpretable_loss` (mean of `-log` of the positive's probability), `positive_probability` (its mean),
            `cache_share` (mean softmax weight of all cached documents together), `fill` (share of filled rows),
            `staleness` (mean squared distance of encoded rows' cached and new embeddings, relative),
            `staleness_youngest` and `staleness_oldest` (of the quarter of them written last, and longest ago), `age`
            (their mean age in steps), `effective_negatives` (the inverse of the mean sum of squares of the cache's
            softmax), `near_duplicates` (softmax weight of cached documents that are nearly equal to the positive),
            `masked` (share of filled rows that margins or the guide hid), `gradient_norm_ratio` (of the gradients of
            the query embeddings and of the documents', after the backward pass). What a step does not have is left
            out. Over several ranks all of it is of this rank's queries and rows alone.

        Raises:
            ValueError: Embeddings that were not finite were kept out of the cache since the last call.
        """
        return self.health.read(self.cache)

    @torch.no_grad()
    def fill_from(self, batches: Iterable[Mapping[str, Any]]) -> int:
        """Encode documents, such as a whole corpus, into the cache before training.

        Args:
            batches: Dicts of `document_features`, `document_ids` (int `[n]`, at least 0) and, where steps have them,
                `guide_documents`, as in a call. Each rank gives and keeps its own part of the documents.

        Returns:
            How many rows of this rank are filled then.

        Raises:
            ValueError: More documents than rows (those before are in then), or what a call would raise.
        """
        begin = self.step_number()
        for batch in batches:
            check_filling(batch)
            embeddings = self.document_encoder(dict(batch["document_features"]))
            check_embeddings(embeddings, embeddings, None)
            specs, guide = self._specs_for(batch["document_features"]), batch.get("guide_documents")
            made = make_batch(embeddings, embeddings, specs=specs, guide_queries=guide, **batch)
            step = self._prepare(made, specs)
            check_room(step.cache, batch["document_ids"])
            step.cache.step.fill_(begin)  # all of it is one step, the same on all ranks
            step.manager.update_cache_(step.cache, new_items=made.new_items, document_ids=made.new_ids)
            self.cache = step.cache
        return 0 if self.cache is None else int(self.cache.num_filled)

    def _loss(
        self,
        step: Step,
        scale: Tensor | float,
        scores: objective.Scores,
        fresh: objective.Fresh | None,
        negatives: Negatives,
        encoded: Tensor,
    ) -> Tensor:
        """Loss `[batch]` with gradient, from the new embeddings `[count, dim]` of what was drawn."""
        batch = step.batch
        num_filled = step.cache.num_filled if negatives.num_filled is None else negatives.num_filled
        log_weight, scores = objective.weigh_cache(
            num_filled, self.cache_size, scores, self.warmup_fill, batch.log_q is not None
        )
        dims, everything = step.rules.dims, negatives.of_all(encoded)
        outcome = objective.compute_loss(batch, scale, scores, fresh, negatives, everything, dims, log_weight)
        if step.is_writing:
            self.health.take(outcome.records)
            if negatives.num_limited is not None:
                self.health.add(LimitRecord(negatives.num_limited, num_filled))
            given = [] if batch.negatives is None else [batch.negatives]
            self.health.watch(batch.queries, [batch.documents, *given, encoded])
        return outcome.loss

    def _write(self, step: Step, negatives: Negatives, updated: Returned | None, refreshed: Returned | None) -> None:
        """New embeddings into their rows, the batch's documents over the oldest ones."""
        if updated is not None and len(updated.rows):
            self.health.add(record_updates(step.cache, EMBEDDING, updated))
        step.manager.update_cache_(
            step.cache,
            new_items=step.new_items,
            new_items_mask=negatives.new_items_mask(),
            document_ids=step.batch.new_ids,
            document_rows=negatives.document_rows,
            updated_item_data=None if updated is None else {EMBEDDING: updated.embeddings},
            updated_item_indices=None if updated is None else updated.rows,
            updated_item_mask=None if updated is None else updated.mask,
            refreshed_item_data=None if refreshed is None else {EMBEDDING: refreshed.embeddings},
            refreshed_item_indices=None if refreshed is None else refreshed.rows,
        )
        if self.cache is None:
            self.cache = step.cache
        if self.refresh_per_step:
            share, is_alone = -(-self.refresh_per_step // self.ranks.size), self.ranks.size == 1
            refresh(step.cache, EMBEDDING, step.rules.data_keys, self.document_encoder, share, is_alone)

    def _prepare(self, batch: Batch, specs: Specs) -> Step:
        """Checks of the batch against the cache; a new cache is kept only once it has been written."""
        all_specs = {**batch.scored_specs(self.embedding_dtype), **specs}
        cache = self.cache
        if cache is None:
            cache = self._new_cache(all_specs, batch.queries.device)
            separate(self.generator, self._first_state)
        if cache.device != batch.queries.device:
            raise ValueError(
                f"`query_embeddings` is on {batch.queries.device}, the cache on {cache.device}. Move the loss with "
                f".to({str(batch.queries.device)!r})."
            )
        (dim,) = cache.stored(EMBEDDING)[0].shape[1:]
        if dim != batch.queries.shape[1]:
            raise ValueError(
                f"`query_embeddings` has {batch.queries.shape[1]} dimensions, the cached embeddings have {dim}."
            )
        batch.check_extras(cache.specs, self.matryoshka_dims)
        manager = CacheManager(all_specs, cache.num_rows, self.use_lru)
        is_writing = self.training and torch.is_grad_enabled()
        new_items = manager.check_new_items(cache, batch.new_items, batch.new_ids) if is_writing else {}
        rules = Rules(
            EMBEDDING,
            list(specs),
            self.generator,
            score_transform=Scale(self.scale.detach() if isinstance(self.scale, Tensor) else self.scale),
            top_k=self.top_k,
            num_samples=self.num_samples if is_writing else 0,
            num_candidates=self.num_candidates if self.shared else 0,
            bias_key=None if batch.log_q is None else BIAS,
            guide_key=None if batch.guide_queries is None else GUIDE,
            dims=self.matryoshka_dims if is_writing else (),
            settings=(self.in_batch, self.margins, self.guide_margins, self.warmup_fill, self.refresh_per_step),
        )
        fresh = batch.fresh(self.in_batch)
        asked = Asked(
            batch.queries.detach(),
            batch.positives,
            batch.new_ids,
            0 if fresh is None else len(fresh),
            has_ceilings=self.margins != objective.Margins(),
            guide_queries=batch.guide_queries,
        )
        return Step(batch, new_items, manager, cache, rules, asked, is_writing)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if (prefix + "log_scale" in state_dict) != (self.log_scale is not None):
            saved, mine = ("is", "is not") if self.log_scale is None else ("is not", "is")
            raise ValueError(f"The scale of the saved loss {saved} learnable, that of this one {mine}.")
        super()._load_from_state_dict(state_dict, prefix, *args)
