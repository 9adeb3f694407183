"""How many documents a step re-encodes: the formulas, by enumeration; and the loss, with numbers and with "auto"."""

from __future__ import annotations

import copy
import itertools
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from negative_cache import NegativeCacheLoss
from negative_cache.estimators import (
    batch_noise,
    best_count,
    choice_error,
    choice_weights,
    error_removed,
    in_batch_noise,
    inclusion_probabilities,
    stand_in_weights,
)
from negative_cache.sampling.config import AUTO_SAMPLES, PAYS_ABOVE
from support import Encoder, assert_same_state

SIZES = torch.tensor([3.0, 0.5, 1.0, 0.25, 0.0, 1.5, 0.75], dtype=torch.float64)
T = 3


def probabilities_of(count: int) -> Tensor:
    units, step = inclusion_probabilities(SIZES, count)
    return (units / step).double()


def mean_squared_error(probability: float, weight: float, num_steps: int) -> float:
    """Of the mean over steps of `weight` where a document is chosen, as an estimate of 1, by enumeration."""
    total = 0.0
    for chosen in itertools.product([0, 1], repeat=num_steps):
        likelihood = math.prod(probability if one else 1 - probability for one in chosen)
        total += likelihood * (weight * sum(chosen) / num_steps - 1) ** 2
    return total


# Formulas


@pytest.mark.parametrize("probability", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("num_steps", [1, 3, 8])
def test_the_weight_of_a_choice_has_the_smallest_error_of_the_mean_over_steps(probability: float, num_steps: int):
    weight = float(choice_weights(torch.tensor(probability, dtype=torch.float64), num_steps))
    error = mean_squared_error(probability, weight, num_steps)
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert mean_squared_error(probability, factor * weight, num_steps) > error
    assert error == pytest.approx((1 - probability) * weight / num_steps)  # what `choice_error` sums
    assert weight <= num_steps + 1e-12


def test_for_infinitely_many_steps_the_weight_is_unbiased():
    probabilities = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(choice_weights(probabilities), 1 / probabilities, rtol=0, atol=0)
    torch.testing.assert_close(choice_weights(probabilities, 1e9), 1 / probabilities, rtol=1e-6, atol=0)
    assert float(choice_weights(probabilities, 7)[-1]) == 1


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_error_of_a_choice_is_its_variance(count: int):
    """Independent choices of documents with orthogonal gradients, all outcomes enumerated."""
    probabilities, variance = probabilities_of(count), 0.0
    for chosen in itertools.product([0, 1], repeat=len(SIZES)):
        is_chosen = torch.tensor(chosen, dtype=torch.bool)
        likelihood = float(torch.where(is_chosen, probabilities, 1 - probabilities).prod())
        if likelihood > 0:
            factors = torch.where(is_chosen, 1 / probabilities.clamp(min=1e-9), 0)
            variance += likelihood * float((SIZES * (factors - 1)).square().sum())
    assert float(choice_error(SIZES, count)) == pytest.approx(variance, rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_error_of_biased_weights_is_that_of_the_mean_over_steps(count: int):
    probabilities = probabilities_of(count)
    expected = sum(
        float(size) ** 2 * T * mean_squared_error(float(p), float(choice_weights(p, T)), T)
        for size, p in zip(SIZES, probabilities, strict=True)
        if size > 0
    )
    assert float(choice_error(SIZES, count, T)) == pytest.approx(expected, rel=1e-6)
    assert float(choice_error(SIZES, count, T)) < float(choice_error(SIZES, count))


@pytest.mark.parametrize("num_steps", [T, math.inf])
def test_the_error_falls_with_each_document_and_ends_at_zero(num_steps: float):
    errors = [float(choice_error(SIZES, count, num_steps)) for count in range(1, len(SIZES) + 1)]
    assert errors[5] == errors[6] == 0  # six documents have a size above 0
    assert all(first > second for first, second in itertools.pairwise(errors[:6]))
    removed = [float(error_removed(SIZES, count, num_steps)) for count in range(2, 7)]
    assert removed == pytest.approx([first - second for first, second in itertools.pairwise(errors[:6])])
    assert all(first > second for first, second in itertools.pairwise(removed))  # each pays less than the last


def test_the_last_document_removes_the_square_of_the_common_size():
    """Where no document is certain: with the sum S of the sizes, it removes S^2 / (k (k - 1))."""
    sizes = torch.linspace(0.8, 1.2, 40, dtype=torch.float64)
    for count in (2, 5, 10):
        expected = float(sizes.sum()) ** 2 / (count * (count - 1))
        assert float(error_removed(sizes, count)) == pytest.approx(expected, rel=1e-6)


def test_the_best_count_is_that_of_the_closed_form():
    """Where no document is certain: (noise - sum s^2 + S^2 / k)(cost + k) is smallest at a root."""
    sizes = torch.linspace(0.8, 1.2, 400, dtype=torch.float64)
    noise, cost = 900.0, 64.0
    root = math.sqrt(float(sizes.sum()) ** 2 * cost / (noise - float(sizes.square().sum())))
    assert 100 < root < 200
    assert abs(best_count(sizes, range(1, 300), noise, cost) - root) <= 0.5 + 1e-6
    assert best_count(sizes, range(1, 300), 4 * noise, cost) < root / 2  # a noisy batch hides the error of the choice
    assert best_count(sizes, range(1, 300), noise, cost, num_steps=2) < root


def test_the_best_count_of_an_empty_and_of_a_certain_cache():
    counts = range(1, 9)
    assert best_count(torch.zeros(5), counts, noise=1.0, batch_cost=8.0) == 1  # empty, or without weight
    assert best_count(torch.tensor([4.0, 0.0, 0.0]), counts, noise=1.0, batch_cost=8.0) == 1  # one document is certain
    assert best_count(torch.tensor([4.0, 4.0, 4.0, 0.0]), counts, noise=0.0, batch_cost=8.0) == 3


def test_the_noise_of_a_batch_is_the_sum_of_the_squared_gradients_of_its_positives():
    generator = torch.Generator().manual_seed(0)
    queries, documents, rows = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (3, 3, 6))
    documents.requires_grad_()
    positive, lse = (queries * documents).sum(1), (queries @ rows[:4].T).logsumexp(1)
    in_batch_lse = (queries @ rows[4:].T).logsumexp(1)
    loss = torch.logaddexp(torch.logaddexp(lse, in_batch_lse), positive) - positive
    (gradient,) = torch.autograd.grad(loss.sum(), documents)
    found = batch_noise(positive.detach(), lse, in_batch_lse, queries)
    torch.testing.assert_close(found, gradient.square().sum(), rtol=1e-12, atol=0)


def test_the_noise_of_in_batch_negatives_is_that_of_importance_sampling():
    """The mean of the sum of squared weights of n documents drawn uniformly from the cache, all outcomes enumerated."""
    rho = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    shares, queries, n = torch.tensor([0.5, 0.8]), torch.tensor([[3.0, 4.0], [1.0, 0.0]]), 3
    expected = 0.0
    for drawn in itertools.product(range(4), repeat=n):
        weights = 4 * rho[:, list(drawn)] / n
        expected += float((weights.square().sum(1) * (shares * queries.norm(dim=1)).square()).sum()) / 4**n
    found = in_batch_noise(shares, rho.square().sum(1).float(), queries, torch.tensor(4), n)
    assert float(found) == pytest.approx(expected, rel=1e-6)
    assert float(in_batch_noise(shares, rho.square().sum(1).float(), queries, torch.tensor(4), 0)) == math.inf


# Documents that stand in


@pytest.mark.parametrize("count", [5, 30])
def test_stand_ins_are_the_ridge_regression_on_the_documents_of_the_batch(count: int):
    """Fewer and more documents than dimensions; against the coefficients of each cached document."""
    generator = torch.Generator().manual_seed(0)
    documents, cached = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (count, 20))
    weights = torch.rand(4, 20, generator=generator, dtype=torch.float64)
    center, ridge = documents.mean(0), documents.square().sum(1).mean()
    centered = documents - center
    gram = centered @ centered.T + ridge * torch.eye(count, dtype=torch.float64)
    coefficients = torch.linalg.solve(gram, centered @ (cached - center).T).T + 1 / count
    torch.testing.assert_close(coefficients.sum(1), torch.ones(20, dtype=torch.float64))
    found = stand_in_weights(weights @ cached, weights.sum(1), documents)
    torch.testing.assert_close(found, weights @ coefficients, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.sum(1), weights.sum(1))
    # the unit of the embeddings does not matter
    scaled = stand_in_weights(10 * weights @ cached, weights.sum(1), 10 * documents)
    torch.testing.assert_close(scaled, found, rtol=1e-9, atol=1e-12)


def test_stand_ins_for_nothing_have_no_weight():
    documents = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    found = stand_in_weights(torch.zeros(3, 8), torch.zeros(3), documents)
    assert torch.equal(found, torch.zeros(3, 5))
    assert bool(stand_in_weights(torch.zeros(3, 8), torch.ones(3), torch.zeros(5, 8)).isfinite().all())


# The loss


def features_of(numbers: list[int]) -> dict[str, Tensor]:
    return {"a": torch.tensor(numbers) % 50, "b": torch.tensor(numbers) // 50}


def call(loss_fn: NegativeCacheLoss, numbers: list[int], seed: int = 1) -> Tensor:
    """A step whose queries resemble their documents."""
    encoder = loss_fn.document_encoder
    documents = encoder(features_of(numbers))
    encoder.calls.clear()
    generator = torch.Generator().manual_seed(seed)
    queries = normalize(documents.detach() + 0.3 * torch.randn(documents.shape, generator=generator), dim=1)
    loss: Tensor = loss_fn(queries.requires_grad_(), documents, features_of(numbers), torch.tensor(numbers))
    return loss


def num_encoded(loss_fn: NegativeCacheLoss) -> int:
    return sum(len(features["a"]) for features in loss_fn.document_encoder.calls)


def make_loss(scale: float = 60.0, size: int = 400, **settings: Any) -> NegativeCacheLoss:
    torch.manual_seed(0)
    return NegativeCacheLoss(Encoder(), size, scale, **{"seed": 0, **settings})


@pytest.mark.parametrize(
    ("num_samples", "batch", "count"),
    [(0.25, 20, 5), (0.25, 3, 1), (0.01, 20, 1), (0.5, 9, 4), (1.5, 4, 6), (1, 7, 7), (2, 6, 12)],
)
def test_a_budget_is_for_the_whole_batch_and_at_least_one_document(num_samples: float, batch: int, count: int):
    loss_fn = make_loss(1.0, num_samples=num_samples)
    call(loss_fn, list(range(200)))
    call(loss_fn, list(range(200, 200 + batch)))
    assert num_encoded(loss_fn) == max(count, 2)  # a document alone is encoded twice
    assert loss_fn.metrics()["documents_per_query"] == pytest.approx(count / batch)


@pytest.mark.parametrize("settings", [{"shared": False}, {"in_batch": False}, {"in_batch": False, "shared": False}])
def test_auto_is_one_document_per_query_where_it_has_nothing_to_wait_for(settings: dict[str, bool]):
    loss_fn = make_loss(1.0, **settings)
    assert not loss_fn.is_waiting
    call(loss_fn, list(range(200)))
    call(loss_fn, list(range(200, 206)))
    assert num_encoded(loss_fn) == 6


def test_while_it_waits_the_loss_is_that_of_the_batch():
    """With a scale of 1, all documents are about equally hard, so that the batch represents the cache."""
    loss_fn = make_loss(1.0)
    for step in range(4):
        numbers = list(range(20 * step, 20 * step + 20))
        loss = call(loss_fn, numbers)
        encoder = loss_fn.document_encoder
        assert num_encoded(loss_fn) == (2 if step == 0 else 0)  # the first step tries the encoder
        gradient = torch.autograd.grad(loss, list(encoder.parameters()))
        documents = encoder(features_of(numbers))
        noise = torch.randn(documents.shape, generator=torch.Generator().manual_seed(1))
        queries = normalize(documents.detach() + 0.3 * noise, dim=1)
        expected = torch.nn.functional.cross_entropy(queries @ documents.T, torch.arange(20))
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, list(encoder.parameters())))
        assert loss_fn.is_waiting
        metrics = loss_fn.metrics()
        assert metrics["documents_per_query"] == metrics["cache_share"] == 0
        assert metrics["fill"] == pytest.approx(0.05 * (step + 1))
        assert metrics.get("in_batch_noise", 0) <= PAYS_ABOVE
        assert "sampling_noise" not in metrics


def hard_loss(**settings: Any) -> NegativeCacheLoss:
    """A loss for which few documents are hard, so that 10 of 200 documents represent them badly."""
    return make_loss(60.0, 1000, **settings)


def test_it_counts_the_cache_once_the_batch_represents_it_badly(caplog: pytest.LogCaptureFixture):
    loss_fn, readings = hard_loss(), []
    with caplog.at_level("INFO", "negative_cache"):
        for step in range(40):
            call(loss_fn, list(range(12 * step, 12 * step + 12)), seed=step)
            readings.append((loss_fn.is_waiting, loss_fn.metrics(), num_encoded(loss_fn)))
    opened = [is_waiting for is_waiting, _, _ in readings].index(False)
    assert opened > 1
    for number, (is_waiting, metrics, count) in enumerate(readings):
        assert is_waiting == (number < opened)  # it never goes back
        assert count == (
            2 if number == 0 else 0 if is_waiting else AUTO_SAMPLES * 12
        )  # the first step tries the encoder
        assert ("sampling_noise" in metrics) == (not is_waiting)
    assert readings[opened][1]["in_batch_noise"] > PAYS_ABOVE > readings[opened - 1][1]["in_batch_noise"]
    assert readings[opened][1]["sampling_noise"] < readings[opened][1]["in_batch_noise"]
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == f"The cache counts in the loss from now on, with {12 * opened} cached documents."


def fill(loss_fn: NegativeCacheLoss, count: int) -> None:
    numbers = list(range(count))
    loss_fn.fill_from([{"document_features": features_of(numbers), "document_ids": torch.tensor(numbers)}])


def test_a_corpus_with_few_hard_documents_counts_at_once():
    loss_fn = hard_loss()
    fill(loss_fn, 900)
    assert loss_fn.is_waiting
    call(loss_fn, list(range(900, 912)))
    assert not loss_fn.is_waiting
    assert num_encoded(loss_fn) == 3


def test_it_does_not_wait_for_documents_that_will_not_come():
    """With equally hard documents: a full cache; and a batch whose documents are all cached, as in a new epoch."""
    loss_fn = make_loss(1.0, 60)
    for step in range(4):
        call(loss_fn, list(range(20 * step, 20 * step + 20)))
        assert loss_fn.is_waiting == (step < 3)
    loss_fn = make_loss(1.0, 200)
    for step in (0, 1, 2, 0):
        assert loss_fn.is_waiting
        call(loss_fn, list(range(20 * step, 20 * step + 20)))
    assert not loss_fn.is_waiting
    assert num_encoded(loss_fn) == 5


def test_an_evaluation_sees_the_whole_cache_and_does_not_end_the_waiting():
    loss_fn = hard_loss()
    fill(loss_fn, 900)
    value = call(loss_fn.eval(), list(range(900, 912)))
    assert loss_fn.is_waiting
    torch.testing.assert_close(value, call(loss_fn.train(), list(range(900, 912))))
    assert not loss_fn.is_waiting


def test_whether_it_waits_is_saved():
    first = hard_loss()
    call(first, list(range(12)))
    waiting = copy.deepcopy(first.state_dict())
    assert first.is_waiting
    for step in range(1, 40):
        call(first, list(range(12 * step, 12 * step + 12)))
    assert not first.is_waiting
    copied, loaded = copy.deepcopy(first), hard_loss()
    loaded.load_state_dict(first.state_dict())
    assert not copied.is_waiting
    assert not loaded.is_waiting
    assert_same_state(dict(loaded.state_dict()), dict(first.state_dict()))
    loaded.load_state_dict(waiting)
    assert loaded.is_waiting


def test_a_number_counts_from_the_first_step_on():
    loss_fn = make_loss(1.0, num_samples=0.25)
    call(loss_fn, list(range(20)))
    call(loss_fn, list(range(20, 40)))
    assert num_encoded(loss_fn) == 5
    assert loss_fn.metrics()["cache_share"] > 0


# The encoder is tried in the first step


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda features: torch.ones(1, 8), "returned shape"),
        (lambda features: torch.full((len(features["a"]), 16), torch.nan, requires_grad=True), "NaN or infinity"),
        (lambda features: torch.ones(len(features["a"]), 16), "without gradient"),
        (lambda features: features["words"], "words"),
    ],
    ids=["shape", "not finite", "no gradient", "key"],
)
def test_a_wrong_encoder_is_found_in_the_first_step_of_the_waiting(wrong: Any, message: str):
    loss_fn, encoder = hard_loss(), Encoder(50, 16)
    loss_fn.document_encoder = wrong
    documents = normalize(encoder(features_of(list(range(12)))), dim=1)
    with pytest.raises((ValueError, KeyError), match=message) as raised:
        loss_fn(documents.detach().requires_grad_(), documents, features_of(list(range(12))))
    assert loss_fn.cache is None  # nothing was written
    if sys.version_info >= (3, 11):
        (note,) = raised.value.__notes__
        assert note.endswith("with a dict of features of two documents: 'a' [2], 'b' [2].")


@pytest.mark.parametrize("count", [1, 12])
def test_trying_the_encoder_draws_no_random_numbers(count: int):
    loss_fn, tried = hard_loss(), []
    encoder, numbers = loss_fn.document_encoder, list(range(count))

    def encode(features: dict[str, Tensor]) -> Tensor:
        tried.append(len(features["a"]))
        return torch.dropout(encoder(features), 0.1, train=True)

    loss_fn.document_encoder = encode
    documents = encoder(features_of(numbers))
    before = torch.get_rng_state()
    for _ in range(2):
        loss_fn(documents.detach().requires_grad_(), documents, features_of(numbers), torch.tensor(numbers))
    assert torch.equal(torch.get_rng_state(), before)
    assert tried == [2]  # a single document twice, which BatchNorm needs
