"""Left-padded texts, and an encoder that reads the last column, as decoders do: it needs padding on the left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from negative_cache import NegativeCacheLoss

PAD, DIM, LONGEST = 99, 8, 9


class LastToken(nn.Module):
    """The vector of the last token plus half of the mean of all; raises for a text that does not end at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Parameter(torch.randn(100, DIM, generator=torch.Generator().manual_seed(0)))
        self.widths: list[int] = []

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        ids, mask = features["input_ids"].long(), features["attention_mask"].float()
        assert bool((mask[:, -1] == 1).all()), features
        assert int(mask.sum(dim=1).max()) == ids.shape[1]  # padded to the longest text
        self.widths.append(ids.shape[1])
        words = self.words[ids]
        mean = (words * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return normalize(words[:, -1] + mean / 2, dim=1)


def texts(numbers: Sequence[int]) -> list[list[int]]:
    """The tokens of documents: from 1 to LONGEST."""
    return [[(7 * number + 3 * i) % 98 + 1 for i in range(1 + number * 5 % LONGEST)] for number in numbers]


def left_padded(numbers: Sequence[int]) -> dict[str, Tensor]:
    tokens = texts(numbers)
    width = max(map(len, tokens))
    ids = torch.tensor([[PAD] * (width - len(text)) + text for text in tokens])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in tokens])
    return {"input_ids": ids, "attention_mask": mask}


def step(loss_fn: NegativeCacheLoss, numbers: Sequence[int], given: Sequence[int] = ()) -> Tensor:
    """One step with documents, and perhaps given negatives."""
    encoder, features, ids = loss_fn.document_encoder, left_padded(numbers), torch.tensor(numbers)
    queries = normalize(torch.randn(len(numbers), DIM, generator=torch.Generator().manual_seed(numbers[0])), dim=1)
    arguments: dict[str, Any] = {"document_ids": ids}
    if given:
        negatives = left_padded(given)
        arguments |= {
            "negative_embeddings": encoder(negatives),
            "negative_features": negatives,
            "negative_ids": torch.tensor(given),
        }
    return loss_fn(queries.requires_grad_(), encoder(features), features, **arguments)  # type: ignore[no-any-return]
