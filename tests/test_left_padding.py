"""Decoders that need padding on the left get it for cached documents too: without training, no embedding is stale."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from last_token import DIM, LONGEST, LastToken, left_padded, step
from negative_cache import NegativeCacheLoss, RaggedFeature
from negative_cache.checkpoint import load_checkpoint, save_checkpoint
from support import as_on_a_gpu, assert_same_state, snapshot

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "own draws": {"in_batch": False, "shared": False, "num_samples": 2},
    "refresh": {"refresh_per_step": 5},
    "slots": {
        "specs": {key: RaggedFeature(torch.int64, LONGEST) for key in ("input_ids", "attention_mask")},
    },
}


def assert_nothing_is_stale(loss_fn: NegativeCacheLoss) -> None:
    """Every row has the embedding of its document."""
    assert loss_fn.cache is not None
    rows = loss_fn.cache.filled.nonzero().squeeze(1)
    with torch.no_grad():
        expected = loss_fn.document_encoder(left_padded(loss_fn.cache.document_ids[rows].tolist()))
    torch.testing.assert_close(loss_fn.cache.embeddings("embedding")[rows], expected)
    assert loss_fn.metrics()["staleness"] < 1e-10


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_sampled_documents_are_padded_on_the_left(settings: dict[str, Any], is_gpu: bool):
    encoder = LastToken()
    loss_fn = NegativeCacheLoss(encoder, 64, **{"num_samples": 1, "seed": 0, **settings})
    with as_on_a_gpu() if is_gpu else nullcontext():
        for number in range(20):
            step(loss_fn, range(4 * number, 4 * number + 4)).backward()
            if number > 2:
                assert loss_fn.metrics()["staleness"] < 1e-10
    assert len(set(encoder.widths)) > 3
    assert_nothing_is_stale(loss_fn)


@pytest.mark.parametrize("is_gpu", [False, True])
def test_given_negatives_of_another_width(is_gpu: bool):
    loss_fn = NegativeCacheLoss(LastToken(), 64, num_samples=1, seed=0)
    with as_on_a_gpu() if is_gpu else nullcontext():
        for number in range(12):
            first = 9 * number  # the numbers 0, 2, 4 modulo 9 have 1, 2 and 3 tokens
            narrow, wide = [first, first + 2, first + 4], [first + 5, first + 7]
            step(loss_fn, *((narrow, wide) if number % 2 else (wide, narrow)))
    assert_nothing_is_stale(loss_fn)


def test_a_corpus_fills_the_cache():
    loss_fn = NegativeCacheLoss(LastToken(), 64, num_samples=1, seed=0)
    parts = [range(start, start + 8) for start in range(0, 40, 8)]
    batches = [{"document_features": left_padded(part), "document_ids": torch.tensor(part)} for part in parts]
    assert loss_fn.fill_from(batches) == 40
    for number in range(40, 48, 2):
        step(loss_fn, range(number, number + 2))
    assert_nothing_is_stale(loss_fn)


def test_a_spec_names_the_side_for_batches_without_padding():
    """One text per batch, several samples."""
    specs = {key: RaggedFeature(torch.int64, padding_side="left") for key in ("input_ids", "attention_mask")}
    loss_fn = NegativeCacheLoss(LastToken(), 64, seed=0, num_samples=4, specs=specs)
    for number in range(20):
        step(loss_fn, [number])
    assert_nothing_is_stale(loss_fn)


def saved_run() -> NegativeCacheLoss:
    loss_fn = NegativeCacheLoss(LastToken(), 20, seed=0, num_samples=3)
    for number in range(4):
        step(loss_fn, range(4 * number, 4 * number + 4))
    return loss_fn


@pytest.mark.parametrize("way", ["state_dict", "checkpoint"])
def test_a_resumed_run_keeps_the_side(way: str, tmp_path: Path):
    saved = saved_run()
    loaded = NegativeCacheLoss(LastToken(), 20, seed=5, num_samples=3)
    if way == "state_dict":
        loaded.load_state_dict(snapshot(saved))
    else:
        save_checkpoint(saved, tmp_path / "cache")
        load_checkpoint(loaded, tmp_path / "cache")
    for number in (40, 42):  # batches without padding
        assert torch.equal(step(saved, [number]), step(loaded, [number]))
    assert_same_state(snapshot(saved), snapshot(loaded))
    assert_nothing_is_stale(loaded)


@pytest.mark.parametrize("cache_size", [9, 40])
def test_a_cache_of_another_size_keeps_the_side(cache_size: int, tmp_path: Path):
    save_checkpoint(saved_run(), tmp_path / "cache")
    loaded = NegativeCacheLoss(LastToken(), cache_size, seed=5, num_samples=3)
    load_checkpoint(loaded, tmp_path / "cache")
    step(loaded, [40])
    assert_nothing_is_stale(loaded)


def test_padding_on_both_sides_is_refused_and_nothing_is_written():
    loss_fn = saved_run()
    before = snapshot(loss_fn)
    features = left_padded([3, 5])
    features["attention_mask"] = torch.tensor([[0, 1, 0], [1, 1, 1]])
    features["input_ids"] = torch.ones(2, 3, dtype=torch.int64)
    vectors = torch.nn.functional.normalize(torch.randn(2, DIM), dim=1).requires_grad_()
    with pytest.raises(ValueError, match=r"document_features\['attention_mask'\].*tokenizer.padding_side"):
        loss_fn(vectors, vectors, features)
    assert_same_state(before, snapshot(loss_fn))
