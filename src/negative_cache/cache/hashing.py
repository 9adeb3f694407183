"""Hashes of the features of documents: documents with equal features are the same document."""

from __future__ import annotations

import torch
from torch import Tensor

from negative_cache.cache import device_copies
from negative_cache.cache.specs import MASK, TOKEN_KEYS
from negative_cache.cache.validation import Items, RaggedRows

# Values per document up to which a hash takes a small part of a step. Tokens of long texts stay below, images do not.
MAX_VALUES = 2**15
_BITS = (1 << 62) - 1


def features_without_hash(items: Items) -> list[str]:
    """Names of the features for which `hash_items` has no hash: floating point ones, and those of many values."""
    without = []
    for key, value in items.items():
        values = value.values if isinstance(value, RaggedRows) else value
        if values.is_floating_point() or values.is_complex() or values[:1].numel() > MAX_VALUES:
            without.append(key)
    return without


def hash_items(items: Items, device: torch.device) -> Tensor:
    """Hash the integer features of each document, independent of padding: int64 `[n]` on the device, 62 bits.

    The hash is the sum over all values of a mix of value, position and feature. Token inputs where the `attention_mask`
    is 0 do not count. Does not synchronize a device.

    Args:
        items: Validated items, see `check_features`.
        device: Where the hashes are needed.
    """
    mask = items.get(MASK)
    is_token = None if mask is None else _matrix(mask) != 0
    total = torch.zeros((), dtype=torch.int64, device=device)
    for number, key in enumerate(sorted(items)):
        value, values = items[key], _matrix(items[key])
        positions = torch.arange(values.shape[1], device=values.device)
        # Every position of every feature has a random offset, so that the sum depends on the order of the values, and
        # no value is the complement of another, which has the same mix.
        mixed = mix(values.to(torch.int64) + mix(positions + ((number + 1) << 32)))
        if isinstance(value, RaggedRows):
            mixed = mixed * (positions < value.lengths[:, None])
        if is_token is not None and key in TOKEN_KEYS and is_token.shape == values.shape:
            mixed = mixed * is_token.to(mixed.device)
        total = total + device_copies.to_device(mixed.sum(dim=1), device)
    return total & _BITS


def mix(values: Tensor) -> Tensor:
    """Spread int64 values over all 64 bits: Stafford's finalizer Mix01, with arithmetic shifts.

    Integer arithmetic wraps around. Arithmetic shifts lose about 2 of the 64 bits.
    """
    values = (values ^ (values >> 31)) * 0x7FB5D329728EA185
    values = (values ^ (values >> 27)) * -0x7E25210B43D22BB3  # 0x81DADEF4BC2DD44D as int64
    return values ^ (values >> 33)


def _matrix(value: Tensor | RaggedRows) -> Tensor:
    """The values of a feature, `[n, width]`; those of ragged rows start at column 0."""
    return value.values if isinstance(value, RaggedRows) else value.reshape(len(value), -1)
