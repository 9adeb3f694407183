"""Which rows are the oldest, and which row holds a document, without looking at all rows.

Both are made of plain tensor operations whose shapes depend on the number of items asked for alone, so that a GPU never
waits. They follow from what the cache stores, and are rebuilt from it when a state is loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_FANOUT = 64
_LAST = 2**62  # later than all others, and exact as a float, by way of which torch pads

# With so many documents per bucket in the mean, a bucket that overflows is not to be expected in the life of a cache
# (for random buckets, a chance of 1e-17); a document that finds no place in its bucket would not be found.
_MEAN_LOAD, _BUCKET = 16, 64


class OldestRows(nn.Module):
    """The lowest of `written` and their rows, by a tree of minima.

    Each node of the tree has the lowest key of 64 nodes below it; the key of a row is its time and then its number. The
    n lowest keys lie below the n nodes that have the lowest ones, on each level.

    Args:
        written: int64 `[num_rows]`: when each row was written.
    """

    def __init__(self, written: Tensor) -> None:
        super().__init__()
        self.num_rows = len(written)
        self.num_levels = 0
        keys = self._keys(written, torch.arange(self.num_rows, device=written.device))
        while len(keys) > _FANOUT:
            missing = -len(keys) % _FANOUT
            keys = torch.nn.functional.pad(keys, (0, missing), value=_LAST).view(-1, _FANOUT).amin(dim=1)
            self.register_buffer(f"level_{self.num_levels}", keys, persistent=False)
            self.num_levels += 1

    def update(self, written: Tensor, rows: Tensor) -> None:
        """Take in that `written` has changed at `rows [n]`; a row may occur several times."""
        for level in range(self.num_levels):
            rows = rows // _FANOUT
            keys, _ = self._children(written, level, rows)
            self._level(level)[rows] = keys.amin(dim=1)

    def first(self, written: Tensor, count: int) -> Tensor:
        """The `count` rows with the lowest `written`, those first; of equal ones the lowest row: int64 `[count]`."""
        nodes = torch.arange(self._size(self.num_levels), device=written.device)
        keys = self._keys_of(written, self.num_levels, nodes)
        for level in range(self.num_levels, 0, -1):
            if len(nodes) > count:
                nodes = nodes[keys.topk(count, largest=False, sorted=False).indices]
            keys, nodes = (values.flatten() for values in self._children(written, level - 1, nodes))
        return nodes[keys.topk(count, largest=False).indices]

    def _level(self, level: int) -> Tensor:
        """The keys of the nodes that are `level + 1` steps above the rows."""
        return self.get_buffer(f"level_{level}")

    def _size(self, height: int) -> int:
        return self.num_rows if height == 0 else len(self._level(height - 1))

    def _children(self, written: Tensor, height: int, parents: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and numbers of the nodes at `height` below `parents [n]`: `[n, 64]` each."""
        nodes = parents[:, None] * _FANOUT + torch.arange(_FANOUT, device=parents.device)
        size = self._size(height)
        keys = self._keys_of(written, height, nodes.clamp(max=size - 1))
        return torch.where(nodes < size, keys, _LAST), nodes

    def _keys_of(self, written: Tensor, height: int, nodes: Tensor) -> Tensor:
        return self._keys(written[nodes], nodes) if height == 0 else self._level(height - 1)[nodes]

    def _keys(self, written: Tensor, rows: Tensor) -> Tensor:
        return written * self.num_rows + rows


class RowsOfIds(nn.Module):
    """Finds the rows of ids, by a hash table with buckets of rows.

    Args:
        ids: int64 `[num_rows]`: the id of each row, negative for none.
    """

    slots: Tensor

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        self.num_buckets = max(len(ids) // _MEAN_LOAD, 1)
        rows, bucket = torch.arange(len(ids), device=ids.device), self._bucket(ids)
        rank = _ranks(torch.where(ids >= 0, bucket, self.num_buckets))
        # One slot more than the buckets have: what has no place is written there.
        slots = torch.full((self.num_buckets * _BUCKET + 1,), -1, dtype=torch.int32, device=ids.device)
        slots[torch.where((ids >= 0) & (rank < _BUCKET), bucket * _BUCKET + rank, -1)] = rows.to(torch.int32)
        slots[-1] = -1
        self.register_buffer("slots", slots, persistent=False)

    def find(self, ids: Tensor, wanted: Tensor) -> Tensor:
        """The row of each of `wanted [n]`, the highest of several: int64 `[n]`, -1 for none or a negative id.

        Args:
            ids: int64 `[num_rows]`.
            wanted: int64 `[n]`.
        """
        members = self._members(self._bucket(wanted))
        is_match = (members >= 0) & (ids[members.clamp(min=0)] == wanted[:, None]) & (wanted >= 0)[:, None]
        return torch.where(is_match, members, -1).amax(dim=1)

    def move(self, rows: Tensor, old: Tensor, new: Tensor) -> None:
        """Take in that `rows [n]` get the ids `new [n]` in place of `old [n]`.

        A row may occur several times, with the same ids.
        """
        bucket = self._bucket(old)
        self._write(bucket, (self._members(bucket) == rows[:, None]) & (old >= 0)[:, None], -1)
        bucket = self._bucket(new)
        counts = is_last_of_equal(rows, new >= 0)
        rank = _ranks(torch.where(counts, bucket, self.num_buckets))
        is_free = self._members(bucket) < 0
        is_next = is_free & (is_free.cumsum(dim=1) == rank[:, None] + 1)
        self._write(bucket, is_next & counts[:, None], rows.to(torch.int32))

    def _members(self, bucket: Tensor) -> Tensor:
        """The rows in each `bucket [n]`, -1 for a free slot: int64 `[n, slots of a bucket]`."""
        return self.slots[:-1].view(-1, _BUCKET)[bucket].long()

    def _write(self, bucket: Tensor, where: Tensor, rows: Tensor | int) -> None:
        """Write to the first true slot of `where [n, slots of a bucket]`, if there is one."""
        slot = bucket * _BUCKET + where.to(torch.uint8).argmax(dim=1)
        self.slots[torch.where(where.any(dim=1), slot, self.num_buckets * _BUCKET)] = rows
        self.slots[-1:].fill_(-1)

    def _bucket(self, ids: Tensor) -> Tensor:
        """int64 `[n]`: a number that looks random but is the same for the same id."""
        mixed = ids * -7046029254386353131  # odd: different ids have different products
        mixed = mixed ^ ((mixed >> 32) & 0xFFFFFFFF)
        return ((mixed * -4658895280553007687) >> 20 & 0x7FFFFFFFFFF) % self.num_buckets


def _ranks(values: Tensor) -> Tensor:
    """How many entries of `values [n]` before each one are equal to it: int64 `[n]`."""
    ordered, order = values.sort(stable=True)
    rank = torch.arange(len(values), device=values.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(rank).scatter_(0, order, rank)


def is_last_of_equal(values: Tensor, valid: Tensor) -> Tensor:
    """bool `[n]`: the valid entries of `values [n]` (-1 or larger) that no valid entry of the same value follows."""
    ordered, order = torch.where(valid, values, -2).sort(stable=True)
    is_last = torch.ones_like(valid)
    is_last[:-1] = ordered[1:] != ordered[:-1]
    return torch.empty_like(valid).scatter_(0, order, is_last) & valid


def is_first_of_equal(values: Tensor, mask: Tensor) -> Tensor:
    """Which of `values [n]` are the first of equal ones among those where `mask [n]` is True: bool `[n]`."""
    return is_last_of_equal(values.flip(0), mask.flip(0)).flip(0)


def is_in_row(values: Tensor, sets: Tensor) -> Tensor:
    """Which of `values [n]` are in each row of `sets [batch, m]`: bool `[batch, n]`."""
    found = torch.zeros(len(sets), len(values), dtype=torch.bool, device=values.device)
    for column in sets.T:  # one after the other: all at once would take m times the memory
        found |= column[:, None] == values
    return found
