"""Columns: fixed-size, quantized or ragged storage of one feature, and functions that access several columns."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from negative_cache.cache.device_copies import bring, zeros
from negative_cache.cache.specs import (
    FeatureSpec,
    FixedLenFeature,
    QuantizedFeature,
    RaggedFeature,
    Specs,
    padding_value,
)
from negative_cache.cache.validation import Items, RaggedRows, pad_rows, reads_without_sync

if TYPE_CHECKING:
    from typing_extensions import Self

# A ragged column copies this many rows at a time when it copies all of them.
_ROWS_AT_ONCE = 8192

# A full arena is rewritten with this size relative to the values in use. A rewrite copies the arena once, and happens
# only after a fixed share of the arena has been written.
ROOM = 1.5


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round each item to 255 levels between plus and minus its largest absolute value.

    Args:
        values: `[n, *shape]`, floating point.

    Returns:
        int8 `[n, *shape]` and float32 scales `[n]`; an item is approximately its int8 values times its scale.
    """
    flat = values.detach().float().reshape(len(values), -1)
    scales = flat.abs().amax(dim=1, keepdim=True) / 127
    steps = flat / torch.where(scales > 0, scales, 1)
    return steps.round_().to(torch.int8).view(values.shape), scales.squeeze(1)


def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """The inverse of `quantize`, up to rounding: float32 `[n, *shape]`."""
    return values.float() * scales.view(-1, *[1] * (values.dim() - 1))


def put(target: Tensor, rows: Tensor, values: Tensor, is_any: Tensor | None) -> None:
    """Write `values [n, ...]` to `rows [n]` of a tensor in place, unless the bool scalar `is_any` is False."""
    target[rows] = values if is_any is None else torch.where(is_any, values, target[rows])


def copy_saved(module: nn.Module, destination: dict[str, Any], prefix: str) -> None:
    """Replace the module's own tensors in a state dict by copies, which later steps do not change."""
    for name in (*module._parameters, *module._buffers):
        saved = destination.get(prefix + name)
        if saved is not None:
            destination[prefix + name] = saved.clone()


class Rows(nn.Module):
    """Buffers of rows. They can be moved, unless they have a `pinned_device`; their dtypes do not change."""

    pinned_device: torch.device | None = None

    def reset_parameters(self) -> None:
        """Set all values to zero; `to_empty` and FSDP's deferred initialization call this."""
        for buffer in self.buffers(recurse=False):
            buffer.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        marker = torch.full([1], time.time_ns(), device=next(self.buffers()).device)
        for child in self.children() if recurse else ():
            child._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(partial(self._moved, fn), recurse=False)  # type: ignore[no-untyped-call]
        moved = fn(marker)
        if moved.is_meta or type(moved) is not Tensor:  # a fake tensor has no values either
            return self
        if not marker.is_meta and torch.equal(moved.cpu(), marker.cpu().to(moved.dtype)):
            return self
        self.reset_parameters()  # after `to_empty`: uninitialized memory does not contain the present time
        return self

    def _moved(self, fn: Callable[[Tensor], Tensor], stored: Tensor) -> Tensor:
        """A buffer after `fn`, the function that `.to()`, `.half()` or a similar method applies to each tensor."""
        probe = fn(stored.new_empty(0))
        if self.pinned_device is not None and probe.device != stored.device:
            return stored
        if probe.dtype == stored.dtype:
            return fn(stored)
        warnings.warn(
            "`.half()`, `.to(dtype)` and similar methods move a cache, but do not change the dtypes in which it stores "
            "values. To store other dtypes, create it with another `embedding_dtype` or other `specs`.",
            stacklevel=2,
        )
        return stored.to(probe.device)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            copy_saved(self, destination, prefix)


class _Column(Rows):
    """Buffers of one feature. With a `pinned_device`, they stay there when the owning module is moved."""

    storage: ClassVar[str] = "values"  # name of the buffer with the values

    def __init__(self, pinned_device: torch.device | None) -> None:
        super().__init__()
        self.pinned_device = pinned_device

    @property
    def device(self) -> torch.device:
        """Device of the column."""
        stored: Tensor = getattr(self, self.storage)
        return stored.device

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the column. Page-locked values stay page-locked, which a deep copy of the tensor would not ensure."""
        stored: Tensor = getattr(self, self.storage)
        if stored.is_pinned():
            memo[id(stored)] = torch.empty_like(stored, pin_memory=True).copy_(stored)
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__setstate__(copy.deepcopy(self.__dict__, memo))  # type: ignore[no-untyped-call]
        return other


class FixedColumn(_Column):
    """A tensor `[num_rows, *shape]`."""

    values: Tensor

    def __init__(
        self, values: Tensor, pinned_device: torch.device | None = None, default_value: float | None = None
    ) -> None:
        super().__init__(pinned_device)
        self.default_value = default_value
        self.register_buffer("values", values.detach())

    @property
    def spec(self) -> FixedLenFeature:
        """The spec, with the dtype in which values are stored."""
        return FixedLenFeature(list(self.values.shape[1:]), self.values.dtype, self.default_value)

    def read(self, rows: Tensor) -> Tensor:
        """The values of `rows [n]`: `[n, *shape]`."""
        return self.values[rows.to(self.device)]

    def write(self, rows: Tensor, values: Tensor, is_any: Tensor | None = None) -> None:
        """Write `values [n, *shape]` to `rows [n]`; see `write_columns`."""
        put(self.values, rows.to(self.device), values.to(self.device, self.values.dtype), is_any)

    def dense(self) -> Tensor:
        """All rows, `[num_rows, *shape]`; the storage itself, not a copy."""
        return self.values


class QuantizedColumn(_Column):
    """Floating point values as int8 `[num_rows, *shape]`, with a float32 scale per row."""

    values: Tensor
    scales: Tensor

    def __init__(
        self, spec: QuantizedFeature, num_rows: int, device: torch.device, pinned_device: torch.device | None = None
    ) -> None:
        super().__init__(pinned_device)
        self.spec = spec
        self.register_buffer("values", torch.zeros([num_rows, *spec.shape], dtype=torch.int8, device=device))
        self.register_buffer("scales", torch.zeros(num_rows, dtype=torch.float32, device=device))

    def read(self, rows: Tensor) -> Tensor:
        """The values of `rows [n]`: float32 `[n, *shape]`."""
        rows = rows.to(self.device)
        return dequantize(self.values[rows], self.scales[rows])

    def write(self, rows: Tensor, values: Tensor, is_any: Tensor | None = None) -> None:
        """Write `values [n, *shape]` to `rows [n]`; see `write_columns`."""
        rows = rows.to(self.device)
        quantized, scales = quantize(values.to(self.device))
        put(self.values, rows, quantized, is_any)
        put(self.scales, rows, scales, is_any)

    def dense(self) -> Tensor:
        """All rows, float32 `[num_rows, *shape]`; a copy."""
        return dequantize(self.values, self.scales)


class RaggedColumn(_Column):
    """Sequences of varying length in one arena.

    Row r is `arena[offsets[r] : offsets[r] + lengths[r]]`. New items are appended to the arena, and the values that
    they replace remain as garbage. A full arena is compacted: the values in use are copied to a new arena with free
    space. If `max_length` values for every row take no more memory than that, the new arena has one slot per row
    instead: items are written to the slot of their row, and the arena is never compacted again.
    """

    storage: ClassVar[str] = "arena"

    arena: Tensor
    offsets: Tensor
    lengths: Tensor
    pads_left: Tensor

    def __init__(
        self, spec: RaggedFeature, num_rows: int, device: torch.device, pinned_device: torch.device | None = None
    ) -> None:
        super().__init__(pinned_device)
        home = device if pinned_device is None else pinned_device
        self.spec = spec
        self.tail = 0
        self.register_buffer("arena", torch.empty(0, dtype=spec.dtype, device=home))
        self.register_buffer("offsets", torch.zeros(num_rows, dtype=torch.int64, device=home))
        self.register_buffer("lengths", torch.zeros(num_rows, dtype=torch.int64, device=home))
        # On the device of the cache even if the column is pinned: the batches that set it are there, and so are the
        # rows that are read.
        self.register_buffer("pads_left", torch.full((), spec.padding_side == "left", device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.pads_left
        super()._apply(fn, recurse)
        if self.pads_left is before:  # the column is pinned, but this value moves with the cache
            self.pads_left = fn(before)
        return self

    def note_side(self, pads_left: Tensor | bool) -> None:
        """Pad on the left from now on if `pads_left` is True; does not synchronize a device."""
        if isinstance(pads_left, Tensor) and not reads_without_sync(pads_left):
            self.pads_left |= pads_left.to(self.pads_left.device)
        elif bool(pads_left):
            self.pads_left.fill_(True)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.pads_left.fill_(self.spec.padding_side == "left")
        self.tail = 0

    @property
    def _is_slotted(self) -> bool:
        slot = self.spec.max_length or 0
        return slot > 0 and self.arena.numel() == len(self.offsets) * slot

    def longest(self, rows: Tensor) -> Tensor:
        """The length of the longest sequence in `rows [n]`: int64 scalar."""
        return self.lengths[rows.to(self.device)].amax() if len(rows) else self.lengths.new_zeros(())

    def read(self, rows: Tensor, width: int | None = None) -> RaggedRows:
        """The sequences of `rows [n]`.

        Args:
            rows: int64 `[n]`.
            width: The length of the longest sequence. None reads it from the device, which synchronizes the device.
        """
        rows = rows.to(self.device)
        width = int(self.longest(rows)) if width is None else width
        lengths = self.lengths[rows]
        if width == 0:
            return RaggedRows(self.arena.new_empty(len(rows), 0), lengths, self.pads_left)
        positions = torch.arange(width, device=self.device)
        inside = positions < lengths[:, None]
        # Positions after the end of a sequence may lie outside the arena. They read value 0, which padding replaces.
        at = torch.where(inside, self.offsets[rows][:, None] + positions, 0)
        return RaggedRows(self.arena[at].masked_fill_(~inside, padding_value(self.spec)), lengths, self.pads_left)

    def write(self, rows: Tensor, values: RaggedRows, is_any: Tensor | None = None) -> None:
        """Write `values` to `rows [n]`; see `write_columns`."""
        self.note_side(values.pads_left)
        rows = rows.to(self.device)
        padded, lengths = values.values.to(self.device), values.lengths.to(self.device)
        count, width = padded.shape
        if not self._is_slotted and self.tail + padded.numel() > self.arena.numel():
            self._compact(padded.numel())
        # Items are written with their padding, because reading their total length would synchronize the device.
        # Compaction removes the padding.
        if self._is_slotted:
            assert self.spec.max_length is not None
            offsets = rows * self.spec.max_length
            put(self.arena, offsets[:, None] + torch.arange(width, device=self.device), padded, is_any)
        else:
            offsets = self.tail + width * torch.arange(count, device=self.device)
            self.arena[self.tail : self.tail + padded.numel()] = padded.flatten()
            self.tail += padded.numel()
        put(self.offsets, rows, offsets, is_any)
        put(self.lengths, rows, lengths, is_any)

    def dense(self) -> Tensor:
        """All rows, padded to the longest one; a copy `[num_rows, longest]`."""
        return pad_rows(self.read(torch.arange(len(self.offsets), device=self.device)))

    @torch.inference_mode(False)  # a later step changes the new arena in place
    def _compact(self, incoming: int) -> None:
        """Copy the values in use to a new arena with room for `incoming` more values."""
        alive, starts = self._alive()
        size = int(ROOM * (len(alive) + incoming)) + incoming
        slot = self.spec.max_length or 0
        if 0 < len(starts) * slot <= size:
            arena = self.arena.new_zeros(len(starts) * slot)
            slots = torch.arange(len(starts), device=self.device) * slot
            _move(alive, starts, arena, slots, self.lengths)
            starts = slots
        else:
            arena = torch.cat([alive, self.arena.new_zeros(size - len(alive))])
        self.arena, self.offsets, self.tail = arena, starts, len(alive)

    def _alive(self) -> tuple[Tensor, Tensor]:
        """The values of all rows in row order without gaps, and the offset of each row in them."""
        starts = self.lengths.cumsum(0) - self.lengths
        alive = self.arena.new_empty(int(self.lengths.sum()))
        for rows in torch.split(torch.arange(len(starts), device=self.device), _ROWS_AT_ONCE):
            _move(self.arena, self.offsets[rows], alive, starts[rows], self.lengths[rows])
        return alive, starts

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Values are saved in row order without gaps, so that equal rows have equal states whatever their history.
        destination[prefix + "arena"], destination[prefix + "offsets"] = self._alive()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        arena = state_dict.get(prefix + "arena")
        if isinstance(arena, Tensor):  # a saved arena may have any size
            with torch.inference_mode(False):
                self.arena = torch.empty_like(arena, device=self.device)
            self.tail = arena.numel()
        state_dict.setdefault(prefix + "pads_left", self.pads_left.clone())  # earlier versions saved none
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.spec.padding_side == "left":  # set by the user, perhaps after the state was saved
            self.pads_left.fill_(True)


def _move(source: Tensor, source_offsets: Tensor, target: Tensor, target_offsets: Tensor, lengths: Tensor) -> None:
    """Copy `n` sequences of `lengths [n]` from their offsets in one arena to their offsets in another."""
    # With all sequences concatenated, value i is value i - starts[row] of its row.
    inside = torch.arange(int(lengths.sum()), device=lengths.device)
    starts = lengths.cumsum(0) - lengths
    places = [
        torch.repeat_interleave(offsets - starts, lengths) + inside for offsets in (source_offsets, target_offsets)
    ]
    target[places[1]] = source[places[0]]


Column = FixedColumn | QuantizedColumn | RaggedColumn


def make_column(
    spec: FeatureSpec, num_rows: int, device: torch.device, pinned_device: torch.device | None = None
) -> Column:
    """An empty column for `num_rows` values of `spec`; fixed features start as zeros.

    Args:
        spec: The feature.
        num_rows: Number of rows.
        device: Device of the cache.
        pinned_device: Device on which the column stays when the cache is moved; None to move it with the cache.
    """
    if isinstance(spec, RaggedFeature):
        return RaggedColumn(spec, num_rows, device, pinned_device)
    home = device if pinned_device is None else pinned_device
    if isinstance(spec, QuantizedFeature):
        return QuantizedColumn(spec, num_rows, home, pinned_device)
    values = zeros([num_rows, *spec.shape], spec.dtype, home, reader=device)
    return FixedColumn(values, pinned_device, spec.default_value)


def make_columns(
    specs: Specs,
    num_rows: int,
    device: torch.device,
    scored_keys: Sequence[str] = (),
    feature_device: torch.device | str | None = None,
) -> dict[str, Column]:
    """Empty columns on `device`, or if not in `scored_keys`, permanently on `feature_device` if it is given."""
    pinned = None if feature_device is None else torch.device(feature_device)
    return {
        key: make_column(spec, num_rows, device, None if key in scored_keys else pinned) for key, spec in specs.items()
    }


def read_columns(columns: Mapping[str, Column], rows: Tensor, keys: Sequence[str]) -> dict[str, Tensor | RaggedRows]:
    """Read `rows [n]` of some columns, each on its own device, in the form that `write_columns` accepts.

    This synchronizes each device with ragged columns once, to read the length of the longest sequence.
    """
    rows_on: dict[torch.device, Tensor] = {}
    longest: dict[torch.device, dict[str, Tensor]] = {}
    for key in keys:
        column = columns[key]
        device = column.device
        if device not in rows_on:
            rows_on[device] = rows.to(device)
        if isinstance(column, RaggedColumn):
            longest.setdefault(device, {})[key] = column.longest(rows_on[device])
    widths: dict[str, int] = {}
    for lengths in longest.values():
        widths.update(zip(lengths, torch.stack(list(lengths.values())).tolist(), strict=True))
    result: dict[str, Tensor | RaggedRows] = {}
    for key in keys:
        column = columns[key]
        here = rows_on[column.device]
        result[key] = column.read(here, widths[key]) if isinstance(column, RaggedColumn) else column.read(here)
    return result


def write_columns(columns: Mapping[str, Column], rows: Tensor, items: Items, is_any: Tensor | None) -> None:
    """Write items to `rows [n]` of their columns; synchronizes the rows' device once if a column is in host memory.

    Args:
        columns: Column per feature.
        rows: int64 `[n]`. A row that occurs several times must get equal values.
        items: Validated values, `n` each.
        is_any: bool scalar on the rows' device. If it is False, nothing is written; None means True.
    """
    elsewhere: dict[torch.device, dict[str, Tensor | RaggedRows]] = {}
    for key, value in items.items():
        column: Any = columns[key]
        if column.device == rows.device:
            column.write(rows, value, is_any)
        else:
            elsewhere.setdefault(column.device, {})[key] = value
    for device, values in elsewhere.items():
        _write_on(device, columns, rows, values, is_any)


def _write_on(
    device: torch.device, columns: Mapping[str, Column], rows: Tensor, items: Items, is_any: Tensor | None
) -> None:
    """`write_columns` for the columns on another device; all tensors are copied there together."""
    parts = [part for value in items.values() for part in (value[:2] if isinstance(value, RaggedRows) else [value])]
    flags = [] if is_any is None else [is_any]
    arrived = iter(bring([rows, *flags, *parts], device))
    rows = next(arrived)
    if flags and not bool(next(arrived)):
        return
    for key, value in items.items():
        column: Any = columns[key]
        if isinstance(value, RaggedRows):
            column.write(rows, RaggedRows(next(arrived), next(arrived), value.pads_left))
        else:
            column.write(rows, next(arrived))
