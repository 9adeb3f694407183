"""What a training batch brings: checked, and in the form in which a step takes it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from negative_cache.cache import NO_ID, NegativeCache
from negative_cache.drawing import Asked, Rules
from negative_cache.features import Features, Specs, concatenate
from negative_cache.negative_cache import CacheManager, check_ids
from negative_cache.negatives import check_finite


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
    """

    queries: Tensor
    documents: Tensor
    positives: Tensor | None
    negatives: Tensor | None
    new_embeddings: Tensor
    new_features: Features
    new_ids: Tensor | None

    @property
    def negative_ids(self) -> Tensor | None:
        """int64 `[m]`: ids of the given negatives; None where there are none or they are unknown."""
        if self.negatives is None or self.new_ids is None:
            return None
        return self.new_ids[len(self.queries) :]


class Step(NamedTuple):
    """A batch that was checked, and what `NegativeCacheLoss` uses it with."""

    batch: Batch
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
    features: Features,
    specs: Specs,
    document_ids: Tensor | None,
    positive_ids: Tensor | None,
    negatives: Tensor | None,
    negative_features: Features | None,
    negative_ids: Tensor | None,
) -> Batch:
    """Put together what `NegativeCacheLoss` was given; see there. Embeddings are checked already."""
    embeddings, ids = documents, document_ids
    if negatives is not None:
        embeddings, features, ids = _join(documents, features, ids, negatives, negative_features, negative_ids, specs)
    elif negative_features is not None or negative_ids is not None:
        raise ValueError("`negative_features` and `negative_ids` need `negative_embeddings`.")
    if ids is not None:
        check_ids("document_ids", ids, (len(embeddings),))
        ids = ids.to(queries.device, torch.int64)
    return Batch(
        queries=queries,
        documents=documents,
        positives=_positive_ids(document_ids, positive_ids, len(queries), queries.device),
        negatives=negatives,
        new_embeddings=embeddings.detach(),
        new_features=features,
        new_ids=ids,
    )


def mask_positives(scores: Tensor, positives: Tensor | None, negative_ids: Tensor | None) -> Tensor:
    """-inf where a negative `[m]` is a known positive of the query, in scores `[batch, m]`."""
    if positives is None or negative_ids is None:
        return scores
    is_positive = ((positives[:, :, None] == negative_ids) & (negative_ids >= 0)).any(dim=1)
    return scores.masked_fill(is_positive, -torch.inf)


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
