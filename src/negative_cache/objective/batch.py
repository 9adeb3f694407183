"""What a training batch brings: checked, and in the form in which a step takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from negative_cache.cache.rows import NO_ID, NegativeCache
from negative_cache.cache.specs import (
    Features,
    FeatureSpec,
    FixedLenFeature,
    RaggedRows,
    Specs,
    concatenate,
    embedding_spec,
    is_free_to_read,
)
from negative_cache.negative_cache import CacheManager, check_ids
from negative_cache.sampling.draw import check_finite
from negative_cache.sampling.one_process import Asked, Rules

# The cache's own columns beside a document's features: scored in each step.
EMBEDDING, BIAS, GUIDE = SCORED = ("embedding", "negative_log_q", "guide_embedding")


class Batch(NamedTuple):
    """A batch of `batch` queries.

    Attributes:
        queries: `[batch, dim]`, with gradient.
        documents: `[batch, dim]`, with gradient: the positive of each query.
        positives: int64 `[batch, n]`: ids of documents that are no negatives of a query, -1 for none; or None.
        negatives: `[m, dim]`, with gradient: given negatives; or None.
        new_embeddings: `[batch + m, dim]`, without gradient: documents and negatives.
        new_features: Their features.
        new_ids: int64 `[batch + m]`: their ids, -1 for unknown; or None.
        log_q: `[batch + m]`: log of the probability with which each is met; or None.
        guide_queries: `[batch, guide_dim]`; or None.
        guide_documents: `[batch + m, guide_dim]`; or None.
    """

    queries: Tensor
    documents: Tensor
    positives: Tensor | None
    negatives: Tensor | None
    new_embeddings: Tensor
    new_features: Features
    new_ids: Tensor | None
    log_q: Tensor | None = None
    guide_queries: Tensor | None = None
    guide_documents: Tensor | None = None

    @property
    def new_items(self) -> dict[str, Any]:
        """What goes into the cache."""
        items = {EMBEDDING: self.new_embeddings, **self.new_features}
        if self.log_q is not None:
            items[BIAS] = -self.log_q
        if self.guide_documents is not None:
            items[GUIDE] = self.guide_documents
        return items

    def scored_specs(self, embedding_dtype: torch.dtype) -> dict[str, FeatureSpec]:
        """Specs of the columns that every step reads of all rows."""
        specs: dict[str, FeatureSpec] = {EMBEDDING: embedding_spec(self.queries.shape[1], embedding_dtype)}
        if self.log_q is not None:
            specs[BIAS] = FixedLenFeature([], torch.float32)
        if self.guide_documents is not None:
            specs[GUIDE] = FixedLenFeature([self.guide_documents.shape[1]], torch.float32)
        return specs

    def check_extras(self, specs: Specs, dims: Sequence[int] = ()) -> None:
        """Raise unless the batch has just what a cache of these specs keeps, and more dimensions than `dims`."""
        width = self.queries.shape[1]
        if any(dim >= width for dim in dims):
            raise ValueError(
                f"`matryoshka_dims` is {list(dims)}; the embeddings themselves have {width} dimensions, which are "
                "counted anyway: give smaller numbers."
            )
        for key, name, value in ((BIAS, "log_q", self.log_q), (GUIDE, "guide_documents", self.guide_documents)):
            if (key in specs) != (value is not None):
                raise ValueError(f"`{name}` must be given in every step or in none; the cache was made the other way.")

    def fresh(self, in_batch: bool) -> Tensor | None:
        """The documents that are differentiated exactly as negatives, with gradient: those of the last `new_ids`."""
        if not in_batch:
            return self.negatives
        return self.documents if self.negatives is None else torch.cat([self.documents, self.negatives])

    @property
    def guide(self) -> tuple[Tensor, Tensor] | None:
        """A guide's embeddings of the queries and of their positives."""
        if self.guide_queries is None or self.guide_documents is None:
            return None
        return self.guide_queries, self.guide_documents[: len(self.queries)]


class Step(NamedTuple):
    """A batch that was checked, and what `NegativeCacheLoss` uses it with; no `new_items` where nothing is written."""

    batch: Batch
    new_items: dict[str, Tensor | RaggedRows]
    manager: CacheManager
    cache: NegativeCache
    rules: Rules
    asked: Asked
    is_writing: bool


def check_embeddings(queries: Tensor, documents: Tensor, negatives: Tensor | None) -> None:
    """Raise unless the embeddings of a batch fit together and are finite (which is looked at on the CPU alone)."""
    if queries.dim() != 2 or queries.shape != documents.shape:
        raise ValueError(
            f"`query_embeddings` has shape {list(queries.shape)}, `document_embeddings` {list(documents.shape)}; "
            "expected the same [batch, dim]."
        )
    if len(queries) == 0:
        raise ValueError("The batch is empty: `query_embeddings` has no rows.")
    if negatives is not None and (negatives.dim() != 2 or negatives.shape[1] != queries.shape[1]):
        raise ValueError(f"`negative_embeddings` has shape {list(negatives.shape)}; expected [m, {queries.shape[1]}].")
    for name, value in (("query", queries), ("document", documents), ("negative", negatives)):
        if value is None:
            continue
        if not value.is_floating_point():
            raise TypeError(f"`{name}_embeddings` is {value.dtype}; expected a floating point dtype.")
        if value.device != queries.device:
            raise ValueError(f"`{name}_embeddings` is on {value.device}, `query_embeddings` on {queries.device}.")
        check_finite(f"`{name}_embeddings`", value)


def make_batch(
    queries: Tensor,
    documents: Tensor,
    document_features: Features,
    specs: Specs,
    document_ids: Tensor | None = None,
    positive_ids: Tensor | None = None,
    negative_embeddings: Tensor | None = None,
    negative_features: Features | None = None,
    negative_ids: Tensor | None = None,
    log_q: Tensor | None = None,
    guide_queries: Tensor | None = None,
    guide_documents: Tensor | None = None,
) -> Batch:
    """Put together what `NegativeCacheLoss` was given; see there. Embeddings are checked already."""
    embeddings, features, ids, negatives = documents, document_features, document_ids, negative_embeddings
    if negatives is not None:
        embeddings, features, ids = _join(documents, features, ids, negatives, negative_features, negative_ids, specs)
    elif negative_features is not None or negative_ids is not None:
        raise ValueError("`negative_features` and `negative_ids` need `negative_embeddings`.")
    if ids is not None:
        check_ids("document_ids", ids, (len(embeddings),))
        ids = ids.to(queries.device, torch.int64)
    count, device = len(embeddings), queries.device
    if log_q is not None:
        if ids is not None or positive_ids is not None:
            raise ValueError(
                "`log_q` was given with ids. By its id a document has one row, however often it is met, and `log_q` "
                "corrects for being met often: give one of them."
            )
        log_q = _extra("log_q", log_q, (count,), device)
        if is_free_to_read(log_q) and bool((log_q > 0).any()):
            raise ValueError(f"`log_q` has {float(log_q.max()):g}; expected logs of probabilities, at most 0.")
    if (guide_queries is None) != (guide_documents is None):
        raise ValueError("`guide_queries` and `guide_documents` must be given together.")
    if guide_queries is not None and guide_documents is not None:
        guide_queries = _extra("guide_queries", guide_queries, (len(queries), guide_queries.shape[-1]), device)
        guide_documents = _extra("guide_documents", guide_documents, (count, guide_queries.shape[1]), device)
    return Batch(
        queries=queries,
        documents=documents,
        positives=_positive_ids(document_ids, positive_ids, len(queries), queries.device),
        negatives=negatives,
        new_embeddings=embeddings.detach(),
        new_features=features,
        new_ids=ids,
        log_q=log_q,
        guide_queries=guide_queries,
        guide_documents=guide_documents,
    )


def _extra(name: str, values: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers that come beside the embeddings, checked, as float32 without gradient."""
    if values.shape != shape:
        raise ValueError(
            f"`{name}` has shape {list(values.shape)}; expected {list(shape)}, the documents of the batch and then "
            "its negatives."
        )
    if not values.is_floating_point():
        raise TypeError(f"`{name}` is {values.dtype}; expected a floating point dtype.")
    check_finite(f"`{name}`", values)
    return values.detach().to(device, torch.float32)


def _join(
    embeddings: Tensor,
    features: Features,
    ids: Tensor | None,
    negative_embeddings: Tensor,
    negative_features: Features | None,
    negative_ids: Tensor | None,
    specs: Specs,
) -> tuple[Tensor, Features, Tensor | None]:
    """The batch's documents and its negatives as one list of new items."""
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
