"""A training batch of cached features, and its conversion to arguments of `NegativeCacheLoss`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from negative_cache.integrations.sentence_transformers.tokens import concatenate_rows


class TextBatch(NamedTuple):
    """The texts of a batch, by column.

    Attributes:
        anchors: Features of the anchors `[batch, ...]`; empty if only their embeddings are needed.
        documents: Features of each column of documents: the positives `[batch, ...]`, then negatives `[m, ...]`.
        document_ids: For each column of documents, their hashes, int64 `[batch]` or `[m]`; or, with labels, hash and
            label, int64 `[batch, 2]` or `[m, 2]`, -1 for no label.
        positive_ids: int64 `[batch, n]`, padded with -1: labels of further documents that are not negatives; None for
            none.
        anchor_ids: int64 `[batch, n]`, padded with -1: known anchors of each positive, its own first; None unless
            anchors are cached.
    """

    anchors: dict[str, Tensor]
    documents: list[dict[str, Tensor]]
    document_ids: list[Tensor]
    positive_ids: Tensor | None
    anchor_ids: Tensor | None

    def compare_with_documents(
        self, embeddings: Sequence[Tensor], guide_anchors: Tensor | None, guide_documents: Tensor | None
    ) -> dict[str, Any]:
        """Arguments of the loss that compares each anchor with documents.

        Args:
            embeddings: `[batch, dim]` of the anchors, the same of the positives, `[m, dim]` of each further column.
            guide_anchors: `[batch, guide_dim]`, a guide's embeddings of the anchors; or None.
            guide_documents: `[documents, guide_dim]`, those of the documents of all columns; or None.
        """
        arguments = {
            "query_embeddings": embeddings[0],
            "document_embeddings": embeddings[1],
            "document_features": self.documents[0],
            "document_ids": self.document_ids[0],
            "positive_ids": self.positive_ids,
            "guide_queries": guide_anchors,
            "guide_documents": guide_documents,
        }
        if len(embeddings) > 2:
            negatives = self.documents[1:]
            arguments |= {
                "negative_embeddings": torch.cat(list(embeddings[2:])),
                "negative_features": {key: concatenate_rows([n[key] for n in negatives]) for key in negatives[0]},
                "negative_ids": torch.cat(self.document_ids[1:]),
            }
        return arguments

    def compare_with_anchors(
        self, embeddings: Sequence[Tensor], guide_anchors: Tensor | None, guide_documents: Tensor | None
    ) -> dict[str, Any]:
        """Arguments of the loss that compares each positive with anchors; see `compare_with_documents`."""
        assert self.anchor_ids is not None
        return {
            "query_embeddings": embeddings[1],
            "document_embeddings": embeddings[0],
            "document_features": self.anchors,
            "document_ids": self.anchor_ids[:, 0],
            "positive_ids": self.anchor_ids[:, 1:],
            "guide_queries": None if guide_documents is None else guide_documents[: len(embeddings[1])],
            "guide_documents": guide_anchors,
        }
