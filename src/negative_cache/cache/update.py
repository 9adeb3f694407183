"""Updates of a cache: given rows get new values, then new items replace the oldest rows."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from negative_cache.cache.index import is_first_of_equal, oldest_rows
from negative_cache.cache.rows import NegativeCache
from negative_cache.cache.specs import Features, Specs
from negative_cache.cache.validation import (
    Items,
    RaggedRows,
    batch_size,
    check_features,
    check_finite_items,
    check_keys,
    check_mask,
    finite_entries,
    reads_without_sync,
)


class RowUpdates(NamedTuple):
    """Validated values for rows of a cache.

    Attributes:
        rows: int64 `[n]`, on the cache's device. If a row occurs several times, its last update is written.
        items: `n` values each, of some or all of the cache's features.
        mask: bool `[n]`, on the cache's device; False entries are not written. None to write all.
        document_ids: int64 `[n, k]`: further ids of the rows' documents, -1 for unknown; None for nothing new.
    """

    rows: Tensor
    items: Items
    mask: Tensor | None = None
    document_ids: Tensor | None = None


def check_new_items(
    cache: NegativeCache,
    specs: Specs,
    new_items: Features | Items,
    *,
    mask: Tensor | None = None,
    known_finite: Collection[str] = (),
    name: str = "new_items",
) -> dict[str, Tensor | RaggedRows]:
    """Validate items for insertion into a cache, without writing them; the cache notes the side of their padding.

    Args:
        cache: The cache.
        specs: The cache's specs, possibly with other default values.
        new_items: Feature name -> `[n, ...]`, with every key of the cache.
        mask: bool `[n]`: False for items that will not be inserted and may have any value. None to insert all.
        known_finite: Features that were checked for non-finite values in their stored dtype already.
        name: What errors call the items.

    Returns:
        The items, padded and cast for `update_rows`.

    Raises:
        ValueError: Wrong keys, shapes or sizes, more items than rows, or non-finite values that the host can read
            without synchronizing the device.
        TypeError: Wrong dtypes.
    """
    check_keys(name, new_items, list(specs))
    items = check_features(name, new_items, specs)
    count = batch_size(items)
    if count > cache.num_rows:
        raise ValueError(
            f"`{name}` has {count} items, the cache only {cache.num_rows} rows. "
            "Use a cache that is larger than the batch."
        )
    unchecked = {key: value for key, value in items.items() if key not in known_finite}
    check_finite_items(name, unchecked, check_mask("new_items_mask", mask, count, cache.device))
    for key, value in items.items():
        if isinstance(value, RaggedRows):  # before rows are read, so that they are padded like this batch
            cache.note_side(key, value.pads_left)
    return items


def update_rows(
    cache: NegativeCache,
    *,
    use_lru: bool,
    new_items: Items | None = None,
    new_items_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    document_rows: Tensor | None = None,
    updates: RowUpdates | None = None,
    reinserted: RowUpdates | None = None,
) -> None:
    """Apply one step to a cache in place: write the updates, then replace the oldest rows with the new items.

    All arguments must be validated. All rows age by one step, and new items get age 0. Among rows of equal age, the
    lowest is the oldest. If the host cannot read values without synchronizing the device, items with non-finite values
    are skipped and counted in `cache.num_rejected`.

    Args:
        cache: The cache.
        use_lru: Whether `updates` reset the age of their rows.
        new_items: Items to insert, `n` of every feature. An item whose document already has a row replaces that row.
        new_items_mask: bool `[n]`, on the cache's device; False items are not inserted. None to insert all.
        document_ids: int64 `[n]`, on the cache's device, -1 for unknown; or `[n, k]`: k ids per document. If several
            items have the same (first) id, the last one is written if the document has a row, else the first one.
        document_rows: int64 `[n]`: the result of `cache.find(document_ids)`, if already computed.
        updates: New values of rows.
        reinserted: New values of rows whose documents occur in the batch again. They are written after the updates,
            and reset the age of their rows even if `use_lru` is False.
    """
    cache.step += 1
    for each, resets_age in ((updates, use_lru), (reinserted, True)):
        if each is not None:
            cache.write(each.rows, each.items, _finite_mask(cache, each.items, each.mask), resets_age)
            if each.document_ids is not None:
                cache.add_ids(each.rows, each.document_ids)
    if new_items:
        mask = _finite_mask(cache, new_items, new_items_mask)
        _insert(cache, new_items, mask, document_ids, document_rows)


def _insert(
    cache: NegativeCache,
    items: Items,
    mask: Tensor | None,
    document_ids: Tensor | None,
    document_rows: Tensor | None,
) -> None:
    """Write each item to the row of its document, or over one of the oldest rows if the document has none."""
    count = batch_size(items)
    if mask is None:
        mask = torch.ones(count, dtype=torch.bool, device=cache.device)
    if document_ids is None:
        # With the running count as index, the k-th inserted item replaces the k-th oldest row.
        cache.write(oldest_rows(cache.written, count)[mask.cumsum(0) - 1], items, mask)
        return
    ids = document_ids.view(count, -1)
    known = cache.find(ids[:, 0].contiguous()) if document_rows is None else document_rows
    is_known, is_new = mask & (known >= 0), mask & (known < 0)
    is_new &= is_first_of_equal(ids[:, 0], is_new) | (ids[:, 0] < 0)
    # The rows of known documents become the youngest before the oldest are selected, so that none is written twice.
    # Entries of other documents write the lowest possible time to row 0, which the maximum ignores.
    times = torch.where(is_known, cache.step, torch.iinfo(torch.int64).min)
    cache.written.scatter_reduce_(0, known.clamp(min=0), times, "amax")
    rows = oldest_rows(cache.written, count)[is_new.cumsum(0) - 1]
    kept = document_ids
    if document_ids.dim() > 1:  # an unknown id replaces no id
        kept = torch.where(document_ids < 0, cache.document_ids[known], document_ids)
    new_ids = torch.cat([kept, document_ids])
    cache.write(torch.cat([known, rows]), items, torch.cat([is_known, is_new]), document_ids=new_ids)


def _finite_mask(cache: NegativeCache, items: Items, mask: Tensor | None) -> Tensor | None:
    """Remove non-finite items that `check_finite_items` cannot read from the mask, and count them."""
    for value in items.values():
        if isinstance(value, RaggedRows) or not value.is_floating_point() or reads_without_sync(value):
            continue
        is_finite = finite_entries(value).to(cache.device)
        kept = is_finite if mask is None else mask & is_finite
        cache.num_rejected += (~kept if mask is None else mask ^ kept).sum()
        mask = kept
    return mask
