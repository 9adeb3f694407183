"""Predicted bytes against those of a cache that is there."""

from __future__ import annotations

import pytest
import torch

from negative_cache import FixedLenFeature, NegativeCacheLoss, RaggedFeature, predict_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_prediction_counts_what_is_there(dtype: torch.dtype):
    size, dim, batch = 5000, 48, 50
    specs = {"row": FixedLenFeature([3], torch.int32), "tokens": RaggedFeature(torch.int16, 64)}
    loss_fn = NegativeCacheLoss(lambda x: torch.ones(len(x["row"]), dim), size, specs=specs, embedding_dtype=dtype)
    lengths = torch.randint(1, 33, (size,), generator=torch.Generator().manual_seed(0))
    tokens = (torch.arange(32) < lengths[:, None]).to(torch.int16)
    for start in range(0, size, batch):
        part = slice(start, start + batch)
        features = {"row": torch.ones(batch, 3, dtype=torch.int32), "tokens": tokens[part]}
        ids = torch.arange(start, start + batch)
        loss_fn(torch.ones(batch, dim, requires_grad=True), torch.ones(batch, dim), features, document_ids=ids)
    predicted = predict_bytes(
        size,
        dim,
        batch,
        embedding_dtype=dtype,
        specs=specs,
        mean_lengths={"tokens": float(lengths.float().mean())},
    )
    buffers = dict(loss_fn.cache.named_buffers())
    arena = buffers.pop("feature_tokens.arena")
    total = sum(buffer.nbytes for buffer in buffers.values())
    slots = 1.5 * float(lengths.float().mean()) * size * 2
    assert predicted.embeddings + predicted.features + predicted.bookkeeping == total + int(slots / 2) * 2
    assert 2 * int(lengths.sum()) <= arena.nbytes <= slots * 1.05


def test_what_a_step_takes_does_not_depend_on_the_rows():
    small, large = (predict_bytes(rows, 768, 128, embedding_dtype=torch.int8) for rows in (2**15, 2**24))
    assert small.step == large.step
    assert large.embeddings == 2**24 * (768 + 4)


def test_what_cannot_be_predicted_is_refused():
    with pytest.raises(ValueError, match="mean length"):
        predict_bytes(10, 4, 2, specs={"tokens": RaggedFeature(torch.int32)})
    with pytest.raises(ValueError, match="at least 1"):
        predict_bytes(0, 4, 2)
