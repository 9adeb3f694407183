"""Evaluation: the gradient through cached rows, and the loss against the batch alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from negative_cache import NegativeCacheLoss
from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss
from support import ANCHORS, HARD, POSITIVES, columns, run_ranks
from text_models import make_static

DIM, SIZE = 8, 48
TABLE = normalize(torch.randn(100, DIM, generator=torch.Generator().manual_seed(1)), dim=1)


def encode(features: dict[str, Tensor]) -> Tensor:
    return TABLE[features["number"]]


def filled(numbers: list[int], log_q: Tensor | None = None, **settings) -> NegativeCacheLoss:
    """A loss with these documents in its cache, in eval mode."""
    loss_fn = NegativeCacheLoss(encode, SIZE, 6.0, seed=0, **settings)
    features = {"number": torch.tensor(numbers)}
    ids = None if log_q is not None else features["number"]
    loss_fn(encode(features), encode(features), features, ids, log_q=log_q)
    return loss_fn.eval()


def batch(seed: int = 3, count: int = 5) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    features = {"number": torch.arange(60, 60 + count)}
    queries = normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)), dim=1)
    return queries.requires_grad_(), encode(features).clone().requires_grad_(), features


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("settings", [{}, {"learnable_scale": True}, {"absolute_margin": 0.1}, {"in_batch": False}])
def test_gradients_include_the_cached_rows(dtype: torch.dtype, settings: dict):
    """Of queries, documents and the scale, against the dense loss; document 62, a positive, is cached and hidden."""
    loss_fn = filled([*range(20), 62], embedding_dtype=dtype, **settings)
    queries, documents, features = batch()
    loss = loss_fn(queries, documents, features, features["number"])
    parameters = [] if loss_fn.log_scale is None else [loss_fn.log_scale]
    found = torch.autograd.grad(loss, [queries, documents, *parameters], allow_unused=True)

    q, d = (value.detach().double().requires_grad_() for value in (queries, documents))
    scale = torch.tensor([6.0], dtype=torch.float64).log().requires_grad_()
    rows = loss_fn.cache.embeddings("embedding")[:21].double()
    positive = (q * d).sum(1)
    cached = q @ rows.T
    hidden = torch.zeros(5, 21, dtype=torch.bool)
    hidden[2 if loss_fn.in_batch is False else slice(None), 20] = True  # in the batch, it is an in-batch negative
    others = (q @ d.T)[:, : 5 if loss_fn.in_batch else 0]
    if loss_fn.in_batch:
        own = torch.eye(5, dtype=torch.bool)
        if "absolute_margin" in settings:
            own |= others > positive[:, None] - 0.1
            hidden |= cached > positive[:, None] - 0.1
        hidden = torch.cat([own, hidden], dim=1)
    scores = scale.exp() * torch.cat([positive[:, None], others, cached], 1)
    hidden = torch.nn.functional.pad(hidden, (1, 0))
    exact = cross_entropy(scores.masked_fill(hidden, -torch.inf), torch.zeros(5, dtype=torch.int64))
    wanted = torch.autograd.grad(exact, [q, d, scale][: len(found)])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.int8: 2e-2}[dtype]
    torch.testing.assert_close(loss.detach().double(), exact.detach(), rtol=tolerance, atol=tolerance)
    for value, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)
    assert int(loss_fn.cache.num_filled) == 21  # nothing was written


def test_the_gradient_of_a_corrected_loss():
    """With `log_q`, each negative counts as one of n draws."""
    log_q = torch.linspace(-4, -2, 20)
    loss_fn = filled(list(range(20)), log_q)
    queries, documents, features = batch()
    own = torch.full((5,), -3.0)
    (found,) = torch.autograd.grad(loss_fn(queries, documents, features, log_q=own), queries)
    q = queries.detach().double().requires_grad_()
    d, rows = documents.detach().double(), TABLE[:20].double()
    others = (6 * q @ d.T + 3.0).masked_fill(torch.eye(5, dtype=torch.bool), -torch.inf)
    negatives = torch.cat([others, 6 * q @ rows.T - log_q.double()], 1) - torch.tensor(24.0).log()
    scores = torch.cat([6 * (q * d).sum(1)[:, None], negatives], 1)
    (wanted,) = torch.autograd.grad(cross_entropy(scores, torch.zeros(5, dtype=torch.int64)), q)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_without_gradients_nothing_more_is_computed(monkeypatch: pytest.MonkeyPatch):
    from negative_cache.sampling import one_process

    monkeypatch.setattr(one_process, "mean_embedding", None)
    loss_fn = filled(list(range(20)))
    queries, documents, features = batch()
    with torch.no_grad():
        loss_fn(queries, documents, features)
    loss_fn(queries.detach(), documents, features)  # the scale is fixed: nothing needs the cached rows
    with pytest.raises(TypeError):
        loss_fn(queries, documents, features)


def check_ranks(rank: int, world_size: int, folder: Path) -> None:
    loss_fn = NegativeCacheLoss(encode, SIZE, 6.0, seed=0, process_group="world")
    features = {"number": torch.arange(10 * rank, 10 * rank + 10)}
    loss_fn(encode(features), encode(features), features, features["number"])
    loss_fn.eval()
    queries, documents, features = batch(count=4)
    own = slice(3 * rank, 3 + rank)  # 3 queries on rank 0, 1 on rank 1
    features = {"number": features["number"][own]}
    loss = loss_fn(queries[own], documents[own], features, features["number"])
    (found,) = torch.autograd.grad(loss, queries)
    whole = filled(list(range(20)))
    every = {"number": torch.arange(60, 64)}
    (wanted,) = torch.autograd.grad(whole(queries, documents, every, every["number"]), queries)
    # losses are weighted so that their mean over ranks is the mean over all queries
    torch.testing.assert_close(found[own] / 2, wanted[own], rtol=1e-5, atol=1e-6)
    alone = loss_fn.in_batch_loss(queries[own], documents[own], document_ids=features["number"])
    scores = 6 * queries[own] @ documents[own].T
    torch.testing.assert_close(alone, cross_entropy(scores, torch.arange(len(scores))))
    with pytest.raises(ValueError, match="evaluating with or without gradients"):
        loss_fn(queries[own].detach() if rank else queries[own], documents[own], features)


def test_ranks_have_the_gradient_of_one_process(tmp_path: Path):
    run_ranks(check_ranks, 2, tmp_path)


def test_the_loss_against_the_batch_is_that_without_a_cache():
    loss_fn = filled(list(range(20)), learnable_scale=True)
    queries, documents, _ = batch()
    negatives, ids = TABLE[80:83].clone().requires_grad_(), torch.tensor([9, 9, 8, 7, 6])
    loss = loss_fn.in_batch_loss(
        queries, documents, document_ids=ids, negative_embeddings=negatives, negative_ids=torch.tensor([6, 5, -1])
    )
    similarities = queries @ torch.cat([documents, negatives]).T
    hidden = torch.zeros(5, 8, dtype=torch.bool)
    hidden[0, 1] = hidden[1, 0] = hidden[4, 5] = True  # documents that equal the positive
    hidden[2:4, 1] = hidden[4, 1] = hidden[:4, 5] = True  # documents that occur twice count once
    expected = cross_entropy((6 * similarities).masked_fill(hidden, -torch.inf), torch.arange(5))
    torch.testing.assert_close(loss, expected)
    inputs = [queries, documents, negatives]
    found, wanted = torch.autograd.grad(loss, [*inputs, loss_fn.log_scale]), torch.autograd.grad(expected, inputs)
    for value, gradient in zip(found, wanted, strict=False):
        torch.testing.assert_close(value, gradient, rtol=1e-5, atol=1e-7)
    assert float(loss_fn.in_batch_loss(queries[:1], documents[:1]).detach()) == 0.0
    with pytest.raises(ValueError, match="same \\[batch, dim\\]"):
        loss_fn.in_batch_loss(queries, documents[:2])


@pytest.mark.parametrize("is_symmetric", [False, True])
def test_the_evaluation_loss_of_texts_equals_that_of_the_in_batch_loss(is_symmetric: bool):
    """Before the first step, while the cache fills, and with gradients disabled alone, as trainers do."""
    model = make_static()
    loss = NegativeCacheRankingLoss(model, 64, seed=0, symmetric=is_symmetric)
    if is_symmetric:
        directions = ("query_to_doc", "doc_to_query")
        plain = MultipleNegativesRankingLoss(model, directions=directions, partition_mode="per_direction")
        texts = (ANCHORS[8:12], POSITIVES[8:12])
    else:
        plain, texts = MultipleNegativesRankingLoss(model), (ANCHORS[8:12], POSITIVES[8:12], HARD[8:12])
    for count in range(3):
        with torch.no_grad():
            expected = plain(columns(model, *texts), None)
            torch.testing.assert_close(loss(columns(model, *texts)), expected, msg=str(count))
        loss.eval()
        torch.testing.assert_close(loss(columns(model, *texts)).detach(), expected)
        loss.train()
        loss(columns(model, ANCHORS[4 * count : 4 * count + 2], POSITIVES[4 * count : 4 * count + 2])).backward()
    assert int(loss.cache_loss.cache.num_filled) == 6
