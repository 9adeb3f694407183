"""Filters that decide which new items enter the cache."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from negative_cache.cache.rows import NegativeCache
from negative_cache.cache.specs import QuantizedFeature, RaggedFeature, padding_value
from negative_cache.cache.validation import RaggedRows, check_features, to_common_width


class CacheFilterFn(abc.ABC):
    """A function `(cache, new_items)` -> bool `[batch]`, True where the item may enter the cache."""

    @abc.abstractmethod
    def __call__(self, cache: NegativeCache, new_items: Mapping[str, Tensor]) -> Tensor:
        """Return, for each new item, whether to insert it."""


class IsInCacheFilterFn(CacheFilterFn):
    """Admits an item unless a filled row has the same values for all of the given keys.

    Args:
        keys: Names of the features to compare. They may be integer or floating point, and of any shape.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        if not keys:
            raise ValueError("`keys` is empty: name at least one feature to compare.")
        self.keys = tuple(keys)

    def __call__(self, cache: NegativeCache, new_items: Mapping[str, Tensor]) -> Tensor:
        """Return True for each item that is not in the cache yet.

        Args:
            cache: The cache with `num_rows` rows. Unfilled rows match no item.
            new_items: Feature name -> `[batch, ...]`. Shorter values are padded as for storage.

        Returns:
            bool `[batch]`. The comparison needs memory proportional to `batch * num_rows`.

        Raises:
            ValueError: The cache or the items lack a key, or a feature is stored as int8 with a scale.
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
        # Other ragged features, such as `attention_mask`, show the padding of those that are compared.
        used = [key for key in new_items if key in self.keys or isinstance(specs.get(key), RaggedFeature)]
        items = check_features("new_items", {key: new_items[key] for key in used}, specs)
        is_equal = cache.filled.expand(len(next(iter(new_items.values()))), -1)
        for key in self.keys:
            value = items[key]
            if isinstance(value, RaggedRows):
                stored = cache.read_rows(torch.arange(cache.num_rows, device=cache.device), [key])[key]
                assert isinstance(stored, RaggedRows)
                value, rows = to_common_width([value.values, stored.values], padding_value(specs[key]))
            else:
                rows = cache.embeddings(key)
            is_equal = is_equal & _equal_rows(value.to(rows.device), rows).to(cache.device)
        return ~is_equal.any(dim=1)


def _equal_rows(items: Tensor, rows: Tensor) -> Tensor:
    """`(items[:, None] == rows[None]).all(other dimensions)`, one column at a time: `[batch, num_rows]`."""
    items, rows = items.unsqueeze(-1).flatten(1), rows.unsqueeze(-1).flatten(1)
    is_equal = torch.ones(len(items), len(rows), dtype=torch.bool, device=rows.device)
    for column in range(rows.shape[1]):
        is_equal &= items[:, column, None] == rows[:, column]
    return is_equal
