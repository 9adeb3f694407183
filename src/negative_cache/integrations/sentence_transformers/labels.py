"""The label column: further ids of the positives, in addition to the hashes of their tokens."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from negative_cache.cache.rows import NegativeCache
from negative_cache.cache.specs import NO_ID


def number_of(label: Any) -> Any:
    """The integer that stands for a label: a hash of 62 bits of a text, the same in every process; -1 for None."""
    if isinstance(label, str):
        return int.from_bytes(hashlib.blake2b(label.encode(), digest_size=8).digest(), "big") >> 2
    return NO_ID if label is None else label


def check_labels(labels: Tensor, num_pairs: int, num_documents: int, reads_values: bool) -> None:
    """Raise ValueError unless labels of pairs, or of all documents of a batch, have the right dtype, shape and values.

    Values are read only if `reads_values` is True; that synchronizes the device.
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"`labels` is {labels.dtype}; the label column must hold integer document ids. Remove the column, "
            "or rename it, if it means something else."
        )
    is_wrong = labels.dim() not in (1, 2) or len(labels) not in (num_pairs, num_documents)
    if is_wrong or (labels.dim() == 2 and labels.shape[1] == 0):
        expected = f"[{num_pairs}] or [{num_pairs}, n]"
        if num_documents > num_pairs:
            expected += f", or with the labels of the negatives [{num_documents}, n]"
        raise ValueError(f"`labels` has shape {list(labels.shape)}; expected {expected}.")
    if reads_values and int(labels.min()) < NO_ID:
        raise ValueError(f"`labels` has the value {int(labels.min())}; document ids are 0 or larger, -1 for unknown.")


def check_labels_are_no_ratings(labels: Tensor, hashes: Tensor) -> None:
    """Raise ValueError if labels `[batch, n]` appear to rate pairs; synchronizes the device.

    Labels rate pairs if all of them that are known are 0 or 1 and the batch has more different texts than labels.
    """
    if 0 <= int(labels.max()) <= 1 and len(torch.unique(hashes)) > len(torch.unique(labels[labels >= 0])):
        raise ValueError(
            "The labels of different positives are only 0 and 1, as if they separated good pairs from bad ones; "
            "expected ids of documents. Keep the good pairs and remove the label column, or pass mined negatives as "
            "columns (anchor, positive, negative, ...): mine_hard_negatives(output_format='n-tuple')."
        )


def have_other_text(labels: Tensor, hashes: Tensor, cache: NegativeCache | None) -> Tensor:
    """Find labels that contradict "one label, one text", in the batch or in the cache.

    Args:
        labels: int64 `[batch]`: the label of each positive, -1 for unknown.
        hashes: int64 `[batch]`: the hashes of their tokens.
        cache: This rank's rows, whose documents are identified by hash and label; None if it is empty.

    Returns:
        bool `[batch]`: whether another text has the label, before it in the batch or in the cache.
    """
    order = labels.argsort(stable=True)
    first = torch.searchsorted(labels[order], labels)
    is_bad = hashes[order[first]] != hashes
    if cache is not None and cache.num_ids > 1:
        rows = cache.find(labels)
        is_bad |= (rows >= 0) & (cache.document_ids[rows, 0] != hashes)
    return is_bad & (labels >= 0)
