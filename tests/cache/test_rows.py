"""A cache saves, loads, copies and moves everything that it holds, and refuses states of other caches."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor

from negative_cache.cache.rows import CacheHolder, NegativeCache
from negative_cache.cache.specs import Features, FixedLenFeature, RaggedFeature
from negative_cache.cache.update import check_new_items, update_rows
from support import assert_same_state, snapshot

SPECS = {"item": FixedLenFeature([], torch.int64), "embedding": FixedLenFeature([2], torch.float32)}


def items(*numbers: int) -> dict[str, Tensor]:
    values = torch.tensor(numbers)
    return {"item": values, "embedding": torch.stack([values, -values], dim=1).float()}


def insert(cache: NegativeCache, new_items: Features, document_ids: Tensor | None = None) -> None:
    checked = check_new_items(cache, cache.specs, new_items)
    update_rows(cache, use_lru=True, new_items=checked, document_ids=document_ids)


def filled_with(num_rows: int, *numbers: int) -> NegativeCache:
    """A cache after one insertion per number."""
    cache = NegativeCache.empty(SPECS, num_rows)
    for number in numbers:
        insert(cache, items(number))
    return cache


def loaded(cache: NegativeCache) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(cache.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_loaded_cache_continues_as_the_saved_one() -> None:
    specs = {**SPECS, "tokens": RaggedFeature(torch.int64)}
    cache, other = (NegativeCache.empty(specs, 3) for _ in range(2))
    for number in (1, 2):
        new = {**items(number), "tokens": torch.full((1, number), number)}
        insert(cache, new, torch.tensor([number]))
    other.load_state_dict(loaded(cache))
    assert_same_state(snapshot(cache), snapshot(other))
    assert other.has_rows()
    for target in (cache, other):
        new = {**items(3, 4), "tokens": torch.tensor([[3, 3, 3], [4, 0, 0]])}
        insert(target, new, torch.tensor([3, 1]))
    for key, value in cache.data.items():
        assert torch.equal(value, other.data[key]), key
    assert torch.equal(cache.age, other.age)
    assert torch.equal(cache.document_ids, other.document_ids)
    assert other.data["tokens"].tolist() == [[4, 0, 0], [2, 2, 0], [3, 3, 3]]


@pytest.mark.parametrize(
    ("specs", "size", "message"),
    [
        (SPECS, 4, "4 rows, this one has 3"),
        ({**SPECS, "item": FixedLenFeature([], torch.int32)}, 3, "'item'"),
        ({**SPECS, "item": FixedLenFeature([2], torch.int64)}, 3, "'item'"),
        ({**SPECS, "item": RaggedFeature(torch.int64)}, 3, "'item'"),
        ({**SPECS, "more": RaggedFeature(torch.int64)}, 3, "more"),
        ({"embedding": SPECS["embedding"]}, 3, "item"),
    ],
)
def test_the_state_of_another_cache_is_refused(specs: dict, size: int, message: str) -> None:
    cache = filled_with(3, 1, 2)
    before = snapshot(cache)
    with pytest.raises(ValueError, match=message):
        cache.load_state_dict(NegativeCache.empty(specs, size).state_dict())
    assert_same_state(before, snapshot(cache))


@pytest.mark.parametrize("key", ["filled", "feature_extra.values", "_extra_state"])
def test_a_damaged_state_is_refused(key: str) -> None:
    specs = {"extra": FixedLenFeature([2], torch.float32)}
    cache = NegativeCache.empty(specs, 3)
    insert(cache, {"extra": torch.ones(1, 2)})
    before = snapshot(cache)
    missing, cut = (NegativeCache.empty(specs, 3).state_dict() for _ in range(2))
    del missing[key]
    with pytest.raises(ValueError, match=r"The state dict has no"):
        cache.load_state_dict(missing)
    cut[key] = cut[key][:1]
    with pytest.raises(ValueError):
        cache.load_state_dict(cut)
    assert_same_state(before, snapshot(cache))


@pytest.mark.parametrize("name", ["a.b", "type", "items", "data", "age", "training", "filled", "a/b", "~", "_columns"])
def test_any_feature_name_works(name: str) -> None:
    specs = {name: FixedLenFeature([], torch.int64), name + ".x": FixedLenFeature([], torch.int64)}
    cache, other = (NegativeCache.empty(specs, 2) for _ in range(2))
    insert(cache, {name: torch.tensor([1]), name + ".x": torch.tensor([2])})
    other.load_state_dict(loaded(cache))
    assert other.data[name].tolist() == [1, 0]
    assert other.data[name + ".x"].tolist() == [2, 0]


def test_names_that_look_alike_are_kept_apart() -> None:
    specs = {name: FixedLenFeature([], torch.int64) for name in ("a.b", "a/b", "a~1b", "a~b")}
    cache, other = (NegativeCache.empty(specs, 1) for _ in range(2))
    insert(cache, {name: torch.tensor([number]) for number, name in enumerate(specs, 1)})
    other.load_state_dict(cache.state_dict())
    assert [int(other.data[name]) for name in specs] == [1, 2, 3, 4]


def test_copies_are_independent_and_a_move_includes_every_buffer() -> None:
    cache = filled_with(2, 1)
    twin = copy.deepcopy(cache)
    insert(twin, items(2))
    assert cache.data["item"].tolist() == [1, 0]
    moved = twin.to("meta")
    assert {buffer.device.type for buffer in moved.buffers()} == {"meta"}
    assert {value.device.type for value in moved.data.values()} == {"meta"}


def test_features_may_stay_where_they_are_when_the_cache_moves() -> None:
    cache = NegativeCache.empty(SPECS, 2, feature_device="cpu", scored_keys=["embedding"]).to("meta")
    assert cache.data["item"].device.type == "cpu"
    assert cache.data["embedding"].device.type == "meta"
    assert cache.device.type == "meta"


@pytest.mark.parametrize(
    ("data", "age", "message"),
    [({}, [], "empty"), ({"x": torch.zeros(2), "y": torch.zeros(3)}, [0, 0], "different numbers of rows")],
)
def test_wrong_caches_made_by_hand_are_refused(data: dict[str, Tensor], age: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NegativeCache(data, age)


def test_ids_are_found_after_a_state_was_loaded() -> None:
    cache, other = (NegativeCache.empty(SPECS, 3) for _ in range(2))
    insert(cache, items(1, 2), torch.tensor([10, 20]))
    insert(other, items(1, 2), torch.tensor([20, 30]))
    assert other.find(torch.tensor([10, 20, 30])).tolist() == [-1, 0, 1]
    other.load_state_dict(loaded(cache))
    assert other.find(torch.tensor([10, 20, 30])).tolist() == [0, 1, -1]


def test_a_holder_hides_its_caches_from_ddp_but_saves_loads_and_moves_them() -> None:
    holder, other = CacheHolder(), CacheHolder()
    holder._held["cache"], other._held["cache"] = filled_with(3, 5), NegativeCache.empty(SPECS, 3)
    assert list(holder.buffers()) == []
    state = holder.state_dict()
    assert "cache.feature_item.values" in state
    other.load_state_dict(state)
    assert_same_state(state, snapshot(other))
    assert other.to("meta")._held["cache"].device.type == "meta"


def test_a_holder_loads_no_cache_unless_all_of_them_fit() -> None:
    holder, other = CacheHolder(), CacheHolder()
    holder._held |= {"a": filled_with(3, 5), "b": filled_with(3, 6)}
    other._held |= {"a": filled_with(3, 7), "b": filled_with(4, 8)}
    before = snapshot(other)
    with pytest.raises(ValueError, match="3 rows, this one has 4"):
        other.load_state_dict(holder.state_dict())
    assert_same_state(before, snapshot(other))


def test_ragged_features_load_under_another_max_length_unless_they_are_longer() -> None:
    def cache(max_length: int | None) -> NegativeCache:
        return NegativeCache.empty({"tokens": RaggedFeature(torch.int64, max_length)}, 4)

    tokens = [torch.arange(1, 6), torch.arange(1, 4)]
    for saved_length, own_length in ((None, 5), (5, None), (5, 6), (None, None)):
        saved, own = cache(saved_length), cache(own_length)
        insert(saved, {"tokens": tokens})
        own.load_state_dict(saved.state_dict())
        assert own.read(torch.arange(3), ["tokens"])["tokens"].tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 0, 0], [0] * 5]
        with pytest.raises(ValueError, match="items of 5 values in the feature 'tokens', this one's max_length is 4"):
            cache(4).load_state_dict(saved.state_dict())


def test_features_without_values_and_scalars_are_read_as_written() -> None:
    cache = NegativeCache.empty({"none": FixedLenFeature([0], torch.int64), "flag": FixedLenFeature([], torch.bool)}, 5)
    cache.write(torch.tensor([4, 1]), {"none": torch.zeros(2, 0), "flag": torch.tensor([True, True])})
    read = cache.read(torch.tensor([0, 1, 4]), ["none", "flag"])
    assert read["none"].shape == (3, 0)
    assert read["flag"].tolist() == [False, True, True]
