"""The variance benchmark compares with the exact gradient, and the estimators that were tried are unbiased."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from benchmarks.estimators_tried import Situation, two_phase
from benchmarks.gradients import Objective, make_batch, measure, of_library, of_tried
from benchmarks.sizes import Case
from benchmarks.stages import Corpus, Stage, load_corpus, train
from benchmarks.variance import ESTIMATORS
from torch import Tensor
from torch.nn.functional import softplus

TRIED = {name: estimator.tried for name, estimator in ESTIMATORS.items() if estimator.tried is not None}


@pytest.fixture(scope="module")
def trained() -> tuple[Corpus, Stage]:
    corpus = load_corpus(None, torch.device("cpu"))
    return corpus, train(corpus, {"late": 12}, 16, 96)[0]


@pytest.mark.parametrize("in_batch", [False, True])
def test_the_exact_gradient_is_that_of_the_dense_loss(trained: tuple[Corpus, Stage], in_batch: bool):
    batch = make_batch(*trained, Case("late", 16, 64), seed=0)
    queries, documents = batch.encode()
    own = torch.isin(batch.rows, batch.documents) if in_batch else batch.documents[:, None] == batch.rows
    scores = (batch.scale * queries @ batch.encode_documents(batch.rows).T).masked_fill(own, -torch.inf)
    if in_batch:
        others = (batch.scale * queries @ documents.T).masked_fill(torch.eye(16, dtype=torch.bool), -torch.inf)
        scores = torch.cat([scores, others], dim=1)
    loss = softplus(scores.logsumexp(dim=1) - batch.scale * (queries * documents).sum(dim=1)).mean()
    (expected,) = torch.autograd.grad(loss, batch.table)
    torch.testing.assert_close(Objective(batch, in_batch).exact_gradient(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("num_samples", [1, 0.25])
def test_the_library_and_the_tried_estimator_have_the_same_variance(trained: tuple[Corpus, Stage], num_samples: float):
    batch = make_batch(*trained, Case("late", 16, 64, is_stale=True), seed=0)
    objective = Objective(batch, in_batch=True)
    exact = objective.exact_gradient()
    library = measure(of_library(batch, 0, {"num_samples": num_samples}), batch.table, exact, 300)
    tried = measure(of_tried(objective, 0, partial(two_phase, num_samples=num_samples)), batch.table, exact, 300)
    assert library.variance == pytest.approx(tried.variance, rel=0.25)
    assert library.documents == pytest.approx(tried.documents, abs=0.1)
    assert max(library.bias, tried.bias) < 3


@pytest.mark.parametrize("name", TRIED)
def test_tried_estimators_are_unbiased(name: str):
    torch.manual_seed(0)
    batch, count, draws = 4, 12, 1500
    cached = torch.nn.functional.normalize(torch.randn(count, 6), dim=1)
    queries = torch.nn.functional.normalize(torch.randn(batch, 6), dim=1)
    probabilities = (queries @ cached.T).masked_fill(torch.rand(batch, count) < 0.2, -torch.inf).softmax(dim=1)
    situation = Situation(probabilities, torch.rand(batch), queries, cached)
    generator = torch.Generator().manual_seed(1)
    found = torch.stack([_dense(situation, generator, name) for _ in range(draws)])
    expected = torch.cat([probabilities, probabilities @ cached, torch.zeros(batch, 1)], dim=1)
    error = (found.mean(dim=0) - expected).abs()
    assert (error <= 5 * found.std(dim=0) / draws**0.5 + 1e-5).all(), name


def _dense(situation: Situation, generator: torch.Generator, name: str) -> Tensor:
    """Weights of all rows, what the queries get, and the weight of the stand-ins: `[batch, n + dim + 1]`."""
    sample = TRIED[name](situation, generator)
    weights = torch.zeros_like(situation.probabilities).index_add(1, sample.rows, sample.weights)
    of_queries = sample.weights @ situation.cached[sample.rows] + sample.correction
    missing = torch.zeros(len(weights)) if sample.missing_weight is None else sample.missing_weight
    return torch.cat([weights, of_queries, missing[:, None]], dim=1)
