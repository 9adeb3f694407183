"""Oldest rows and rows of ids, against looking at all rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from negative_cache.features import FixedLenFeature
from negative_cache.lookup import OldestRows, RowsOfIds, is_last_of_equal
from negative_cache.negative_cache import CacheManager
from support import Recorder


def oldest_by_sorting(written: Tensor, count: int) -> list[int]:
    return written.sort(stable=True).indices[:count].tolist()


# Below one node, exactly one, one more; two and three levels of them.
@pytest.mark.parametrize("num_rows", [1, 5, 63, 64, 65, 4095, 4096, 4097, 10_000])
def test_the_oldest_rows_are_those_of_a_sort(num_rows: int):
    rng = torch.Generator().manual_seed(num_rows)
    written = torch.randint(-3, 3, (num_rows,), generator=rng)
    tree = OldestRows(written)
    for step in range(30):
        for count in {1, min(3, num_rows), min(100, num_rows), num_rows}:
            assert tree.first(written, count).tolist() == oldest_by_sorting(written, count)
        rows = torch.randint(num_rows, (1 + step,), generator=rng)  # some of them twice
        written[rows] = torch.randint(0, 2 + step, (num_rows,), generator=rng)[rows]
        tree.update(written, rows)


def test_a_tree_that_is_not_told_of_a_change_is_wrong():
    written = torch.arange(5000)
    tree = OldestRows(written)
    written[3000] = -1
    assert tree.first(written, 1).tolist() != oldest_by_sorting(written, 1)
    tree.update(written, torch.tensor([3000]))
    assert tree.first(written, 1).tolist() == oldest_by_sorting(written, 1)


@pytest.mark.parametrize("num_rows", [1, 7, 100, 3000])
def test_ids_are_found_in_their_rows(num_rows: int):
    """A table that follows changes, one that is built anew, and a search through all rows."""
    rng = torch.Generator().manual_seed(num_rows)
    ids = torch.full((num_rows,), -1)
    table = RowsOfIds(ids)
    for _ in range(60):
        rows = torch.randperm(num_rows, generator=rng)[: max(num_rows // 3, 1)]
        new = torch.randint(-1, 2 * num_rows, (len(rows),), generator=rng)
        is_other = ~torch.isin(new, ids) | (new < 0)  # no id in two rows
        kept = is_other & is_last_of_equal(new, new >= 0) | (new < 0)
        rows, new = rows[kept], new[kept]
        twice = torch.cat([rows, rows[:2]])
        table.move(twice, ids[twice], torch.cat([new, new[:2]]))
        ids[rows] = new
        wanted = torch.arange(-2, 2 * num_rows)
        known = {value: row for row, value in enumerate(ids.tolist()) if value >= 0}
        expected = [known.get(value, -1) for value in wanted.tolist()]
        assert table.find(ids, wanted).tolist() == expected
        assert RowsOfIds(ids).find(ids, wanted).tolist() == expected
    assert int((table.slots >= 0).sum()) == int((ids >= 0).sum())  # nothing is left behind


@pytest.mark.parametrize("step", [1, 2, 64, 1 << 20, 1 << 40])
def test_regular_ids_fill_the_buckets_evenly(step: int):
    """Of 2^16 ids, 16 per bucket in the mean; were they random, the fullest of 4,096 buckets would have some 35."""
    table = RowsOfIds(torch.arange(2**16) * step % (2**62))
    fullest = (table.slots[:-1].view(table.num_buckets, -1) >= 0).sum(dim=1).amax()
    assert int(fullest) <= 48
    assert int((table.slots >= 0).sum()) == 2**16


def test_a_bucket_that_is_full_loses_the_rest_and_no_more():
    ids = torch.arange(200)
    table = RowsOfIds(ids)
    object.__setattr__(table, "_bucket", lambda values: torch.zeros_like(values))  # all ids in one bucket
    table.slots.fill_(-1)
    table.move(ids, torch.full((200,), -1), ids)
    found = table.find(ids, ids)
    assert int((found >= 0).sum()) == 64
    assert bool(((found == ids) | (found < 0)).all())


@pytest.mark.parametrize("with_ids", [False, True])
def test_an_update_touches_nothing_of_the_size_of_the_cache(with_ids: bool):
    """The operations of an update, and the largest tensor that they make, do not depend on the number of rows."""
    seen = []
    for num_rows in (2**13, 2**17):
        manager = CacheManager({"x": FixedLenFeature([4], torch.float32)}, num_rows)
        cache = manager.init_cache()

        def update(start: int, manager=manager, cache=cache) -> None:
            ids = torch.arange(start, start + 8)
            manager.update_cache_(
                cache,
                new_items={"x": torch.ones(8, 4)},
                document_ids=ids if with_ids else None,
                updated_item_data={"x": torch.zeros(8, 4)},
                updated_item_indices=torch.arange(8),
            )

        update(0)
        with Recorder() as recorder:
            update(4)
        seen.append((recorder.num_ops, recorder.largest))
    assert seen[0][1] == seen[1][1] <= 64 * 64
    assert seen[1][0] - seen[0][0] <= 25  # one level more of the tree
    many = CacheManager({"x": FixedLenFeature([4], torch.float32)}, 2**13)
    cache = many.init_cache()
    with Recorder() as few_items:
        many.update_cache_(cache, new_items={"x": torch.ones(2, 4)})
    with Recorder() as many_items:
        many.update_cache_(cache, new_items={"x": torch.ones(512, 4)})
    assert abs(many_items.num_ops - few_items.num_ops) <= 5
