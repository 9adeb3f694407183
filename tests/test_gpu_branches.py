"""Branches for devices on which reading a value would synchronize, run on the CPU: masks in place of early returns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from negative_cache import (
    CacheClassificationLoss,
    CacheLossHandler,
    CacheManager,
    FixedLenFeature,
    NegativeCacheLoss,
)
from negative_cache.cache import rows as cache_module
from support import Encoder, as_on_a_gpu, assert_same_state, snapshot


@pytest.fixture
def on_a_gpu():
    with as_on_a_gpu():
        yield


def test_other_branches_run_here(on_a_gpu: None):
    assert not cache_module.reads_without_sync(torch.zeros(1))


def documents_after_nine_steps() -> dict[int, tuple[list[int], int]]:
    """Tokens and the step of the last write of each cached document, by id. Documents have one to four tokens."""
    table = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def encode(features: dict[str, Tensor]) -> Tensor:
        return nn.functional.normalize(table[features["input_ids"]].sum(dim=1), dim=1)

    loss_fn = NegativeCacheLoss(encode, 20, num_samples=1, seed=0, use_lru=False)
    for number in range(9):
        ids = 3 * number + torch.arange(4)
        tokens = [torch.full((1 + int(i) % 4,), int(i) + 1) for i in ids]
        features = {"input_ids": nn.utils.rnn.pad_sequence(tokens, batch_first=True)}
        loss_fn(0.9 * encode(features), encode(features), features, document_ids=ids)
    cache = loss_fn.cache
    tokens, written = cache.data["input_ids"].tolist(), cache.written.tolist()
    return {
        int(document): ([token for token in tokens[row] if token], written[row])
        for row, document in enumerate(cache.document_ids)
    }


def test_the_cache_holds_the_same_documents_as_on_the_cpu():
    """Without LRU, documents and ages do not depend on the draws, which differ."""
    on_the_cpu = documents_after_nine_steps()
    with as_on_a_gpu():
        assert documents_after_nine_steps() == on_the_cpu
    assert len(on_the_cpu) == 20


def test_nothing_to_write_changes_nothing(on_a_gpu: None):
    specs = {"row": FixedLenFeature([], torch.int64)}
    manager = CacheManager(specs, 4)
    cache = manager.init_cache()
    cache = manager.update_cache(cache, new_items={"row": torch.arange(3)})
    before = snapshot(cache)
    none = torch.zeros(0, dtype=torch.int64)
    cache = manager.update_cache(cache, updated_item_data={"row": none}, updated_item_indices=none)
    cache = manager.update_cache(
        cache,
        new_items={"row": torch.arange(2)},
        new_items_mask=torch.zeros(2, dtype=torch.bool),
        updated_item_data={"row": torch.tensor([9])},
        updated_item_indices=torch.tensor([1]),
        updated_item_mask=torch.tensor([False]),
    )
    after = snapshot(cache)
    assert int(after.pop("step")) == int(before.pop("step")) + 2
    assert_same_state(before, after)


def test_a_handler_trains_from_its_first_step_on(on_a_gpu: None):
    specs = {key: FixedLenFeature([], torch.int64) for key in ("a", "b")}
    specs["embedding"] = FixedLenFeature([8], torch.float32)
    loss = CacheClassificationLoss("embedding", ("a", "b"), lambda scores: 20.0 * scores)
    handler, encoder = CacheLossHandler(CacheManager(specs, 16), loss, "embedding", ("a", "b")), Encoder()
    for number in range(5):
        items = {"a": torch.arange(4) + 4 * number, "b": torch.arange(4)}
        loss = handler.update_cache_and_compute_loss(encoder, torch.randn(4, 8), encoder(items), items)
        assert bool(loss.isfinite())
        assert (float(loss.detach()) != 0) == (number > 0)
    assert int(handler.cache.num_filled) == 16


def test_rows_that_are_not_finite_are_kept_out_and_raised_with_the_metrics(on_a_gpu: None):
    def table(features: dict[str, Tensor]) -> Tensor:
        return torch.ones(len(features["row"]), 2) * features["row"][:, None]

    loss_fn = NegativeCacheLoss(table, 8, num_samples=1, seed=0)
    rows = torch.tensor([1.0, 2.0, torch.nan])
    queries = torch.ones(3, 2, requires_grad=True)
    loss_fn(queries, table({"row": rows}), {"row": torch.arange(3)})
    assert int(loss_fn.cache.num_filled) == 2
    with pytest.raises(ValueError, match="1 embeddings that were not finite"):
        loss_fn.metrics()
    assert loss_fn.metrics()["fill"] == 2 / 8
