"""Lookups: the row of a document id, the oldest rows, and the first or last of equal values.

All are tensor operations whose shapes do not depend on values, so they do not synchronize the device.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ROWS_AT_ONCE = 2**18  # `oldest_rows` uses 24 bytes for each of these rows on a CPU

# Ids that do not fit into their bucket may not be found. With a mean of 16 ids per bucket and 64 slots, a random bucket
# overflows with a probability below 1e-17, so this is not expected in the lifetime of a cache.
_MEAN_LOAD, _BUCKET = 16, 64


def oldest_rows(written: Tensor, count: int) -> Tensor:
    """The rows with the lowest `written [num_rows]`, in ascending order, ties in row order: int64 `[count]`."""
    num_rows, lowest = len(written), [written[:0]]
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        times = written[start : start + _ROWS_AT_ONCE]
        # The keys time * num_rows + row are unique, sort by time and then by row, and yield the row as a remainder.
        keys = torch.arange(start, start + len(times), device=written.device).add_(times, alpha=num_rows)
        lowest.append(keys.topk(min(count, len(keys)), largest=False).values)
    candidates = torch.cat(lowest)
    return candidates.topk(min(count, num_rows), largest=False).values % max(num_rows, 1)


class RowsOfIds(nn.Module):
    """Finds the rows of ids with a hash table of rows.

    The table is derived from the ids of the rows, so it is not saved, and is rebuilt after a state is loaded.

    Args:
        ids: int64 `[num_rows]`: the id of each row, negative for none.

    Attributes:
        slots: int32 `[num_buckets + 1, slots]`: the rows in each bucket, -1 for a free slot. Rows that do not fit share
            the last slot of their bucket. The last bucket is never read: rows without an id are written there.
        places: int64 `[num_rows + 1]`: the index of each row in the flattened `slots`. The last element takes the
            writes of skipped entries.
    """

    slots: Tensor
    places: Tensor

    @torch.inference_mode(False)  # an evaluation may build the table, and a later step changes it in place
    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        self.num_buckets = max(len(ids) // _MEAN_LOAD, 1) | 1  # odd, so that all bits of the hash matter
        slots = torch.full((self.num_buckets + 1, _BUCKET + 1), -1, dtype=torch.int32, device=ids.device)
        places = torch.full((len(ids) + 1,), slots.numel() - 1, device=ids.device)
        self.register_buffer("slots", slots, persistent=False)
        self.register_buffer("places", places, persistent=False)
        if ids.is_meta:  # has no values; these operations would import torch's compiler, which takes a second
            return
        rows, bucket, rank = self._by_bucket(torch.arange(len(ids), device=ids.device), ids, ids < 0)
        self._put(rows, bucket, rank.clamp(max=_BUCKET))

    def find(self, ids: Tensor, wanted: Tensor) -> Tensor:
        """The row of each of `wanted [n]`, the highest if there are several: int64 `[n]`, -1 for none or a negative id.

        Args:
            ids: int64 `[num_rows]`: the id of each row.
            wanted: int64 `[n]`.
        """
        members = self.slots[self._bucket(wanted)].long()
        # A free slot (-1) reads the id of the last row. The result is -1 whether or not that id is the wanted one.
        return members.masked_fill_(ids[members] != wanted[:, None], -1).amax(dim=1)

    def move(self, rows: Tensor, ids: Tensor, is_repeated: Tensor | None = None) -> None:
        """Register the new `ids [n]` of `rows [n]`.

        Args:
            rows: int64 `[n]`.
            ids: int64 `[n]`, negative for none.
            is_repeated: bool `[n]`: True for all but one of the entries of a row; None if no row occurs twice.
        """
        self.slots.view(-1).index_fill_(0, self.places[rows], -1)
        self.places.index_fill_(0, rows, self.slots.numel() - 1)
        is_skipped = ids < 0 if is_repeated is None else (ids < 0) | is_repeated
        rows, bucket, rank = self._by_bucket(rows, ids, is_skipped)
        # The k-th new row of a bucket takes its k-th free slot, where the running count of free slots reaches k. If
        # there are fewer than k, the search returns `_BUCKET`, the shared slot.
        num_free = (self.slots[bucket, :_BUCKET] < 0).cumsum(dim=1)
        column = torch.searchsorted(num_free, rank[:, None] + 1)
        self._put(rows, bucket, column.squeeze(1))

    def _by_bucket(self, rows: Tensor, ids: Tensor, is_skipped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows sorted by bucket, their buckets, and the number of earlier rows in the same bucket."""
        bucket = self._bucket(ids).masked_fill_(is_skipped, self.num_buckets)
        bucket, order = bucket.sort(stable=True)
        rank = torch.arange(len(rows), device=rows.device) - torch.searchsorted(bucket, bucket)
        return rows.masked_fill(is_skipped, len(self.places) - 1)[order], bucket, rank

    def _put(self, rows: Tensor, bucket: Tensor, column: Tensor) -> None:
        place = bucket * (_BUCKET + 1) + column
        self.slots.view(-1)[place] = rows.to(torch.int32)
        self.places[rows] = place

    def _bucket(self, ids: Tensor) -> Tensor:
        """The bucket of each id by a multiplicative hash, which spreads regular ids evenly: int64 `[n]`."""
        mixed = ids * -7046029254386353131
        return ((mixed ^ (mixed >> 32)) * -4658895280553007687) % self.num_buckets


def is_last_of_equal(values: Tensor, mask: Tensor) -> Tensor:
    """Whether each of `values [n]` (at least -1) is the last with its value where `mask [n]` is True: bool `[n]`."""
    return _is_end_of_equal(values, mask, is_last=True)


def is_first_of_equal(values: Tensor, mask: Tensor) -> Tensor:
    """Whether each of `values [n]` (at least -1) is the first with its value where `mask [n]` is True: bool `[n]`."""
    return _is_end_of_equal(values, mask, is_last=False)


def _is_end_of_equal(values: Tensor, mask: Tensor, is_last: bool) -> Tensor:
    values = values.masked_fill(~mask, -2)
    # A stable sort keeps equal values in order, so the two ends of a run are its first and its last entry.
    ordered, order = values.sort(stable=True)
    end = order[torch.searchsorted(ordered, values, right=is_last) - int(is_last)]
    return (end == torch.arange(len(values), device=values.device)) & mask


def is_in_row(values: Tensor, sets: Tensor) -> Tensor:
    """Which of `values [n]` are in each row of `sets [batch, m]`: bool `[batch, n]`."""
    found = torch.zeros(len(sets), len(values), dtype=torch.bool, device=values.device)
    for column in sets.T:  # a comparison with all columns at once would take m times the memory
        found |= column[:, None] == values
    return found
