"""Encoding cached documents anew without gradient: a few in each step, or a whole corpus before the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from negative_cache.cache.rows import NegativeCache
from negative_cache.sampling.draw import DocumentEncoder, encode, read_pool


@torch.no_grad()
def refresh(
    cache: NegativeCache,
    embedding_key: str,
    data_keys: Sequence[str],
    encoder: DocumentEncoder,
    count: int,
    is_alone: bool = True,
) -> None:
    """Encode `count` filled rows anew, in turn: each row once in `num_filled / count` steps. Ages stay as they are.

    What is not finite is kept out and counted: the step is written already, so it is too late to raise.
    """
    if is_alone and not cache.has_rows():  # ranks encode together, or a wrapped encoder would wait for the others
        return
    turn = torch.arange(count, device=cache.device) + cache.step * count
    rows = turn % cache.num_filled.clamp(min=1)
    dim = cache.stored(embedding_key)[0].shape[1]
    embeddings = encode(encoder, read_pool([cache], rows, data_keys), count, dim, must_be_finite=False)
    stored = embeddings.to(cache.specs[embedding_key].dtype)
    is_finite, is_filled = stored.isfinite().all(dim=1), cache.filled[rows]
    cache.num_rejected += (is_filled & ~is_finite).sum()
    cache.write(rows, {embedding_key: stored}, is_filled & is_finite, resets_age=False)


def check_filling(batch: Mapping[str, Any]) -> None:
    """Raise unless a batch of documents has features and ids."""
    missing = {"document_features", "document_ids"} - set(batch)
    if missing:
        raise ValueError(f"A batch has the keys {sorted(batch)}; it must have {sorted(missing)} too.")
    ids = batch["document_ids"]
    if len(ids) and int(ids.min()) < 0:
        raise ValueError(f"`document_ids` has the value {int(ids.min())}; every document needs an id of 0 or more.")


def check_room(cache: NegativeCache, document_ids: Tensor) -> None:
    """Raise unless documents `[n]` can all be put in without any being pushed out."""
    room = cache.num_rows - int(cache.num_filled)
    num_new = int((cache.find(torch.unique(document_ids).to(cache.device, torch.int64)) < 0).sum())
    if num_new > room:
        raise ValueError(
            f"The documents do not fit: the cache has {cache.num_rows} rows on this rank, {room} of them free, and "
            f"{num_new} more documents come. Use a larger cache_size, or leave fill_from out."
        )
