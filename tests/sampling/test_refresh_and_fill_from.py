"""Rows that are re-encoded in turn, and a cache that is filled before the first step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from negative_cache import FixedLenFeature, NegativeCacheLoss
from negative_cache.objective.batch import EMBEDDING
from negative_cache.sampling.encode import refresh
from support import as_on_a_gpu, assert_same_state, snapshot

DIM, SCALE, NUM_DOCUMENTS = 4, 2.0, 40
SPECS = {"row": FixedLenFeature([], torch.int64)}


class Encoder:
    """The embedding of a document is its row of a table; keeps the rows of each call, and whether it had gradient."""

    def __init__(self) -> None:
        self.table = torch.randn(NUM_DOCUMENTS, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.table.requires_grad_()
        self.calls: list[tuple[list[int], bool]] = []

    def __call__(self, features: dict[str, Tensor]) -> Tensor:
        self.calls.append((features["row"].tolist(), torch.is_grad_enabled()))
        return self.table[features["row"]]

    @property
    def refreshed(self) -> list[list[int]]:
        return [rows for rows, has_gradient in self.calls if not has_gradient]


def make_loss(encoder: Any, cache_size: int = 16, **settings: Any) -> NegativeCacheLoss:
    settings = {"embedding_dtype": torch.float64, "specs": SPECS, "seed": 0, **settings}
    return NegativeCacheLoss(encoder, cache_size, SCALE, **settings)


def documents(*numbers: int) -> dict[str, Any]:
    return {"document_features": {"row": torch.tensor(numbers)}, "document_ids": torch.tensor(numbers)}


def filled_loss(count: int, cache_size: int = 16, **settings: Any) -> tuple[NegativeCacheLoss, Encoder]:
    encoder = Encoder()
    loss_fn = make_loss(encoder, cache_size, **settings)
    assert loss_fn.fill_from([documents(*range(count))]) == count
    encoder.calls.clear()
    return loss_fn, encoder


def step(loss_fn: NegativeCacheLoss, encoder: Encoder, *numbers: int) -> Tensor:
    rows = torch.tensor(numbers)
    embedded = encoder.table[rows]
    return loss_fn(embedded.detach().flip(1).requires_grad_(), embedded, {"row": rows}, rows)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda table: table[:, :1], ValueError, r"returned shape \[2, 1\]; expected \[2, 4\]"),
        (lambda table: {"embedding": table}, TypeError, "returned dict"),
    ],
)
def test_an_encoder_that_returns_something_else_to_a_refresh_is_refused(change: Any, error: type, message: str):
    encoder = Encoder()
    loss_fn = make_loss(lambda features: change(encoder(features)), refresh_per_step=2)
    with pytest.raises(error, match=message):
        step(loss_fn, encoder, 0, 1)


# refresh_per_step


@pytest.mark.parametrize(("count", "per_step"), [(9, 3), (10, 3), (5, 5), (4, 7)])
@pytest.mark.parametrize("is_on_a_gpu", [False, True])
def test_each_row_has_its_turn(count: int, per_step: int, is_on_a_gpu: bool):
    loss_fn, encoder = filled_loss(count, refresh_per_step=per_step)
    for _ in range(count):
        if is_on_a_gpu:
            with as_on_a_gpu():
                step(loss_fn, encoder, 0, 1).backward()
        else:
            step(loss_fn, encoder, 0, 1).backward()
    turns = torch.tensor(encoder.refreshed)
    assert turns.shape == (count, per_step)
    assert turns.flatten().bincount().tolist() == [per_step] * count
    if count % per_step == 0:  # and each once per round
        for start in range(0, count, count // per_step):
            round_ = turns[start : start + count // per_step].flatten()
            assert len(round_.unique()) == len(round_) == count


def test_no_embedding_is_older_than_a_round():
    """The encoder changes in each step; which version made a row's embedding is written in its first number."""
    encoder = Encoder()

    def encode(features: dict[str, Tensor]) -> Tensor:
        embeddings = encoder(features).clone()
        embeddings[:, 0] = version
        return embeddings

    oldest = {}
    for per_step in (0, 5):
        version = 0.0
        loss_fn = make_loss(encode, 20, refresh_per_step=per_step)
        loss_fn.fill_from([documents(*range(20))])
        for number in range(1, 13):
            version = float(number)
            rows = torch.tensor([number % 20])
            embedded = encode({"row": rows})
            loss_fn(embedded.detach().requires_grad_(), embedded, {"row": rows}, rows).backward()
        oldest[per_step] = float(loss_fn.cache.data[EMBEDDING][:, 0].min())
    assert oldest == {0: 0.0, 5: 12 - 20 / 5 + 1}


def test_a_refresh_changes_embeddings_alone():
    loss_fn, encoder = filled_loss(10)
    cache = loss_fn.cache
    step(loss_fn, encoder, 3, 12)
    before = snapshot(cache)
    with torch.no_grad():
        encoder.table += 1.0
    encoder.calls.clear()
    refresh(cache, EMBEDDING, ["row"], encoder, 4)
    after = snapshot(cache)
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert changed == ["feature_embedding.values"]
    (rows,) = encoder.refreshed
    is_changed = (after[changed[0]] != before[changed[0]]).any(1)
    assert sorted(cache.data["row"][is_changed].tolist()) == sorted(rows)
    torch.testing.assert_close(after[changed[0]][is_changed], encoder.table.detach()[cache.data["row"][is_changed]])


def test_a_refresh_does_not_change_which_rows_are_replaced():
    """Without LRU, ages depend on insertions alone, whatever is drawn."""
    ends = []
    for per_step in (0, 6):
        loss_fn, encoder = filled_loss(10, 12, refresh_per_step=per_step, use_lru=False)
        for number in range(8):
            step(loss_fn, encoder, 20 + number, 30 + number).backward()
        ends.append(loss_fn.cache)
    assert torch.equal(ends[0].document_ids, ends[1].document_ids)
    assert torch.equal(ends[0].age, ends[1].age)


def test_a_refresh_leaves_the_gradient_as_it_is():
    gradients = []
    for per_step in (0, 8):
        loss_fn, encoder = filled_loss(12, refresh_per_step=per_step)
        step(loss_fn, encoder, 0, 1).backward()
        gradients.append(encoder.table.grad)
        assert len(encoder.refreshed) == (per_step > 0)
    assert torch.equal(*gradients)


def test_nothing_is_refreshed_in_evaluation_or_without_gradient():
    loss_fn, encoder = filled_loss(10, refresh_per_step=4)
    before = snapshot(loss_fn)
    step(loss_fn.eval(), encoder, 0, 1)
    with torch.no_grad():
        step(loss_fn.train(), encoder, 0, 1)
    assert encoder.calls == []
    assert_same_state(before, snapshot(loss_fn))


@pytest.mark.parametrize("is_on_a_gpu", [False, True])
@pytest.mark.parametrize(("dtype", "bad"), [(torch.float64, torch.nan), (torch.float16, 1e6), (torch.int8, torch.inf)])
def test_embeddings_that_are_not_finite_are_kept_out_and_reported_once(
    is_on_a_gpu: bool, dtype: torch.dtype, bad: float
):
    loss_fn, encoder = filled_loss(6, embedding_dtype=dtype, refresh_per_step=6)
    cache = loss_fn.cache
    old = cache.data[EMBEDDING].clone()

    def broken(features: dict[str, Tensor]) -> Tensor:
        embeddings = encoder(features)
        if torch.is_grad_enabled():
            return embeddings
        return torch.where((features["row"] == 4)[:, None], bad, embeddings + 1)

    loss_fn.document_encoder = broken
    if is_on_a_gpu:
        with as_on_a_gpu():
            step(loss_fn, encoder, 0, 1).backward()
    else:
        step(loss_fn, encoder, 0, 1).backward()
    assert torch.equal(cache.data[EMBEDDING][4], old[4])
    assert bool((cache.data[EMBEDDING][[0, 1, 2, 3, 5]] != old[[0, 1, 2, 3, 5]]).all())
    with pytest.raises(ValueError, match="1 embeddings that were not finite were kept out"):
        loss_fn.metrics()
    assert loss_fn.metrics()["fill"] == 6 / 16


@pytest.mark.parametrize("value", [-1, 17])
def test_refresh_per_step_must_be_from_0_to_the_number_of_rows(value: int):
    with pytest.raises(ValueError, match="`refresh_per_step`"):
        make_loss(Encoder(), refresh_per_step=value)


# fill_from


def dense(loss_fn: NegativeCacheLoss, encoder: Encoder, numbers: list[int]) -> float:
    """The loss of a batch against the documents in the cache, by id."""
    table = encoder.table.detach()
    cached = set(loss_fn.cache.document_ids[loss_fn.cache.filled].tolist()) - set(numbers)
    losses = []
    for number in numbers:
        scores = SCALE * table @ table[number].flip(0)
        parts = torch.cat([scores[[number]], scores[sorted(set(numbers) - {number})], scores[sorted(cached)]])
        losses.append(parts.logsumexp(0) - parts[0])
    return float(torch.stack(losses).mean())


def test_documents_are_in_the_cache_before_the_first_step():
    encoder = Encoder()
    loss_fn = make_loss(encoder, num_samples=1)
    assert loss_fn.fill_from([documents(3, 4, 5), documents(6), documents(5, 7)]) == 5
    cache = loss_fn.cache
    assert sorted(cache.document_ids[cache.filled].tolist()) == [3, 4, 5, 6, 7]
    rows = cache.data["row"][cache.filled]
    assert torch.equal(rows, cache.document_ids[cache.filled])
    assert torch.equal(cache.data[EMBEDDING][cache.filled], encoder.table.detach()[rows])
    assert not any(has_gradient for _, has_gradient in encoder.calls)
    # a query's own document does not count, 9 is new
    loss = step(loss_fn, encoder, 4, 9)
    assert float(loss.detach()) == pytest.approx(dense(loss_fn, encoder, [4, 9]), rel=1e-12)
    # and known documents keep their row
    found = cache.find(torch.tensor([3, 4, 5, 6, 7, 9]))
    assert found[:5].tolist() == [0, 1, 2, 3, 4]
    assert int(cache.num_filled) == 6
    assert cache.age[found][[1, 5]].tolist() == [0, 0]


@pytest.mark.parametrize("mode", ["eval", "no_grad"])
def test_the_cache_is_filled_in_every_mode(mode: str):
    encoder = Encoder()
    loss_fn = make_loss(encoder).train(mode != "eval")
    with torch.set_grad_enabled(mode != "no_grad"):
        assert loss_fn.fill_from([documents(0, 1, 2)]) == 3
    assert loss_fn.training == (mode != "eval")
    assert float(step(loss_fn.eval(), encoder, 0, 8).detach()) == pytest.approx(dense(loss_fn, encoder, [0, 8]))


def test_no_batches_make_no_cache():
    loss_fn = make_loss(Encoder())
    assert loss_fn.fill_from([]) == 0
    assert loss_fn.cache is None


def test_more_documents_than_rows_are_refused():
    """Earlier batches stay, nothing is written of the one that does not fit, and known documents need no room."""
    loss_fn = make_loss(Encoder(), cache_size=6)
    loss_fn.fill_from([documents(0, 1, 2, 3)])
    before = snapshot(loss_fn)
    with pytest.raises(ValueError, match="6 rows on this rank, of which 2 are free; the batch has 3 new documents"):
        loss_fn.fill_from([documents(3, 7, 8, 9)])
    assert_same_state(before, snapshot(loss_fn))
    assert loss_fn.fill_from([documents(0, 1), documents(3, 7, 8), documents(7)]) == 6
    assert sorted(loss_fn.cache.document_ids.tolist()) == [0, 1, 2, 3, 7, 8]
    small = make_loss(Encoder(), cache_size=2)
    with pytest.raises(ValueError, match="`cache_size` is 2; the batch has 3 documents"):
        small.fill_from([documents(0, 1, 2)])
    assert small.cache is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"document_ids": torch.tensor([0.0, 1.0])}, TypeError, "`document_ids` is torch.float32"),
        ({"document_ids": torch.tensor([0, 1, 2])}, ValueError, r"`document_ids` has shape \[3\]"),
        ({"document_ids": torch.tensor([0, -2])}, ValueError, "`document_ids` has the value -2"),
        ({"document_features": {"other": torch.tensor([0, 1])}}, KeyError, "row"),
        ({"log_q": torch.zeros(2)}, ValueError, "`log_q` was given with ids"),
        ({"guide_documents": torch.zeros(2, 3)}, ValueError, "`guide_documents` must be given in every step"),
        ({"unknown": 1}, TypeError, "unknown"),
    ],
)
def test_wrong_documents_are_refused(change: dict[str, Any], error: type[Exception], message: str):
    loss_fn = make_loss(Encoder())
    loss_fn.fill_from([documents(4, 5)])
    before = snapshot(loss_fn)
    with pytest.raises(error, match=message):
        loss_fn.fill_from([{**documents(0, 1), **change}])
    assert_same_state(before, snapshot(loss_fn))


def test_filling_refuses_embeddings_that_are_not_finite():
    loss_fn = make_loss(lambda f: torch.full((len(f["row"]), DIM), torch.nan))
    with pytest.raises(ValueError, match="NaN"):
        loss_fn.fill_from([documents(0, 1)])
    assert loss_fn.cache is None
