"""Known anchors of documents: with `symmetric=True`, they are excluded from the documents' negatives.

An anchor is identified by a hash of its tokens. Each row of the document cache stores the ids of the last anchors that
its document was paired with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from negative_cache.cache.rows import NegativeCache
from negative_cache.cache.specs import NO_ID, FixedLenFeature

ANCHOR_IDS = "anchor_ids"
NUM_ANCHORS = 4  # stored per document
ANCHOR_IDS_SPEC = FixedLenFeature([NUM_ANCHORS], torch.int64)


def known_anchors(cache: NegativeCache | None, document_ids: Tensor) -> Tensor:
    """Read the anchors that cached documents were paired with.

    Args:
        cache: This rank's rows of the document cache; None if it is empty.
        document_ids: int64 `[n]`.

    Returns:
        int64 `[n, NUM_ANCHORS]`, padded with -1.
    """
    none = document_ids.new_full((len(document_ids), NUM_ANCHORS), NO_ID)
    if cache is None:
        return none
    rows = cache.find(document_ids)
    known = cache.read(rows.clamp(min=0), [ANCHOR_IDS])[ANCHOR_IDS].to(document_ids.device)
    return torch.where(rows[:, None] >= 0, known, none)


def merge_anchors(document_ids: Tensor, anchor_ids: Tensor, known: Tensor) -> Tensor:
    """All known anchors of each document of a batch: its own, those of equal documents in the batch, and earlier ones.

    Args:
        document_ids: int64 `[batch]`, -1 for unknown.
        anchor_ids: int64 `[batch]`, at least 0.
        known: int64 `[batch, NUM_ANCHORS]`, see `known_anchors`.

    Returns:
        int64 `[batch, n]`: each anchor once, the document's own first, padded with -1.
    """
    is_same = (document_ids[:, None] == document_ids) & (document_ids >= 0)
    count = min(NUM_ANCHORS, len(document_ids))
    others = torch.where(is_same, anchor_ids, NO_ID).topk(count, dim=1).values
    merged = anchor_ids[:, None]
    for column in torch.cat([others, known], dim=1).T:
        is_new = (column[:, None] != merged).all(dim=1)
        merged = torch.cat([merged, torch.where(is_new, column, NO_ID)[:, None]], dim=1)
    # Move the padding to the end, because the cache stores only the first NUM_ANCHORS columns.
    order = (merged < 0).to(torch.uint8).argsort(dim=1, stable=True)
    return merged.gather(1, order)
