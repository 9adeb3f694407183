"""`NegativeCacheLoss`: cache, draws, loss and updates in one module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from negative_cache import estimators
from negative_cache.cache import NO_ID, NegativeCache, state_of
from negative_cache.features import (
    Features,
    FeatureSpec,
    FixedLenFeature,
    Specs,
    concatenate,
    infer_specs,
    spec_from_json,
)
from negative_cache.negative_cache import CacheManager, check_ids
from negative_cache.negatives import (
    DocumentEncoder,
    check_finite,
    draw_negatives,
    encode,
    new_generator,
    pool_of,
    read_pool,
)
from negative_cache.retrieval import retrieve

EMBEDDING = "embedding"


class NegativeCacheLoss(nn.Module):
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
        embedding_dtype: Stored dtype of embeddings: float32, bfloat16, float16 or float64.
        feature_device: Where document features are kept, such as "cpu"; None for where the embeddings are.
        seed: Seed of the draws; None takes one from torch's global generator.
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
        seed: int | None = None,
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
        if not embedding_dtype.is_floating_point:
            raise ValueError(f"`embedding_dtype` is {embedding_dtype}; it must be a floating point dtype.")
        if specs is not None and EMBEDDING in specs:
            raise ValueError(f"`specs` has the key {EMBEDDING!r}, which the cache itself uses. Rename the feature.")
        # In a tuple, the encoder is no submodule: its parameters and its training mode are the caller's.
        self._document_encoder = (document_encoder,)
        self.cache_size = cache_size
        self.top_k = top_k
        self.num_samples = num_samples
        self.use_lru = use_lru
        self.embedding_dtype = embedding_dtype
        self.feature_device = feature_device
        self.generator = new_generator(seed)
        self.cache: NegativeCache | None = None
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
        if name == "document_encoder":  # nn.Module would register a module, and never reach the property
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

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
        negatives = (negative_embeddings, negative_features, negative_ids)
        self._check_embeddings(query_embeddings, document_embeddings, negative_embeddings)
        embeddings, features, ids = document_embeddings, document_features, document_ids
        specs = self.specs or infer_specs(document_features) if self.cache is None else self._feature_specs()
        if negative_embeddings is not None:
            embeddings, features, ids = _join(embeddings, features, ids, negatives, specs)
        elif negative_features is not None or negative_ids is not None:
            raise ValueError("`negative_features` and `negative_ids` need `negative_embeddings`.")
        manager, cache = self._prepare(query_embeddings, specs)
        new_items = {EMBEDDING: embeddings.detach(), **features}
        is_writing = self.training and torch.is_grad_enabled()
        if is_writing:
            manager.check_new_items(cache, new_items, ids)
        positives = _positive_ids(document_ids, positive_ids, len(query_embeddings), cache.device)
        fresh_scores = None
        if negative_embeddings is not None:
            fresh_scores = self._pair_scores(query_embeddings[:, None], negative_embeddings)
            fresh_scores = _mask_positives(fresh_scores, positives, negative_ids)
        positive_scores = self._pair_scores(query_embeddings, document_embeddings)
        excluded = None if positives is None else cache.find(positives.flatten()).view(positives.shape)
        withheld = None if negative_ids is None else cache.find(negative_ids.to(cache.device, torch.int64))
        if not is_writing:
            lse = self._normaliser(query_embeddings, cache, excluded, withheld)
            return estimators.readable_loss(positive_scores, torch.zeros_like(lse)[:, None], lse, fresh_scores).mean()
        loss, rows, fresh, is_valid = self._sampled_loss(
            query_embeddings, positive_scores, cache, excluded, withheld, fresh_scores
        )
        manager.update_cache_(
            cache,
            new_items=new_items,
            document_ids=ids,
            updated_item_data={EMBEDDING: fresh.detach()} if len(rows) else None,
            updated_item_indices=rows if len(rows) else None,
            updated_item_mask=is_valid if len(rows) else None,
        )
        if self.cache is None:
            self.cache = cache
        return loss.mean()

    def metrics(self) -> dict[str, float]:
        """Health of the last training step; waits for the device.

        Returns:
            `interpretable_loss` (mean of `-log` of the positive's probability), `staleness` (mean squared distance
            of the drawn rows' cached and new embeddings, relative), `fill` (share of filled rows).

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
        return {**last, "fill": int(self.cache.num_filled) / self.cache_size}

    def _sampled_loss(
        self,
        queries: Tensor,
        positive_scores: Tensor,
        cache: NegativeCache,
        excluded: Tensor | None,
        withheld: Tensor | None,
        fresh_scores: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss `[batch]`; rows `[n]` that were drawn, their new embeddings `[n, dim]` and which to write."""
        pool = pool_of([cache], EMBEDDING, withheld)
        drawn = draw_negatives(
            queries,
            pool,
            cache.has_rows(),
            generator=self.generator,
            score_transform=self._transform(),
            excluded=excluded,
            top_k=self.top_k,
            num_samples=self.num_samples,
        )
        rows, dim = drawn.rows.flatten(), queries.shape[1]
        if len(rows):
            data_keys = [key for key in cache.specs if key != EMBEDDING]
            fresh = encode(self.document_encoder, read_pool([cache], rows, data_keys), len(rows), dim)
            negative_scores = self._pair_scores(queries[:, None], fresh.view(len(queries), -1, dim))
            staleness = estimators.staleness(pool.gather(rows), fresh).mean()
        else:
            fresh = queries.new_empty(0, dim)
            negative_scores = positive_scores[:, None] * 0
            staleness = positive_scores.new_zeros(())
        loss = estimators.readable_loss(positive_scores, negative_scores, drawn.lse, fresh_scores)
        self._last = {"interpretable_loss": loss.detach().mean(), "staleness": staleness.detach()}
        return loss, rows, fresh, drawn.is_valid.repeat_interleave(self.num_samples)

    def _normaliser(
        self, queries: Tensor, cache: NegativeCache, excluded: Tensor | None, withheld: Tensor | None
    ) -> Tensor:
        """logsumexp over the cache `[batch]`, without drawing anything from the generator."""
        return retrieve(
            queries,
            pool_of([cache], EMBEDDING, withheld),
            generator=torch.Generator(),
            score_transform=self._transform(),
            excluded=excluded,
            top_k=self.top_k,
        ).lse

    def _transform(self) -> Any:
        scale = self.scale.detach() if isinstance(self.scale, Tensor) else self.scale
        return lambda scores: scores * scale

    def _pair_scores(self, queries: Tensor, documents: Tensor) -> Tensor:
        """Scaled dot products over the last dimension, in at least float32."""
        dtype = torch.promote_types(torch.float32, torch.promote_types(queries.dtype, documents.dtype))
        return self.scale * (queries.to(dtype) * documents.to(dtype)).sum(dim=-1)

    def _feature_specs(self) -> dict[str, Any]:
        assert self.cache is not None
        return {key: spec for key, spec in self.cache.specs.items() if key != EMBEDDING}

    def _prepare(self, queries: Tensor, specs: Specs) -> tuple[CacheManager, NegativeCache]:
        """The manager and the cache; a new cache is kept only once it has been written."""
        all_specs: dict[str, FeatureSpec] = {EMBEDDING: FixedLenFeature([queries.shape[1]], self.embedding_dtype)}
        all_specs.update(specs)
        manager = CacheManager(all_specs, self.cache_size, self.use_lru)
        cache = self.cache
        if cache is None:
            cache = NegativeCache.empty(all_specs, self.cache_size, queries.device, self.feature_device, EMBEDDING)
        if cache.device != queries.device:
            raise ValueError(
                f"`query_embeddings` is on {queries.device}, the cache on {cache.device}. Move the loss with "
                f".to({str(queries.device)!r})."
            )
        if self.cache is not None and list(cache.specs[EMBEDDING].shape) != [queries.shape[1]]:  # type: ignore[union-attr]
            raise ValueError(
                f"`query_embeddings` has {queries.shape[1]} dimensions, the cached embeddings have "
                f"{cache.embeddings(EMBEDDING).shape[1]}."
            )
        return manager, cache

    def _check_embeddings(self, queries: Tensor, documents: Tensor, negatives: Tensor | None) -> None:
        if queries.dim() != 2 or queries.shape != documents.shape:
            raise ValueError(
                f"`query_embeddings` has shape {list(queries.shape)}, `document_embeddings` {list(documents.shape)}; "
                "expected the same [batch, dim]."
            )
        if len(queries) == 0:
            raise ValueError("The batch is empty: `query_embeddings` has no rows.")
        if negatives is not None and (negatives.dim() != 2 or negatives.shape[1] != queries.shape[1]):
            raise ValueError(
                f"`negative_embeddings` has shape {list(negatives.shape)}; expected [m, {queries.shape[1]}]."
            )
        for name, value in (("query", queries), ("document", documents), ("negative", negatives)):
            if value is None:
                continue
            if not value.is_floating_point():
                raise TypeError(f"`{name}_embeddings` is {value.dtype}; expected a floating point dtype.")
            if value.device != queries.device:
                raise ValueError(f"`{name}_embeddings` is on {value.device}, `query_embeddings` on {queries.device}.")
            check_finite(f"`{name}_embeddings`", value)

    def get_extra_state(self) -> Tensor:
        """The generator's state, uint8."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Continue the draws where the saved run stopped."""
        self.generator.set_state(state.cpu())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.cache is None and prefix + "cache.filled" in state_dict:
            saved = state_of(state_dict, prefix + "cache.")
            specs = {key: spec_from_json(spec) for key, spec in saved["specs"].items()}
            embedding = specs.pop(EMBEDDING)._replace(dtype=self.embedding_dtype)
            specs = {EMBEDDING: embedding, **(specs if self.specs is None else self.specs)}
            device = state_dict[prefix + "cache.filled"].device
            cache = NegativeCache.empty(specs, self.cache_size, device, self.feature_device, EMBEDDING)
            cache.check_loadable(state_dict, prefix + "cache.")
            self.cache = cache
        elif self.cache is not None:
            self.cache.check_loadable(state_dict, prefix + "cache.")
        super()._load_from_state_dict(state_dict, prefix, *args)


def _join(
    embeddings: Tensor,
    features: Features,
    ids: Tensor | None,
    negatives: tuple[Tensor | None, Features | None, Tensor | None],
    specs: Specs,
) -> tuple[Tensor, Features, Tensor | None]:
    """The batch's documents and its negatives as one list of new items."""
    negative_embeddings, negative_features, negative_ids = negatives
    assert negative_embeddings is not None
    if negative_features is None:
        raise ValueError("`negative_embeddings` needs `negative_features`, to encode the documents again later.")
    for name, given in (("document_features", features), ("negative_features", negative_features)):
        missing = set(specs) - set(given)
        if missing:
            raise ValueError(f"`{name}` must have the keys {sorted(specs)}, got {sorted(given)}.")
    if ids is not None or negative_ids is not None:
        first = _ids_or_unknown("document_ids", ids, embeddings)
        ids = torch.cat([first, _ids_or_unknown("negative_ids", negative_ids, negative_embeddings)])
    return (
        torch.cat([embeddings, negative_embeddings]),
        concatenate(features, negative_features, specs),
        ids,
    )


def _ids_or_unknown(name: str, ids: Tensor | None, embeddings: Tensor) -> Tensor:
    if ids is None:
        return torch.full((len(embeddings),), NO_ID, dtype=torch.int64, device=embeddings.device)
    check_ids(name, ids, (len(embeddings),))
    return ids.to(embeddings.device, torch.int64)


def _positive_ids(
    document_ids: Tensor | None, positive_ids: Tensor | None, batch: int, device: torch.device
) -> Tensor | None:
    """All known positives of each query, `[batch, n]`."""
    parts = []
    if document_ids is not None:
        check_ids("document_ids", document_ids, (batch,))
        parts.append(document_ids[:, None].to(device, torch.int64))
    if positive_ids is not None:
        if positive_ids.dim() != 2:
            raise ValueError(f"`positive_ids` has shape {list(positive_ids.shape)}; expected [{batch}, n].")
        check_ids("positive_ids", positive_ids, (batch, positive_ids.shape[1]))
        parts.append(positive_ids.to(device, torch.int64))
    return torch.cat(parts, dim=1) if parts else None


def _mask_positives(scores: Tensor, positives: Tensor | None, negative_ids: Tensor | None) -> Tensor:
    """-inf where a negative `[m]` is a known positive of the query, in scores `[batch, m]`."""
    if positives is None or negative_ids is None:
        return scores
    ids = negative_ids.to(scores.device)
    is_positive = ((positives[:, :, None] == ids) & (ids >= 0)).any(dim=1)
    return scores.masked_fill(is_positive, -torch.inf)
