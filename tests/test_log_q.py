"""Documents that are met with known probabilities: the corrected softmax stands for all documents alike."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from negative_cache import FixedLenFeature, NegativeCacheLoss
from negative_cache.batch import BIAS
from negative_cache.checkpoint import load_checkpoint, save_checkpoint
from support import assert_same_state, snapshot

SCALE = 1.5
Q = torch.tensor([1 / 1, 1 / 2, 1 / 3], dtype=torch.float64)  # Zipf's law
Q = Q / Q.sum()
ITEMS = torch.tensor([[0.9, -0.3], [-1.0, 0.4], [0.2, 1.1]], dtype=torch.float64)
QUERIES = torch.tensor([[0.8, 0.6], [-0.6, 0.8]], dtype=torch.float64)  # orthogonal
SPECS = {"item": FixedLenFeature([], torch.int64)}


def make_loss(cache_size: int = 4, **settings: Any) -> NegativeCacheLoss:
    settings = {"embedding_dtype": torch.float64, "specs": SPECS, "seed": 0, **settings}
    return NegativeCacheLoss(lambda f: ITEMS[f["item"]].clone().requires_grad_(), cache_size, SCALE, **settings)


def step(loss_fn: NegativeCacheLoss, items: Tensor, log_q: Tensor | None = Q.log()) -> tuple[Tensor, Tensor]:
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
    torch.testing.assert_close(mean_partition(Q.log(), in_batch), TRUTH, rtol=1e-6, atol=0)  # log q is float32


@pytest.mark.parametrize("log_q", [None, -Q.log(), Q.log() / 2, torch.zeros(3)])
def test_without_the_right_correction_it_is_another(log_q: Tensor | None):
    assert float((mean_partition(log_q) / TRUTH - 1).abs().max()) > 0.05
