"""Which new items may enter the cache."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from negative_cache.cache.rows import NegativeCache
from negative_cache.cache.specs import QuantizedFeature, RaggedFeature, check_features, padding_value


class CacheFilterFn(abc.ABC):
    """`(cache, new_items)` -> bool `[batch]`: True where the item may enter."""

    @abc.abstractmethod
    def __call__(self, cache: NegativeCache, new_items: Mapping[str, Tensor]) -> Tensor:
        """Say for each new item whether to insert it."""


class IsInCacheFilterFn(CacheFilterFn):
    """Lets in the items that no filled row equals on all of the given keys.

    Args:
        keys: Feature names to compare; of any shape, integer or floating point.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        if not keys:
            raise ValueError("`keys` is empty: name at least one feature to compare.")
        self.keys = tuple(keys)

    def __call__(self, cache: NegativeCache, new_items: Mapping[str, Tensor]) -> Tensor:
        """True where the item is not yet in the cache.

        Args:
            cache: `num_rows` rows; unfilled ones equal nothing.
            new_items: Feature name -> `[batch, ...]`, padded like the cache's where it is shorter.

        Returns:
            bool `[batch]`. Memory is of the order `batch * num_rows`.
        """
        specs = cache.specs
        missing = [key for key in self.keys if key not in specs or key not in new_items]
        if missing:
            raise ValueError(f"The filter compares {missing}, which the cache or the new items do not have.")
        rounded = [key for key in self.keys if isinstance(specs[key], QuantizedFeature)]
        if rounded:
            raise ValueError(
                f"The filter compares {rounded}, which the cache keeps rounded to int8. Name other features."
            )
        items = check_features("new_items", {key: new_items[key] for key in self.keys}, specs)
        batch = len(next(iter(new_items.values())))
        is_equal = cache.filled.expand(batch, -1)
        for key in self.keys:
            value, rows = items[key], cache.data[key]
            spec = specs[key]
            if not isinstance(value, Tensor):
                width = max(value.values.shape[1], rows.shape[1])
                pad = padding_value(spec) if isinstance(spec, RaggedFeature) else 0
                rows = torch.nn.functional.pad(rows, (0, width - rows.shape[1]), value=pad)
                value = torch.nn.functional.pad(value.values, (0, width - value.values.shape[1]), value=pad)
            is_equal = is_equal & _equal_rows(value.to(rows.device), rows).to(cache.device)
        return ~is_equal.any(dim=1)


def _equal_rows(items: Tensor, rows: Tensor) -> Tensor:
    """`(items[:, None] == rows[None]).all(other dimensions)`, one column at a time: `[batch, num_rows]`."""
    items, rows = items.unsqueeze(-1).flatten(1), rows.unsqueeze(-1).flatten(1)
    is_equal = torch.ones(len(items), len(rows), dtype=torch.bool, device=rows.device)
    for column in range(rows.shape[1]):
        is_equal &= items[:, column, None] == rows[:, column]
    return is_equal
