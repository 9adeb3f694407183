"""One call per step: the loss and the updates of the caches."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from negative_cache import (
    CacheClassificationLoss,
    CacheManager,
    GumbelMaxRetrievalFn,
    IsInCacheFilterFn,
    MultiCacheLossHandler,
    RaggedFeature,
    handlers,
    losses,
    negative_cache,
)
from support import Encoder, assert_same_state, run_ranks, snapshot

DIM = 8
SPECS = {
    "a": negative_cache.FixedLenFeature([], torch.int64),
    "b": negative_cache.FixedLenFeature([], torch.int64),
    "embedding": negative_cache.FixedLenFeature([DIM], torch.float32),
}


def new_handler(cache_size: int = 16, filter_fn: Any = None, use_lru: bool = True, **options: Any) -> Any:
    manager = CacheManager(SPECS, cache_size, use_lru)
    options = {"score_transform": lambda s: 20.0 * s, **options}
    loss = CacheClassificationLoss("embedding", ("a", "b"), **options)
    return handlers.CacheLossHandler(manager, loss, "embedding", ("a", "b"), filter_fn=filter_fn)


def features(count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randint(50, (count,), generator=generator) for key in ("a", "b")}


def step(handler: Any, encoder: Encoder, seed: int, batch: int = 4, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(1000 + seed)
    queries = torch.randn(batch, DIM, generator=generator, requires_grad=True)
    items = features(batch, seed)
    return handler.update_cache_and_compute_loss(encoder, queries, encoder(items), items, **options)


def test_the_documented_first_use_works() -> None:
    torch.manual_seed(0)
    specs = {
        "embedding": negative_cache.FixedLenFeature(shape=[DIM], dtype=torch.float32),
        "a": negative_cache.FixedLenFeature(shape=[1], dtype=torch.int32),
        "b": negative_cache.FixedLenFeature(shape=[2], dtype=torch.int32),
    }
    cache_manager = negative_cache.CacheManager(specs, cache_size=131_072)
    cache_loss = losses.CacheClassificationLoss(
        embedding_key="embedding", data_keys=("a", "b"), score_transform=lambda s: 20.0 * s, top_k=64
    )
    handler = handlers.CacheLossHandler(cache_manager, cache_loss, embedding_key="embedding", data_keys=("a", "b"))
    words = nn.Embedding(50, DIM)

    def item_network(items: dict[str, Tensor]) -> Tensor:
        tokens = torch.cat([items["a"], items["b"]], dim=1)
        return nn.functional.normalize(words(tokens).mean(dim=1), dim=1)

    for number in range(3):
        words.zero_grad()
        items = {"a": torch.randint(50, (16, 1)), "b": torch.randint(50, (16, 2))}
        queries = nn.functional.normalize(torch.randn(16, DIM), dim=1).requires_grad_()
        loss = handler.update_cache_and_compute_loss(item_network, queries, item_network(items), items)
        loss.backward()
        assert loss.isfinite()
        assert loss.shape == ()
        assert (queries.grad.abs().sum() > 0) == (number > 0)
        assert int(handler.cache.num_filled) == 16 * (number + 1)
    assert torch.equal(handler.cache.data["b"][32:48], items["b"].int())
    assert handler.cache.age[:64].tolist()[32:] == [0] * 16 + [3] * 16


def test_one_feature_is_enough() -> None:
    specs = {"data": negative_cache.FixedLenFeature([3], torch.float32), "embedding": SPECS["embedding"]}
    loss = CacheClassificationLoss("embedding", ("data",))
    handler = handlers.CacheLossHandler(CacheManager(specs, 8), loss, "embedding", ("data",))
    network = nn.Linear(3, DIM)
    for _ in range(3):
        items = {"data": torch.randn(2, 3), "ignored": torch.zeros(7)}
        value = handler.update_cache_and_compute_loss(
            lambda f: network(f["data"]), torch.randn(2, DIM), network(items["data"]), items
        )
    value.backward()
    assert network.weight.grad.abs().sum() > 0
    assert torch.equal(handler.cache.data["data"][4:6], items["data"])


@pytest.mark.parametrize("use_lru", [True, False])
def test_updates_are_written_before_the_new_items(use_lru: bool) -> None:
    torch.manual_seed(0)
    handler, encoder = new_handler(cache_size=8, use_lru=use_lru), Encoder(dim=DIM)
    step(handler, encoder, 1)
    step(handler, encoder, 2)
    old = copy.deepcopy(handler.cache)
    with torch.no_grad():
        encoder.first.weight.add_(1)
    encoder.calls.clear()
    state = handler.cache_loss.generator.get_state()
    step(handler, encoder, 3)
    handler.cache_loss.generator.set_state(state)
    generator = torch.Generator().manual_seed(1003)
    items, queries = features(4, 3), torch.randn(4, DIM, generator=generator)
    result = handler.cache_loss(encoder, queries, encoder(items), {"docs": old})
    expected = handler.cache_manager.update_cache(
        old,
        new_items={**items, "embedding": encoder(items).detach()},
        updated_item_data=result.updated_item_data["docs"],
        updated_item_indices=result.updated_item_indices["docs"],
        updated_item_mask=result.updated_item_mask["docs"],
    )
    assert_same_state(snapshot(expected), snapshot(handler.cache))


@pytest.mark.parametrize("top_k", [None, 5])
def test_return_topk_equals_a_dense_computation(top_k: int | None) -> None:
    torch.manual_seed(0)
    handler, encoder = new_handler(cache_size=16, top_k=top_k), Encoder(dim=DIM)
    for seed in range(3):
        step(handler, encoder, seed)
    cache = copy.deepcopy(handler.cache)
    loss, top = step(handler, encoder, 9, return_topk=3)
    assert loss.shape == ()
    queries = torch.randn(4, DIM, generator=torch.Generator().manual_seed(1009))
    scores = (queries @ cache.data["embedding"].T).masked_fill(~cache.filled, -torch.inf)
    if top_k is not None:
        groups = torch.arange(16).tensor_split(top_k)
        best = torch.stack([group[scores[:, group].argmax(dim=1)] for group in groups], dim=1)
        scores = torch.full_like(scores, -torch.inf).scatter(1, best, scores.gather(1, best))
    rows = scores.topk(3, dim=1).indices
    assert isinstance(top, list)
    assert len(top) == 4
    for query, found in enumerate(top):
        assert set(found) == {"a", "b"}
        assert found["a"].tolist() == cache.data["a"][rows[query]].tolist()
        assert found["b"].tolist() == cache.data["b"][rows[query]].tolist()


def test_return_topk_of_an_empty_cache_is_empty() -> None:
    _, top = step(new_handler(), Encoder(dim=DIM), 0, return_topk=3)
    assert [found["a"].tolist() for found in top] == [[]] * 4


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("reducer", [torch.mean, None])
@pytest.mark.parametrize("has_step", [False, True])
def test_the_writer_may_be_given_by_position(tmp_path: Path, has_step: bool, reducer: Any) -> None:
    torch.manual_seed(0)
    handler, encoder = new_handler(reducer=reducer), Encoder(dim=DIM)
    expected = []
    with SummaryWriter(tmp_path) as writer:
        for number in range(3):
            items, queries = features(4, number), torch.randn(4, DIM)
            state, cache = handler.cache_loss.generator.get_state(), copy.deepcopy(handler.cache)
            handler.update_cache_and_compute_loss(
                encoder, queries, encoder(items), items, (writer, 10 * number) if has_step else writer
            )
            after = handler.cache_loss.generator.get_state()
            handler.cache_loss.generator.set_state(state)
            result = handler.cache_loss(encoder, queries, encoder(items), {"docs": cache})
            assert torch.equal(after, handler.cache_loss.generator.get_state())
            expected.append((result.interpretable_loss.mean().item(), result.staleness.mean().item()))
            with torch.no_grad():
                encoder.first.weight.mul_(1.1)
    written = scalars(tmp_path)
    steps = [0, 10, 20] if has_step else [0, 1, 2]
    assert set(written) == {"cache/interpretable_prediction_loss", "cache/staleness"}
    for place, tag in enumerate(["cache/interpretable_prediction_loss", "cache/staleness"]):
        assert [at for at, _ in written[tag]] == steps
        assert [value for _, value in written[tag]] == pytest.approx([values[place] for values in expected])
    assert expected[2][1] > 0


def test_without_a_reducer_the_loss_is_per_query() -> None:
    handler, encoder = new_handler(reducer=None), Encoder(dim=DIM)
    assert step(handler, encoder, 0).shape == (4,)
    handler.cache_loss.reducer = torch.sum
    assert step(handler, encoder, 1).shape == ()


def named_handler(filter_fn: Any = None) -> MultiCacheLossHandler:
    loss = CacheClassificationLoss("embedding", ("a", "b"), reducer=None)
    managers = {"web.pages": CacheManager(SPECS, 8), "books": CacheManager(SPECS, 5)}
    return MultiCacheLossHandler(managers, loss, "embedding", ("a", "b"), filter_fn=filter_fn)


def named_step(handler: MultiCacheLossHandler, encoder: Encoder, seed: int) -> Any:
    items = {"web.pages": features(3, seed), "books": features(2, seed + 100)}
    embedded = {name: encoder(value) for name, value in items.items()}
    queries = torch.randn(5, DIM, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    positives = torch.cat([embedded["web.pages"], embedded["books"]])
    return handler.update_cache_and_compute_loss(encoder, queries, positives, embedded, items)


def test_several_caches_are_one_pool_and_each_is_updated() -> None:
    torch.manual_seed(0)
    handler, encoder = named_handler(), Encoder(dim=DIM)
    for seed in range(4):
        named_step(handler, encoder, seed)
    web, books = handler.cache["web.pages"], handler.cache["books"]
    assert web.filled.all()
    assert books.filled.all()
    with torch.no_grad():
        encoder.first.weight.mul_(-3)
    # All old rows of both caches are stale; only sampled rows get new embeddings.
    before = torch.cat([cache.data["embedding"].clone() for cache in (books, web)])
    named_step(handler, encoder, 9)
    embedded = [encoder(cache.read(torch.arange(cache.num_rows), ("a", "b"))) for cache in (books, web)]
    after = torch.cat([cache.data["embedding"] for cache in (books, web)])
    is_new = torch.isclose(after, torch.cat(embedded)).all(dim=1)
    is_old = torch.isclose(after, before).all(dim=1)
    assert (is_new | is_old).all()
    assert 5 < is_new.sum() <= 10  # five inserted, one to five drawn
    assert torch.equal(torch.cat([books.age, web.age]) == 0, is_new)


def test_named_caches_are_in_the_state() -> None:
    torch.manual_seed(0)
    handler, encoder = named_handler(), Encoder(dim=DIM)
    for seed in range(3):
        named_step(handler, encoder, seed)
    other = named_handler()
    other.load_state_dict(handler.state_dict())
    assert_same_state(snapshot(handler), snapshot(other))
    assert torch.equal(named_step(handler, encoder, 3), named_step(other, encoder, 3))


def test_nan_for_one_of_several_caches_writes_none_of_them() -> None:
    torch.manual_seed(0)
    handler, encoder = named_handler(), Encoder(dim=DIM)
    named_step(handler, encoder, 0)
    items = {"web.pages": features(3, 5), "books": features(2, 6)}
    before = snapshot(handler)
    for name in items:
        embedded = {name: encoder(value) for name, value in items.items()}
        embedded[name] = embedded[name] * torch.nan
        with pytest.raises(ValueError, match="NaN"):
            handler.update_cache_and_compute_loss(encoder, torch.randn(5, DIM), torch.randn(5, DIM), embedded, items)
        assert_same_state(before, snapshot(handler))


def test_a_refused_state_changes_nothing_at_all() -> None:
    torch.manual_seed(0)
    handler, encoder = named_handler(), Encoder(dim=DIM)
    named_step(handler, encoder, 0)
    managers = {"web.pages": CacheManager(SPECS, 8), "books": CacheManager(SPECS, 6)}
    loss = CacheClassificationLoss("embedding", ("a", "b"))
    for first, second in (("books", "web.pages"), ("web.pages", "books")):
        target = MultiCacheLossHandler(
            {first: managers[first], second: managers[second]}, loss, "embedding", ("a", "b")
        )
        before = snapshot(target)
        with pytest.raises(ValueError, match="5 rows, this one has 6"):
            target.load_state_dict(handler.state_dict())
        assert_same_state(before, snapshot(target))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize("shape", [(), (2,), (2, 2)])
def test_filter_keeps_known_items_out(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    specs = {"x": negative_cache.FixedLenFeature(shape, dtype), "embedding": SPECS["embedding"]}
    loss = CacheClassificationLoss("embedding", ("x",))
    handler = handlers.CacheLossHandler(
        CacheManager(specs, 8), loss, "embedding", ("x",), filter_fn=IsInCacheFilterFn(("x",))
    )
    for values in ([1, 2], [2, 3], [1, 3], [0, 1]):
        items = {"x": torch.stack([torch.full(shape, value, dtype=dtype) for value in values])}
        handler.update_cache_and_compute_loss(
            lambda f: torch.ones(len(f["x"]), DIM), torch.randn(2, DIM), torch.randn(2, DIM), items
        )
    first = handler.cache.data["x"].reshape(8, -1)[:, 0]
    assert first[handler.cache.filled].tolist() == [1, 2, 3, 0]


def test_the_filter_sees_each_of_several_caches() -> None:
    torch.manual_seed(0)
    handler, encoder = named_handler(IsInCacheFilterFn(("a", "b"))), Encoder(dim=DIM)
    for _ in range(2):
        named_step(handler, encoder, 0)
    assert int(handler.cache["web.pages"].num_filled) == 3
    assert int(handler.cache["books"].num_filled) == 2


@pytest.mark.parametrize("is_eval", [True, False])
def test_evaluation_writes_nothing_and_leaves_the_random_numbers_alone(is_eval: bool) -> None:
    torch.manual_seed(0)
    handler, encoder = new_handler(), Encoder(dim=DIM)
    for seed in range(3):
        step(handler, encoder, seed)
    before = snapshot(handler)
    handler.train(not is_eval)
    with torch.set_grad_enabled(is_eval):
        first, top = step(handler, encoder, 5, return_topk=2)
        second = step(handler, encoder, 5)
    assert len(top) == 4
    assert torch.equal(first, second)
    assert first != 0
    assert_same_state(before, snapshot(handler))
    handler.train()
    step(handler, encoder, 5)
    assert not torch.equal(before["_handler._extra_state"], handler.state_dict()["_handler._extra_state"])


def train(handler: Any, encoder: Encoder, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    values = []
    for seed in steps:
        optimizer.zero_grad()
        loss = step(handler, encoder, seed)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


def new_run(seed: int, **options: Any) -> tuple[Any, Encoder, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    encoder = Encoder(dim=DIM)
    return new_handler(cache_size=12, **options), encoder, torch.optim.Adam(encoder.parameters(), lr=0.05)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"use_lru": False}])
def test_a_resumed_run_equals_an_uninterrupted_one(options: dict[str, Any]) -> None:
    whole = new_run(0, **options)
    values = train(*whole, range(10))
    first = new_run(0, **options)
    resumed_values = train(*first, range(5))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    second = new_run(77, **options)
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    resumed_values += train(*second, range(5, 10))
    assert resumed_values == values
    assert len(set(values)) == 10
    for mine, other in zip(whole[:2], second[:2], strict=True):
        assert_same_state(snapshot(mine), snapshot(other))


def test_without_the_state_the_run_would_differ() -> None:
    values = train(*new_run(0), range(10))
    handler, encoder, optimizer = new_run(0)
    train(handler, encoder, optimizer, range(5))
    state = handler.state_dict()
    handler.cache_loss.generator.manual_seed(5)
    state["_handler._extra_state"] = handler.cache_loss.generator.get_state()
    handler.load_state_dict(state)
    assert train(handler, encoder, optimizer, range(5, 10)) != values[5:]


@pytest.mark.parametrize("part", ["queries", "positives", "encoder"])
def test_nan_is_refused_and_the_cache_is_as_before(part: str) -> None:
    torch.manual_seed(0)
    handler, encoder = new_handler(), Encoder(dim=DIM)
    step(handler, encoder, 0)
    before = snapshot(handler.cache)
    queries, positives, items = torch.randn(4, DIM), torch.randn(4, DIM), features(4, 1)
    if part == "encoder":
        encoder.first.weight.data.fill_(torch.nan)
    else:
        (queries if part == "queries" else positives)[2, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        handler.update_cache_and_compute_loss(encoder, queries, positives, items)
    assert_same_state(before, snapshot(handler.cache))


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        ({"a": torch.zeros(4, dtype=torch.int64)}, ValueError, r"\['b'\]"),
        ({"a": torch.zeros(4), "b": torch.zeros(4)}, TypeError, "the spec says"),
        ({"a": torch.zeros(3, dtype=torch.int64), "b": torch.zeros(4, dtype=torch.int64)}, ValueError, "batch sizes"),
        (features(17, 0), ValueError, "batch sizes"),
    ],
)
def test_wrong_features_change_nothing(items: dict[str, Tensor], error: type[Exception], message: str) -> None:
    torch.manual_seed(0)
    handler, encoder = new_handler(), Encoder(dim=DIM)
    step(handler, encoder, 0)
    before = snapshot(handler)
    with pytest.raises(error, match=message):
        handler.update_cache_and_compute_loss(encoder, torch.randn(4, DIM), torch.randn(4, DIM), items)
    assert_same_state(before, snapshot(handler))


def test_a_batch_larger_than_the_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="17 items, the cache only 16 rows"):
        step(new_handler(cache_size=16), Encoder(dim=DIM), 0, batch=17)


@pytest.mark.parametrize(
    ("network", "error", "message"),
    [
        (lambda f: torch.zeros(len(f["a"]), DIM + 1), ValueError, rf"expected \[4, {DIM}\]"),
        (lambda f: torch.zeros(len(f["a"]) - 1, DIM), ValueError, rf"expected \[4, {DIM}\]"),
        (lambda f: {"embedding": f["a"]}, TypeError, "returned dict"),
    ],
)
def test_a_network_with_another_output_is_refused(network: Any, error: type[Exception], message: str) -> None:
    torch.manual_seed(0)
    handler, encoder = new_handler(), Encoder(dim=DIM)
    step(handler, encoder, 0)
    before = snapshot(handler.cache)
    with pytest.raises(error, match=message):
        handler.update_cache_and_compute_loss(network, torch.randn(4, DIM), torch.randn(4, DIM), features(4, 1))
    assert_same_state(before, snapshot(handler.cache))


def test_keys_that_do_not_fit_are_refused() -> None:
    manager, loss = CacheManager(SPECS, 4), CacheClassificationLoss("embedding", ("a", "b"))
    with pytest.raises(ValueError, match="specs"):
        handlers.CacheLossHandler(manager, loss, "vector", ("a", "b"))
    with pytest.raises(ValueError, match="specs"):
        handlers.CacheLossHandler(manager, loss, "embedding", ("a",))
    with pytest.raises(TypeError, match="string"):
        handlers.CacheLossHandler(manager, loss, "embedding", "ab")


def test_the_state_moves_with_the_handler() -> None:
    handler = new_handler()
    assert {buffer.device.type for buffer in handler.to("meta").cache.buffers()} == {"meta"}
    assert handler.cache.device.type == "meta"


def test_a_handler_takes_ragged_features() -> None:
    torch.manual_seed(0)
    specs = {"a": RaggedFeature(torch.int64), "embedding": SPECS["embedding"]}
    loss = CacheClassificationLoss("embedding", ("a",))
    handler = handlers.CacheLossHandler(CacheManager(specs, 6), loss, "embedding", ("a",))
    words = nn.Embedding(50, DIM)

    def network(items: dict[str, Tensor]) -> Tensor:
        return (words(items["a"]) * (items["a"] > 0)[:, :, None]).sum(dim=1)

    for width in (3, 5, 1):
        items = {"a": torch.arange(1, 1 + 2 * width).reshape(2, width)}
        value = handler.update_cache_and_compute_loss(network, torch.randn(2, DIM), network(items), items)
    value.backward()
    assert handler.cache.data["a"].tolist() == [
        [1, 2, 3, 0, 0],
        [4, 5, 6, 0, 0],
        [1, 2, 3, 4, 5],
        [6, 7, 8, 9, 10],
        [1, 0, 0, 0, 0],
        [2, 0, 0, 0, 0],
    ]


def _ranks_share_one_cache(rank: int, world_size: int, folder: Path) -> None:
    """Each rank draws a document that only its own queries are near to."""
    torch.manual_seed(rank)
    loss = CacheClassificationLoss("embedding", ("a",), score_transform=lambda s: 1e4 * s)
    loss._retrieval_fn = GumbelMaxRetrievalFn()
    specs = {"a": SPECS["a"], "embedding": SPECS["embedding"]}
    handler = handlers.CacheLossHandler(CacheManager(specs, 8), loss, "embedding", ("a",), use_cross_replica=True)
    axes = torch.eye(DIM)
    for scale, first in ((1.0, 0), (2.0, 4)):
        mine = {"a": first + 2 * rank + torch.arange(2)}
        queries = axes[[0, 0]] if rank == 0 else axes[[3, 3]]
        positives = scale * axes[mine["a"]]
        handler.update_cache_and_compute_loss(lambda f, scale=scale: scale * axes[f["a"]], queries, positives, mine)
    torch.save(handler.cache.state_dict(), folder / f"{rank}.pt")


def test_ranks_share_one_cache(tmp_path: Path) -> None:
    run_ranks(_ranks_share_one_cache, 2, tmp_path)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert_same_state(*states)
    specs = {"a": SPECS["a"], "embedding": SPECS["embedding"]}
    cache = CacheManager(specs, 8).init_cache()
    cache.load_state_dict(states[0])
    assert cache.data["a"].tolist() == list(range(8))
    scale = torch.tensor([2.0, 1, 1, 2, 2, 2, 2, 2])  # rows 0 and 3 were drawn and re-encoded
    assert torch.equal(cache.data["embedding"], scale[:, None] * torch.eye(DIM))
    assert cache.age.tolist() == [0, 1, 1, 0, 0, 0, 0, 0]


def _ranks_share_sequences(rank: int, world_size: int, folder: Path) -> None:
    specs = {"a": RaggedFeature(torch.int64), "b": RaggedFeature(torch.int64), "embedding": SPECS["embedding"]}
    loss = CacheClassificationLoss("embedding", ("a", "b"))
    handler = handlers.CacheLossHandler(CacheManager(specs, 8), loss, "embedding", ("a", "b"), use_cross_replica=True)
    for _ in range(2):
        items = {
            "a": torch.full((2, 2 + rank), rank + 1),
            "b": [torch.tensor([5] * (2 - rank)), torch.tensor([6])],
        }
        handler.update_cache_and_compute_loss(
            lambda f: torch.ones(len(f["a"]), DIM), torch.ones(2, DIM), torch.ones(2, DIM), items
        )
    assert handler.cache.data["a"].tolist() == [[1, 1, 0], [1, 1, 0], [2, 2, 2], [2, 2, 2]] * 2
    assert handler.cache.data["b"].tolist() == [[5, 5], [6, 0], [5, 0], [6, 0]] * 2


def test_ranks_share_sequences_of_different_lengths(tmp_path: Path) -> None:
    run_ranks(_ranks_share_sequences, 2, tmp_path)


def test_embeddings_may_be_kept_as_int8():
    """The handler's losses are those of float32 rows, up to the rounding of rows and queries."""
    runs = []
    for spec in (SPECS["embedding"], negative_cache.QuantizedFeature([DIM])):
        torch.manual_seed(0)
        encoder = Encoder()
        cache_loss = CacheClassificationLoss("embedding", ("a", "b"), lambda s: 20.0 * s)
        manager = CacheManager({**SPECS, "embedding": spec}, 64)
        handler = handlers.CacheLossHandler(manager, cache_loss, "embedding", ("a", "b"))
        values = []
        for number in range(12):
            features = {"a": (torch.arange(4) + 4 * number) % 50, "b": (torch.arange(4) + 7 * number) % 50}
            documents, queries = encoder(features).detach(), encoder({**features, "a": features["b"]}).detach()
            found = handler.cache_loss(encoder, queries, documents, {"documents": handler.cache})
            values.append(float(found.interpretable_loss))
            handler.update_cache_and_compute_loss(encoder, queries, documents, features)
        runs.append(values)
    # A unit vector is off by at most 1/254 in each dimension: a score by 20 * 2 * sqrt(8) / 254 at most.
    assert runs[0] == pytest.approx(runs[1], abs=0.45)
    assert runs[0] != runs[1]
