"""The manager of a cache: which rows new documents replace."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from negative_cache.cache.index import is_first_of_equal
from negative_cache.cache.rows import NO_ID, NegativeCache
from negative_cache.cache.specs import (
    Features,
    FeatureSpec,
    FixedLenFeature,
    QuantizedFeature,
    RaggedFeature,
    RaggedRows,
    Specs,
    all_finite,
    batch_size,
    check_features,
    check_keys,
    check_specs,
    is_free_to_read,
)

__all__ = ["CacheManager", "FixedLenFeature", "NegativeCache", "QuantizedFeature", "RaggedFeature"]


class CacheManager:
    """Says which rows of a cache to replace: the oldest (FIFO), or the least recently used (LRU).

    Args:
        specs: Feature name -> `FixedLenFeature`, `QuantizedFeature` or `RaggedFeature`.
        cache_size: Number of rows of `init_cache()`.
        use_lru: Whether updating a row makes it young again; if not, only insertion counts.
    """

    def __init__(self, specs: Specs, cache_size: int, use_lru: bool = True) -> None:
        check_specs(specs)
        if cache_size < 1:
            raise ValueError(f"`cache_size` is {cache_size}; it must be at least 1.")
        self.specs = dict(specs)
        self.cache_size = cache_size
        self.use_lru = use_lru

    def init_cache(self) -> NegativeCache:
        """A new cache on the CPU: all values zero, no row filled, every age 0."""
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
        """A new cache in which rows were updated first, and then the oldest ones replaced.

        Rows written now have age 0, all others one step more. Rows updated in the same call count as
        younger than all others (LRU) when the oldest are chosen; ties go to the lowest row.

        Args:
            cache: The cache; it stays as it is.
            new_items: Feature name -> `[n, *shape]`, with every key of the cache; n at most its rows.
            new_items_mask: bool `[n]`; False entries are not inserted.
            updated_item_data: Feature name -> `[m, *shape]`, some of the cache's keys.
            updated_item_indices: int `[m]`: the rows to update; of equal ones the last counts.
            updated_item_mask: bool `[m]`; False entries change nothing.

        Returns:
            The updated copy. (The handler and `NegativeCacheLoss` update in place.)

        Raises:
            ValueError: Wrong keys, shapes, sizes or row numbers, more items than rows, a value that is
                not finite.
        """
        cache = copy.deepcopy(cache)
        self.update_cache_(
            cache,
            new_items=new_items,
            new_items_mask=new_items_mask,
            updated_item_data=updated_item_data,
            updated_item_indices=updated_item_indices,
            updated_item_mask=updated_item_mask,
        )
        return cache

    def update_cache_(
        self,
        cache: NegativeCache,
        *,
        new_items: Features | None = None,
        new_items_mask: Tensor | None = None,
        updated_item_data: Features | None = None,
        updated_item_indices: Tensor | None = None,
        updated_item_mask: Tensor | None = None,
        refreshed_item_data: Features | None = None,
        refreshed_item_indices: Tensor | None = None,
        document_ids: Tensor | None = None,
        document_rows: Tensor | None = None,
    ) -> None:
        """`update_cache` in place. Nothing is written unless every argument is right.

        Args:
            refreshed_item_data: Like `updated_item_data`, for documents that came again as new ones: written after
                the updated ones, and age 0 without LRU too.
            refreshed_item_indices: Their rows.
            document_ids: int64 `[n]` of the new items, -1 for unknown. A document that has a row is
                written there; of a document that occurs twice in the batch the last known or first
                unknown entry counts.
            document_rows: int64 `[n]`: what `cache.find(document_ids)` returned, if that is known already.
        """
        if cache.written.shape[0] != cache.num_rows:
            raise ValueError(f"The cache has {cache.num_rows} rows but {cache.written.shape[0]} ages.")
        updated, updated_mask = self._check_updates(cache, updated_item_data, updated_item_indices, updated_item_mask)
        refreshed, refreshed_mask = self._check_updates(cache, refreshed_item_data, refreshed_item_indices, None)
        inserted = self.check_new_items(cache, new_items, document_ids, new_items_mask) if new_items else {}
        inserted_mask = _check_mask("new_items_mask", new_items_mask, batch_size(inserted), cache.device)
        inserted_mask = _mask_not_finite(cache, inserted, inserted_mask)
        cache.step += 1
        if updated and updated_item_indices is not None:
            rows = updated_item_indices.to(cache.device, torch.int64)
            cache.write(rows, updated, updated_mask, resets_age=self.use_lru)
        if refreshed and refreshed_item_indices is not None:
            cache.write(refreshed_item_indices.to(cache.device, torch.int64), refreshed, refreshed_mask)
        if inserted:
            _insert(cache, inserted, inserted_mask, document_ids, document_rows)

    def _specs_of(self, cache: NegativeCache) -> dict[str, FeatureSpec]:
        """The cache's specs, with this manager's default values: a cache made by hand has none."""
        return {
            key: spec._replace(default_value=self.specs[key].default_value) if key in self.specs else spec
            for key, spec in cache.specs.items()
        }

    def _check_updates(
        self, cache: NegativeCache, data: Features | None, indices: Tensor | None, mask: Tensor | None
    ) -> tuple[dict[str, Tensor | RaggedRows], Tensor | None]:
        if data is None and indices is None:
            return {}, None
        if data is None or indices is None:
            raise ValueError("`updated_item_data` and `updated_item_indices` must be given together.")
        updated = check_features("updated_item_data", data, self._specs_of(cache))
        if not updated:
            return {}, None
        count = batch_size(updated)
        if indices.shape != (count,) or indices.is_floating_point():
            raise ValueError(
                f"`updated_item_indices` is {indices.dtype} {list(indices.shape)}; expected integers [{count}]."
            )
        if is_free_to_read(indices):
            is_outside = (indices < 0) | (indices >= cache.num_rows)
            if mask is not None and mask.shape == indices.shape:
                is_outside &= mask.cpu().to(torch.bool)
            if bool(is_outside.any()):
                raise ValueError(
                    f"`updated_item_indices` has values outside the cache's rows 0 to {cache.num_rows - 1}."
                )
        mask = _check_mask("updated_item_mask", mask, count, cache.device)
        _check_finite("updated_item_data", updated, mask)
        return updated, _mask_not_finite(cache, updated, mask)

    def check_new_items(
        self,
        cache: NegativeCache,
        new_items: Features,
        document_ids: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> dict[str, Tensor | RaggedRows]:
        """Raise what `update_cache` would raise for these items and ids; nothing is written.

        Returns:
            The items, padded and cast.
        """
        check_keys("new_items", new_items, list(cache.specs))
        items = check_features("new_items", new_items, self._specs_of(cache))
        count = batch_size(items)
        if count > cache.num_rows:
            raise ValueError(
                f"`new_items` has {count} items, the cache only {cache.num_rows} rows. "
                "Use a cache that is larger than the batch."
            )
        if document_ids is not None:
            check_ids("document_ids", document_ids, (count,))
        _check_finite("new_items", items, _check_mask("new_items_mask", mask, count, cache.device))
        return items


def _insert(
    cache: NegativeCache,
    items: Mapping[str, Tensor | RaggedRows],
    mask: Tensor | None,
    document_ids: Tensor | None,
    document_rows: Tensor | None,
) -> None:
    """Write items over the oldest rows; a known document over its own row."""
    count = batch_size(items)
    if mask is None:
        mask = torch.ones(count, dtype=torch.bool, device=cache.device)
    if document_ids is None:
        cache.write(cache.oldest(count)[mask.cumsum(0) - 1], items, mask)
        return
    document_ids = document_ids.to(cache.device, torch.int64)
    known = cache.find(document_ids) if document_rows is None else document_rows
    is_known = mask & (known >= 0)
    is_new = mask & (known < 0)
    is_new &= is_first_of_equal(document_ids, is_new) | (document_ids < 0)
    cache.make_young(known, is_known)
    rows = cache.oldest(count)[is_new.cumsum(0) - 1]
    cache.write(torch.cat([known, rows]), items, torch.cat([is_known, is_new]), document_ids=document_ids)


def _check_mask(name: str, mask: Tensor | None, count: int, device: torch.device) -> Tensor | None:
    if mask is None or count == 0:
        return None
    if mask.shape != (count,):
        raise ValueError(f"`{name}` has shape {list(mask.shape)}; expected [{count}].")
    return mask.to(device, torch.bool)


def check_ids(name: str, ids: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless `ids` are integers of this shape, -1 (unknown) or larger."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"`{name}` is {got}; expected a tensor of integers.")
    if ids.shape != shape:
        raise ValueError(f"`{name}` has shape {list(ids.shape)}; expected {list(shape)}.")
    if is_free_to_read(ids) and ids.numel() and int(ids.min()) < NO_ID:
        raise ValueError(f"`{name}` has the value {int(ids.min())}; ids are 0 or larger, -1 means unknown.")


def _check_finite(name: str, items: Mapping[str, Tensor | RaggedRows], mask: Tensor | None) -> None:
    """Raise for values that are not finite in the entries that count, where they can be looked at."""
    for key, value in items.items():
        if isinstance(value, RaggedRows) or not value.is_floating_point() or not is_free_to_read(value):
            continue
        if all_finite(value):
            continue
        finite = _finite_entries(value)
        finite = finite if mask is None else finite | ~mask.to(finite.device)
        if not bool(finite.all()):
            raise ValueError(
                f"`{name}[{key!r}]`, stored as {value.dtype}, has NaN or infinity in {int((~finite).sum())} of "
                f"{len(finite)} rows. Nothing was written; look for a learning rate that is too high or an overflow "
                "in half precision."
            )


def _mask_not_finite(
    cache: NegativeCache, items: Mapping[str, Tensor | RaggedRows], mask: Tensor | None
) -> Tensor | None:
    """Mask and count values that are not finite where `_check_finite` cannot look at them."""
    for value in items.values():
        if isinstance(value, RaggedRows) or not value.is_floating_point() or is_free_to_read(value):
            continue
        is_finite = _finite_entries(value).to(cache.device)
        kept = is_finite if mask is None else mask & is_finite
        cache.num_rejected += (~kept if mask is None else mask ^ kept).sum()
        mask = kept
    return mask


def _finite_entries(value: Tensor) -> Tensor:
    """bool `[n]`: which entries have nothing but finite values; 0 times any other is NaN."""
    return (value * 0).unsqueeze(-1).flatten(1).sum(dim=1) == 0
