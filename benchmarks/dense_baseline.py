"""The dense step that the tiled one is compared with: the algorithm of the earlier PyTorch port of the method.

It has the costs of the port: a score matrix of all queries and rows, a copy of it for each elementwise function,
int64 row numbers of the same size for the groups, Gumbel noise for every remaining score, rows that are written one by
one, and an increment of every age. All rows count as filled, as in the port.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

SCALE = 20.0


class DenseStep(NamedTuple):
    """Result of a step.

    Attributes:
        loss: Scalar with gradient.
        interpretable_loss: `[batch]`: minus the log of each positive's probability.
        drawn: int64 `[batch]`: the sampled rows.
        replaced: int64 `[batch]`: the rows that the batch's documents replaced.
    """

    loss: Tensor
    interpretable_loss: Tensor
    drawn: Tensor
    replaced: Tensor


class DenseCache:
    """A full cache as plain tensors, and the step that trains against all of its rows.

    Args:
        embeddings: float32 `[num_rows, dim]`; changed in place.
        features: int32 `[num_rows, length]` each; changed in place.
        age: int32 `[num_rows]`: steps since each row was written.
        encode: Features -> embeddings.
    """

    def __init__(
        self,
        embeddings: Tensor,
        features: Mapping[str, Tensor],
        age: Tensor,
        encode: Callable[[dict[str, Tensor]], Tensor],
    ) -> None:
        self.embeddings = embeddings
        self.features = dict(features)
        self.age = age
        self.encode = encode

    def step(
        self, queries: Tensor, documents: Tensor, features: Mapping[str, Tensor], top_k: int | None = None
    ) -> DenseStep:
        """Compute the loss, re-encode the drawn rows, and replace the oldest rows by the batch's documents."""
        scores, drawn = self._draw(queries.detach(), top_k)
        encoded = self.encode({key: column[drawn] for key, column in self.features.items()})
        positive_scores = SCALE * (queries * documents).sum(dim=1)
        negative_scores = SCALE * (queries * encoded).sum(dim=1)
        probability = torch.cat([positive_scores[:, None], scores], dim=1).softmax(dim=1)[:, 0].detach()
        loss = ((1 - probability) * (negative_scores - positive_scores)).mean()
        replaced = self._update(drawn, encoded.detach(), documents.detach(), features)
        return DenseStep(loss, -probability.log(), drawn, replaced)

    def _draw(self, queries: Tensor, top_k: int | None) -> tuple[Tensor, Tensor]:
        """Scores `[batch, num_rows or top_k]`, and one row per query by the Gumbel-max trick."""
        scores = SCALE * (queries @ self.embeddings.T)
        if top_k is None:
            return scores, _gumbel_max(scores)
        scores, rows = best_of_groups(scores, top_k)
        return scores, rows.gather(1, _gumbel_max(scores)[:, None]).squeeze(1)

    def _update(self, drawn: Tensor, encoded: Tensor, documents: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        youngest = self.age.new_full((len(drawn),), -1)
        write_one_by_one(self.embeddings, drawn, encoded)
        write_one_by_one(self.age, drawn, youngest)
        replaced = self.age.topk(len(documents)).indices
        write_one_by_one(self.embeddings, replaced, documents)
        for key, column in self.features.items():
            write_one_by_one(column, replaced, features[key])
        write_one_by_one(self.age, replaced, youngest[: len(replaced)])
        self.age = self.age + 1
        return replaced


def best_of_groups(scores: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Score and row of the best of each of equally long contiguous groups: `[batch, num_groups]`."""
    batch, num_rows = scores.shape
    rows = torch.arange(num_rows, device=scores.device).repeat(batch, 1).view(batch, num_groups, -1)
    values, at = scores.view(batch, num_groups, -1).topk(1, dim=2)
    return values.squeeze(2), rows.gather(2, at).squeeze(2)


def write_one_by_one(column: Tensor, rows: Tensor, values: Tensor) -> None:
    """`column[rows] = values`, with an assignment, and padding to the column's width, for every row."""
    for row, value in zip(rows[:, None], values.to(column.dtype), strict=True):
        if column.dim() > 1:
            value = torch.cat([value, value.new_zeros(column.shape[1] - len(value))])
        column[row] = value


def _gumbel_max(scores: Tensor) -> Tensor:
    noise = -torch.log(-torch.log(torch.rand_like(scores)))
    return (scores + noise).argmax(dim=1)
