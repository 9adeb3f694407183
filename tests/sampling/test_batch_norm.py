"""Encoders with BatchNorm, which cannot encode a single document in training mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from negative_cache import NegativeCacheLoss, RaggedFeature
from negative_cache.objective.batch import EMBEDDING
from negative_cache.sampling.encode import refresh

DIM = 8


class Encoder:
    """Normalized embeddings of words; keeps the number of documents of each call."""

    def __init__(self, norm: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.tower = nn.Sequential(nn.EmbeddingBag(100, DIM, padding_idx=0), norm, nn.Linear(DIM, DIM)).to(dtype)
        self.sizes: list[int] = []

    def __call__(self, features: dict[str, Tensor]) -> Tensor:
        self.sizes.append(len(features["words"]))
        return normalize(self.tower(features["words"]), dim=-1)


def words_of(documents: Tensor) -> Tensor:
    return (documents[:, None] * 7 + torch.arange(4)) % 99 + 1


def step(loss_fn: NegativeCacheLoss, encoder: Encoder, *documents: int) -> Tensor:
    ids = torch.tensor(documents)
    words = words_of(ids)
    loss: Tensor = loss_fn(encoder({"words": words[:, :2]}), encoder({"words": words}), {"words": words}, ids)
    return loss


def test_a_step_may_draw_a_single_document():
    encoder = Encoder(nn.BatchNorm1d(DIM))
    loss_fn = NegativeCacheLoss(encoder, 16, seed=0, num_samples=1)
    step(loss_fn, encoder, 0, 1).backward()
    step(loss_fn, encoder, 1, 2).backward()  # draws document 0, the only one that is not in the batch
    assert encoder.sizes[-1] == 2
    assert int(loss_fn.cache.num_filled) == 3


@pytest.mark.parametrize("documents", [(1, 2), (2,)], ids=["batch of two", "batch of one"])
def test_a_single_document_has_the_embedding_and_gradient_that_it_had(documents: tuple[int, ...]):
    """Without BatchNorm. A batch of one pays nothing: BatchNorm could not encode the batch itself."""
    results = []
    for is_in_batch_of_two in (True, False):
        encoder = Encoder(nn.LayerNorm(DIM), torch.float64)
        loss_fn = NegativeCacheLoss(encoder, 16, seed=0, num_samples=1, embedding_dtype=torch.float64)
        step(loss_fn, encoder, 0, *documents[:-1])
        encoder.sizes.clear()
        if not is_in_batch_of_two:  # what the loss asks for twice is encoded once, and repeated
            loss_fn.document_encoder = lambda features, encoder=encoder: encoder(
                {"words": features["words"][:1]}
            ).expand(len(features["words"]), -1)
        loss = step(loss_fn, encoder, *documents)
        loss.backward()
        results.append((loss, loss_fn.cache.embeddings("embedding"), encoder.tower[0].weight.grad))
        assert encoder.sizes[2:] == [len(documents) if is_in_batch_of_two else 1]
    for twice, once in zip(*results, strict=True):
        torch.testing.assert_close(twice, once, rtol=1e-12, atol=1e-14)
    assert bool(results[0][2][words_of(torch.tensor([0]))].any())  # document 0 was re-encoded with gradient


def test_several_documents_are_encoded_once():
    encoder = Encoder(nn.BatchNorm1d(DIM))
    loss_fn = NegativeCacheLoss(encoder, 16, seed=0, num_samples=1)
    step(loss_fn, encoder, *range(6))
    step(loss_fn, encoder, 6, 7, 8, 9, 10)
    assert 2 <= encoder.sizes[-1] <= 5


def test_one_row_per_step_is_refreshed_beside_the_next():
    encoder = Encoder(nn.BatchNorm1d(DIM))
    loss_fn = NegativeCacheLoss(encoder, 16, seed=0, num_samples=1, refresh_per_step=1)
    step(loss_fn, encoder, 0, 1, 2, 3, 4)
    cache, written = loss_fn.cache, []
    encoder.sizes.clear()
    for _ in range(5):
        cache.step += 1
        before = cache.embeddings("embedding").clone()
        with torch.no_grad():
            encoder.tower[2].weight += 0.1
        refresh(cache, EMBEDDING, ["words"], encoder, 1)
        changed = (cache.embeddings("embedding") != before).any(dim=1).nonzero().flatten().tolist()
        assert len(changed) == 1
        written += changed
    assert sorted(written) == [0, 1, 2, 3, 4]
    assert encoder.sizes == [2] * 5


@pytest.mark.parametrize("is_list", [False, True])
def test_a_corpus_may_end_with_a_batch_of_one(is_list: bool):
    encoder = Encoder(nn.BatchNorm1d(DIM))
    specs = {"words": RaggedFeature(torch.int64)}

    def encode(features: dict[str, Any]) -> Tensor:
        words = features["words"]
        return encoder({"words": words if isinstance(words, Tensor) else torch.stack(words)})

    loss_fn = NegativeCacheLoss(encode, 16, seed=0, num_samples=1, specs=specs)
    batches = []
    for ids in (torch.arange(4), torch.tensor([4])):
        words = words_of(ids)
        batches.append({"document_features": {"words": list(words) if is_list else words}, "document_ids": ids})
    assert loss_fn.fill_from(batches) == 5
    assert encoder.sizes == [4, 2]
    assert loss_fn.cache.data["words"][4].tolist() == words_of(torch.tensor([4]))[0].tolist()
