"""How one feature of all rows is stored: fixed size, or ragged without padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from negative_cache.features import (
    FeatureSpec,
    FixedLenFeature,
    QuantizedFeature,
    RaggedFeature,
    RaggedRows,
    dequantize,
    padding_value,
    quantize,
)

_Module = TypeVar("_Module", bound=nn.Module)

# An arena that is full is rewritten with this much room over what is alive, so that a rewrite, which
# costs one copy of the arena, comes only after a fixed share of it has been written.
_ROOM = 1.5


class _Column(nn.Module):
    """Buffers that stay on `pinned_device`, where one is given, when the owner is moved."""

    def __init__(self, pinned_device: torch.device | None) -> None:
        super().__init__()
        self.pinned_device = pinned_device

    def _apply(self: _Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Module:
        return self if self.pinned_device is not None else super()._apply(fn, recurse)  # type: ignore[misc]


class FixedColumn(_Column):
    """A tensor `[num_rows, *shape]`."""

    values: Tensor

    def __init__(
        self,
        values: Tensor,
        pinned_device: torch.device | None = None,
        default_value: float | None = None,
    ) -> None:
        super().__init__(pinned_device)
        self.default_value = default_value
        self.register_buffer("values", values.detach())

    @property
    def device(self) -> torch.device:
        return self.values.device

    def read(self, rows: Tensor) -> Tensor:
        """The values of `rows [n]`: `[n, *shape]`."""
        return self.values[rows.to(self.device)]

    def read_rows(self, rows: Tensor) -> Tensor:
        """The values of `rows [n]` as `write` takes them."""
        return self.read(rows)

    def write(self, rows: Tensor, values: Tensor) -> None:
        """Store `values [n, *shape]` in `rows [n]`. A row that occurs twice must have equal values."""
        self.values[rows.to(self.device)] = values.to(self.device, self.values.dtype)

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
    ) -> None:
        super().__init__(pinned_device)
        self.spec = spec
        self.register_buffer("values", torch.zeros([num_rows, *spec.shape], dtype=torch.int8, device=device))
        self.register_buffer("scales", torch.zeros(num_rows, dtype=torch.float32, device=device))

    @property
    def device(self) -> torch.device:
        return self.values.device

    def read(self, rows: Tensor) -> Tensor:
        """The values of `rows [n]`: float32 `[n, *shape]`."""
        rows = rows.to(self.device)
        return dequantize(self.values[rows], self.scales[rows])

    def read_rows(self, rows: Tensor) -> Tensor:
        """The values of `rows [n]` as `write` takes them."""
        return self.read(rows)

    def write(self, rows: Tensor, values: Tensor) -> None:
        """Store `values [n, *shape]` in `rows [n]`. A row that occurs twice must have equal values."""
        rows = rows.to(self.device)
        self.values[rows], self.scales[rows] = quantize(values.to(self.device))

    def dense(self) -> Tensor:
        """All rows, float32 `[num_rows, *shape]`; a copy."""
        return dequantize(self.values, self.scales)


class RaggedColumn(_Column):
    """Sequences of varying length in one arena.

    Row r is `arena[offsets[r] : offsets[r] + lengths[r]]`. New items go to the end of the arena. When
    it is full, what is alive is copied to a new one; the room it then gets is either a share of what is
    alive or, where that is less, a slot of max_length per row, after which nothing moves any more.
    """

    arena: Tensor
    offsets: Tensor
    lengths: Tensor

    def __init__(
        self,
        spec: RaggedFeature,
        num_rows: int,
        device: torch.device,
        pinned_device: torch.device | None = None,
    ) -> None:
        super().__init__(pinned_device)
        self.spec = spec
        self.tail = 0
        self.register_buffer("arena", torch.empty(0, dtype=spec.dtype, device=device))
        self.register_buffer("offsets", torch.zeros(num_rows, dtype=torch.int64, device=device))
        self.register_buffer("lengths", torch.zeros(num_rows, dtype=torch.int64, device=device))

    @property
    def device(self) -> torch.device:
        return self.arena.device

    @property
    def _slot(self) -> int:
        return 0 if self.spec.max_length is None else self.spec.max_length

    @property
    def _is_slotted(self) -> bool:
        return self._slot > 0 and self.arena.numel() == len(self.offsets) * self._slot

    def read(self, rows: Tensor) -> Tensor:
        """The sequences of `rows [n]`, padded to the longest of them: `[n, longest]`."""
        return self._gather(rows.to(self.device))

    def read_rows(self, rows: Tensor) -> RaggedRows:
        """The sequences of `rows [n]` as `write` takes them."""
        rows = rows.to(self.device)
        return RaggedRows(self._gather(rows), self.lengths[rows])

    def write(self, rows: Tensor, values: RaggedRows) -> None:
        """Store `values` in `rows [n]`. A row that occurs twice must have equal values."""
        rows = rows.to(self.device)
        padded, lengths = values.values.to(self.device), values.lengths.to(self.device)
        count, width = padded.shape
        if not self._is_slotted and self.tail + padded.numel() > self.arena.numel():
            self._rewrite(padded.numel())
        if self._is_slotted:
            positions = torch.arange(width, device=self.device)
            self.offsets[rows] = rows * self._slot
            self.arena[self.offsets[rows][:, None] + positions] = padded
        else:
            self.offsets[rows] = self.tail + width * torch.arange(count, device=self.device)
            self.arena[self.tail : self.tail + padded.numel()] = padded.flatten()
            self.tail += padded.numel()
        self.lengths[rows] = lengths

    def dense(self) -> Tensor:
        """All rows, padded to the longest of them; a copy `[num_rows, longest]`."""
        return self._gather(torch.arange(len(self.offsets), device=self.device))

    def _gather(self, rows: Tensor) -> Tensor:
        lengths = self.lengths[rows]
        positions = torch.arange(int(lengths.amax()) if len(rows) else 0, device=self.device)
        inside = positions < lengths[:, None]
        if positions.numel() == 0:
            return self.arena.new_empty(len(rows), 0)
        at = torch.where(inside, self.offsets[rows][:, None] + positions, 0)
        return torch.where(inside, self.arena[at], self.arena.new_tensor(padding_value(self.spec)))

    def _rewrite(self, incoming: int) -> None:
        """Copy what is alive to a new arena with room for `incoming` more values."""
        alive, starts = self._alive()
        size = int(_ROOM * (len(alive) + incoming)) + incoming
        slots = len(self.offsets) * self._slot
        if 0 < slots <= size:
            arena = self.arena.new_zeros(slots)
            own = torch.arange(len(self.offsets), device=self.device) * self._slot
            arena[self._positions(own, starts)] = alive
            starts = own
        else:
            arena = torch.cat([alive, self.arena.new_zeros(size - len(alive))])
        self.arena, self.offsets, self.tail = arena, starts, len(alive)

    def _alive(self) -> tuple[Tensor, Tensor]:
        """The values of all rows, one row after the other, and where each row starts in them."""
        starts = self.lengths.cumsum(0) - self.lengths
        return self.arena[self._positions(self.offsets, starts)], starts

    def _positions(self, offsets: Tensor, starts: Tensor) -> Tensor:
        """Where the values of all rows are in an arena in which the rows start at `offsets`."""
        shifts = torch.repeat_interleave(offsets - starts, self.lengths)
        return shifts + torch.arange(len(shifts), device=self.device)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # What is alive in the order of rows: the same for the same rows, however they came about.
        destination[prefix + "arena"], destination[prefix + "offsets"] = self._alive()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        arena = state_dict.get(prefix + "arena")
        if isinstance(arena, Tensor):
            self.arena = torch.empty_like(arena, device=self.device)
            self.tail = arena.numel()
        super()._load_from_state_dict(state_dict, prefix, *args)


Column = FixedColumn | QuantizedColumn | RaggedColumn


def make_column(
    spec: FeatureSpec, num_rows: int, device: torch.device, pinned_device: torch.device | None = None
) -> Column:
    """An empty column for `num_rows` values of `spec`; fixed features start as zeros."""
    device = device if pinned_device is None else pinned_device
    if isinstance(spec, RaggedFeature):
        return RaggedColumn(spec, num_rows, device, pinned_device)
    if isinstance(spec, QuantizedFeature):
        return QuantizedColumn(spec, num_rows, device, pinned_device)
    values = torch.zeros([num_rows, *spec.shape], dtype=spec.dtype, device=device)
    return FixedColumn(values, pinned_device, spec.default_value)


def spec_of(column: Column) -> FeatureSpec:
    """The spec that a column holds."""
    if not isinstance(column, FixedColumn):
        return column.spec
    return FixedLenFeature(list(column.values.shape[1:]), column.values.dtype, column.default_value)
