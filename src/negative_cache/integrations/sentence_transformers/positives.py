"""Which anchors belong to a document, as far as the cache of documents remembers.

A cached anchor is known by its own text. That it belongs to a document, whose negative it then must not be, stands in
the document's row: the ids of the anchors it came with last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from negative_cache.cache.rows import NO_ID, NegativeCache
from negative_cache.cache.specs import FixedLenFeature

ANCHORS = "anchor_ids"
NUM_ANCHORS = 4  # remembered per document
ANCHORS_SPEC = FixedLenFeature([NUM_ANCHORS], torch.int64)


def known_anchors(cache: NegativeCache | None, document_ids: Tensor) -> Tensor:
    """Ids of the anchors that documents `[n]` came with before: int64 `[n, NUM_ANCHORS]`, -1 for none."""
    none = document_ids.new_full((len(document_ids), NUM_ANCHORS), NO_ID)
    if cache is None:
        return none
    rows = cache.find(document_ids)
    known = cache.read(rows.clamp(min=0), [ANCHORS])[ANCHORS].to(document_ids.device)
    return torch.where(rows[:, None] >= 0, known, none)


def anchors_of(document_ids: Tensor, anchor_ids: Tensor, known: Tensor) -> Tensor:
    """All known anchors of the documents of a batch: their own, those of equal documents in the batch, older ones.

    Args:
        document_ids: int64 `[batch]`, -1 for unknown.
        anchor_ids: int64 `[batch]`, at least 0.
        known: int64 `[batch, NUM_ANCHORS]`.

    Returns:
        int64 `[batch, n]`, each once, its own first, filled up with -1.
    """
    is_same = (document_ids[:, None] == document_ids) & (document_ids >= 0)
    count = min(NUM_ANCHORS, len(document_ids))
    others = torch.where(is_same, anchor_ids, NO_ID).topk(count, dim=1).values
    found = anchor_ids[:, None]
    for column in torch.cat([others, known], dim=1).T:
        is_new = (column[:, None] != found).all(dim=1)
        found = torch.cat([found, torch.where(is_new, column, NO_ID)[:, None]], dim=1)
    order = (found < 0).to(torch.uint8).argsort(dim=1, stable=True)
    return found.gather(1, order)
