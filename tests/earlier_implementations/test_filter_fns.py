"""Which new items may enter the cache."""

from __future__ import annotations

import pytest
import torch

from negative_cache import (
    CacheManager,
    FixedLenFeature,
    IsInCacheFilterFn,
    NegativeCache,
    QuantizedFeature,
    RaggedFeature,
)


def by_hand(key: str, value: torch.Tensor) -> NegativeCache:
    return NegativeCache({key: value}, [0] * len(value))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float16, torch.bool])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_items_equal_to_a_row_are_held_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    rows = torch.stack([torch.zeros(shape), torch.ones(shape)]).to(dtype)
    other = torch.ones(shape) * (0.5 if dtype.is_floating_point else 2)
    if dtype == torch.bool:
        cache, new = by_hand("x", rows[1:]), rows.flip(0)
        expected = [False, True]
    else:
        cache, new = by_hand("x", rows), torch.stack([torch.ones(shape), other, torch.zeros(shape)]).to(dtype)
        expected = [False, True, False]
    result = IsInCacheFilterFn(["x"])(cache, {"x": new})
    assert result.dtype == torch.bool
    assert result.tolist() == expected


def test_one_different_element_is_enough() -> None:
    rows = torch.arange(12).reshape(2, 2, 3)
    new = rows.repeat(6, 1, 1)
    for position in range(6):
        new.reshape(12, 6)[position, position] += 100
    assert IsInCacheFilterFn(["x"])(by_hand("x", rows), {"x": new}).tolist() == [True] * 6 + [False] * 6


def test_all_keys_must_agree_in_one_row() -> None:
    cache = NegativeCache({"x": torch.tensor([1, 2]), "y": torch.tensor([[1.0], [2.0]])}, [0, 0])
    new = {"x": torch.tensor([1, 1, 2]), "y": torch.tensor([[1.0], [2.0], [2.0]])}
    assert IsInCacheFilterFn(("x", "y"))(cache, new).tolist() == [False, True, False]
    assert IsInCacheFilterFn(("x",))(cache, new).tolist() == [False, False, False]


def test_unfilled_rows_equal_nothing() -> None:
    manager = CacheManager({"x": FixedLenFeature([], torch.int64)}, 4)
    cache = manager.update_cache(manager.init_cache(), new_items={"x": torch.tensor([5])})
    assert IsInCacheFilterFn(["x"])(cache, {"x": torch.tensor([0, 5])}).tolist() == [True, False]


def test_short_items_are_compared_as_they_would_be_stored() -> None:
    manager = CacheManager({"x": FixedLenFeature([3], torch.int64, 7)}, 4)
    cache = manager.update_cache(manager.init_cache(), new_items={"x": torch.tensor([[1]])})
    new = torch.tensor([[1, 7], [1, 0]])
    assert IsInCacheFilterFn(["x"])(cache, {"x": new}).tolist() == [False, True]


def test_ragged_features() -> None:
    manager = CacheManager({"x": RaggedFeature(torch.int64)}, 4)
    cache = manager.update_cache(manager.init_cache(), new_items={"x": torch.tensor([[1, 2, 0], [3, 0, 0]])})
    is_new = IsInCacheFilterFn(["x"])
    assert is_new(cache, {"x": torch.tensor([[1, 2], [1, 0], [3, 0]])}).tolist() == [False, True, False]
    assert is_new(cache, {"x": torch.tensor([[1, 2, 0, 4], [1, 2, 0, 0]])}).tolist() == [True, False]
    assert is_new(cache, {"x": [torch.tensor([3]), torch.tensor([3, 3])]}).tolist() == [False, True]


def test_ragged_features_are_compared_without_their_padding() -> None:
    """Whatever its side, its width and its value under the mask."""
    manager = CacheManager({"x": RaggedFeature(torch.int64), "attention_mask": RaggedFeature(torch.int64)}, 4)
    known = {"x": torch.tensor([[9, 1, 2], [9, 9, 3]]), "attention_mask": torch.tensor([[0, 1, 1], [0, 0, 1]])}
    cache = manager.update_cache(manager.init_cache(), new_items=known)
    new = {
        "x": torch.tensor([[8, 8, 1, 2], [8, 8, 8, 3], [8, 8, 9, 3]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]]),
    }
    assert IsInCacheFilterFn(["x"])(cache, new).tolist() == [False, False, True]
    on_the_right = {"x": torch.tensor([[1, 2], [3, 0]]), "attention_mask": torch.tensor([[1, 1], [1, 0]])}
    assert IsInCacheFilterFn(["x", "attention_mask"])(cache, on_the_right).tolist() == [False, False]


def test_an_empty_batch() -> None:
    assert IsInCacheFilterFn(["x"])(by_hand("x", torch.ones(2, 3)), {"x": torch.ones(0, 3)}).shape == (0,)


def test_wrong_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="`keys` is empty"):
        IsInCacheFilterFn([])
    cache = by_hand("x", torch.ones(2))
    with pytest.raises(ValueError, match=r"\['y'\]"):
        IsInCacheFilterFn(["x", "y"])(cache, {"x": torch.ones(1), "y": torch.ones(1)})
    with pytest.raises(ValueError, match=r"\['x'\]"):
        IsInCacheFilterFn(["x"])(cache, {"z": torch.ones(1)})


def test_what_is_kept_rounded_is_not_compared():
    cache = CacheManager({"x": QuantizedFeature([2])}, 4).init_cache()
    with pytest.raises(ValueError, match="rounded to int8"):
        IsInCacheFilterFn(["x"])(cache, {"x": torch.ones(1, 2)})
