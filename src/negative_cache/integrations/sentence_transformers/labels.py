"""The label column: ids of the positives, which replace the hashes of their tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def ids_from_labels(labels: Tensor | None, hashes: Tensor) -> tuple[Tensor, Tensor | None]:
    """Ids of the positives, and of further documents that are not negatives of the anchors.

    Args:
        labels: int `[batch]`, ids of the positives; or `[batch, n]`, each followed by ids of further positives, padded
            with -1; or None.
        hashes: int64 `[batch]`, hashes of the positives' tokens.

    Returns:
        `ids`, int64 `[batch]`: the labels, or the hashes if there are no labels. `positive_ids`, int64 `[batch, n]`:
        the further positives and the hashes, or None if there are no labels.

    Raises:
        ValueError: `labels` are not integers, or their shape is wrong.
    """
    if labels is None or labels.numel() == 0:
        return hashes, None
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"`labels` is {labels.dtype}; the label column must hold integer document ids. Remove the column, "
            "or rename it, if it means something else."
        )
    if labels.dim() not in (1, 2) or len(labels) != len(hashes):
        raise ValueError(f"`labels` has shape {list(labels.shape)}; expected [{len(hashes)}] or [{len(hashes)}, n].")
    labels = labels.to(hashes.device, torch.int64)
    if labels.dim() == 1:
        return labels, hashes[:, None]
    return labels[:, 0], torch.cat([labels[:, 1:], hashes[:, None]], dim=1)


def check_labels_are_ids(labels: Tensor, hashes: Tensor) -> None:
    """Raise ValueError if labels `[batch]` or `[batch, n]` appear to rate pairs; synchronizes the device.

    Labels rate pairs if all of them are 0 or 1 and the batch has more different texts than labels.
    """
    if int(labels.max()) <= 1 and len(torch.unique(hashes)) > len(torch.unique(labels[labels >= 0])):
        raise ValueError(
            "The labels of different positives are only 0 and 1, as if they separated good pairs from bad ones; "
            "expected ids of documents. Keep the good pairs and remove the label column, or pass mined negatives as "
            "columns (anchor, positive, negative, ...): mine_hard_negatives(output_format='n-tuple')."
        )
