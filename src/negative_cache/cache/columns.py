"""How one feature of all rows is stored: fixed size, or ragged without padding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from negative_cache.cache.mapped_file import MappedFile
from negative_cache.cache.placement import zeros
from negative_cache.cache.specs import (
    FeatureSpec,
    FixedLenFeature,
    QuantizedFeature,
    RaggedFeature,
    RaggedRows,
    dequantize,
    padding_value,
    quantize,
)

if TYPE_CHECKING:
    from typing_extensions import Self

_Module = TypeVar("_Module", bound=nn.Module)

# Rows of a ragged column that are copied at once when all of them are.
_ROWS_AT_ONCE = 8192

# An arena that is full is rewritten with this much room over what is alive, so that a rewrite, which
# costs one copy of the arena, comes only after a fixed share of it has been written.
ROOM = 1.5


class _Column(nn.Module):
    """Buffers that stay on `pinned_device`, where one is given, when the owner is moved.

    The values are in the buffer named `in_file`: with a file, that is in there, and stays.
    """

    in_file: ClassVar[str] = "values"

    def __init__(self, pinned_device: torch.device | None, file: MappedFile | None = None) -> None:
        super().__init__()
        self.pinned_device = pinned_device
        self._file = file

    def _apply(self: _Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Module:
        return self if self.pinned_device is not None else super()._apply(fn, recurse)

    @property
    def device(self) -> torch.device:
        """Where the column is."""
        stored: Tensor = getattr(self, self.in_file)
        return stored.device

    def _expect(self, rows: Tensor) -> Tensor:
        """`rows [n]`, which are about to be read or written."""
        if self._file is not None:
            self._file.expect(rows)
        return rows

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy whose values are where they are here: in page-locked memory, or in a file of its own."""
        stored = self._buffers[self.in_file]
        assert stored is not None
        if self._file is not None:
            file = memo[id(self._file)] = copy.deepcopy(self._file)
            memo[id(stored)] = file.tensor.view_as(stored)
        elif stored.is_pinned():
            memo[id(stored)] = torch.empty_like(stored, pin_memory=True).copy_(stored)
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__setstate__(copy.deepcopy(self.__dict__, memo))  # type: ignore[no-untyped-call]
        return other

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        if self._file is not None:  # what is loaded goes into the file; it does not take its place
            local_metadata = {**local_metadata, "assign_to_params_buffers": False}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if self._file is not None:
            self._file.release()


class FixedColumn(_Column):
    """A tensor `[num_rows, *shape]`."""

    values: Tensor

    def __init__(
        self,
        values: Tensor,
        pinned_device: torch.device | None = None,
        default_value: float | None = None,
        file: MappedFile | None = None,
    ) -> None:
        super().__init__(pinned_device, file)
        self.default_value = default_value
        self.register_buffer("values", values.detach())

    def read(self, rows: Tensor) -> Tensor:
        """The values of `rows [n]`: `[n, *shape]`."""
        return self.values[self._expect(rows.to(self.device))]

    def write(self, rows: Tensor, values: Tensor) -> None:
        """Store `values [n, *shape]` in `rows [n]`. A row that occurs twice must have equal values."""
        self.values[self._expect(rows.to(self.device))] = values.to(self.device, self.values.dtype)

    def dense(self) -> Tensor:
        """All rows, `[num_rows, *shape]`; the storage itself, not a copy."""
        return self.values


class QuantizedColumn(_Column):
    """Floating point values as int8 `[num_rows, *shape]`, with a float32 scale per row."""

    values: Tensor
    scales: Tensor

    def __init__(
        self,
        spec: QuantizedFeature,
        num_rows: int,
        device: torch.device,
        pinned_device: torch.device | None = None,
        file: MappedFile | None = None,
    ) -> None:
        super().__init__(pinned_device, file)
        self.spec = spec
        values = torch.zeros([num_rows, *spec.shape], dtype=torch.int8, device=device) if file is None else file.tensor
        self.register_buffer("values", values)
        self.register_buffer("scales", torch.zeros(num_rows, dtype=torch.float32, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scales = self.scales
        super()._apply(fn, recurse)
        self.scales = scales.to(self.device)  # moved, but float32 whatever the module is cast to
        return self

    def read(self, rows: Tensor) -> Tensor:
        """The values of `rows [n]`: float32 `[n, *shape]`."""
        rows = self._expect(rows.to(self.device))
        return dequantize(self.values[rows], self.scales[rows])

    def write(self, rows: Tensor, values: Tensor) -> None:
        """Store `values [n, *shape]` in `rows [n]`. A row that occurs twice must have equal values."""
        rows = self._expect(rows.to(self.device))
        self.values[rows], self.scales[rows] = quantize(values.to(self.device))

    def dense(self) -> Tensor:
        """All rows, float32 `[num_rows, *shape]`; a copy."""
        return dequantize(self.values, self.scales)


class RaggedColumn(_Column):
    """Sequences of varying length in one arena.

    Row r is `arena[offsets[r] : offsets[r] + lengths[r]]`. New items go to the end of the arena. When
    it is full, what is alive is copied to a new one; the room it then gets is either a share of what is
    alive or, where that is less, a slot of max_length per row, after which nothing moves any more. In a
    file every row has its slot from the start.
    """

    in_file: ClassVar[str] = "arena"

    arena: Tensor
    offsets: Tensor
    lengths: Tensor

    def __init__(
        self,
        spec: RaggedFeature,
        num_rows: int,
        device: torch.device,
        pinned_device: torch.device | None = None,
        file: MappedFile | None = None,
    ) -> None:
        super().__init__(pinned_device, file)
        self.spec = spec
        self.tail = 0
        arena = torch.empty(0, dtype=spec.dtype, device=device) if file is None else file.tensor.view(-1)
        self.register_buffer("arena", arena)
        self.register_buffer("offsets", torch.zeros(num_rows, dtype=torch.int64, device=device))
        self.register_buffer("lengths", torch.zeros(num_rows, dtype=torch.int64, device=device))

    @property
    def _slot(self) -> int:
        return 0 if self.spec.max_length is None else self.spec.max_length

    @property
    def _is_slotted(self) -> bool:
        return self._slot > 0 and self.arena.numel() == len(self.offsets) * self._slot

    def read(self, rows: Tensor) -> Tensor:
        """The sequences of `rows [n]`, padded to the longest of them: `[n, longest]`."""
        return self.read_rows(rows).values

    def longest(self, rows: Tensor) -> Tensor:
        """The length of the longest sequence of `rows [n]`: an int64 scalar."""
        return self.lengths[rows.to(self.device)].amax() if len(rows) else self.lengths.new_zeros(())

    def read_rows(self, rows: Tensor, width: int | None = None) -> RaggedRows:
        """The sequences of `rows [n]` as `write` takes them.

        Args:
            rows: int64 `[n]`.
            width: The longest of them, if that is known; else it is waited for.
        """
        rows = rows.to(self.device)
        width = int(self.longest(rows)) if width is None else width
        lengths = self.lengths[rows]
        if width == 0:
            return RaggedRows(self.arena.new_empty(len(rows), 0), lengths)
        positions = torch.arange(width, device=self.device)
        inside = positions < lengths[:, None]
        at = torch.where(inside, self.offsets[self._expect(rows)][:, None] + positions, 0)
        return RaggedRows(self.arena[at].masked_fill_(~inside, padding_value(self.spec)), lengths)

    def write(self, rows: Tensor, values: RaggedRows, is_any: Tensor | None = None) -> None:
        """Store `values` in `rows [n]`. A row that occurs twice must have equal values.

        Args:
            rows: int64 `[n]`.
            values: Checked values.
            is_any: bool scalar: if False, the rows keep what they have; None for True.
        """
        rows = rows.to(self.device)
        padded, lengths = values.values.to(self.device), values.lengths.to(self.device)
        count, width = padded.shape
        if not self._is_slotted and self.tail + padded.numel() > self.arena.numel():
            self._rewrite(padded.numel())
        if self._is_slotted:
            offsets = self._expect(rows) * self._slot
            at = offsets[:, None] + torch.arange(width, device=self.device)
            self.arena[at] = padded if is_any is None else torch.where(is_any, padded, self.arena[at])
        else:
            offsets = self.tail + width * torch.arange(count, device=self.device)
            self.arena[self.tail : self.tail + padded.numel()] = padded.flatten()
            self.tail += padded.numel()
        for stored, new in ((self.offsets, offsets), (self.lengths, lengths)):
            stored[rows] = new if is_any is None else torch.where(is_any, new, stored[rows])

    def dense(self) -> Tensor:
        """All rows, padded to the longest of them; a copy `[num_rows, longest]`."""
        return self.read(torch.arange(len(self.offsets), device=self.device))

    def _rewrite(self, incoming: int) -> None:
        """Copy what is alive to a new arena with room for `incoming` more values."""
        alive, starts = self._alive()
        size = int(ROOM * (len(alive) + incoming)) + incoming
        slots = len(self.offsets) * self._slot
        if 0 < slots <= size:
            arena = self.arena.new_zeros(slots)
            own = self._own_slots()
            _move(alive, starts, arena, own, self.lengths)
            starts = own
        else:
            arena = torch.cat([alive, self.arena.new_zeros(size - len(alive))])
        self.arena, self.offsets, self.tail = arena, starts, len(alive)

    def _own_slots(self) -> Tensor:
        """Where each row's slot starts."""
        return torch.arange(len(self.offsets), device=self.device) * self._slot

    def _alive(self) -> tuple[Tensor, Tensor]:
        """The values of all rows, one row after the other, and where each row starts in them."""
        starts = self.lengths.cumsum(0) - self.lengths
        alive = self.arena.new_empty(int(self.lengths.sum()))
        for rows in torch.split(torch.arange(len(starts), device=self.device), _ROWS_AT_ONCE):
            _move(self.arena, self.offsets[self._expect(rows)], alive, starts[rows], self.lengths[rows])
        return alive, starts

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # What is alive in the order of rows: the same for the same rows, however they came about.
        destination[prefix + "arena"], destination[prefix + "offsets"] = self._alive()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        arena = state_dict.get(prefix + "arena")
        if isinstance(arena, Tensor) and self._file is not None:
            arena, offsets, lengths = (
                state_dict[prefix + name].to(self.device) for name in ("arena", "offsets", "lengths")
            )
            own = self._own_slots()
            for rows in torch.split(torch.arange(len(own)), _ROWS_AT_ONCE):
                _move(arena, offsets[rows], self.arena, own[self._expect(rows)], lengths[rows])
            state_dict = {**state_dict, prefix + "arena": self.arena, prefix + "offsets": own}
        elif isinstance(arena, Tensor):
            self.arena = torch.empty_like(arena, device=self.device)
            self.tail = arena.numel()
        super()._load_from_state_dict(state_dict, prefix, *args)


def _move(source: Tensor, source_offsets: Tensor, target: Tensor, target_offsets: Tensor, lengths: Tensor) -> None:
    """Copy the sequences of `n` rows, `lengths [n]`, from their offsets in one arena to those in another."""
    inside = torch.arange(int(lengths.sum()), device=lengths.device)
    starts = lengths.cumsum(0) - lengths
    places = [
        torch.repeat_interleave(offsets - starts, lengths) + inside for offsets in (source_offsets, target_offsets)
    ]
    target[places[1]] = source[places[0]]


Column = FixedColumn | QuantizedColumn | RaggedColumn


def make_column(
    spec: FeatureSpec,
    num_rows: int,
    device: torch.device,
    pinned_device: torch.device | None = None,
    folder: str | Path | None = None,
) -> Column:
    """An empty column for `num_rows` values of `spec`; fixed features start as zeros.

    Args:
        spec: The feature.
        num_rows: Number of rows.
        device: Where the cache is.
        pinned_device: Where the column stays, whatever `.to()` says; None for where the cache is.
        folder: Keep the values in a file of this folder; `pinned_device` is then the CPU.
    """
    home = device if pinned_device is None else pinned_device
    file = None if folder is None else MappedFile(folder, *stored_as(spec, num_rows))
    if isinstance(spec, RaggedFeature):
        return RaggedColumn(spec, num_rows, home, pinned_device, file)
    if isinstance(spec, QuantizedFeature):
        return QuantizedColumn(spec, num_rows, home, pinned_device, file)
    values = zeros([num_rows, *spec.shape], spec.dtype, home, device) if file is None else file.tensor
    return FixedColumn(values, pinned_device, spec.default_value, file)


def stored_as(spec: FeatureSpec, num_rows: int) -> tuple[list[int], torch.dtype]:
    """Shape and dtype of what a column has in its file."""
    if isinstance(spec, RaggedFeature):
        return [num_rows, spec.max_length or 0], spec.dtype
    return [num_rows, *spec.shape], torch.int8 if isinstance(spec, QuantizedFeature) else spec.dtype


def spec_of(column: Column) -> FeatureSpec:
    """The spec that a column holds."""
    if not isinstance(column, FixedColumn):
        return column.spec
    return FixedLenFeature(list(column.values.shape[1:]), column.values.dtype, column.default_value)
