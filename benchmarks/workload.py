"""Full caches and steps on them, with an encoder that costs next to nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.dense_baseline import SCALE, DenseCache
from benchmarks.sizes import Size
from negative_cache import NegativeCache, NegativeCacheLoss
from negative_cache.cache.columns import quantize
from negative_cache.cache.update import check_new_items, update_rows
from negative_cache.retrieval import Retrieved, Scale, Search, retrieve
from negative_cache.sampling.config import SamplingConfig
from negative_cache.sampling.draw import row_pool

EMBEDDING = "embedding"
TABLE_ROWS = 4096  # distinct documents of the encoder
CHUNK_ROWS = 8192  # written at once where a cache is filled


def unit_rows(count: int, dim: int, device: torch.device) -> Tensor:
    """Random embeddings of length 1: `[count, dim]`."""
    return normalize(torch.randn(count, dim, device=device), dim=1)


def make_features(start: int, count: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """Two int32 features `[count, length]` of documents numbered from `start` on."""
    first = torch.arange(start, start + count, device=device)[:, None].repeat(1, length).to(torch.int32)
    return {"first": first, "second": first.clone()}


def fill(cache: NegativeCache, make: Callable[[int, int], dict[str, Tensor]], embedding_key: str = EMBEDDING) -> None:
    """Insert as many documents as the cache has rows. Their embeddings are random, and rotated from chunk to chunk.

    Args:
        cache: Changed in place.
        make: (number of the first document, number of documents) -> the other features.
        embedding_key: The feature that holds the embedding.
    """
    (dim,) = cache.specs[embedding_key].shape  # type: ignore[union-attr]
    embeddings = unit_rows(min(CHUNK_ROWS, cache.num_rows), dim, cache.device)
    for number, start in enumerate(range(0, cache.num_rows, CHUNK_ROWS)):
        count = min(CHUNK_ROWS, cache.num_rows - start)
        items = {embedding_key: embeddings[:count].roll(number, dims=1), **make(start, count)}
        update_rows(cache, use_lru=True, new_items=check_new_items(cache, cache.specs, items))


class TopKLoss(NegativeCacheLoss):
    """The loss with the `top_k` of the earlier implementations; None for all rows."""

    top_k: int | None = None

    def _sampling(self, *args: Any) -> SamplingConfig:
        return replace(super()._sampling(*args), top_k=self.top_k)


@dataclass
class Workload:
    """A batch, and a loss with a full cache."""

    loss_fn: TopKLoss
    queries: Tensor
    documents: Tensor
    features: dict[str, Tensor]

    @property
    def rows(self) -> Tensor:
        """The stored embeddings `[num_rows, dim]`."""
        return self.cache.stored(EMBEDDING)[0]

    @property
    def cache(self) -> NegativeCache:
        assert self.loss_fn.cache is not None
        return self.loss_fn.cache

    def step(self, top_k: int | None) -> Tensor:
        """The library's step: retrieve, write back, insert."""
        self.loss_fn.top_k = top_k
        loss: Tensor = self.loss_fn(self.queries, self.documents, self.features)
        return loss

    def retrieve(self, top_k: int | None) -> Retrieved:
        """The pass over the rows alone, as the loss runs it."""
        search = Search(self.queries, row_pool(self.cache, EMBEDDING), Scale(SCALE), top_k=top_k)
        return retrieve(search, self.loss_fn.generator)

    def product(self, block_rows: int | None = None) -> Callable[[], object]:
        """The bare product in the rows' dtype: `queries @ rows.T` at once, or `rows @ queries.T` block by block."""
        rows, queries = self.rows, self.queries.detach()
        if rows.dtype == torch.int8:
            operand = quantize(queries)[0]
            multiply = torch._int_mm
        else:
            operand = queries.to(rows.dtype)
            multiply = torch.mm
        blocks = torch.split(rows, block_rows or len(rows))

        def product() -> None:
            if block_rows is None:
                multiply(operand, rows.T)
                return
            for block in blocks:
                multiply(block, operand.T)

        return product


def make_workload(size: Size, device: torch.device, seed: int = 0) -> Workload:
    """A batch and a full cache of the given size."""
    torch.manual_seed(seed)
    encode = make_encoder(size, device)
    loss_fn = TopKLoss(
        encode,
        size.rows,
        SCALE,
        num_samples=1,
        in_batch=False,
        shared=False,
        embedding_dtype=size.torch_dtype,
        seed=seed,
    )
    queries = unit_rows(size.batch, size.dim, device).requires_grad_()
    features = make_features(size.rows, size.batch, size.length, device)
    documents = encode(features)
    loss_fn(queries[:1], documents[:1], {key: value[:1] for key, value in features.items()})  # creates the cache
    assert loss_fn.cache is not None
    fill(loss_fn.cache, lambda start, count: make_features(start, count, size.length, device))
    return Workload(loss_fn, queries, documents, features)


def make_encoder(size: Size, device: torch.device) -> Callable[[dict[str, Tensor]], Tensor]:
    """An encoder that looks the embedding of a document up by its number."""
    table = unit_rows(min(size.rows, TABLE_ROWS), size.dim, device)
    return lambda features: table[features["first"][:, 0].long() % len(table)]


def make_dense(size: Size, device: torch.device) -> DenseCache:
    """A full cache for the dense step."""
    age = torch.arange(size.rows, dtype=torch.int32, device=device).flip(0) // size.batch
    features = make_features(0, size.rows, size.length, device)
    return DenseCache(unit_rows(size.rows, size.dim, device), features, age, make_encoder(size, device))
