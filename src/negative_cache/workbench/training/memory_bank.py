"""A baseline without re-encoding: in-batch negatives and a queue of stale embeddings of past documents."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, pad

UNKNOWN = -1


class MemoryBankLoss(nn.Module):
    """Cross-entropy of each anchor's positive against the other documents of the batch and a queue of past documents.

    The queue is first in, first out, and keeps embeddings as they were computed (Xiao et al. 2017; He et al. 2020; Wang
    et al. 2020). The gradient flows to the queries and documents of the batch, not to the queue. Known positives of an
    anchor are not among its negatives.

    Args:
        model: The model to train.
        size: Rows of the queue.
        scale: Factor that multiplies the cosine similarities.
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
        """Compute the mean loss of a batch; in training, also add its documents to the queue.

        Args:
            sentence_features: Model inputs of the anchors, of the positives, and of any negatives of all anchors.
            labels: int64 `[batch + m, n]`: for each document, its id, padded with -1; for positives, followed by ids of
                further positives. The `m` rows of the negatives may be missing.

        Returns:
            Scalar.

        Raises:
            ValueError: The number of columns, or the shape or dtype of the labels, is wrong.
        """
        columns = list(sentence_features)
        if len(columns) < 2 or labels.dim() != 2 or labels.is_floating_point():
            raise ValueError(
                f"The memory bank got {len(columns)} text columns and labels of shape {list(labels.shape)}; expected "
                "the columns anchor, positive, label and any negatives, where label is a list of integer document ids."
            )
        queries, *of_columns = (normalize(self._embed(column), dim=-1) for column in columns)
        documents, count = torch.cat(of_columns), len(queries)
        ids = pad(labels[:, 0], (0, len(documents) - len(labels)), value=UNKNOWN)
        filled = int(self.num_written.clamp(max=self.size))
        candidates = torch.cat([documents, self.embeddings[:filled]])
        scores = self.scale * queries @ candidates.T
        scores = scores.masked_fill(_known(labels[:count], torch.cat([ids, self.ids[:filled]])), -torch.inf)
        loss = cross_entropy(scores, torch.arange(count, device=scores.device))
        if self.training and torch.is_grad_enabled():
            self._push(documents.detach(), ids)
        return loss

    def queue_state(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint must contain."""
        return dict(self.named_buffers(recurse=False))

    def load_queue_state(self, state: dict[str, Tensor]) -> None:
        """Restore the queue from a checkpoint."""
        for name, buffer in self.queue_state().items():
            buffer.copy_(state[name])

    def _embed(self, features: dict[str, Any]) -> Tensor:
        embeddings: Tensor = self.model(features)["sentence_embedding"]
        return embeddings.float()

    def _push(self, documents: Tensor, ids: Tensor) -> None:
        """Overwrite the oldest rows. If there are more documents than rows, the last ones are kept."""
        count = min(len(documents), self.size)
        first = self.num_written + len(documents) - count
        rows = (first + torch.arange(count, device=ids.device)) % self.size
        self.embeddings[rows] = documents[-count:]
        self.ids[rows] = ids[-count:]
        self.num_written += len(documents)


def _known(labels: Tensor, ids: Tensor) -> Tensor:
    """Which of `ids [m]` are known positives of each query, except its own positive: bool `[batch, m]`."""
    known = ((labels[:, :, None] == ids) & (ids != UNKNOWN)).any(dim=1)
    known[:, : len(labels)].fill_diagonal_(False)
    return known
