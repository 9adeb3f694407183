"""`CacheManager`, `NegativeCache` and the feature specs, under the names of the earlier implementations."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from negative_cache.cache.rows import NegativeCache
from negative_cache.cache.specs import (
    Features,
    FeatureSpec,
    FixedLenFeature,
    QuantizedFeature,
    RaggedFeature,
    Specs,
    check_specs,
)
from negative_cache.cache.update import RowUpdates, check_new_items, update_rows
from negative_cache.cache.validation import (
    batch_size,
    check_features,
    check_finite_items,
    check_integer,
    check_mask,
    reads_without_sync,
)

__all__ = ["CacheManager", "FixedLenFeature", "NegativeCache", "QuantizedFeature", "RaggedFeature"]


class CacheManager:
    """Decides which rows of a cache are replaced: the oldest (FIFO), or the least recently used (LRU).

    Args:
        specs: Feature name -> `FixedLenFeature`, `QuantizedFeature` or `RaggedFeature`.
        cache_size: Number of rows of `init_cache()`.
        use_lru: Whether an update of a row resets its age; if False, only an insertion resets it.
    """

    def __init__(self, specs: Specs, cache_size: int, use_lru: bool = True) -> None:
        check_specs(specs)
        self.specs = dict(specs)
        self.cache_size = check_integer("cache_size", cache_size, 1)
        self.use_lru = use_lru

    def init_cache(self) -> NegativeCache:
        """Create a cache on the CPU, with all values zero, no row filled, and every age 0."""
        return NegativeCache.empty(self.specs, self.cache_size)

    def update_cache(
        self,
        cache: NegativeCache,
        *,
        new_items: Features | None = None,
        new_items_mask: Tensor | None = None,
        updated_item_data: Features | None = None,
        updated_item_indices: Tensor | None = None,
        updated_item_mask: Tensor | None = None,
    ) -> NegativeCache:
        """Copy the cache, update the given rows, then replace the oldest rows with the new items.

        Inserted rows, and with LRU updated rows, get age 0; all other rows age by one step. With LRU, rows updated in
        this call count as the youngest when the oldest rows are chosen. Of rows of equal age, the lowest row counts as
        the oldest.

        Args:
            cache: The cache; it is not changed.
            new_items: Feature name -> `[n, *shape]`, with every key of the cache. n is at most its number of rows.
            new_items_mask: bool `[n]`; False entries are not inserted.
            updated_item_data: Feature name -> `[m, *shape]`, for some or all of the cache's keys.
            updated_item_indices: int `[m]`: the rows to update. If a row occurs several times, its last update counts.
            updated_item_mask: bool `[m]`; False entries change nothing.

        Returns:
            The updated copy. (`CacheLossHandler` and `NegativeCacheLoss` update in place.)

        Raises:
            ValueError: Wrong keys, shapes, sizes or row numbers, more items than rows, or values that are not finite.
            TypeError: Wrong dtypes.
        """
        if len(cache.written) != cache.num_rows:
            raise ValueError(f"The cache has {cache.num_rows} rows but {len(cache.written)} ages.")
        cache = copy.deepcopy(cache)  # validation notes the side of padding in it
        specs, items, count = self.specs_of(cache), None, 0
        updates = check_updates(cache, specs, updated_item_data, updated_item_indices, updated_item_mask)
        if new_items:
            items = check_new_items(cache, specs, new_items, mask=new_items_mask)
            count = batch_size(items)
        mask = check_mask("new_items_mask", new_items_mask, count, cache.device)
        update_rows(cache, use_lru=self.use_lru, new_items=items, new_items_mask=mask, updates=updates)
        return cache

    def specs_of(self, cache: NegativeCache) -> dict[str, FeatureSpec]:
        """The cache's specs with this manager's default values, which a cache made by hand does not have."""
        return {
            key: spec._replace(default_value=self.specs[key].default_value) if key in self.specs else spec
            for key, spec in cache.specs.items()
        }


def check_updates(
    cache: NegativeCache, specs: Specs, data: Features | None, indices: Tensor | None, mask: Tensor | None
) -> RowUpdates | None:
    """Validate the updates passed to `CacheManager.update_cache`; return None if there are none."""
    if data is None and indices is None:
        return None
    if data is None or indices is None:
        raise ValueError("`updated_item_data` and `updated_item_indices` must be given together.")
    items = check_features("updated_item_data", data, specs)
    if not items:
        return None
    count = batch_size(items)
    if indices.shape != (count,) or indices.is_floating_point():
        raise ValueError(
            f"`updated_item_indices` is {indices.dtype} {list(indices.shape)}; expected integers [{count}]."
        )
    if reads_without_sync(indices):
        is_outside = (indices < 0) | (indices >= cache.num_rows)
        if mask is not None and mask.shape == indices.shape:
            is_outside &= mask.cpu().to(torch.bool)
        if bool(is_outside.any()):
            raise ValueError(f"`updated_item_indices` has values outside the cache's rows 0 to {cache.num_rows - 1}.")
    mask = check_mask("updated_item_mask", mask, count, cache.device)
    check_finite_items("updated_item_data", items, mask)
    return RowUpdates(indices.to(cache.device, torch.int64), items, mask)
