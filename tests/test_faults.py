"""What earlier implementations of the method get wrong, one test per fault."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from negative_cache import (
    CacheClassificationLoss,
    CacheLossHandler,
    CacheManager,
    FixedLenFeature,
    GumbelMaxRetrievalFn,
    IsInCacheFilterFn,
    NegativeCacheLoss,
    approximate_top_k_with_indices,
)
from negative_cache.retrieval.randomness import uniforms
from support import Encoder, Recorder, assert_same_state, snapshot

DIM = 8


def new_handler(cache_size: int, length: int = 1, filter_fn: Any = None, **options: Any) -> CacheLossHandler:
    specs = {
        "embedding": FixedLenFeature([DIM], torch.float32),
        "a": FixedLenFeature([], torch.int64),
        "b": FixedLenFeature([], torch.int64),
        "wide": FixedLenFeature([length], torch.int64),
    }
    keys = ("a", "b", "wide")
    loss = CacheClassificationLoss("embedding", keys, **options)
    return CacheLossHandler(CacheManager(specs, cache_size), loss, "embedding", keys, filter_fn=filter_fn)


def items_of(count: int, length: int = 1, first: int = 1) -> dict[str, Tensor]:
    numbers = (first + torch.arange(count)) % 50
    return {"a": numbers, "b": numbers, "wide": numbers[:, None].repeat(1, length)}


def step(handler: CacheLossHandler, encoder: Any, items: dict[str, Tensor], **options: Any) -> Any:
    queries = torch.randn(len(items["a"]), DIM, requires_grad=True)
    return handler.update_cache_and_compute_loss(encoder, queries, encoder(items), items, **options)


def fill(handler: CacheLossHandler) -> None:
    """Fill every row at once; an insertion is for batches."""
    cache = handler.cache
    values = {**items_of(cache.num_rows, cache.data["wide"].shape[1]), "embedding": torch.randn(cache.num_rows, DIM)}
    for key, value in values.items():
        cache.data[key].copy_(value)
    cache.filled.fill_(True)


def test_1_unfilled_rows_are_invisible() -> None:
    torch.manual_seed(0)
    handler, encoder = new_handler(cache_size=1000, reducer=None), Encoder(dim=DIM)
    step(handler, encoder, items_of(3))
    encoder.calls.clear()
    queries, items = torch.randn(3, DIM), items_of(3, first=10)
    positives = encoder(items)
    encoder.calls.clear()
    result = handler.cache_loss(encoder, queries, positives, {"docs": handler.cache}, return_topk=10)
    scores = torch.cat([(queries * positives).sum(1, keepdim=True), queries @ handler.cache.data["embedding"][:3].T], 1)
    assert torch.allclose(result.interpretable_loss, -scores.log_softmax(dim=1)[:, 0])
    assert set(encoder.calls[0]["a"].tolist()) <= {1, 2, 3}
    assert [len(found["a"]) for found in result.topk_features] == [3, 3, 3]


def test_2_a_known_positive_is_no_negative_and_has_one_row() -> None:
    torch.manual_seed(0)
    encoder = Encoder(dim=DIM)
    loss_fn = NegativeCacheLoss(encoder, cache_size=10, scale=20.0, in_batch=False, shared=False)
    items = {key: value for key, value in items_of(2).items() if key != "wide"}
    for _ in range(4):
        encoder.calls.clear()
        loss = loss_fn(torch.randn(2, DIM), encoder(items), items, document_ids=torch.tensor([5, 6]))
    assert loss > 0
    assert encoder.calls[-1]["a"].tolist() == [2, 1]  # each query is shown the other one's document
    assert loss_fn.cache.document_ids.tolist() == [5, 6] + [-1] * 8
    assert int(loss_fn.cache.num_filled) == 2
    only = {key: value[:1] for key, value in items.items()}
    alone = NegativeCacheLoss(encoder, cache_size=10, num_samples=1)
    for _ in range(3):
        assert alone(torch.randn(1, DIM), encoder(only), only, document_ids=torch.tensor([5])) == 0


@pytest.mark.parametrize("options", [{}, {"top_k": 64}])
def test_3_no_matrix_of_all_scores(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    batch, num_rows = 32, 65_536
    handler, encoder = new_handler(num_rows, **options), Encoder(dim=DIM)
    fill(handler)
    with Recorder() as recorder:
        loss, _ = step(handler, encoder, items_of(batch), return_topk=5)
        loss.backward()
    assert num_rows <= recorder.largest < batch * num_rows / 2


def test_3_the_check_sees_a_dense_pass() -> None:
    torch.manual_seed(0)
    batch, num_rows = 32, 2048
    handler, encoder = new_handler(num_rows), Encoder(dim=DIM)
    handler.cache_loss._retrieval_fn = GumbelMaxRetrievalFn(inv_temp=0.5)
    fill(handler)
    with Recorder() as recorder:
        step(handler, encoder, items_of(batch))
    assert recorder.largest >= batch * num_rows


def test_4_features_of_the_whole_cache_are_not_copied() -> None:
    torch.manual_seed(0)
    batch, num_rows, length = 4, 4096, 100
    handler, encoder = new_handler(num_rows, length), Encoder(dim=DIM)
    fill(handler)
    column = handler.cache.data["wide"]
    with Recorder() as recorder:
        loss, _ = step(handler, encoder, items_of(batch, length), return_topk=5)
        loss.backward()
    assert recorder.largest < column.numel() / 10
    assert handler.cache.data["wide"].data_ptr() == column.data_ptr()
    with Recorder() as recorder:
        column.clone()
    assert recorder.largest == column.numel()


def test_5_the_number_of_operations_does_not_grow_with_the_batch() -> None:
    counts = []
    for batch in (8, 64):
        torch.manual_seed(0)
        handler, encoder = new_handler(cache_size=512), Encoder(dim=DIM)
        fill(handler)
        with Recorder() as recorder:
            step(handler, encoder, items_of(batch)).backward()
        counts.append(recorder.num_ops)
    assert counts[0] == counts[1]
    assert counts[0] > 50


def test_6_the_cache_is_saved_resumed_and_moved() -> None:
    torch.manual_seed(0)
    handler, encoder = new_handler(cache_size=6, length=2), Encoder(dim=DIM)
    for number in range(3):
        step(handler, encoder, items_of(2, 2, first=number))
    file = io.BytesIO()
    torch.save(torch.nn.ModuleDict({"loss": handler}).state_dict(), file)
    file.seek(0)
    other = new_handler(cache_size=6, length=2)
    torch.nn.ModuleDict({"loss": other}).load_state_dict(torch.load(file, weights_only=True))
    assert_same_state(snapshot(handler), snapshot(other))
    assert torch.equal(other.cache.age, handler.cache.age)
    assert torch.equal(other.cache.data["wide"], handler.cache.data["wide"])
    other.to("meta")
    assert all(value.device.type == "meta" for value in [*other.cache.data.values(), other.cache.age])


@pytest.mark.parametrize("top_k", [1, 3, 7, 10])
def test_8_top_k_need_not_divide_the_cache_and_ties_have_an_order(top_k: int) -> None:
    torch.manual_seed(0)
    handler, encoder = new_handler(cache_size=10, top_k=top_k), Encoder(dim=DIM)
    fill(handler)
    assert step(handler, encoder, items_of(3)).isfinite()
    _, rows = approximate_top_k_with_indices(torch.zeros(2, 10), top_k)
    starts = [int(group[0]) for group in torch.arange(10).tensor_split(top_k)]
    assert rows.tolist() == [starts, starts]
    handler.cache.embeddings("embedding").fill_(1)
    handler.eval()
    items = items_of(3)
    _, found = handler.update_cache_and_compute_loss(
        encoder, torch.ones(3, DIM), encoder(items), items, return_topk=top_k
    )
    assert found[0]["a"].tolist() == handler.cache.data["a"][starts].tolist()


def test_9_random_numbers_are_finer_than_24_bits_and_all_rows_are_reached() -> None:
    torch.manual_seed(0)
    count = 2**20
    small = uniforms((count,), torch.Generator().manual_seed(0), torch.device("cpu")).sort().values[: count // 100]
    assert len(small.unique()) > 0.999 * len(small)
    coarse = torch.rand(count).sort().values[: count // 100]
    assert len(coarse.unique()) < 0.99 * len(coarse)  # 24 bits repeat themselves

    num_rows, num_queries = 131_072, 128
    handler = new_handler(num_rows)
    fill(handler)
    handler.cache.embeddings("embedding").fill_(0)
    zeros = torch.zeros(num_queries, DIM)
    result = handler.cache_loss(lambda f: torch.zeros(len(f["a"]), DIM), zeros, zeros, {"docs": handler.cache})
    rows = result.updated_item_indices["docs"].double()
    assert stats.kstest((rows / num_rows).numpy(), "uniform").pvalue > 1e-4
    assert len(rows.unique()) > num_queries - 4  # hardly any is expected twice


def test_10_the_insert_filter_is_applied() -> None:
    torch.manual_seed(0)
    is_new = IsInCacheFilterFn(("a", "wide"))  # a scalar and a vector
    handler, encoder = new_handler(cache_size=10, length=3, filter_fn=is_new), Encoder(dim=DIM)
    for _ in range(3):
        step(handler, encoder, items_of(2, 3))
    assert handler.cache.data["a"][handler.cache.filled].tolist() == [1, 2]
    step(handler, encoder, items_of(2, 3, first=2))
    assert handler.cache.data["a"][handler.cache.filled].tolist() == [1, 2, 3]


def test_11_evaluation_does_not_write() -> None:
    torch.manual_seed(0)
    handler, encoder = new_handler(cache_size=10), Encoder(dim=DIM)
    step(handler, encoder, items_of(2))
    before = snapshot(handler)
    with torch.no_grad():
        step(handler, encoder, items_of(2, first=5))
    handler.eval()
    step(handler, encoder, items_of(2, first=5))
    assert_same_state(before, snapshot(handler))


def test_11_nan_does_not_enter_the_cache() -> None:
    torch.manual_seed(0)
    handler, encoder = new_handler(cache_size=10), Encoder(dim=DIM)
    step(handler, encoder, items_of(2))
    before = snapshot(handler.cache)
    items = items_of(2)
    with pytest.raises(ValueError, match="NaN"):
        handler.update_cache_and_compute_loss(encoder, torch.randn(2, DIM), torch.full((2, DIM), torch.nan), items)
    assert_same_state(before, snapshot(handler.cache))
    assert step(handler, encoder, items).isfinite()
