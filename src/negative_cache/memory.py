"""How many bytes a cache takes, and how many a step takes beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from negative_cache.cache.columns import ROOM
from negative_cache.cache.index import RowsOfIds
from negative_cache.cache.rows import NegativeCache
from negative_cache.cache.specs import (
    FixedLenFeature,
    RaggedFeature,
    Specs,
    check_embedding_dtype,
    check_keys,
    embedding_spec,
)
from negative_cache.objective.batch import BIAS, EMBEDDING, GUIDE, SCORED
from negative_cache.objective.settings import default_candidates
from negative_cache.retrieval.tiles import BLOCK, tile_bytes

# Matrices of float32 numbers that there are at once, in the mean: of queries and drawn rows, of queries and the batch's
# documents, with gradient.
_CANDIDATE_MATRICES, _BATCH_MATRICES = 4, 2


class Bytes(NamedTuple):
    """Predicted memory in bytes.

    Attributes:
        embeddings: The rows that are scored, with the scales of int8 ones; also those of a guide, and corrections.
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
    num_candidates: int | None = None,
    shared: bool = True,
    in_batch: bool = True,
    guide_dim: int = 0,
    has_log_q: bool = False,
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
        num_samples: See `NegativeCacheLoss`.
        num_candidates: See there.
        shared: See there.
        in_batch: See there.
        guide_dim: Dimensions of a guide's embeddings; 0 without a guide.
        has_log_q: Whether steps have `log_q`.
        features_on_disk: Whether features are in a `feature_folder`; only what finds them is counted then.

    Returns:
        `Bytes`. The step is that of the tiled pass on a CPU; that of the fused GPU kernel is smaller.

    Raises:
        ValueError: Sizes below 1 (of a guide below 0), a batch larger than the cache, candidates that are not shared, a
            dtype that a cache cannot have, mean lengths of other features than the ragged ones or beyond their
            max_length, a feature named like one of the cache's own.
    """
    for name, value in (("cache_size", cache_size), ("dim", dim), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` is {value!r}; it must be an integer, at least 1.")
    if batch_size > cache_size:
        raise ValueError(f"`batch_size` is {batch_size}, larger than the cache's {cache_size} rows.")
    if not isinstance(guide_dim, int) or guide_dim < 0:
        raise ValueError(f"`guide_dim` is {guide_dim!r}; it must be an integer, 0 without a guide.")
    if num_candidates is not None and not shared:
        raise ValueError(f"`num_candidates` is {num_candidates}; candidates are only chosen from with shared=True.")
    num_candidates = (num_candidates or default_candidates(num_samples)) if shared else 0
    check_embedding_dtype(embedding_dtype)
    specs, mean_lengths = dict(specs or {}), dict(mean_lengths or {})
    for key in SCORED:
        if key in specs:
            raise ValueError(f"`specs` has the key {key!r}, which the cache itself uses.")
    ragged = {key: spec for key, spec in specs.items() if isinstance(spec, RaggedFeature)}
    check_keys("mean_lengths", mean_lengths, list(ragged))
    for key, spec in ragged.items():
        longest = math.inf if spec.max_length is None else spec.max_length
        if not 0 <= mean_lengths[key] <= longest or math.isinf(mean_lengths[key]):
            raise ValueError(f"`mean_lengths[{key!r}]` is {mean_lengths[key]}; it must be from 0 to {longest}.")
    scored = {EMBEDDING: embedding_spec(dim, embedding_dtype)}
    if guide_dim:
        scored[GUIDE] = FixedLenFeature([guide_dim], torch.float32)
    if has_log_q:
        scored[BIAS] = FixedLenFeature([], torch.float32)
    cache = NegativeCache.empty({**scored, **specs}, cache_size, "meta")
    by_part = {"embedding": 0, "feature": 0, "": 0}
    for name, buffer in cache.named_buffers():
        is_scored = name.startswith(tuple(f"feature_{key}." for key in scored))
        part = "embedding" if is_scored else "feature" if "feature_" in name else ""
        if not (features_on_disk and part == "feature" and name.endswith(".values")):
            by_part[part] += buffer.nbytes
    for key, spec in ragged.items():
        if not features_on_disk:
            length = ROOM * mean_lengths[key]
            if spec.max_length is not None:
                length = min(length, spec.max_length)
            by_part["feature"] += int(cache_size * length) * spec.dtype.itemsize
    if has_ids:
        by_part[""] += sum(buffer.nbytes for buffer in RowsOfIds(cache.document_ids).buffers())
    return Bytes(
        by_part["embedding"],
        by_part["feature"],
        by_part[""],
        tile_bytes(batch_size, dim, cache_size, embedding_dtype)
        + _draw_bytes(batch_size, cache_size, num_samples, num_candidates)
        + (_BATCH_MATRICES * batch_size * batch_size * 4 if in_batch else 0)
        + 3 * batch_size * (1 + num_samples) * dim * 4,
    )


def _draw_bytes(batch_size: int, cache_size: int, num_samples: int, num_candidates: int) -> int:
    """The most that drawing rows takes, and weighing them for all queries, if there are candidates."""
    # float64 cumulative sums over the blocks of a tile and within one, their uniforms, and gathered numbers
    drawing = batch_size * max(num_samples, num_candidates) * BLOCK * 8 * 6
    weighing = _CANDIDATE_MATRICES * batch_size * min(batch_size * num_candidates, cache_size) * 4
    return max(drawing, weighing)
