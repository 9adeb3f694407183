"""What only some ranks have or do: negatives, gradients, dtypes, widths, mistakes. No hang, and the same answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from negative_cache import (
    CacheClassificationLoss,
    CacheLossHandler,
    CacheManager,
    DistributedCacheClassificationLoss,
    FixedLenFeature,
    MultiCacheLossHandler,
    NegativeCache,
    NegativeCacheLoss,
    RaggedFeature,
)
from support import assert_same_state, run_ranks, snapshot

DIM, BATCH = 6, 4


class Documents(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.table = nn.Parameter(torch.randn(64, DIM, generator=generator))

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return nn.functional.normalize(self.table[features["number"]], dim=1)


def own(rank: int, step: int = 0) -> Tensor:
    return torch.arange(BATCH) + BATCH * (2 * step + rank)


def call(loss_fn: NegativeCacheLoss, numbers: Tensor, factor: float = 1.0, **given: Any) -> Tensor:
    embedded = loss_fn.document_encoder({"number": numbers})
    loss: Tensor = loss_fn(embedded * factor, embedded, {"number": numbers}, document_ids=numbers, **given)
    return loss


def cache_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if "cache." in key}


def negatives(model: nn.Module, numbers: Tensor) -> dict[str, Any]:
    return {
        "negative_embeddings": model({"number": numbers}),
        "negative_features": {"number": numbers},
        "negative_ids": numbers,
    }


def check_given_negatives(rank: int, world_size: int, folder: Path) -> None:
    model = Documents()
    loss_fn = NegativeCacheLoss(model, 32, num_samples=1, seed=0, process_group="world")
    call(loss_fn, own(rank)).backward()
    # a frozen document tower, negatives on one rank only, in another dtype
    with torch.no_grad():
        frozen = negatives(model, torch.arange(2) + 40)
    frozen["negative_embeddings"] = frozen["negative_embeddings"].half()
    queries = model({"number": own(rank)}).detach().requires_grad_()
    documents = model({"number": own(rank)}).detach()
    loss_fn(queries, documents, {"number": own(rank)}, **(frozen if rank else {})).backward()
    # with a gradient on one rank alone
    model.zero_grad()
    given = negatives(model, torch.arange(3) + 50) if rank == 0 else {}
    queries = queries.detach().requires_grad_()
    loss_fn(queries, documents, {"number": own(rank)}, **given).backward()
    reached = model.table.grad if model.table.grad is not None else torch.zeros(64, DIM)
    assert bool(reached[50:53].any()) == (rank == 0)
    # an encoder that fails where negatives are given
    before = snapshot(loss_fn)
    loss_fn.document_encoder = lambda features: model(features)[: -1 if rank else None]
    with pytest.raises(ValueError, match="Rank 1, step 3: The document encoder returned shape"):
        loss_fn(queries, documents, {"number": own(rank)}, **negatives(model, torch.arange(2) + 40 + rank))
    after = snapshot(loss_fn)
    assert_same_state(
        {k: v for k, v in before.items() if "cache." in k}, {k: after[k] for k in before if "cache." in k}
    )


def test_given_negatives_on_some_ranks(tmp_path: Path):
    run_ranks(check_given_negatives, 2, tmp_path)


def check_new_items(rank: int, world_size: int, folder: Path) -> None:
    """What cannot be stored on one rank is written on none."""
    model = Documents()
    loss_fn = NegativeCacheLoss(model, 32, num_samples=1, embedding_dtype=torch.float16, seed=0, process_group="world")
    call(loss_fn, own(rank))
    before = snapshot(loss_fn)
    documents = model({"number": own(rank)}) * (1e5 if rank == 1 else 1.0)
    with pytest.raises(ValueError, match=r"Rank 1, step 1: .*stored as torch.float16, has NaN or infinity in . of 4"):
        loss_fn(model({"number": own(rank)}), documents, {"number": own(rank)})
    assert_same_state(before, snapshot(loss_fn))
    queries = model({"number": own(rank)})
    with pytest.raises(TypeError, match="Rank 1, step 1: `query_embeddings` is tuple; expected a dense tensor"):
        loss_fn((queries,) if rank == 1 else queries, queries, {"number": own(rank)})  # type: ignore[arg-type]
    assert_same_state(before, snapshot(loss_fn))
    loss_fn = NegativeCacheLoss(lambda f: f["vector"], 32, num_samples=1, seed=0, process_group="world")
    vectors = model({"number": own(rank)}).detach()
    loss_fn(vectors.clone().requires_grad_(), vectors, {"vector": vectors})
    before = snapshot(loss_fn)
    bad = vectors * (torch.nan if rank == 0 else 1.0)
    with pytest.raises(ValueError, match=r"Rank 0, step 1: `document_features\['vector'\]`"):
        loss_fn(vectors.clone().requires_grad_(), vectors, {"vector": bad})
    assert_same_state(before, snapshot(loss_fn))


def test_what_cannot_be_stored_on_one_rank(tmp_path: Path):
    run_ranks(check_new_items, 2, tmp_path)


def make_handler(kind: type[CacheClassificationLoss], width: int = 4, rows: int = 16, **settings: Any) -> Any:
    specs = {
        "number": FixedLenFeature([], torch.int64),
        "words": FixedLenFeature([width], torch.int32),
        "embedding": FixedLenFeature([DIM], torch.float32),
    }
    keys = ("number", "words")
    return CacheLossHandler(CacheManager(specs, rows), kind("embedding", keys), "embedding", keys, **settings)


def handle(handler: CacheLossHandler, model: nn.Module, numbers: Tensor, width: int, factor: float = 1.0) -> Tensor:
    features = {"number": numbers, "words": numbers[:, None].expand(-1, width).to(torch.int32)}
    embedded = model(features)
    loss: Tensor = handler.update_cache_and_compute_loss(model, embedded * factor, embedded, features)
    return loss


def check_top_k(rank: int, world_size: int, folder: Path) -> None:
    model, handler = Documents(), make_handler(DistributedCacheClassificationLoss)
    handler.cache_loss.top_k = 33
    with pytest.raises(ValueError, match="top_k is 33; it must be from 1 to the 32 rows of the caches of all ranks"):
        handle(handler, model, own(rank), 2)
    handler.cache_loss.top_k = 4 if rank else None
    with pytest.raises(ValueError, match="The ranks differ in `top_k`"):
        handle(handler, model, own(rank), 2)


def test_top_k_beyond_all_rows_or_different_top_k_raises_on_every_rank(tmp_path: Path):
    run_ranks(check_top_k, 2, tmp_path)


def check_replicas(rank: int, world_size: int, folder: Path) -> None:
    """Features narrower than their spec, errors on one rank, and fewer rows than ranks."""
    model = Documents()
    for kind in (CacheClassificationLoss, DistributedCacheClassificationLoss):
        handler = make_handler(kind, use_cross_replica=True)
        for step in range(3):
            handle(handler, model, own(rank, step), 2 + rank)
        for key, value in handler.cache.state_dict().items():
            both = [torch.empty_like(value) for _ in range(world_size)]
            dist.all_gather(both, value)
            assert torch.equal(both[0], both[1]), (kind, key)
        assert bool((handler.cache.data["words"][:, 3] == 0).all())
        before = snapshot(handler.cache)
        with pytest.raises(ValueError, match=r"Rank 1, step 3: query_embeddings has NaN"):
            handle(handler, model, own(rank), 2, torch.nan if rank else 1.0)

        def broken(features: dict[str, Tensor]) -> Tensor:
            if rank == 0:
                raise KeyError("no such input")
            return model(features)

        features = {"number": own(rank), "words": torch.zeros(BATCH, 1, dtype=torch.int32)}
        embedded = model(features)
        with pytest.raises(RuntimeError, match="Rank 0, step 3: KeyError: 'no such input'"):
            handler.update_cache_and_compute_loss(broken, embedded, embedded, features)
        assert_same_state(before, snapshot(handler.cache))
    small = make_handler(DistributedCacheClassificationLoss, rows=1, use_cross_replica=True)
    features = {"number": torch.zeros(1, dtype=torch.int64), "words": torch.zeros(1, 1, dtype=torch.int32)}
    embedded = model(features)
    with pytest.raises(ValueError, match="2 items, the cache only 1 rows"):  # of both ranks together
        small.update_cache_and_compute_loss(model, embedded, embedded, features)
    small.cache.filled[:] = True
    small.eval()
    assert bool(small.update_cache_and_compute_loss(model, embedded, embedded, features).isfinite())
    manager = CacheManager({"vector": FixedLenFeature([DIM], torch.float32), "words": RaggedFeature(torch.int64)}, 1)
    one_row = manager.update_cache(
        manager.init_cache(), new_items={"vector": torch.ones(1, DIM), "words": torch.tensor([[1, 2]])}
    )
    replicated = DistributedCacheClassificationLoss("vector", ("words",))
    replicated.is_replicated = True
    weight = torch.ones(DIM, requires_grad=True)
    vectors = torch.ones(2, DIM)
    found = replicated(lambda f: f["words"].sum(1)[:, None] * weight, vectors, vectors, {"cache": one_row})
    assert bool(found.training_loss.isfinite())  # the second rank has no row to search
    sharded = make_handler(DistributedCacheClassificationLoss)
    sharded.train(rank == 0)
    with pytest.raises(ValueError, match="differ in training or evaluating"):
        handle(sharded, model, own(rank), 2)
    wrong = torch.ones(BATCH, DIM + rank)
    with pytest.raises(ValueError, match=r"Rank 1, step 0: Query embeddings have shape \[4, 7\]"):
        sharded.cache_loss(model, wrong, wrong, {"cache": sharded.cache})


def test_replicas_with_what_differs(tmp_path: Path):
    run_ranks(check_replicas, 2, tmp_path)


def check_named_caches(rank: int, world_size: int, folder: Path) -> None:
    """Several caches of different widths and dtypes: what one process reads is what arrives."""
    sizes, dtypes = {"a": (4, torch.float16), "b": (7, torch.float32)}, {}
    caches, managers = {}, {}
    for name, (width, dtype) in sizes.items():
        specs = {
            "zone": FixedLenFeature([width], torch.int32),
            "number": FixedLenFeature([], torch.int64),
            "embedding": FixedLenFeature([DIM], dtype),
        }
        managers[name] = CacheManager(specs, 8)
        numbers = torch.arange(8) + 8 * rank + (16 if name == "b" else 0)
        zone = numbers[:, None].expand(-1, width).to(torch.int32)
        data = {"zone": zone, "number": numbers, "embedding": Documents()({"number": numbers}).detach().to(dtype)}
        caches[name] = NegativeCache(data, torch.zeros(8, dtype=torch.int64))
        dtypes[name] = dtype
    loss_fn = DistributedCacheClassificationLoss("embedding", ("zone", "number"), lambda s: 3.0 * s)
    model, seen = Documents(), []

    def encode(features: dict[str, Tensor]) -> Tensor:
        seen.append(features)
        return model(features)

    for _ in range(10):
        queries = model({"number": own(rank)})
        result = loss_fn(encode, queries, queries, caches, return_topk=3)
        assert float(result.staleness) < 1e-5
        for name, cache in caches.items():
            rows, mask = result.updated_item_indices[name], result.updated_item_mask[name]
            got = result.updated_item_data[name]["embedding"][mask]
            expected = model({"number": cache.data["number"][rows[mask]]})
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    for features in [*seen, *result.topk_features]:
        assert features["zone"].shape[1] == 7
        assert bool((features["zone"][:, :4] == features["number"][:, None]).all())
        is_wide = features["number"] >= 16
        assert bool((features["zone"][:, 4:] == torch.where(is_wide, features["number"], 0)[:, None]).all())
    handler = MultiCacheLossHandler(managers, loss_fn, "embedding", ("zone", "number"))
    items = {name: {"zone": torch.ones(2, 3, dtype=torch.int32), "number": torch.arange(2)} for name in sizes}
    queries = model({"number": torch.arange(2)})
    handler.update_cache_and_compute_loss(encode, queries, queries, dict.fromkeys(sizes, queries), items)
    first = handler.update_cache_and_compute_loss(
        encode, queries, queries, dict.fromkeys(sizes, queries), items, return_topk=2
    )[1]
    assert all(set(features) == {"zone", "number"} for features in first)


def test_several_caches_that_differ(tmp_path: Path):
    run_ranks(check_named_caches, 2, tmp_path)


class Wrapped(nn.Module):
    """A model that owns its loss, as a LightningModule does."""

    def __init__(self, gathers: bool) -> None:
        super().__init__()
        self.documents = Documents()
        self.loss_fn = NegativeCacheLoss(
            self.documents, 32, num_samples=1, seed=0, learnable_scale=True, process_group="world" if gathers else None
        )
        specs = {"number": FixedLenFeature([], torch.int64), "embedding": FixedLenFeature([DIM], torch.float32)}
        cache_loss = CacheClassificationLoss("embedding", ("number",))
        self.handler = CacheLossHandler(CacheManager(specs, 16), cache_loss, "embedding", ("number",))

    def forward(self, numbers: Tensor) -> Tensor:
        embedded = self.documents({"number": numbers})
        loss: Tensor = self.loss_fn(embedded, embedded, {"number": numbers}, document_ids=numbers)
        handled: Tensor = self.handler.update_cache_and_compute_loss(
            self.documents, embedded, embedded, {"number": numbers}
        )
        return loss + handled


def check_ddp_leaves_the_caches_alone(rank: int, world_size: int, folder: Path) -> None:
    for gathers in (False, True):
        inner = Wrapped(gathers)
        inner(own(rank, 0))  # before it is wrapped, too
        model = DistributedDataParallel(inner)
        for step in range(1, 3):
            model(own(rank, step)).backward()
        seen = torch.cat([own(rank, step) for step in range(3)])
        for cache in (inner.loss_fn.cache, inner.handler.cache):
            assert torch.equal(cache.data["number"][cache.filled].sort().values, seen)
        assert any(".cache." in key for key in model.state_dict())
        again = Wrapped(gathers)
        again.load_state_dict(inner.state_dict())
        assert_same_state(snapshot(inner), snapshot(again))


def test_ddp_around_a_model_that_owns_its_loss(tmp_path: Path):
    run_ranks(check_ddp_leaves_the_caches_alone, 2, tmp_path)
