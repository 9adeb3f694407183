"""Predicted bytes against those of a cache that is there."""

from __future__ import annotations

import math

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


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((10, 4, 2), {"specs": {"tokens": RaggedFeature(torch.int32)}}, r"missing \['tokens'\]"),
        ((10, 4, 2), {"mean_lengths": {"tokens": 3}}, r"unknown \['tokens'\]"),
        ((10, 4, 2), {"specs": {"x": RaggedFeature(torch.int32, 9)}, "mean_lengths": {"x": 10}}, "from 0 to 9"),
        ((10, 4, 2), {"specs": {"x": RaggedFeature(torch.int32)}, "mean_lengths": {"x": -1}}, "from 0 to inf"),
        ((10, 4, 2), {"specs": {"x": RaggedFeature(torch.int32)}, "mean_lengths": {"x": math.nan}}, "is nan"),
        ((10, 4, 2), {"specs": {"embedding": RaggedFeature(torch.int32)}}, "which the cache itself uses"),
        ((10, 4, 2), {"embedding_dtype": torch.int32}, "floating point dtype or int8"),
        ((10, 4, 11), {}, "larger than the cache's 10 rows"),
        ((0, 4, 2), {}, "`cache_size` is 0"),
        ((10, 4.0, 2), {}, "`dim` is 4.0"),
    ],
)
def test_what_cannot_be_predicted_is_refused(sizes: tuple, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        predict_bytes(*sizes, **options)


def test_a_dtype_is_no_string():
    with pytest.raises(TypeError, match=r"`embedding_dtype` is 'int8'; expected a torch\.dtype"):
        NegativeCacheLoss(lambda x: x, 4, embedding_dtype="int8")


def test_features_on_disk_take_only_what_finds_them():
    specs = {"row": FixedLenFeature([100], torch.int32), "tokens": RaggedFeature(torch.int32, 64)}
    options = {"specs": specs, "mean_lengths": {"tokens": 10}}
    assert predict_bytes(1000, 8, 4, **options, features_on_disk=True).features == 16 * 1000
    assert predict_bytes(1000, 8, 4, **options).features == (16 + 400 + 60) * 1000
