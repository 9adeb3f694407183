"""`log_q`: where documents occur with known probabilities, the corrected softmax is that over all documents."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from negative_cache import FixedLenFeature, NegativeCacheLoss
from negative_cache.checkpoint import load_checkpoint, save_checkpoint
from negative_cache.objective.batch import BIAS
from support import assert_same_state, snapshot

SCALE = 1.5
Q = torch.tensor([1 / 1, 1 / 2, 1 / 3], dtype=torch.float64)  # Zipf's law
Q = Q / Q.sum()
LOG_Q = Q.log()
ITEMS = torch.tensor([[0.9, -0.3], [-1.0, 0.4], [0.2, 1.1]], dtype=torch.float64)
QUERIES = torch.tensor([[0.8, 0.6], [-0.6, 0.8]], dtype=torch.float64)  # orthogonal
SPECS = {"item": FixedLenFeature([], torch.int64)}


def make_loss(cache_size: int = 4, **settings: Any) -> NegativeCacheLoss:
    settings = {"embedding_dtype": torch.float64, "specs": SPECS, "seed": 0, **settings}
    return NegativeCacheLoss(lambda f: ITEMS[f["item"]].clone().requires_grad_(), cache_size, SCALE, **settings)


def step(loss_fn: NegativeCacheLoss, items: Tensor, log_q: Tensor | None = LOG_Q) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and its documents as a leaf."""
    documents = ITEMS[items].clone().requires_grad_()
    queries = QUERIES[: len(items)] if len(items) <= 2 else QUERIES.repeat(len(items), 1)[: len(items)]
    return loss_fn(queries, documents, {"item": items}, log_q=None if log_q is None else log_q[items]), documents


def partition(loss_fn: NegativeCacheLoss, items: Tensor, log_q: Tensor | None) -> Tensor:
    """`sum exp(s)` over each query's negatives, as the loss sees it, `[2]`.

    A document is the positive of one query and a negative of an orthogonal one, so that its gradient along its query is
    `-(1 - pi) * scale / 2`.
    """
    loss, documents = step(loss_fn, items, log_q)
    (gradient,) = torch.autograd.grad(loss, documents)
    rest = -2 / SCALE * (gradient * QUERIES).sum(1)
    return (SCALE * (QUERIES * documents.detach()).sum(1)).exp() * rest / (1 - rest)


def mean_partition(log_q: Tensor | None, in_batch: bool = True) -> Tensor:
    """Its mean over all batches of two documents and all caches of two rows, each drawn from Q."""
    mean = torch.zeros(2, dtype=torch.float64)
    for cached in itertools.product(range(3), repeat=2):
        loss_fn = make_loss(in_batch=in_batch)
        step(loss_fn, torch.tensor(cached), log_q)
        loss_fn.eval()
        for batch in itertools.product(range(3), repeat=2):
            items = torch.tensor(batch)
            mean += Q[[*cached, *batch]].prod() * partition(loss_fn, items, log_q)
    return mean


TRUTH = (SCALE * QUERIES @ ITEMS.T).exp().sum(1)


@pytest.mark.parametrize("in_batch", [True, False])
def test_the_mean_of_the_corrected_partition_is_that_of_all_documents(in_batch: bool):
    torch.testing.assert_close(mean_partition(LOG_Q, in_batch), TRUTH, rtol=1e-6, atol=0)  # log q is float32


@pytest.mark.parametrize("log_q", [None, LOG_Q.min() - LOG_Q, LOG_Q / 2, torch.zeros(3)])
def test_without_the_right_correction_the_mean_is_another(log_q: Tensor | None):
    assert float((mean_partition(log_q) / TRUTH - 1).abs().max()) > 0.05


# The column


def trained(**settings: Any) -> NegativeCacheLoss:
    loss_fn = make_loss(8, **settings)
    for number in range(3):
        step(loss_fn, torch.tensor([number, (number * 2 + 1) % 3]))[0].backward()
    return loss_fn


@pytest.mark.parametrize("first", [True, False])
def test_log_q_is_given_in_every_step_or_in_none(first: bool):
    loss_fn, items = make_loss(), torch.tensor([0, 1])
    step(loss_fn, items, LOG_Q if first else None)
    before = snapshot(loss_fn)
    with pytest.raises(ValueError, match="`log_q` must be given in every step or in none"):
        step(loss_fn, items, None if first else LOG_Q)
    assert_same_state(before, snapshot(loss_fn))


@pytest.mark.parametrize(
    ("log_q", "error", "message"),
    [
        (torch.zeros(3), ValueError, r"`log_q` has shape \[3\]; expected \[2\]"),
        (torch.zeros(2, dtype=torch.int64), TypeError, "`log_q` is torch.int64"),
        (torch.tensor([0.0, -torch.inf]), ValueError, "`log_q` has NaN or infinity"),
        (torch.tensor([-1.0, 0.5]), ValueError, "`log_q` has 0.5; expected logs of probabilities"),
    ],
)
def test_wrong_log_q_is_refused(log_q: Tensor, error: type[Exception], message: str):
    loss_fn = make_loss()
    with pytest.raises(error, match=message):
        loss_fn(QUERIES, ITEMS[:2], {"item": torch.tensor([0, 1])}, log_q=log_q)
    assert loss_fn.cache is None


@pytest.mark.parametrize("given", [{"document_ids": torch.tensor([0, 1])}, {"positive_ids": torch.tensor([[2], [-1]])}])
def test_log_q_with_ids_is_refused(given: dict[str, Tensor]):
    loss_fn = make_loss()
    with pytest.raises(ValueError, match="`log_q` was given with ids"):
        loss_fn(QUERIES, ITEMS[:2], {"item": torch.tensor([0, 1])}, log_q=LOG_Q[:2], **given)
    assert loss_fn.cache is None


@pytest.mark.parametrize("with_specs", [True, False])
@pytest.mark.parametrize("how", ["state_dict", "checkpoint", "checkpoint of another size"])
def test_log_q_is_saved_with_the_cache(with_specs: bool, how: str, tmp_path: Path):
    settings = {"specs": SPECS if with_specs else None, "embedding_dtype": torch.float32}
    saved = trained(**settings)
    loaded = make_loss(12 if "size" in how else 8, **settings)
    if how == "state_dict":
        loaded.load_state_dict(saved.state_dict())
    else:
        save_checkpoint(saved, tmp_path / "checkpoint")
        load_checkpoint(loaded, tmp_path / "checkpoint")
    assert loaded.cache is not None
    if "size" not in how:
        assert_same_state(snapshot(saved), snapshot(loaded))
    filled = loaded.cache.filled
    items = loaded.cache.data["item"][filled]
    assert len(items) == 6
    torch.testing.assert_close(loaded.cache.data[BIAS][filled], -LOG_Q[items].float(), rtol=0, atol=0)
    for loss_fn in (saved, loaded):
        loss_fn.eval()
    both = [step(loss_fn, torch.tensor([2, 1]))[0] for loss_fn in (saved, loaded)]
    torch.testing.assert_close(*both, rtol=1e-6, atol=0)


def test_log_q_stays_exact_where_embeddings_are_rounded():
    loss_fn = trained(embedding_dtype=torch.int8)
    cache = loss_fn.cache
    assert cache is not None
    values, scales = cache.stored(BIAS)
    assert values.dtype == torch.float32
    assert scales is None
    filled = cache.filled
    assert torch.equal(values[filled], -LOG_Q[cache.data["item"][filled]].float())
    # the loss is that of the rounded embeddings with the correction, n = 6 rows and one other document
    loss_fn.eval()
    loss, _ = step(loss_fn, torch.tensor([2, 1]))
    rows = torch.cat([cache.data["embedding"][filled].double(), ITEMS[[2, 1]]])
    bias = torch.cat([values[filled].double(), -Q[[2, 1]].log()]) - torch.tensor(7.0).log()
    scores = SCALE * QUERIES @ rows.T + bias
    scores[0, -2] = scores[1, -1] = -torch.inf
    positive = SCALE * (QUERIES * ITEMS[[2, 1]]).sum(1)
    expected = torch.logaddexp(scores.logsumexp(1), positive) - positive
    torch.testing.assert_close(loss, expected.mean().to(loss.dtype), rtol=0.02, atol=0)
