"""Predicts the memory of a cache, and the memory that a step allocates in addition."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch

from negative_cache.cache.columns import ROOM
from negative_cache.cache.index import RowsOfIds
from negative_cache.cache.rows import NegativeCache, module_name
from negative_cache.cache.specs import FixedLenFeature, RaggedFeature, Specs, check_embedding_dtype, embedding_spec
from negative_cache.cache.validation import check_keys
from negative_cache.objective.batch import BIAS, EMBEDDING, GUIDE, SCORED
from negative_cache.retrieval.tile_scores import BLOCK, tile_bytes
from negative_cache.sampling.config import check_num_samples, documents_per_query, draws_per_query

# Average number of float32 matrices that exist at the same time: of queries by drawn rows, and, with gradient, of
# queries by the documents of the batch.
_CANDIDATE_MATRICES, _BATCH_MATRICES = 4, 3


class Bytes(NamedTuple):
    """Predicted memory in bytes.

    Attributes:
        embeddings: The scored columns: embeddings (with scales if int8), a guide's embeddings, and `log_q`
            corrections.
        features: The documents' features.
        bookkeeping: Ages, ids, the mask of filled rows, and the index of ids.
        step: Peak of the allocations of a step by the retrieval pass and the updates, without encoders and their
            inputs. It does not grow with the number of rows of a large cache.
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
    num_samples: float | Literal["auto"] = "auto",
    shared: bool = True,
    in_batch: bool = True,
    guide_dim: int = 0,
    has_log_q: bool = False,
) -> Bytes:
    """Predict the memory of a `NegativeCacheLoss` with a full cache, by counting the tensors that it would hold.

    Args:
        cache_size: Number of rows (on one rank).
        dim: Embedding dimension.
        batch_size: Queries per step (of all ranks).
        embedding_dtype: See `NegativeCacheLoss`.
        specs: Spec per document feature.
        mean_lengths: Mean length of each ragged feature. Its column is counted with 50 % spare room for new items, but
            with at most max_length per row.
        has_ids: Whether documents have ids, one each. `NegativeCacheRankingLoss` has two with labels, 32 bytes a row
            more.
        num_samples, shared, in_batch: See `NegativeCacheLoss`.
        guide_dim: Dimension of a guide's embeddings; 0 without a guide.
        has_log_q: Whether `log_q` is given.

    Returns:
        `Bytes`. `step` is predicted for the tiled pass on a CPU; the fused GPU kernel needs less.

    Raises:
        ValueError: A size is below 1 (`guide_dim`: below 0), the batch is larger than the cache, the dtype is an
            integer dtype other than int8, `mean_lengths` do not match the ragged features or exceed their max_length,
            or `specs` has a key that the cache uses itself.
        TypeError: `embedding_dtype` is not a dtype.
    """
    _check_sizes(cache_size, dim, batch_size, guide_dim)
    check_embedding_dtype(embedding_dtype)
    specs, mean_lengths = dict(specs or {}), dict(mean_lengths or {})
    ragged = _ragged_features(specs, mean_lengths)
    scored: Specs = {
        EMBEDDING: embedding_spec(dim, embedding_dtype),
        **({GUIDE: FixedLenFeature([guide_dim], torch.float32)} if guide_dim else {}),
        **({BIAS: FixedLenFeature([], torch.float32)} if has_log_q else {}),
    }
    cache = NegativeCache.empty({**scored, **specs}, cache_size, "meta")
    embeddings, features = _column_bytes(cache, scored), _column_bytes(cache, specs)
    bookkeeping = sum(buffer.nbytes for buffer in cache.buffers()) - embeddings - features
    if has_ids:
        bookkeeping += sum(buffer.nbytes for buffer in RowsOfIds(cache.document_ids).buffers())
    features += sum(_arena_bytes(spec, cache_size, mean_lengths[key]) for key, spec in ragged.items())
    step = tile_bytes(batch_size, dim, cache_size, embedding_dtype)
    count = documents_per_query(check_num_samples(num_samples, shared), shared, in_batch)
    step += _draw_bytes(batch_size, cache_size, draws_per_query(count, shared), shared)
    step += _BATCH_MATRICES * batch_size * batch_size * 4 if in_batch else 0
    step += 3 * math.ceil(batch_size * (1 + count)) * dim * 4
    return Bytes(embeddings, features, bookkeeping, step)


def _check_sizes(cache_size: int, dim: int, batch_size: int, guide_dim: int) -> None:
    for name, value in (("cache_size", cache_size), ("dim", dim), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` is {value!r}; it must be an integer, at least 1.")
    if batch_size > cache_size:
        raise ValueError(
            f"`batch_size` is {batch_size}, larger than the cache's {cache_size} rows. Use a cache that is larger than "
            "the batch."
        )
    if not isinstance(guide_dim, int) or guide_dim < 0:
        raise ValueError(f"`guide_dim` is {guide_dim!r}; it must be an integer, 0 without a guide.")


def _ragged_features(specs: Specs, mean_lengths: Mapping[str, float]) -> dict[str, RaggedFeature]:
    """Return the ragged features, after a check of their mean lengths."""
    for key in SCORED:
        if key in specs:
            raise ValueError(f"`specs` has the key {key!r}, which the cache itself uses. Rename the feature.")
    ragged = {key: spec for key, spec in specs.items() if isinstance(spec, RaggedFeature)}
    check_keys("mean_lengths", mean_lengths, list(ragged))
    for key, spec in ragged.items():
        longest = math.inf if spec.max_length is None else spec.max_length
        if not 0 <= mean_lengths[key] <= longest or math.isinf(mean_lengths[key]):
            raise ValueError(f"`mean_lengths[{key!r}]` is {mean_lengths[key]}; it must be from 0 to {longest}.")
    return ragged


def _column_bytes(cache: NegativeCache, keys: Iterable[str]) -> int:
    columns = [cache.get_submodule(module_name("feature", key)) for key in keys]
    return sum(buffer.nbytes for column in columns for buffer in column.buffers())


def _arena_bytes(spec: RaggedFeature, cache_size: int, mean_length: float) -> int:
    """Bytes of the values of a ragged feature in a full cache; a new cache has none yet."""
    longest = math.inf if spec.max_length is None else spec.max_length
    return int(cache_size * min(ROOM * mean_length, longest)) * spec.dtype.itemsize


def _draw_bytes(batch_size: int, cache_size: int, num_draws: int, shared: bool) -> int:
    """Peak bytes for drawing rows and, if there are candidates, for weighing them for all queries."""
    # six tensors of at most 8 bytes for each row of a drawn block: row numbers, masks, weights and their sums
    drawing = batch_size * num_draws * BLOCK * 8 * 6
    weighing = _CANDIDATE_MATRICES * batch_size * min(batch_size * num_draws, cache_size) * 4 if shared else 0
    return max(drawing, weighing)
