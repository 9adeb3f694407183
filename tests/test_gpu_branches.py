"""What is done where looking at values would stall a device, run on the CPU: masks in place of early returns."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_handlers
import torch
from test_ranks_equal_one_process import check_cache_has_each_document_once, check_distribution, check_write_back
from torch import Tensor

from negative_cache import CacheManager, FixedLenFeature, NegativeCacheLoss
from negative_cache.cache import rows as cache_module
from support import Encoder, as_on_a_gpu, assert_same_state, run_ranks, snapshot
from test_checkpoint import documents, make_loss, step


@pytest.fixture
def on_a_gpu():
    with as_on_a_gpu():
        yield


def test_the_branch_is_another_one(on_a_gpu: None):
    assert not cache_module.is_free_to_read(torch.zeros(1))


def test_the_cache_holds_what_it_holds_on_the_cpu():
    """Without LRU, documents and ages do not depend on the draws, which differ."""
    losses = [make_loss(use_lru=False) for _ in range(2)]
    for number in range(9):
        step(losses[0], 3 * number)
        with as_on_a_gpu():
            step(losses[1], 3 * number)
    first, second = (documents(loss_fn) for loss_fn in losses)
    assert first.keys() == second.keys()
    for key, (tokens, _, written) in first.items():  # new embeddings depend on what was drawn with a row
        assert (tokens, written) == (second[key][0], second[key][2])


def test_nothing_to_write_changes_nothing(on_a_gpu: None):
    specs = {"row": FixedLenFeature([], torch.int64)}
    manager = CacheManager(specs, 4)
    cache = manager.init_cache()
    manager.update_cache_(cache, new_items={"row": torch.arange(3)})
    before = snapshot(cache)
    none = torch.zeros(0, dtype=torch.int64)
    manager.update_cache_(cache, updated_item_data={"row": none}, updated_item_indices=none)
    manager.update_cache_(
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


def test_a_handler_from_its_first_step_on(on_a_gpu: None):
    handler, encoder = test_handlers.new_handler(), Encoder()
    for number in range(5):
        assert bool(test_handlers.step(handler, encoder, number).isfinite())
    assert int(handler.cache.num_filled) > 0


def test_what_is_not_finite_is_kept_out_counted_and_raised_with_the_metrics(on_a_gpu: None):
    def table(features: dict[str, Tensor]) -> Tensor:
        return torch.ones(len(features["row"]), 2) * features["row"][:, None]

    loss_fn = NegativeCacheLoss(table, 8, seed=0)
    rows = torch.tensor([1.0, 2.0, torch.nan])
    queries = torch.ones(3, 2, requires_grad=True)
    loss_fn(queries, table({"row": rows}), {"row": torch.arange(3)})
    assert int(loss_fn.cache.num_filled) == 2
    with pytest.raises(ValueError, match="1 embeddings that were not finite"):
        loss_fn.metrics()
    assert loss_fn.metrics()["fill"] == 2 / 8


def on_ranks(rank: int, world_size: int, folder: Path) -> None:
    with as_on_a_gpu():
        check_cache_has_each_document_once(rank, world_size, folder)
        check_write_back(rank, world_size, folder)
        check_distribution(rank, world_size, folder)


def test_over_ranks(tmp_path: Path):
    run_ranks(on_ranks, 2, tmp_path)
