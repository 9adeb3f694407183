"""The columns of a cache together: made, read and written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from negative_cache.cache.columns import Column, RaggedColumn, make_column, stored_as
from negative_cache.cache.mapped_file import check_folder, check_space
from negative_cache.cache.placement import bring
from negative_cache.cache.specs import FeatureSpec, RaggedFeature, RaggedRows, Specs


def make_columns(
    specs: Specs,
    num_rows: int,
    device: torch.device,
    scored_keys: Sequence[str] = (),
    feature_device: torch.device | str | None = None,
    feature_folder: str | Path | None = None,
) -> dict[str, Column]:
    """Empty columns; all but those of `scored_keys` are where `feature_device` or `feature_folder` say.

    Raises:
        ValueError: See `check_feature_folder`.
        OSError: The folder's disk has not enough room.
    """
    features = {key: spec for key, spec in specs.items() if key not in scored_keys}
    pinned = None if feature_device is None else torch.device(feature_device)
    if feature_folder is not None:
        check_feature_folder(feature_folder, feature_device, features)
        stored = [stored_as(spec, num_rows) for spec in features.values()]
        check_space(feature_folder, sum(math.prod(shape) * dtype.itemsize for shape, dtype in stored))
        pinned = torch.device("cpu")
    return {
        key: make_column(spec, num_rows, device, pinned, feature_folder)
        if key in features
        else make_column(spec, num_rows, device)
        for key, spec in specs.items()
    }


def check_feature_folder(
    feature_folder: str | Path, feature_device: torch.device | str | None, specs: Mapping[str, FeatureSpec]
) -> None:
    """Raise ValueError unless features of these specs can be kept in files of the folder."""
    check_folder(feature_folder)
    if feature_device is not None and torch.device(feature_device).type != "cpu":
        raise ValueError(f"`feature_device` is {str(feature_device)!r}, but what is in `feature_folder` is on the CPU.")
    for key, spec in specs.items():
        if isinstance(spec, RaggedFeature) and spec.max_length is None:
            raise ValueError(
                f"The ragged feature {key!r} has no max_length, so that a file has no place for each of its rows. Give "
                f"`specs` with RaggedFeature({spec.dtype}, max_length=...), or a FixedLenFeature."
            )


def read_columns(columns: Mapping[str, Column], rows: Tensor, keys: Sequence[str]) -> dict[str, Tensor | RaggedRows]:
    """`rows [n]` of some columns, each on its own device, as `write_columns` takes them."""
    at = {device: rows.to(device) for device in {columns[key].device for key in keys}}
    chosen = {key: columns[key] for key in keys}
    widths = _widths({key: column for key, column in chosen.items() if isinstance(column, RaggedColumn)}, at)
    result: dict[str, Tensor | RaggedRows] = {}
    for key, column in chosen.items():
        here = at[column.device]
        result[key] = column.read_rows(here, widths[key]) if isinstance(column, RaggedColumn) else column.read(here)
    return result


def _widths(columns: Mapping[str, RaggedColumn], rows: Mapping[torch.device, Tensor]) -> dict[str, int]:
    """The longest sequence in each column, by device; each device is waited for once."""
    widths: dict[str, int] = {}
    for device, at in rows.items():
        here = {key: column for key, column in columns.items() if column.device == device}
        longest = [column.longest(at) for column in here.values()]
        widths.update(zip(here, torch.stack(longest).tolist() if longest else [], strict=True))
    return widths


def write_columns(
    columns: Mapping[str, Column], rows: Tensor, items: Mapping[str, Tensor | RaggedRows], is_any: Tensor | None
) -> None:
    """Store items in `rows [n]` of their columns. For those of another device it is waited once.

    Args:
        columns: Column per feature.
        rows: int64 `[n]`. A row that occurs twice must have equal values.
        items: Checked values, `n` each.
        is_any: bool scalar: if False, nothing is stored; None for True.
    """
    devices = {key: columns[key].device for key in items}
    for key, value in items.items():
        if devices[key] == rows.device:
            _write(is_any, columns[key], rows, value)
    for device in set(devices.values()) - {rows.device}:
        there = {key: value for key, value in items.items() if devices[key] == device}
        parts = [part for value in there.values() for part in (value if isinstance(value, RaggedRows) else [value])]
        flags = [] if is_any is None else [is_any]
        arrived = iter(bring([rows, *flags, *parts], device))
        rows_there = next(arrived)
        if flags and not bool(next(arrived)):
            continue
        for key, value in there.items():
            is_ragged = isinstance(value, RaggedRows)
            arrived_value = RaggedRows(next(arrived), next(arrived)) if is_ragged else next(arrived)
            _write(None, columns[key], rows_there, arrived_value)


def _write(is_any: Tensor | None, column: Column, rows: Tensor, value: Tensor | RaggedRows) -> None:
    if isinstance(column, RaggedColumn):
        assert isinstance(value, RaggedRows)
        column.write(rows, value, is_any)
        return
    assert isinstance(value, Tensor)
    if is_any is not None:
        old = column.read(rows)
        value = torch.where(is_any, value.to(old.device), old)
    column.write(rows, value)
