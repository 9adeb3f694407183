"""Which rows are the oldest, which row holds a document, and which of several values are equal.

Plain tensor operations whose shapes do not depend on values, so that a GPU never waits. What is kept follows from what
the cache stores, and is rebuilt from it when a state is loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ROWS_AT_ONCE = 2**18  # on a CPU, 24 bytes for each are needed to find the oldest ones

# With so many documents per bucket in the mean, a bucket that overflows is not to be expected in the life of a cache
# (for random buckets, a chance of 1e-17); a document that finds no place in its bucket may be lost.
_MEAN_LOAD, _BUCKET = 16, 64


def oldest_rows(written: Tensor, count: int) -> Tensor:
    """The rows with the lowest `written [num_rows]`, those first; of equal ones the lowest row: int64 `[count]`."""
    num_rows, lowest = len(written), [written[:0]]
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        times = written[start : start + _ROWS_AT_ONCE]
        keys = torch.arange(start, start + len(times), device=written.device).add_(times, alpha=num_rows)
        lowest.append(keys.topk(min(count, len(keys)), largest=False).values)
    candidates = torch.cat(lowest)
    return candidates.topk(min(count, num_rows), largest=False).values % max(num_rows, 1)


class RowsOfIds(nn.Module):
    """Finds the rows of ids, by a hash table with buckets of rows.

    Args:
        ids: int64 `[num_rows]`: the id of each row, negative for none.

    Attributes:
        slots: int32 `[num_buckets + 1, slots]`: the rows in each bucket, -1 for a free slot. Rows that do not fit share
            the last slot of their bucket; nobody looks into the last bucket, which takes what has no id.
        places: int64 `[num_rows + 1]`: the slot of each row; the last element takes what is not to be written.
    """

    slots: Tensor
    places: Tensor

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        self.num_buckets = max(len(ids) // _MEAN_LOAD, 1) | 1  # odd, so that all bits of the hash count
        slots = torch.full((self.num_buckets + 1, _BUCKET + 1), -1, dtype=torch.int32, device=ids.device)
        places = torch.full((len(ids) + 1,), slots.numel() - 1, device=ids.device)
        self.register_buffer("slots", slots, persistent=False)
        self.register_buffer("places", places, persistent=False)
        rows, bucket, rank = self._by_bucket(torch.arange(len(ids), device=ids.device), ids, ids < 0)
        self._put(rows, bucket, rank.clamp(max=_BUCKET))

    def find(self, ids: Tensor, wanted: Tensor) -> Tensor:
        """The row of each of `wanted [n]`, the highest of several: int64 `[n]`, -1 for none or a negative id.

        Args:
            ids: int64 `[num_rows]`.
            wanted: int64 `[n]`.
        """
        members = self.slots[self._bucket(wanted)].long()
        # A free slot reads the id of the last row, which makes no difference: -1 it is either way.
        return members.masked_fill_(ids[members] != wanted[:, None], -1).amax(dim=1)

    def move(self, rows: Tensor, ids: Tensor, is_repeated: Tensor | None = None) -> None:
        """Take in that `rows [n]` get other `ids [n]`.

        Args:
            rows: int64 `[n]`.
            ids: int64 `[n]`, negative for none.
            is_repeated: bool `[n]`: True for all but one of the entries with the same row; None if no row occurs twice.
        """
        self.slots.view(-1).index_fill_(0, self.places[rows], -1)
        self.places.index_fill_(0, rows, self.slots.numel() - 1)
        is_skipped = ids < 0 if is_repeated is None else (ids < 0) | is_repeated
        rows, bucket, rank = self._by_bucket(rows, ids, is_skipped)
        num_free = (self.slots[bucket, :_BUCKET] < 0).cumsum(dim=1)
        column = torch.searchsorted(num_free, rank[:, None] + 1)  # of the first free slot, the second, ...
        self._put(rows, bucket, column.squeeze(1))

    def _by_bucket(self, rows: Tensor, ids: Tensor, is_skipped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows in the order of their buckets, the buckets, and how many rows before each one have its bucket."""
        bucket = self._bucket(ids).masked_fill_(is_skipped, self.num_buckets)
        bucket, order = bucket.sort(stable=True)
        rank = torch.arange(len(rows), device=rows.device) - torch.searchsorted(bucket, bucket)
        return rows.masked_fill(is_skipped, len(self.places) - 1)[order], bucket, rank

    def _put(self, rows: Tensor, bucket: Tensor, column: Tensor) -> None:
        place = bucket * (_BUCKET + 1) + column
        self.slots.view(-1)[place] = rows.to(torch.int32)
        self.places[rows] = place

    def _bucket(self, ids: Tensor) -> Tensor:
        """int64 `[n]`: a number that looks random but is the same for the same id."""
        mixed = ids * -7046029254386353131
        return ((mixed ^ (mixed >> 32)) * -4658895280553007687) % self.num_buckets


def is_last_of_equal(values: Tensor, mask: Tensor) -> Tensor:
    """The last of equal `values [n]` (at least -1), of those where `mask [n]` is True: bool `[n]`."""
    return _is_end_of_equal(values, mask, is_last=True)


def is_first_of_equal(values: Tensor, mask: Tensor) -> Tensor:
    """The first of equal `values [n]` (at least -1), of those where `mask [n]` is True: bool `[n]`."""
    return _is_end_of_equal(values, mask, is_last=False)


def _is_end_of_equal(values: Tensor, mask: Tensor, is_last: bool) -> Tensor:
    values = values.masked_fill(~mask, -2)
    ordered, order = values.sort(stable=True)
    end = order[torch.searchsorted(ordered, values, right=is_last) - int(is_last)]
    return (end == torch.arange(len(values), device=values.device)) & mask


def is_in_row(values: Tensor, sets: Tensor) -> Tensor:
    """Which of `values [n]` are in each row of `sets [batch, m]`: bool `[batch, n]`."""
    found = torch.zeros(len(sets), len(values), dtype=torch.bool, device=values.device)
    for column in sets.T:  # one after the other: all at once would take m times the memory
        found |= column[:, None] == values
    return found
