"""`NegativeCacheLoss`: cache, draws, loss and updates in one module."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from negative_cache import estimators
from negative_cache.batch import Batch, Step, check_embeddings, make_batch, mask_positives
from negative_cache.cache import CacheHolder, NegativeCache, state_of
from negative_cache.distributed import Ranks, separate, shard_sizes, world
from negative_cache.drawing import Asked, Negatives, Returned, Rules, draw_here
from negative_cache.features import (
    Features,
    FeatureSpec,
    Specs,
    check_embedding_dtype,
    embedding_spec,
    infer_specs,
    spec_from_json,
)
from negative_cache.meeting import NUM_TOLD, Meeting, tell
from negative_cache.negative_cache import CacheManager
from negative_cache.negatives import DocumentEncoder, check_finite, encode
from negative_cache.randomness import new_generator
from negative_cache.retrieval import Scale
from negative_cache.sharded import draw_from_ranks
from negative_cache.table import check_feature_folder

EMBEDDING = "embedding"


class NegativeCacheLoss(CacheHolder):
    """Cross-entropy of each query's positive against all cached documents, at the price of one more encoding.

    With `s(q, d) = scale * <q, d>`, the loss is `-s(q, positive) + logsumexp(s(q, positive), {s(q, row)})`
    over the filled rows that are no known positives of the query. Its value is computed from the cached
    embeddings; its gradient is the exact one in expectation over the rows drawn (Lindgren et al., NeurIPS
    2021). After the loss the drawn rows get their new embeddings and the batch's documents replace the
    oldest rows. In eval mode, or where gradients are switched off, nothing is written.

    `state_dict` holds the cache, a learnable scale and the state of the generator, but not the encoder.

    Args:
        document_encoder: Features `{key: [n, ...]}` -> embeddings `[n, dim]`. Called with drawn rows.
        cache_size: Number of rows.
        scale: Factor of the dot products, the inverse temperature. Normalise embeddings for the usual 20.
        learnable_scale: Make the scale a parameter (its logarithm, `log_scale`).
        top_k: Restrict the softmax to the best row of each of top_k groups of rows: faster on a GPU, approximate.
        num_samples: Rows drawn and encoded per query.
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
        use_lru: bool = True,
        specs: Specs | None = None,
        embedding_dtype: torch.dtype = torch.float32,
        feature_device: torch.device | str | None = None,
        feature_folder: str | Path | None = None,
        seed: int | None = None,
        process_group: dist.ProcessGroup | Literal["world"] | None = None,
    ) -> None:
        super().__init__()
        if cache_size < 1:
            raise ValueError(f"`cache_size` is {cache_size}; it must be at least 1.")
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"`scale` is {scale}; it must be a positive number.")
        if top_k is not None and not 1 <= top_k <= cache_size:
            raise ValueError(f"`top_k` is {top_k}; it must be from 1 to the cache's {cache_size} rows.")
        if num_samples < 1:
            raise ValueError(f"`num_samples` is {num_samples}; it must be at least 1.")
        check_embedding_dtype(embedding_dtype)
        if specs is not None and EMBEDDING in specs:
            raise ValueError(f"`specs` has the key {EMBEDDING!r}, which the cache itself uses. Rename the feature.")
        if feature_folder is not None:
            check_feature_folder(feature_folder, feature_device, specs or {})
        # In a tuple, the encoder is no submodule: its parameters and its training mode are the caller's.
        self._document_encoder = (document_encoder,)
        self.cache_size = cache_size
        self.top_k = top_k
        self.num_samples = num_samples
        self.use_lru = use_lru
        self.embedding_dtype = embedding_dtype
        self.feature_device = feature_device
        self.feature_folder = feature_folder
        self.generator = new_generator(seed)
        self._first_state = self.generator.get_state()
        self._process_group = process_group
        self._ranks: Ranks | None = None
        self.embedding_dim: int | None = None  # where it is known before the first step
        self.specs: dict[str, FeatureSpec] | None = None if specs is None else dict(specs)
        self._fixed_scale = scale
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale))) if learnable_scale else None
        self._last: dict[str, Tensor] = {}

    @property
    def document_encoder(self) -> DocumentEncoder:
        """The encoder of drawn rows; may be replaced at any time."""
        return self._document_encoder[0]

    @document_encoder.setter
    def document_encoder(self, encoder: DocumentEncoder) -> None:
        self._document_encoder = (encoder,)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("document_encoder", "cache"):  # nn.Module would register a module, and never reach the property
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def cache(self) -> NegativeCache | None:
        """This rank's rows; None before the first step."""
        return self._held.get("cache")

    @cache.setter
    def cache(self, cache: NegativeCache) -> None:
        self._held["cache"] = cache

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The processes that share the cache; None for this one alone."""
        if self._process_group != "world":
            return self._process_group
        return world()

    @property
    def ranks(self) -> Ranks:
        """The processes that share the cache."""
        if self._ranks is None or self._ranks.group is not self.process_group:
            self._ranks = Ranks(self.process_group)
        return self._ranks

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

        Returns:
            Scalar, with gradient to all embeddings, the encoder and the scale; 0 while the cache is empty.

        Raises:
            ValueError: Wrong keys, shapes, sizes, devices or ids, or values that are not finite; the cache
                is as it was then.
            TypeError: Wrong dtypes.
        """
        device = query_embeddings.device

        def prepare() -> tuple[Step, list[int]]:
            check_embeddings(query_embeddings, document_embeddings, negative_embeddings)
            specs = self.specs or infer_specs(document_features) if self.cache is None else self._feature_specs()
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
            )
            step = self._prepare(batch, specs)
            if ranks.size == 1:
                return step, []
            needs_gradient = negative_embeddings is not None and negative_embeddings.requires_grad
            return step, tell(step.rules, [step.cache], step.asked, step.is_writing, needs_gradient)

        ranks = self.ranks
        step, table = ranks.meet(self.step_number, device, prepare, NUM_TOLD)
        batch, cache = step.batch, step.cache
        meeting = Meeting(table) if ranks.size > 1 else None
        negatives: Negatives
        if meeting is None:
            negatives = draw_here(step.rules, [cache], step.asked)
        else:
            negatives = draw_from_ranks(ranks, meeting, step.rules, [cache], step.asked, self.step_number)
        fresh, error = batch.queries.new_empty(0, batch.queries.shape[1]), None
        written_dtype = cache.specs[EMBEDDING].dtype
        if negatives.count:
            try:
                fresh = encode(self.document_encoder, negatives.features, negatives.count, fresh.shape[1])
                check_finite(f"The new embeddings, as {self.embedding_dtype},", fresh.to(written_dtype))
            except Exception as caught:
                error = caught
        updated, refreshed = None, None
        if step.is_writing:  # else nothing was drawn
            stored = fresh.detach().to(written_dtype)
            updated, refreshed = negatives.give_back(stored, batch.new_embeddings, error)
        loss = self._loss(batch, negatives, fresh, ranks, meeting)
        if step.is_writing:
            self._write(step, negatives.new_items_mask(), updated, refreshed)
        mean = loss.mean()
        return mean if meeting is None else mean * meeting.weight(ranks.rank)

    def metrics(self) -> dict[str, float]:
        """Health of the last training step; waits for the device.

        Returns:
            `interpretable_loss` (mean of `-log` of the positive's probability), `staleness` (mean squared distance
            of the drawn rows' cached and new embeddings, relative), `fill` (share of filled rows). Over several ranks
            all of it is of this rank's queries and rows alone.

        Raises:
            ValueError: Embeddings that were not finite were kept out of the cache since the last call.
        """
        if self.cache is None:
            return {"interpretable_loss": 0.0, "staleness": 0.0, "fill": 0.0}
        rejected = int(self.cache.num_rejected)
        if rejected:
            self.cache.num_rejected.zero_()
            raise ValueError(
                f"{rejected} embeddings that were not finite were kept out of the cache; look for a learning "
                "rate that is too high or an overflow in half precision."
            )
        last = {key: float(value) for key, value in self._last.items()}
        return {**last, "fill": int(self.cache.num_filled) / self.cache.num_rows}

    def _loss(self, batch: Batch, negatives: Negatives, fresh: Tensor, ranks: Ranks, meeting: Meeting | None) -> Tensor:
        """Loss `[batch]` with gradient, from the new embeddings `[count, dim]` of what was drawn."""
        queries, scale = batch.queries, self.scale
        if self.log_scale is not None:
            scale = ranks.average_gradient(self.log_scale.to(queries.device)).exp()
        positive_scores = scale * estimators.dot(queries, batch.documents)
        fresh_scores, given = None, self._given(batch, positive_scores.dtype, ranks, meeting)
        if given is not None:
            with torch.autocast(queries.device.type, enabled=False):
                fresh_scores = scale * (queries.to(given.dtype) @ given.T)
            fresh_scores = mask_positives(fresh_scores, batch.positives, negatives.withheld_ids)
        staleness = positive_scores.new_zeros(())
        if negatives.count:
            negative_scores = scale * estimators.dot(queries[:, None], fresh.view(len(queries), -1, queries.shape[1]))
            staleness = estimators.staleness(negatives.cached, fresh).mean()
        else:
            negative_scores = positive_scores[:, None] * 0
        loss = estimators.readable_loss(positive_scores, negative_scores, negatives.lse, fresh_scores)
        if self.training and torch.is_grad_enabled():
            self._last = {"interpretable_loss": loss.detach().mean(), "staleness": staleness.detach()}
        return loss

    def _write(
        self, step: Step, new_items_mask: Tensor | None, updated: Returned | None, refreshed: Returned | None
    ) -> None:
        """New embeddings into their rows, the batch's documents over the oldest ones."""
        step.manager.update_cache_(
            step.cache,
            new_items={EMBEDDING: step.batch.new_embeddings, **step.batch.new_features},
            new_items_mask=new_items_mask,
            document_ids=step.batch.new_ids,
            updated_item_data=None if updated is None else {EMBEDDING: updated.embeddings},
            updated_item_indices=None if updated is None else updated.rows,
            updated_item_mask=None if updated is None else updated.mask,
            refreshed_item_data=None if refreshed is None else {EMBEDDING: refreshed.embeddings},
            refreshed_item_indices=None if refreshed is None else refreshed.rows,
        )
        if self.cache is None:
            self.cache = step.cache

    def _given(self, batch: Batch, dtype: torch.dtype, ranks: Ranks, meeting: Meeting | None) -> Tensor | None:
        """The given negatives of all ranks; None where there are none."""
        given = None if batch.negatives is None else batch.negatives.to(dtype)
        if meeting is None or not any(meeting.num_withheld):
            return given
        if given is None:
            given = batch.queries.new_empty(0, batch.queries.shape[1], dtype=dtype)
        if meeting.needs_gradient and not given.requires_grad:  # all ranks take part in the backward pass, or none
            given = given.detach().requires_grad_()
        return ranks.gather_with_gradient(given, meeting.num_withheld)

    def _feature_specs(self) -> dict[str, Any]:
        assert self.cache is not None
        return {key: spec for key, spec in self.cache.specs.items() if key != EMBEDDING}

    def step_number(self) -> int:
        """How many steps have updated the cache; waits for the device."""
        return 0 if self.cache is None else int(self.cache.step)

    def _prepare(self, batch: Batch, specs: Specs) -> Step:
        """Checks of the batch against the cache; a new cache is kept only once it has been written."""
        all_specs: dict[str, FeatureSpec] = {EMBEDDING: embedding_spec(batch.queries.shape[1], self.embedding_dtype)}
        all_specs.update(specs)
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
        manager = CacheManager(all_specs, cache.num_rows, self.use_lru)
        is_writing = self.training and torch.is_grad_enabled()
        if is_writing:
            items = {EMBEDDING: batch.new_embeddings, **batch.new_features}
            manager.check_new_items(cache, items, batch.new_ids)
        rules = Rules(
            EMBEDDING,
            list(specs),
            self.generator,
            score_transform=Scale(self.scale.detach() if isinstance(self.scale, Tensor) else self.scale),
            top_k=self.top_k,
            num_samples=self.num_samples if is_writing else 0,
        )
        asked = Asked(
            batch.queries.detach(),
            batch.positives,
            batch.new_ids,
            0 if batch.negatives is None else len(batch.negatives),
        )
        return Step(batch, manager, cache, rules, asked, is_writing)

    def _new_cache(self, specs: Specs, device: torch.device) -> NegativeCache:
        """An empty cache of this rank's share of the rows."""
        num_rows = shard_sizes(self.cache_size, self.ranks.size)[self.ranks.rank]
        if num_rows == 0:
            raise ValueError(f"`cache_size` is {self.cache_size}, less than the {self.ranks.size} ranks that share it.")
        return NegativeCache.empty(specs, num_rows, device, self.feature_device, EMBEDDING, self.feature_folder)

    def get_extra_state(self) -> Tensor:
        """The generator's state, uint8."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Continue the draws where the saved run stopped."""
        self.generator.set_state(state.cpu())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if (prefix + "log_scale" in state_dict) != (self.log_scale is not None):
            raise ValueError(
                "The scale of the saved loss is learnable, that of this one is not."
                if self.log_scale is None
                else "The scale of this loss is learnable, that of the saved one is not."
            )
        if self.cache is None and prefix + "cache.filled" in state_dict:
            saved = state_of(state_dict, prefix + "cache.")
            (dim,) = saved["specs"].pop(EMBEDDING)["shape"]
            specs = {key: spec_from_json(spec) for key, spec in saved["specs"].items()}
            specs = {**(self.specs or specs), EMBEDDING: embedding_spec(dim, self.embedding_dtype)}
            device = state_dict[prefix + "cache.filled"].device
            cache = self._new_cache(specs, device)
            cache.check_loadable(state_dict, prefix + "cache.")
            self.cache = cache
        super()._load_from_state_dict(state_dict, prefix, *args)
