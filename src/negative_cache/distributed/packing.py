"""Pack tensors and rows as bytes, so that one message carries several of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from negative_cache.cache.specs import RaggedFeature, Specs, padding_value
from negative_cache.cache.validation import Items, RaggedRows

# Every tensor in a message starts at a multiple of this, so that it can be read in place.
_ALIGNMENT = 8


def pack_tensors(tensors: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """Pack the bytes of tensors into one uint8 tensor, each padded to its length."""
    pieces = []
    for tensor, length in zip(tensors, lengths, strict=True):
        raw = tensor.detach().contiguous().flatten().view(torch.uint8)
        size = _num_bytes(tensor, length)
        pieces.append(torch.nn.functional.pad(raw, (0, -size % _ALIGNMENT + size - raw.numel())))
    return torch.cat(pieces)


def unpack_tensors(raw: Tensor, like: Sequence[Tensor], lengths: Sequence[int], sizes: Sequence[int]) -> list[Tensor]:
    """The inverse of `pack_tensors`: tensors like `like`, with `sizes` rows each."""
    tensors, start = [], 0
    for tensor, length, size in zip(like, lengths, sizes, strict=True):
        stop = start + _num_bytes(tensor, size)
        tensors.append(raw[start:stop].view(tensor.dtype).view(size, *tensor.shape[1:]))
        full = _num_bytes(tensor, length)
        start += full + -full % _ALIGNMENT
    return tensors


def _num_bytes(like: Tensor, length: int) -> int:
    return length * like.shape[1:].numel() * like.element_size()


def pack_rows(features: Items, widths: Mapping[str, int]) -> Tensor:
    """Pack rows as bytes, the same number for each row: uint8 `[n, bytes]`.

    Args:
        features: Feature name -> values `[n, *shape]`, or ragged rows.
        widths: Per ragged feature, the width to which its values are padded; equal on all ranks.
    """
    columns = []
    for key in sorted(features):
        value = features[key]
        if isinstance(value, RaggedRows):
            columns.append(value.lengths[:, None])
            columns.append(value.lengths.new_zeros(len(value.lengths), 1, dtype=torch.bool) | value.pads_left)
            missing = widths[key] - value.values.shape[1]
            columns.append(torch.nn.functional.pad(value.values, (0, missing)))  # a negative number cuts off padding
        else:
            columns.append(value.flatten(1) if value.dim() > 1 else value[:, None])
    return torch.cat([bytes_of(column) for column in columns], dim=1)


def bytes_of(column: Tensor) -> Tensor:
    """The bytes of `[n, width]`: uint8 `[n, bytes]`."""
    if column.numel() == 0:  # torch cannot view an empty tensor as bytes
        return torch.empty(
            len(column), column.shape[1] * column.element_size(), dtype=torch.uint8, device=column.device
        )
    return column.contiguous().view(torch.uint8)


def unpack_rows(raw: Tensor, specs: Specs, widths: Mapping[str, int]) -> dict[str, Tensor | RaggedRows]:
    """The inverse of `pack_rows`."""
    start = 0

    def take(dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        nonlocal start
        size = torch.Size(shape).numel() * dtype.itemsize
        if size == 0 or len(raw) == 0:
            column = torch.empty(len(raw), *shape, dtype=dtype, device=raw.device)
        else:
            column = raw[:, start : start + size].clone().flatten().view(dtype).view(len(raw), *shape)
        start += size
        return column

    rows: dict[str, Tensor | RaggedRows] = {}
    for key in sorted(specs):
        spec = specs[key]
        if isinstance(spec, RaggedFeature):
            lengths, is_left = take(torch.int64, [1])[:, 0], take(torch.bool, [1])
            values = take(spec.dtype, [widths[key]])
            inside = torch.arange(widths[key], device=raw.device) < lengths[:, None]
            values = torch.where(inside, values, values.new_tensor(padding_value(spec)))
            rows[key] = RaggedRows(values, lengths, is_left.any())
        else:
            rows[key] = take(spec.dtype, list(spec.shape))
    return rows
