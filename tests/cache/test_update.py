"""Updates and insertions write the rows that the documentation names, with and without reads by the host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from negative_cache.cache.rows import NegativeCache
from negative_cache.cache.specs import FixedLenFeature
from negative_cache.cache.update import RowUpdates, check_new_items, update_rows
from support import as_on_a_gpu, assert_same_state, snapshot

SPECS = {"item": FixedLenFeature([], torch.int64), "embedding": FixedLenFeature([2], torch.float32)}


@pytest.fixture(params=["host reads", "no host reads"], autouse=True)
def reads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test runs as on a CPU, and as on a GPU, where the host does not read values."""
    if request.param == "host reads":
        yield
        return
    with as_on_a_gpu():
        yield


def items(*numbers: int) -> dict[str, Tensor]:
    values = torch.tensor(numbers)
    return {"item": values, "embedding": torch.stack([values, -values], dim=1).float()}


def updates(rows: list[int], numbers: list[float], mask: list[bool] | None = None) -> RowUpdates:
    values = torch.tensor(numbers)
    chosen = None if mask is None else torch.tensor(mask)
    return RowUpdates(torch.tensor(rows), {"embedding": torch.stack([values, values], dim=1).float()}, chosen)


def mask(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


def stored(cache: NegativeCache) -> list[int]:
    return cache.data["item"].tolist()


def insert(cache: NegativeCache, numbers: list[int], ids: list[int] | None, mask: Tensor | None = None) -> None:
    document_ids = None if ids is None else torch.tensor(ids)
    checked = check_new_items(cache, SPECS, items(*numbers), mask=mask)
    update_rows(cache, use_lru=True, new_items=checked, new_items_mask=mask, document_ids=document_ids)


def test_items_without_ids_replace_the_oldest_rows() -> None:
    cache = NegativeCache.empty(SPECS, 3)
    insert(cache, [1, 2], None)
    insert(cache, [3, 4, 5], None, mask(1, 0, 1))
    assert stored(cache) == [5, 2, 3]
    assert cache.age.tolist() == [0, 1, 0]


def test_known_documents_are_written_in_their_own_row() -> None:
    cache = NegativeCache.empty(SPECS, 4)
    insert(cache, [1, 2], [100, 200])
    insert(cache, [3, 4], [200, 300])
    assert stored(cache) == [1, 3, 4, 0]
    assert cache.document_ids.tolist() == [100, 200, 300, -1]
    assert cache.age.tolist() == [1, 0, 0, 2]


def test_unknown_ids_are_never_matched() -> None:
    cache = NegativeCache.empty(SPECS, 4)
    insert(cache, [1, 2], [-1, -1])
    insert(cache, [3], [-1])
    assert stored(cache) == [1, 2, 3, 0]
    assert cache.find(torch.tensor([-1])).tolist() == [-1]


def test_a_document_twice_in_a_batch_takes_one_row() -> None:
    cache = NegativeCache.empty(SPECS, 4)
    insert(cache, [1, 2, 3], [7, 7, 8])  # new: the first entry counts
    assert stored(cache) == [1, 3, 0, 0]
    insert(cache, [4, 5], [7, 7])  # known: the last one
    assert stored(cache) == [5, 3, 0, 0]
    insert(cache, [6, 9, 10], [20, 20, 7], mask=mask(0, 1, 0))
    assert stored(cache) == [5, 3, 9, 0]


def test_replaced_rows_lose_their_document() -> None:
    cache = NegativeCache.empty(SPECS, 2)
    insert(cache, [1, 2], [7, 8])
    insert(cache, [3], None)
    assert cache.document_ids.tolist() == [-1, 8]
    assert cache.find(torch.tensor([7, 8, 8, 9])).tolist() == [-1, 1, 1, -1]


def test_updates_of_the_embedding_keep_the_document() -> None:
    cache = NegativeCache.empty(SPECS, 2)
    insert(cache, [1], [7])
    update_rows(cache, use_lru=True, updates=updates([0], [9]))
    assert cache.document_ids.tolist() == [7, -1]


def test_a_known_row_gives_the_same_update_as_its_lookup() -> None:
    caches = [NegativeCache.empty(SPECS, 4) for _ in range(2)]
    ids = torch.tensor([20, 40, 10])
    for cache, rows in zip(caches, (None, torch.tensor([1, -1, 0])), strict=True):
        insert(cache, [1, 2, 3], [10, 20, 30])
        update_rows(cache, use_lru=True, new_items=items(7, 8, 9), document_ids=ids, document_rows=rows)
        assert stored(cache) == [9, 7, 3, 8]
    assert_same_state(snapshot(caches[0]), snapshot(caches[1]))


@pytest.mark.parametrize(("use_lru", "ages"), [(True, [0, 0, 1, 1]), (False, [1, 0, 1, 1])])
def test_reinserted_rows_become_young_without_lru_too(use_lru: bool, ages: list[int]) -> None:
    cache = NegativeCache.empty(SPECS, 4)
    insert(cache, [1, 2, 3, 4], None)
    update_rows(cache, use_lru=use_lru, updates=updates([0], [8]), reinserted=updates([1], [9]))
    assert cache.data["embedding"].tolist() == [[8, 8], [9, 9], [3, -3], [4, -4]]
    assert cache.age.tolist() == ages


def test_reinserted_values_are_written_after_the_updates() -> None:
    cache = NegativeCache.empty(SPECS, 2)
    insert(cache, [1, 2], None)
    update_rows(cache, use_lru=True, updates=updates([0, 1], [7, 8]), reinserted=updates([0], [9]))
    assert cache.data["embedding"].tolist() == [[9, 9], [8, 8]]


def test_the_last_update_of_a_row_that_is_not_masked_counts() -> None:
    cache = NegativeCache.empty(SPECS, 3)
    insert(cache, [1, 2, 3], None)
    update_rows(cache, use_lru=True, updates=updates([1, 0, 1, 0, 1], [5, 6, 7, 8, 9], [True, True, True, True, False]))
    assert cache.data["embedding"].tolist() == [[8, 8], [7, 7], [3, -3]]
    assert cache.age.tolist() == [0, 0, 1]


def test_a_step_in_which_everything_is_masked_changes_only_the_step() -> None:
    cache = NegativeCache.empty(SPECS, 3)
    insert(cache, [1, 2], [7, 8])
    before = snapshot(cache)
    insert(cache, [3, 4], [7, 9], mask(0, 0))
    update_rows(cache, use_lru=True, updates=updates([0], [9], [False]))
    after = snapshot(cache)
    assert int(after.pop("step")) == int(before.pop("step")) + 2
    assert_same_state(before, after)


def test_an_update_without_rows_changes_only_the_step() -> None:
    cache = NegativeCache.empty(SPECS, 3)
    insert(cache, [1, 2], None)
    before = snapshot(cache)
    none = RowUpdates(torch.zeros(0, dtype=torch.int64), {"embedding": torch.zeros(0, 2)})
    update_rows(cache, use_lru=True, updates=none)
    after = snapshot(cache)
    assert int(after.pop("step")) == int(before.pop("step")) + 1
    assert_same_state(before, after)


def test_values_that_are_not_finite_are_refused_or_where_nothing_is_read_skipped_and_counted(
    request: pytest.FixtureRequest,
) -> None:
    cache = NegativeCache.empty(SPECS, 4)
    insert(cache, [1, 2], None)
    new = items(3, 4, 5)
    new["embedding"][1, 0] = torch.inf
    if "no host reads" not in request.node.name:
        with pytest.raises(ValueError, match=r"`new_items\['embedding'\]`.* NaN or infinity in 1 of 3 rows"):
            check_new_items(cache, SPECS, new)
        return
    update_rows(
        cache,
        use_lru=True,
        new_items=check_new_items(cache, SPECS, new),
        updates=updates([0, 1], [torch.nan, 9.0]),
    )
    assert stored(cache) == [1, 2, 3, 5]
    assert cache.data["embedding"][:2].tolist() == [[1, -1], [9, 9]]
    assert int(cache.num_rejected) == 2


@pytest.mark.parametrize(
    ("new", "error", "message"),
    [
        (items(1, 2, 3, 4), ValueError, "`new_items` has 4 items, the cache only 3 rows"),
        ({"item": torch.tensor([1])}, ValueError, r"`new_items` must have the keys .* missing \['embedding'\]"),
        ({**items(1), "embedding": torch.ones(1, 3)}, ValueError, r"`new_items\['embedding'\]` has shape \[1, 3\]"),
        ({**items(1), "item": torch.ones(1)}, TypeError, "the spec says torch.int64"),
    ],
)
def test_new_items_that_do_not_fit_are_refused(new: dict[str, Tensor], error: type[Exception], message: str) -> None:
    cache = NegativeCache.empty(SPECS, 3)
    with pytest.raises(error, match=message):
        check_new_items(cache, SPECS, new)


def test_new_items_of_any_value_are_accepted_where_they_are_masked() -> None:
    cache = NegativeCache.empty(SPECS, 3)
    new = items(1, 2)
    new["embedding"][0] = torch.nan
    insert_mask = mask(0, 1)
    checked = check_new_items(cache, SPECS, new, mask=insert_mask)
    update_rows(cache, use_lru=True, new_items=checked, new_items_mask=insert_mask)
    assert stored(cache) == [2, 0, 0]
    assert int(cache.num_rejected) == 0
    with pytest.raises(ValueError, match=r"`new_items_mask` has shape \[3\]; expected \[2\]"):
        check_new_items(cache, SPECS, new, mask=mask(0, 1, 1))
