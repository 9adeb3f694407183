"""Predicted bytes equal those of a cache that was filled."""

from __future__ import annotations

import math

import pytest
import torch

from negative_cache import FixedLenFeature, NegativeCacheLoss, RaggedFeature, predict_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_prediction_equals_the_bytes_of_a_full_cache(dtype: torch.dtype):
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


def test_a_guide_and_corrections_are_counted():
    size, dim = 64, 8
    loss_fn = NegativeCacheLoss(lambda x: torch.ones(len(x["row"]), dim), size)
    documents = {"document_embeddings": torch.ones(4, dim), "document_features": {"row": torch.ones(4, 2)}}
    guide = {"guide_queries": torch.ones(4, 5), "guide_documents": torch.ones(4, 5), "log_q": torch.zeros(4)}
    loss_fn(torch.ones(4, dim), **documents, **guide)
    total = sum(buffer.nbytes for buffer in loss_fn.cache.buffers())
    options = {"specs": {"row": FixedLenFeature([2], torch.float32)}, "has_ids": False}
    predicted = predict_bytes(size, dim, 4, **options, guide_dim=5, has_log_q=True)
    assert predicted.embeddings + predicted.features + predicted.bookkeeping == total
    assert predicted.embeddings == 4 * size * (dim + 5 + 1)


def test_shared_rows_are_counted_once_per_query():
    """The candidates of all queries, 8 each, are weighed for every query."""
    alone, shared = (predict_bytes(2**15, 64, 1024, in_batch=False, shared=shared).step for shared in (False, True))
    assert shared - alone > 3 * 1024 * 8 * 1024 * 4


def test_more_samples_than_16_are_chosen_from_as_many_candidates():
    """`max(8, min(16, 2 * num_samples), num_samples)` candidates per query."""
    steps = [predict_bytes(2**20, 1, 256, in_batch=False, num_samples=count).step for count in (1, 4, 16, 32)]
    encoded = [3 * 256 * (1 + count) * 4 for count in (1, 4, 16, 32)]
    weighed = [4 * 256 * 256 * 4 * candidates for candidates in (8, 8, 16, 32)]
    rest = [step - ours - others for step, ours, others in zip(steps, encoded, weighed, strict=True)]
    assert len(set(rest)) == 1


def test_the_bytes_of_a_step_do_not_depend_on_the_rows():
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
        ((10, 4, 2), {"guide_dim": -1}, "`guide_dim` is -1"),
        ((10, 4, 2), {"embedding_dtype": torch.int32}, "floating point dtype or int8"),
        ((10, 4, 11), {}, "larger than the cache's 10 rows"),
        ((0, 4, 2), {}, "`cache_size` is 0"),
        ((10, 4.0, 2), {}, "`dim` is 4.0"),
    ],
)
def test_wrong_sizes_and_options_are_refused(sizes: tuple, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        predict_bytes(*sizes, **options)


def test_a_dtype_given_as_a_string_is_refused():
    with pytest.raises(TypeError, match=r"`embedding_dtype` is 'int8'; expected a torch\.dtype"):
        NegativeCacheLoss(lambda x: x, 4, embedding_dtype="int8")
