"""Lookups find what a search through all rows finds."""

from __future__ import annotations

import pytest
import torch

from negative_cache.cache import index as lookup
from negative_cache.cache.index import RowsOfIds, is_first_of_equal, is_last_of_equal, oldest_rows
from negative_cache.cache.rows import NegativeCache
from negative_cache.cache.specs import FixedLenFeature
from negative_cache.cache.update import RowUpdates, update_rows
from support import Recorder


@pytest.mark.parametrize("num_rows", [1, 5, 64, 65, 10_000])
@pytest.mark.parametrize("rows_at_once", [64, 2**18])
def test_the_oldest_rows_are_those_of_a_sort(num_rows: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch):
    """Rows that were never written are equal; a cache made by hand has times below 0."""
    monkeypatch.setattr(lookup, "_ROWS_AT_ONCE", rows_at_once)
    rng = torch.Generator().manual_seed(num_rows)
    for written in (torch.zeros(num_rows, dtype=torch.int64), torch.randint(-3, 3, (num_rows,), generator=rng)):
        for count in {1, min(3, num_rows), min(100, num_rows), num_rows}:
            expected = written.sort(stable=True).indices[:count]
            assert oldest_rows(written, count).tolist() == expected.tolist()


@pytest.mark.parametrize("num_rows", [1, 7, 100, 3000])
def test_ids_are_found_in_their_rows(num_rows: int):
    """A table that follows changes, a rebuilt one and a search through all rows agree."""
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
        is_repeated = torch.arange(len(twice)) >= len(rows)
        table.move(twice, torch.cat([new, new[:2]]), is_repeated)
        ids[rows] = new
        wanted = torch.arange(-2, 2 * num_rows)
        known = {value: row for row, value in enumerate(ids.tolist()) if value >= 0}
        expected = [known.get(value, -1) for value in wanted.tolist()]
        assert table.find(ids, wanted).tolist() == expected
        assert RowsOfIds(ids).find(ids, wanted).tolist() == expected
    assert int((table.slots[:-1] >= 0).sum()) == int((ids >= 0).sum())  # no stale entry is left


@pytest.mark.parametrize("step", [1, 2, 10, 64, 65, 1000, 10**9 + 7, 1 << 20, 1 << 32, (1 << 32) + 1, 1 << 40])
def test_regular_ids_fill_the_buckets_evenly(step: int):
    """2^16 ids are 16 per bucket in the mean; of random ids, the fullest of 4,096 buckets would have about 35."""
    table = RowsOfIds(torch.arange(2**16) * step % (2**62))
    is_taken = table.slots[:-1] >= 0
    assert int(is_taken.sum(dim=1).amax()) <= 48
    assert int(is_taken.sum()) == 2**16


def test_a_full_bucket_loses_only_the_ids_beyond_it():
    ids = torch.arange(200)
    table = RowsOfIds(ids)
    object.__setattr__(table, "_bucket", lambda values: torch.zeros_like(values))  # all ids in one bucket
    for _ in range(2):
        table.move(ids, ids)
        found = table.find(ids, ids)
        assert int((found >= 0).sum()) == 65
        assert bool(((found == ids) | (found < 0)).all())


@pytest.mark.parametrize("count", [0, 1, 50])
def test_first_and_last_of_equal_values(count: int):
    rng = torch.Generator().manual_seed(count)
    values = torch.randint(-1, 10, (count,), generator=rng)
    mask = torch.rand(count, generator=rng) < 0.7
    places = [[i for i in range(count) if mask[i] and values[i] == value] for value in range(-1, 10)]
    first, last = is_first_of_equal(values, mask), is_last_of_equal(values, mask)
    assert first.nonzero().flatten().tolist() == sorted(part[0] for part in places if part)
    assert last.nonzero().flatten().tolist() == sorted(part[-1] for part in places if part)


@pytest.mark.parametrize("with_ids", [False, True])
def test_the_number_of_operations_of_an_update_does_not_depend_on_sizes(with_ids: bool):
    """The largest tensor has one number per row, to find the oldest rows (in large caches, those of one part)."""
    seen = {}
    for num_rows, count in ((2**13, 8), (2**15, 8), (2**13, 512)):
        cache = NegativeCache.empty({"x": FixedLenFeature([4], torch.float32)}, num_rows)

        def update(start: int, cache=cache, count=count) -> None:
            update_rows(
                cache,
                use_lru=True,
                new_items={"x": torch.ones(count, 4)},
                document_ids=torch.arange(start, start + count) if with_ids else None,
                updates=RowUpdates(torch.arange(8), {"x": torch.zeros(8, 4)}),
            )

        update(0)
        with Recorder() as recorder:
            update(4)
        seen[num_rows, count] = recorder
    small, large, many = seen.values()
    assert small.num_ops == large.num_ops == many.num_ops
    assert small.largest == 2**13
    assert large.largest == 2**15


def test_a_cache_without_rows_has_no_oldest_row():
    assert oldest_rows(torch.empty(0, dtype=torch.int64), 3).tolist() == []
