"""The baseline without encoding anew: in-batch negatives and a queue of stale embeddings of past documents."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

UNKNOWN = -1


class MemoryBankLoss(nn.Module):
    """Cross-entropy of each anchor's positive against the batch's other documents and a queue of past ones.

    The queue is first in, first out, and holds embeddings as they were (Xiao et al. 2017; He et al. 2020; Wang et al.
    2020). Gradient goes to the queries and to the documents of the batch, none to the queue. A known positive of an
    anchor is not among its negatives.

    Args:
        model: The model to train.
        size: Rows of the queue.
        scale: Factor of the cosine similarities.
    """

    embeddings: Tensor
    ids: Tensor
    num_written: Tensor

    def __init__(self, model: SentenceTransformer, size: int, scale: float) -> None:
        super().__init__()
        self.model = model
        self.size = size
        self.scale = scale
        self.register_buffer("embeddings", torch.zeros(size, model.get_embedding_dimension()))
        self.register_buffer("ids", torch.full((size,), UNKNOWN))
        self.register_buffer("num_written", torch.zeros((), dtype=torch.int64))

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor) -> Tensor:
        """The mean loss of a batch; in training the batch's documents then enter the queue.

        Args:
            sentence_features: Model inputs of the anchors and of the positives.
            labels: int64 `[batch, n]`: id of the positive, behind it those of further positives, filled up with -1.

        Returns:
            Scalar.

        Raises:
            ValueError: Other columns or labels.
        """
        columns = list(sentence_features)
        if len(columns) != 2 or labels.dim() != 2 or labels.is_floating_point():
            raise ValueError(
                f"The memory bank got {len(columns)} text columns and labels of shape {list(labels.shape)}; expected "
                "the columns anchor, positive and label, where label is a list of integer document ids."
            )
        queries, documents = (normalize(self._embed(column), dim=-1) for column in columns)
        filled = int(self.num_written.clamp(max=self.size))
        candidates = torch.cat([documents, self.embeddings[:filled]])
        scores = self.scale * queries @ candidates.T
        scores = scores.masked_fill(_known(labels, torch.cat([labels[:, 0], self.ids[:filled]])), -torch.inf)
        loss = cross_entropy(scores, torch.arange(len(queries), device=scores.device))
        if self.training and torch.is_grad_enabled():
            self._push(documents.detach(), labels[:, 0])
        return loss

    def queue_state(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep."""
        return dict(self.named_buffers(recurse=False))

    def load_queue_state(self, state: dict[str, Tensor]) -> None:
        """Go on with the queue of a checkpoint."""
        for name, buffer in self.queue_state().items():
            buffer.copy_(state[name])

    def _embed(self, features: dict[str, Any]) -> Tensor:
        embeddings: Tensor = self.model(features)["sentence_embedding"]
        return embeddings.float()

    def _push(self, documents: Tensor, ids: Tensor) -> None:
        """Over the oldest rows; of more documents than rows the last ones stay."""
        count = min(len(documents), self.size)
        first = self.num_written + len(documents) - count
        rows = (first + torch.arange(count, device=ids.device)) % self.size
        self.embeddings[rows] = documents[-count:]
        self.ids[rows] = ids[-count:]
        self.num_written += len(documents)


def _known(labels: Tensor, ids: Tensor) -> Tensor:
    """Which candidates `[m]` are known positives of a query, but for its own at its own place: bool `[batch, m]`."""
    known = ((labels[:, :, None] == ids) & (ids != UNKNOWN)).any(dim=1)
    known[:, : len(labels)].fill_diagonal_(False)
    return known
