"""The inputs of a training batch, validated and in the form that a step uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from negative_cache.cache.specs import (
    NO_ID,
    Features,
    FeatureSpec,
    FixedLenFeature,
    Specs,
    check_feature,
    embedding_spec,
    kind_of,
)
from negative_cache.cache.validation import check_finite, check_ids, concatenate, reads_without_sync
from negative_cache.sampling.config import InBatch, SamplingRequest

# The cache's own columns, in addition to the document features. Every step scores them.
EMBEDDING, BIAS, GUIDE = SCORED = ("embedding", "negative_log_q", "guide_embedding")


class BatchInputs(NamedTuple):
    """The arguments of `NegativeCacheLoss.forward`; see there."""

    query_embeddings: Tensor
    document_embeddings: Tensor
    document_features: Features
    document_ids: Tensor | None = None
    positive_ids: Tensor | None = None
    negative_embeddings: Tensor | None = None
    negative_features: Features | None = None
    negative_ids: Tensor | None = None
    log_q: Tensor | None = None
    guide_queries: Tensor | None = None
    guide_documents: Tensor | None = None


class Batch(NamedTuple):
    """A batch of `batch` queries and `m` given negatives.

    Attributes:
        queries: `[batch, dim]`, with gradient.
        documents: `[batch, dim]`, with gradient: the positive of each query.
        negatives: `[m, dim]`, with gradient: negatives of every query; None for none.
        embeddings: `[batch + m, dim]`, with gradient: documents, then negatives.
        positive_ids: int64 `[batch, n]`: ids of documents that are not negatives of a query, padded with -1; or None.
        new_items: Items to insert into the cache: embeddings and features of documents and negatives, `batch + m` each.
        new_ids: int64 `[batch + m]`, or `[batch + m, k]` for k ids per document: their ids, -1 for unknown; or None.
        log_q: `[batch + m]`: log of the probability of each document, as in `forward`; or None.
        guide_queries: `[batch, guide_dim]`; or None.
        guide_documents: `[batch + m, guide_dim]`; or None.
        has_hashes: Whether the ids are hashes of the features.
    """

    queries: Tensor
    documents: Tensor
    negatives: Tensor | None
    embeddings: Tensor
    positive_ids: Tensor | None
    new_items: Mapping[str, Any]
    new_ids: Tensor | None
    log_q: Tensor | None
    guide_queries: Tensor | None
    guide_documents: Tensor | None
    has_hashes: bool = False

    def with_hashes(self, hashes: Tensor) -> Batch:
        """The batch with `hashes`, int64 `[batch + m]`, as the ids of its documents."""
        return self._replace(new_ids=hashes, positive_ids=hashes[: len(self.queries), None], has_hashes=True)

    def scored_specs(self, embedding_dtype: torch.dtype) -> dict[str, FeatureSpec]:
        """Specs of the columns that every step scores."""
        specs: dict[str, FeatureSpec] = {EMBEDDING: embedding_spec(self.queries.shape[1], embedding_dtype)}
        if self.log_q is not None:
            specs[BIAS] = FixedLenFeature([], torch.float32)
        if self.guide_documents is not None:
            specs[GUIDE] = FixedLenFeature([self.guide_documents.shape[1]], torch.float32)
        return specs

    def in_batch(self, has_documents: bool) -> InBatch:
        """The in-batch negatives of this process.

        Args:
            has_documents: Whether each query's document is a negative of the other queries.
        """
        start, negatives = 0, self.embeddings
        if not has_documents:
            start, negatives = (
                len(self.queries),
                self.queries.detach()[:0] if self.negatives is None else self.negatives,
            )
        count = len(negatives)
        return InBatch(
            embeddings=negatives,
            ids=torch.full((count,), NO_ID, device=negatives.device) if self.new_ids is None else self.new_ids[start:],
            first_own=0 if has_documents else -1,
            biases=None if self.log_q is None else -self.log_q[start:],
            guide=None if self.guide_documents is None else self.guide_documents[start:],
        )

    def request(self, num_in_batch: int) -> SamplingRequest:
        """The request for sampling, before anything is scored."""
        return SamplingRequest(
            self.queries.detach(),
            positive_ids=self.positive_ids,
            new_ids=self.new_ids,
            num_in_batch=num_in_batch,
            guide_queries=self.guide_queries,
        )

    def check_against(self, specs: Specs, dims: Sequence[int], num_ids: int) -> None:
        """Raise unless the batch fits a cache with the columns of `specs` and with `num_ids` ids per document.

        Raises:
            ValueError: It does not, or one of the `dims` is not below the embedding dimension.
        """
        width = self.queries.shape[1]
        if self.new_ids is not None and self.new_ids[:1].numel() != num_ids:
            raise ValueError(
                f"`document_ids` has {self.new_ids[:1].numel()} ids per document, the cache has {num_ids}. The first "
                "step decides; pad with -1."
            )
        if dims and max(dims) >= width:
            raise ValueError(
                f"`matryoshka_dims` is {list(dims)}; the embeddings have {width} dimensions, and "
                "the full dimension always has a loss. Give smaller numbers."
            )
        for key, name, value in ((BIAS, "log_q", self.log_q), (GUIDE, "guide_documents", self.guide_documents)):
            if (key in specs) != (value is not None):
                raise ValueError(
                    f"`{name}` must be given in every step or in none; the first step decides what the cache stores."
                )
        for key, values in self.new_items.items():
            is_counted = isinstance(values, list) or (isinstance(values, Tensor) and values.dim())
            if is_counted and len(values) != len(self.embeddings):
                raise ValueError(
                    f"`document_features[{key!r}]` has {len(values)} documents; there are {len(self.embeddings)} "
                    "embeddings of documents. Give the features of the same documents."
                )


def make_batch(inputs: BatchInputs, specs: Specs) -> Batch:
    """Validate the inputs of a step and put them together.

    Args:
        inputs: The arguments of `NegativeCacheLoss.forward`.
        specs: Specs of the document features; may include those of the cache's own columns.

    Raises:
        ValueError: Wrong keys, shapes, sizes, devices or ids, or values that are not finite (checked only on the
            CPU). Features are validated later, against the cache.
        TypeError: Wrong dtypes.
    """
    _check_embeddings(inputs)
    queries, documents, negatives = inputs.query_embeddings, inputs.document_embeddings, inputs.negative_embeddings
    document_ids = _document_ids("document_ids", inputs.document_ids, len(documents), queries.device)
    positive_ids = None if document_ids is None else document_ids.view(len(documents), -1)
    if inputs.positive_ids is not None:
        given = inputs.positive_ids
        if isinstance(given, Tensor) and given.dim() != 2:
            raise ValueError(f"`positive_ids` has shape {list(given.shape)}; expected [{len(queries)}, n].")
        shape = (len(queries), given.shape[1] if isinstance(given, Tensor) else 0)
        further = _ids("positive_ids", inputs.positive_ids, shape, queries.device)
        assert further is not None
        positive_ids = further if positive_ids is None else torch.cat([positive_ids, further], dim=1)
    embeddings, features, new_ids = documents, inputs.document_features, document_ids
    if negatives is not None:
        embeddings, features, new_ids = _append_negatives(inputs, negatives, document_ids, specs)
    elif inputs.negative_features is not None or inputs.negative_ids is not None:
        raise ValueError("`negative_features` and `negative_ids` need `negative_embeddings`.")
    log_q, guide_queries, guide_documents = _check_extras(inputs, len(embeddings))
    new_items = {EMBEDDING: embeddings.detach(), **features}
    if log_q is not None:
        new_items[BIAS] = -log_q
    if guide_documents is not None:
        new_items[GUIDE] = guide_documents
    return Batch(
        queries=queries,
        documents=documents,
        negatives=negatives,
        embeddings=embeddings,
        positive_ids=positive_ids,
        new_items=new_items,
        new_ids=new_ids,
        log_q=log_q,
        guide_queries=guide_queries,
        guide_documents=guide_documents,
    )


def _check_embeddings(inputs: BatchInputs) -> None:
    """Raise unless the embeddings of a batch fit together and are finite."""
    queries, documents, negatives = inputs.query_embeddings, inputs.document_embeddings, inputs.negative_embeddings
    for name, value in (("query", queries), ("document", documents), ("negative", negatives)):
        is_missing = value is None and name == "negative"
        if not is_missing and (not isinstance(value, Tensor) or value.layout != torch.strided):
            raise TypeError(
                f"`{name}_embeddings` is {kind_of(value)}; expected a dense tensor [n, dim]. Take the embeddings out "
                'of the output of the encoder, such as `output["sentence_embedding"]`.'
            )
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
        check_finite(f"`{name}_embeddings`", value, is_embedding=True)


def _append_negatives(
    inputs: BatchInputs, negatives: Tensor, document_ids: Tensor | None, specs: Specs
) -> tuple[Tensor, Features, Tensor | None]:
    """Concatenate the documents and the given negatives as new items: embeddings, features, ids."""
    documents, features, new_ids = inputs.document_embeddings, inputs.document_features, None
    if inputs.negative_features is None:
        raise ValueError("`negative_embeddings` needs `negative_features`, to re-encode the documents later.")
    specs = {key: spec for key, spec in specs.items() if key not in SCORED}
    for name, given in (("document_features", features), ("negative_features", inputs.negative_features)):
        if not isinstance(given, Mapping):
            raise TypeError(f"`{name}` is {type(given).__name__}; expected a dict of feature name -> values.")
        for key, value in given.items():
            check_feature(f"{name}[{key!r}]", value)
        if set(specs) - set(given):
            raise ValueError(f"`{name}` must have the keys {sorted(specs)}, got {sorted(given)}.")
    negative_ids = _document_ids("negative_ids", inputs.negative_ids, len(negatives), documents.device)
    known = document_ids if negative_ids is None else negative_ids
    if known is not None:
        if document_ids is not None and known.shape[1:] != document_ids.shape[1:]:
            raise ValueError(
                f"`document_ids` has shape {list(document_ids.shape)}, `negative_ids` {list(known.shape)}; expected "
                "the same number of ids per document. Pad with -1."
            )
        both = ((document_ids, documents), (negative_ids, negatives))
        shape = known.shape[1:]
        new_ids = torch.cat([known.new_full((len(value), *shape), NO_ID) if i is None else i for i, value in both])
    both_features = {"document_features": features, "negative_features": inputs.negative_features}
    return torch.cat([documents, negatives]), concatenate(both_features, specs), new_ids


def _check_extras(inputs: BatchInputs, count: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Validate and return `log_q` and the guide's embeddings of queries and documents."""
    log_q, queries, documents = inputs.log_q, inputs.guide_queries, inputs.guide_documents
    if log_q is not None:
        if inputs.document_ids is not None or inputs.negative_ids is not None or inputs.positive_ids is not None:
            raise ValueError(
                "`log_q` was given with ids. With ids a document has one row, however often it occurs, and `log_q` "
                "corrects for frequent documents: give one of the two."
            )
        log_q = _extra("log_q", log_q, (count,), inputs)
        if reads_without_sync(log_q) and bool((log_q > 0).any()):
            raise ValueError(f"`log_q` has {float(log_q.max()):g}; expected logs of probabilities, at most 0.")
    if (queries is None) != (documents is None):
        raise ValueError("`guide_queries` and `guide_documents` must be given together.")
    if queries is not None and documents is not None:
        width = queries.shape[-1] if isinstance(queries, Tensor) and queries.dim() else 0
        queries = _extra("guide_queries", queries, (len(inputs.query_embeddings), width), inputs)
        documents = _extra("guide_documents", documents, (count, queries.shape[1]), inputs)
    return log_q, queries, documents


def _extra(name: str, values: Tensor, shape: tuple[int, ...], inputs: BatchInputs) -> Tensor:
    """Validate an optional input and return it as float32 without gradient."""
    if not isinstance(values, Tensor) or values.layout != torch.strided:
        raise TypeError(f"`{name}` is {kind_of(values)}; expected a dense tensor. Convert it with torch.as_tensor.")
    if values.shape != shape:
        raise ValueError(
            f"`{name}` has shape {list(values.shape)}; expected {list(shape)}: the documents of the batch, then its "
            "negatives."
        )
    if not values.is_floating_point():
        raise TypeError(f"`{name}` is {values.dtype}; expected a floating point dtype.")
    check_finite(f"`{name}`", values, is_embedding=name != "log_q")
    return values.detach().to(inputs.query_embeddings.device, torch.float32)


def _document_ids(name: str, ids: Tensor | None, count: int, device: torch.device) -> Tensor | None:
    """Validate ids `[count]` or `[count, k]` and return them as int64 on the device."""
    if isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[1] > 0:
        checked = _ids(name, ids, (count, ids.shape[1]), device)
        return checked[:, 0] if checked is not None and ids.shape[1] == 1 else checked
    return _ids(name, ids, (count,), device)


def _ids(name: str, ids: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    """Validate ids and return them as int64 on the device."""
    if ids is None:
        return None
    check_ids(name, ids, shape)
    return ids.to(device, torch.int64)
