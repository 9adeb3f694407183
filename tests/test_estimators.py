"""The losses against autograd of the dense loss in float64; expectations by enumeration, not by sampling."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from negative_cache.estimators import (
    dot,
    interpretable_loss,
    products,
    readable_loss,
    sampled_softmax_loss,
    staleness,
)

BATCH, ROWS, IN_BATCH = 4, 5, 3


def own_draws_loss(positive, negative_scores, lse, in_batch=None):
    """`readable_loss` where each query has draws of its own."""
    return readable_loss(positive, negative_scores.mean(dim=1), lse, in_batch)


class Scores(NamedTuple):
    positive: Tensor  # [batch]
    rows: Tensor  # [batch, rows]: of the cache
    in_batch: Tensor | None  # [batch, n]

    def leaves(self) -> list[Tensor]:
        return [score for score in self if score is not None]


def make_scores(scale: float = 2.0, with_in_batch: bool = False) -> Scores:
    generator = torch.Generator().manual_seed(0)
    sizes = ((BATCH,), (BATCH, ROWS), (BATCH, IN_BATCH))
    values = [scale * torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    leaves = [value.requires_grad_() for value in values]
    return Scores(leaves[0], leaves[1], leaves[2] if with_in_batch else None)


def exact_loss(scores: Scores) -> Tensor:
    parts = [scores.positive[:, None], scores.rows] + ([] if scores.in_batch is None else [scores.in_batch])
    return torch.cat(parts, dim=1).logsumexp(dim=1) - scores.positive


def gradients(loss: Tensor, scores: Scores) -> list[Tensor]:
    return list(torch.autograd.grad(loss.sum(), scores.leaves()))


def expected_gradients(scores: Scores, loss_of, num_samples: int) -> list[Tensor]:
    """The sum over all tuples of rows of their probability times the gradient of `loss_of(rows' scores, lse)`."""
    probabilities = scores.rows.detach().softmax(dim=1)
    lse = scores.rows.detach().logsumexp(dim=1)
    total = [torch.zeros_like(leaf) for leaf in scores.leaves()]
    for rows in itertools.product(range(ROWS), repeat=num_samples):
        weight = probabilities[:, list(rows)].prod(dim=1)  # one per query: the queries' losses are independent
        loss = loss_of(scores.rows[:, list(rows)], lse)
        for sum_, gradient in zip(total, gradients(weight * loss, scores), strict=True):
            sum_ += gradient
    return total


@pytest.mark.parametrize("num_samples", [1, 2, 3])
def test_sampled_softmax_loss_has_the_exact_gradient_in_expectation(num_samples: int):
    scores = make_scores()
    expected = expected_gradients(
        scores, lambda drawn, lse: sampled_softmax_loss(scores.positive, drawn, lse), num_samples
    )
    torch.testing.assert_close(expected, gradients(exact_loss(scores), scores), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("num_samples", [1, 2])
@pytest.mark.parametrize("with_in_batch", [False, True])
def test_readable_loss_has_the_exact_gradient_in_expectation(num_samples: int, with_in_batch: bool):
    scores = make_scores(with_in_batch=with_in_batch)
    expected = expected_gradients(
        scores, lambda drawn, lse: own_draws_loss(scores.positive, drawn, lse, scores.in_batch), num_samples
    )
    torch.testing.assert_close(expected, gradients(exact_loss(scores), scores), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("with_in_batch", [False, True])
def test_readable_loss_has_the_exact_value_whatever_was_drawn(with_in_batch: bool):
    scores = make_scores(with_in_batch=with_in_batch)
    lse = scores.rows.logsumexp(dim=1)
    for row in range(ROWS):
        loss = own_draws_loss(scores.positive, scores.rows[:, [row]], lse, scores.in_batch)
        torch.testing.assert_close(loss, exact_loss(scores), rtol=1e-13, atol=1e-14)


def test_interpretable_loss_is_the_exact_value_without_gradient():
    scores = make_scores()
    loss = interpretable_loss(scores.positive, scores.rows.logsumexp(dim=1))
    torch.testing.assert_close(loss, exact_loss(scores).detach(), rtol=1e-13, atol=1e-14)
    assert not loss.requires_grad


def test_both_losses_have_the_same_gradient_for_each_draw():
    scores = make_scores()
    lse = scores.rows.logsumexp(dim=1).detach()
    first = gradients(sampled_softmax_loss(scores.positive, scores.rows[:, [2, 4]], lse), scores)
    second = gradients(own_draws_loss(scores.positive, scores.rows[:, [2, 4]], lse), scores)
    torch.testing.assert_close(first, second, rtol=1e-13, atol=0)


def test_the_lse_gets_no_gradient():
    """It comes from stale embeddings; the draws carry the gradient of that part."""
    scores = make_scores()
    lse = torch.zeros(BATCH, dtype=torch.float64, requires_grad=True)
    loss = sampled_softmax_loss(scores.positive, scores.rows, lse) + own_draws_loss(scores.positive, scores.rows, lse)
    loss.sum().backward()
    assert lse.grad is None


def test_in_batch_scores_of_minus_infinity_are_no_negatives():
    """The value and every gradient are those without them; their own gradient is 0."""
    scores = make_scores(with_in_batch=True)
    assert scores.in_batch is not None
    masked = scores.in_batch.detach().clone()
    masked[0, 1] = masked[1] = -torch.inf
    masked.requires_grad_()
    lse, drawn = scores.rows.logsumexp(dim=1).detach(), scores.rows[:, :1]
    loss = own_draws_loss(scores.positive, drawn, lse, masked)
    positive_grad, rows_grad, in_batch_grad = torch.autograd.grad(loss.sum(), [scores.positive, scores.rows, masked])
    without = own_draws_loss(scores.positive[:1], drawn[:1], lse[:1], scores.in_batch[:1, [0, 2]])
    torch.testing.assert_close(loss[:1], without, rtol=1e-14, atol=0)
    torch.testing.assert_close(positive_grad[:1], torch.autograd.grad(without.sum(), scores.positive)[0][:1])
    alone = own_draws_loss(scores.positive[1:2], drawn[1:2], lse[1:2])
    torch.testing.assert_close(loss[1:2], alone, rtol=1e-14, atol=0)
    torch.testing.assert_close(rows_grad[1], torch.autograd.grad(alone.sum(), scores.rows)[0][1])
    assert in_batch_grad[0, 1] == 0
    assert in_batch_grad[1].tolist() == [0, 0, 0]
    assert bool((in_batch_grad[2:] > 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_any_negative_the_loss_and_its_gradient_are_zero(dtype: torch.dtype):
    positive = torch.tensor([1.0, -300.0], dtype=dtype, requires_grad=True)
    drawn = torch.tensor([[3.0], [5.0]], dtype=dtype, requires_grad=True)
    nothing = torch.full((2,), -torch.inf, dtype=dtype)
    in_batch = torch.full((2, 2), -torch.inf, dtype=dtype, requires_grad=True)
    losses = [
        sampled_softmax_loss(positive, drawn, nothing),
        own_draws_loss(positive, drawn, nothing),
        own_draws_loss(positive, drawn, nothing, in_batch),
    ]
    for loss in losses:
        assert loss.tolist() == [0, 0]
        found = torch.autograd.grad(loss.sum(), [positive, drawn, in_batch], allow_unused=True)
        assert all(gradient is None or not gradient.any() for gradient in found)
    assert interpretable_loss(positive, nothing).tolist() == [0, 0]


def test_without_a_cache_the_loss_is_the_plain_cross_entropy():
    scores = make_scores(with_in_batch=True)
    nothing = torch.full((BATCH,), -torch.inf, dtype=torch.float64)
    loss = own_draws_loss(scores.positive, scores.rows[:, :1] * 0, nothing, scores.in_batch)
    assert scores.in_batch is not None
    truth = torch.cat([scores.positive[:, None], scores.in_batch], dim=1).logsumexp(dim=1) - scores.positive
    torch.testing.assert_close(loss, truth, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(
        torch.autograd.grad(loss.sum(), [scores.positive, scores.in_batch]),
        torch.autograd.grad(truth.sum(), [scores.positive, scores.in_batch]),
        rtol=1e-12,
        atol=1e-14,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("difference", [-1e4, 0.0, 1e4])
def test_large_scores_overflow_nowhere(dtype: torch.dtype, difference: float):
    positive = torch.tensor([1e4], dtype=dtype, requires_grad=True)
    drawn = (positive.detach()[:, None] + difference).requires_grad_()
    lse = drawn.detach()[:, 0]
    in_batch = torch.tensor([[-1e4, 1e4]], dtype=dtype, requires_grad=True)
    for loss in (own_draws_loss(positive, drawn, lse), own_draws_loss(positive, drawn, lse, in_batch)):
        found = torch.autograd.grad(loss.sum(), [positive, drawn, in_batch], allow_unused=True)
        assert bool(loss.isfinite().all())
        assert all(gradient is None or bool(gradient.isfinite().all()) for gradient in found)
    # -log pi of two equal scores is log 2, of one that is 1e4 above 1e4, of one that is 1e4 below 0.
    expected = {-1e4: 0.0, 0.0: math.log(2), 1e4: 1e4}[difference]
    assert float(own_draws_loss(positive, drawn, lse).detach()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("with_in_batch", [False, True])
def test_a_tiny_weight_keeps_its_relative_precision(with_in_batch: bool):
    """In float32, `1 - softmax` would be 0 from a margin of 17 on; its true value is exp(-margin)."""
    margin = torch.tensor([20.0, 40.0, 80.0])
    positive = margin.clone().requires_grad_()
    lse = torch.zeros(3)
    drawn = torch.zeros(3, 1, requires_grad=True)
    in_batch = torch.zeros(3, 1) if with_in_batch else None
    expected = torch.sigmoid(math.log(2 if with_in_batch else 1) - margin.double())
    losses = [own_draws_loss(positive, drawn, lse, in_batch)]
    if not with_in_batch:
        losses.append(sampled_softmax_loss(positive, drawn, lse))
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss.sum(), positive)
        torch.testing.assert_close(-gradient.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses[0].detach().double(), torch.log1p(expected / (1 - expected)), rtol=1e-5, atol=0)
    assert bool((1 - torch.stack([positive, lse], 1).softmax(1)[:, 0] == 0).all())  # what must not be computed


def test_staleness_is_the_relative_squared_distance():
    cached = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    encoded = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 1.0]], requires_grad=True)
    found = staleness(cached, encoded)
    assert found.tolist() == [0.0, 5.0 / 4.0, 1.0]
    assert not found.requires_grad
    assert staleness(torch.zeros(1, 2), torch.zeros(1, 2)).tolist() == [0.0]
    assert staleness(cached.to(torch.bfloat16), encoded).tolist() == [0.0, 1.25, 1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_products_are_computed_in_at_least_float32_even_under_autocast(dtype: torch.dtype):
    """Integers whose products are exact in float32, but not in half precision."""
    queries, documents = torch.tensor([[33.0, 1.0], [17.0, -3.0]]), torch.tensor([[31.0, 1.0], [57.0, 5.0]])
    truth = queries.double() @ documents.double().T
    assert not torch.equal(truth.to(torch.bfloat16).double(), truth)
    with torch.autocast("cpu", torch.bfloat16):
        found = products(queries.to(dtype), documents.to(dtype))
        pairs = dot(queries.to(dtype), documents.to(dtype))
    assert found.dtype == pairs.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(found.double(), truth)
    assert torch.equal(pairs.double(), truth.diagonal())
