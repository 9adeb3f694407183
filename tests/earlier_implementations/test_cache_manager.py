"""`CacheManager` writes the rows that the earlier implementations write, and no others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from negative_cache import CacheManager, FixedLenFeature, NegativeCache, RaggedFeature
from support import assert_same_state, snapshot

SPECS = {"item": FixedLenFeature([], torch.int64), "embedding": FixedLenFeature([2], torch.float32)}


def items(*numbers: int) -> dict[str, Tensor]:
    values = torch.tensor(numbers)
    return {"item": values, "embedding": torch.stack([values, -values], dim=1).float()}


def embeddings(*numbers: float) -> dict[str, Tensor]:
    return {"embedding": torch.tensor([[float(number)] * 2 for number in numbers])}


def mask(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


def stored(cache: NegativeCache) -> list[int]:
    return cache.data["item"].tolist()


def filled_with(manager: CacheManager, *numbers: int) -> NegativeCache:
    """A cache after one insertion per number."""
    cache = manager.init_cache()
    for number in numbers:
        cache = manager.update_cache(cache, new_items=items(number))
    return cache


def test_a_new_cache_is_zero_and_unfilled() -> None:
    cache = CacheManager({**SPECS, "tokens": RaggedFeature(torch.int64)}, 3).init_cache()
    assert cache.num_rows == 3
    assert cache.age.tolist() == [0, 0, 0]
    assert cache.age.dtype == torch.int32
    assert stored(cache) == [0, 0, 0]
    assert cache.data["embedding"].tolist() == [[0, 0]] * 3
    assert cache.data["tokens"].shape == (3, 0)
    assert int(cache.num_filled) == 0
    assert not cache.has_rows()
    assert cache.document_ids.tolist() == [-1, -1, -1]


def test_a_cache_unpacks_into_data_and_age() -> None:
    data, age = filled_with(CacheManager(SPECS, 2), 5)
    assert data["item"].tolist() == [5, 0]
    assert age.tolist() == [0, 1]


@pytest.mark.parametrize("use_lru", [False, True])
def test_insertion_goes_to_the_oldest_rows_and_ties_to_the_lowest(use_lru: bool) -> None:
    manager = CacheManager(SPECS, 4, use_lru)
    cache = manager.init_cache()
    cache = manager.update_cache(cache, new_items=items(1, 2))
    assert (stored(cache), cache.age.tolist()) == ([1, 2, 0, 0], [0, 0, 1, 1])
    cache = manager.update_cache(cache, new_items=items(3))
    assert (stored(cache), cache.age.tolist()) == ([1, 2, 3, 0], [1, 1, 0, 2])
    cache = manager.update_cache(cache, new_items=items(4, 5, 6))
    assert (stored(cache), cache.age.tolist()) == ([5, 6, 3, 4], [0, 0, 1, 0])
    assert cache.filled.all()


def test_lru_keeps_rows_that_were_updated_in_an_earlier_step() -> None:
    manager = CacheManager(SPECS, 3, use_lru=True)
    cache = filled_with(manager, 1, 2, 3)
    cache = manager.update_cache(cache, updated_item_data=embeddings(9), updated_item_indices=torch.tensor([0]))
    assert cache.age.tolist() == [0, 2, 1]
    cache = manager.update_cache(cache, new_items=items(4))
    assert stored(cache) == [1, 4, 3]


def test_fifo_replaces_in_order_of_insertion() -> None:
    manager = CacheManager(SPECS, 3, use_lru=False)
    cache = filled_with(manager, 1, 2, 3)
    cache = manager.update_cache(cache, updated_item_data=embeddings(9), updated_item_indices=torch.tensor([0]))
    assert cache.age.tolist() == [3, 2, 1]
    assert cache.data["embedding"][0].tolist() == [9, 9]
    cache = manager.update_cache(cache, new_items=items(4))
    assert stored(cache) == [4, 2, 3]


@pytest.mark.parametrize(("use_lru", "expected"), [(True, [1, 4, 3]), (False, [4, 2, 3])])
def test_updates_come_before_insertions(use_lru: bool, expected: list[int]) -> None:
    manager = CacheManager(SPECS, 3, use_lru)
    cache = filled_with(manager, 1, 2, 3)
    cache = manager.update_cache(
        cache,
        new_items=items(4),
        updated_item_data=embeddings(9),
        updated_item_indices=torch.tensor([0]),
    )
    assert stored(cache) == expected
    assert cache.data["embedding"][0].tolist() == ([9, 9] if use_lru else [4, -4])


def test_masked_new_items_take_no_row() -> None:
    manager = CacheManager(SPECS, 3)
    cache = manager.init_cache()
    cache = manager.update_cache(cache, new_items=items(1, 2, 3), new_items_mask=mask(0, 1, 1))
    assert stored(cache) == [2, 3, 0]
    assert cache.filled.tolist() == [True, True, False]


def test_masked_updates_change_nothing_even_out_of_range() -> None:
    manager = CacheManager(SPECS, 3)
    cache = filled_with(manager, 1, 2, 3)
    cache = manager.update_cache(
        cache,
        updated_item_data=embeddings(7, 8, 9),
        updated_item_indices=torch.tensor([-5, 1, 99]),
        updated_item_mask=mask(0, 1, 0),
    )
    assert cache.data["embedding"].tolist() == [[1, -1], [8, 8], [3, -3]]
    assert cache.age.tolist() == [3, 0, 1]


def test_masks_that_are_all_false_change_no_row() -> None:
    manager = CacheManager(SPECS, 3)
    cache = filled_with(manager, 1, 2)
    before = snapshot(cache)
    cache = manager.update_cache(
        cache,
        new_items=items(7, 8),
        new_items_mask=mask(0, 0),
        updated_item_data=embeddings(9),
        updated_item_indices=torch.tensor([0]),
        updated_item_mask=mask(0),
    )
    after = snapshot(cache)
    assert int(after.pop("step")) == int(before.pop("step")) + 1
    assert_same_state(before, after)


def test_of_duplicate_update_indices_the_last_allowed_wins() -> None:
    manager = CacheManager(SPECS, 3)
    cache = filled_with(manager, 1, 2, 3)
    cache = manager.update_cache(
        cache,
        updated_item_data=embeddings(10, 20, 30, 40, 50),
        updated_item_indices=torch.tensor([1, 0, 1, 0, 1]),
        updated_item_mask=mask(1, 1, 1, 1, 0),
    )
    assert cache.data["embedding"].tolist() == [[40, 40], [30, 30], [3, -3]]


@pytest.mark.parametrize("age", [[0, 2, 1], torch.tensor([0, 2, 1], dtype=torch.int32), (0, 2, 1)])
def test_a_cache_made_by_hand_counts_as_filled(age: Sequence[int] | Tensor) -> None:
    cache = NegativeCache(items(1, 2, 3), age)
    assert cache.age.tolist() == [0, 2, 1]
    assert int(cache.num_filled) == 3
    assert cache.has_rows()
    updated = CacheManager(SPECS, 3).update_cache(cache, new_items=items(4))
    assert stored(updated) == [1, 4, 3]
    assert updated.age.tolist() == [1, 0, 2]


def test_a_cache_made_by_hand_is_padded_with_the_managers_default_value() -> None:
    specs = {"x": FixedLenFeature([3], torch.int64, 7)}
    cache = NegativeCache({"x": torch.zeros(2, 3, dtype=torch.int64)}, [0, 0])
    updated = CacheManager(specs, 2).update_cache(cache, new_items={"x": torch.tensor([[1]])})
    assert updated.data["x"].tolist() == [[1, 7, 7], [0, 0, 0]]


def test_a_wrong_number_of_ages_is_refused() -> None:
    cache = NegativeCache(items(1, 2, 3), [0, 0])
    with pytest.raises(ValueError, match="3 rows but 2 ages"):
        CacheManager(SPECS, 3).update_cache(cache, new_items=items(4))


@pytest.mark.parametrize("is_by_hand", [False, True])
def test_update_cache_does_not_change_its_input(is_by_hand: bool) -> None:
    manager = CacheManager(SPECS, 3)
    cache = NegativeCache(items(1, 2, 3), [0, 1, 2]) if is_by_hand else filled_with(manager, 1, 2)
    before = snapshot(cache)
    updated = manager.update_cache(
        cache, new_items=items(4), updated_item_data=embeddings(9), updated_item_indices=torch.tensor([0])
    )
    assert_same_state(before, snapshot(cache))
    assert updated.data["embedding"][0].tolist() == [9, 9]
    assert stored(updated).count(4) == 1


def test_short_features_are_padded_with_the_spec_default() -> None:
    specs = {
        "x": FixedLenFeature([3], torch.int64, 7),
        "y": FixedLenFeature([2], torch.float32),
        "z": RaggedFeature(torch.int64, default_value=5),
    }
    cache = CacheManager(specs, 2).update_cache(
        CacheManager(specs, 2).init_cache(),
        new_items={"x": torch.tensor([[1]]), "y": torch.ones(1, 1), "z": torch.tensor([[1, 5]])},
    )
    assert cache.data["x"].tolist() == [[1, 7, 7], [0, 0, 0]]
    assert cache.data["y"].tolist() == [[1, 0], [0, 0]]
    assert cache.data["z"].tolist() == [[1], [5]]


WRONG_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"new_items": items(1, 2, 3, 4)}, ValueError, "4 items, the cache only 3 rows"),
    ({"new_items": embeddings(1)}, ValueError, r"missing \['item'\]"),
    ({"new_items": {**items(1), "other": torch.ones(1)}}, ValueError, r"unknown \['other'\]"),
    ({"new_items": {**items(1), "embedding": torch.ones(1, 3)}}, ValueError, "has shape"),
    ({"new_items": {**items(1), "item": torch.ones(1)}}, TypeError, "the spec says"),
    ({"new_items": {**items(1), "item": torch.tensor([1, 2])}}, ValueError, "different batch sizes"),
    ({"new_items": items(1), "new_items_mask": mask(1, 1)}, ValueError, "`new_items_mask`"),
    ({"new_items": {**items(1), "embedding": torch.tensor([[1, torch.nan]])}}, ValueError, "NaN or infinity in 1 of 1"),
    ({"new_items": {**items(1), "embedding": torch.tensor([[torch.inf, 1]])}}, ValueError, "NaN or infinity"),
    ({"updated_item_data": embeddings(1)}, ValueError, "together"),
    ({"updated_item_indices": torch.tensor([0])}, ValueError, "together"),
    ({"updated_item_data": embeddings(1), "updated_item_indices": torch.tensor([3])}, ValueError, "outside"),
    ({"updated_item_data": embeddings(1), "updated_item_indices": torch.tensor([-1])}, ValueError, "outside"),
    ({"updated_item_data": embeddings(1), "updated_item_indices": torch.tensor([0, 1])}, ValueError, "expected integ"),
    (
        {"updated_item_data": embeddings(1), "updated_item_indices": torch.tensor([0.0])},
        ValueError,
        "expected integers",
    ),
    ({"updated_item_data": {"other": torch.ones(1)}, "updated_item_indices": torch.tensor([0])}, ValueError, "other"),
    ({"updated_item_data": embeddings(torch.nan), "updated_item_indices": torch.tensor([0])}, ValueError, "NaN"),
    (
        {
            "updated_item_data": embeddings(1),
            "updated_item_indices": torch.tensor([0]),
            "updated_item_mask": mask(1, 1),
        },
        ValueError,
        "`updated_item_mask`",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG_CALLS)
def test_wrong_calls_are_refused(call: dict, error: type[Exception], message: str) -> None:
    manager = CacheManager(SPECS, 3)
    cache = filled_with(manager, 1, 2)
    before = snapshot(cache)
    with pytest.raises(error, match=message):
        manager.update_cache(cache, **call)
    assert_same_state(before, snapshot(cache))


def test_masked_nan_raises_no_error_and_is_not_written() -> None:
    manager = CacheManager(SPECS, 3)
    cache = filled_with(manager, 1)
    new = items(2, 3)
    new["embedding"][0] = torch.nan
    cache = manager.update_cache(
        cache,
        new_items=new,
        new_items_mask=mask(0, 1),
        updated_item_data=embeddings(torch.nan),
        updated_item_indices=torch.tensor([0]),
        updated_item_mask=mask(0),
    )
    assert cache.data["embedding"].tolist() == [[1, -1], [3, -3], [0, 0]]


@pytest.mark.parametrize("size", [0, -1])
def test_a_cache_needs_rows(size: int) -> None:
    with pytest.raises(ValueError, match="cache_size"):
        CacheManager(SPECS, size)


def test_a_partial_update_does_not_fill_a_row_but_a_full_one_does() -> None:
    manager = CacheManager(SPECS, 3)
    cache = filled_with(manager, 1)
    cache = manager.update_cache(cache, updated_item_data=embeddings(9), updated_item_indices=torch.tensor([1]))
    assert cache.filled.tolist() == [True, False, False]
    cache = manager.update_cache(cache, updated_item_data=items(5), updated_item_indices=torch.tensor([2]))
    assert cache.filled.tolist() == [True, False, True]
    assert stored(cache) == [1, 0, 5]


def test_scalar_float_features_are_stored_and_checked() -> None:
    specs = {"x": FixedLenFeature([], torch.float32)}
    manager = CacheManager(specs, 2)
    cache = manager.update_cache(manager.init_cache(), new_items={"x": torch.tensor([1.5])})
    assert cache.data["x"].tolist() == [1.5, 0]
    with pytest.raises(ValueError, match="NaN"):
        manager.update_cache(cache, new_items={"x": torch.tensor([torch.nan])})
