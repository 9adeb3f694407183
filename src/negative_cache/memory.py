"""How many bytes a cache takes, and how many a step takes beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from negative_cache.batch import EMBEDDING
from negative_cache.cache import NegativeCache
from negative_cache.columns import ROOM
from negative_cache.features import RaggedFeature, Specs, check_embedding_dtype, check_keys, embedding_spec
from negative_cache.lookup import RowsOfIds
from negative_cache.retrieval.tiles import BLOCK, tile_bytes


class Bytes(NamedTuple):
    """Predicted memory in bytes.

    Attributes:
        embeddings: The rows that are scored, with the scales of int8 ones.
        features: The documents' features.
        bookkeeping: Ages, ids, filled rows, and what finds them.
        step: The most that the retrieval pass and the updates of a step allocate beside, encoders and their inputs
            excluded. It does not depend on the number of rows.
    """

    embeddings: int
    features: int
    bookkeeping: int
    step: int


def predict_bytes(
    cache_size: int,
    dim: int,
    batch_size: int,
    *,
    embedding_dtype: torch.dtype = torch.float32,
    specs: Specs | None = None,
    mean_lengths: Mapping[str, float] | None = None,
    has_ids: bool = True,
    num_samples: int = 1,
    features_on_disk: bool = False,
) -> Bytes:
    """Memory of a `NegativeCacheLoss` with a full cache, by counting the tensors that it would have.

    Args:
        cache_size: Rows (on one rank).
        dim: Dimensions of an embedding.
        batch_size: Queries per step (of all ranks).
        embedding_dtype: See `NegativeCacheLoss`.
        specs: Spec per document feature.
        mean_lengths: Mean length of each ragged feature. Up to half as much again is counted, which is
            the room in which such a feature is kept, or max_length per row where that is less.
        has_ids: Whether documents have ids.
        num_samples: Rows drawn per query.
        features_on_disk: Whether features are in a `feature_folder`; only what finds them is counted then.

    Returns:
        `Bytes`. The step is that of the tiled pass on a CPU; that of the fused GPU kernel is smaller.

    Raises:
        ValueError: Sizes below 1, a batch larger than the cache, a dtype that a cache cannot have, mean lengths of
            other features than the ragged ones or beyond their max_length, a feature named like the embedding.
    """
    for name, value in (("cache_size", cache_size), ("dim", dim), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` is {value!r}; it must be an integer, at least 1.")
    if batch_size > cache_size:
        raise ValueError(f"`batch_size` is {batch_size}, larger than the cache's {cache_size} rows.")
    check_embedding_dtype(embedding_dtype)
    specs, mean_lengths = dict(specs or {}), dict(mean_lengths or {})
    if EMBEDDING in specs:
        raise ValueError(f"`specs` has the key {EMBEDDING!r}, which the cache itself uses.")
    ragged = {key: spec for key, spec in specs.items() if isinstance(spec, RaggedFeature)}
    check_keys("mean_lengths", mean_lengths, list(ragged))
    for key, spec in ragged.items():
        longest = math.inf if spec.max_length is None else spec.max_length
        if not 0 <= mean_lengths[key] <= longest or math.isinf(mean_lengths[key]):
            raise ValueError(f"`mean_lengths[{key!r}]` is {mean_lengths[key]}; it must be from 0 to {longest}.")
    cache = NegativeCache.empty({EMBEDDING: embedding_spec(dim, embedding_dtype), **specs}, cache_size, "meta")
    by_part = {"embedding": 0, "feature": 0, "": 0}
    for name, buffer in cache.named_buffers():
        part = "embedding" if name.startswith("feature_embedding.") else "feature" if "feature_" in name else ""
        if not (features_on_disk and part == "feature" and name.endswith(".values")):
            by_part[part] += buffer.nbytes
    for key, spec in ragged.items():
        if not features_on_disk:
            length = ROOM * mean_lengths[key]
            if spec.max_length is not None:
                length = min(length, spec.max_length)
            by_part["feature"] += int(cache_size * length) * spec.dtype.itemsize
    if has_ids:
        by_part[""] += RowsOfIds(cache.document_ids).slots.nbytes
    step = tile_bytes(batch_size, dim, cache_size, embedding_dtype)
    # float64 cumulative sums over the blocks of a tile and within one, their uniforms, and gathered numbers
    step += batch_size * num_samples * BLOCK * 8 * 6
    step += 3 * batch_size * (1 + num_samples) * dim * 4
    return Bytes(by_part["embedding"], by_part["feature"], by_part[""], step)
