"""The statistical checks themselves: calm under the null hypothesis, and awake otherwise."""

from __future__ import annotations

import torch

from stats import ALPHA, chi_square, independence, mean_gradient


def test_p_values_are_uniform_under_the_null_hypothesis():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.tensor([0.5, 0.3, 0.199, 0.001], dtype=torch.float64)
    values = []
    for _ in range(200):
        rows = torch.multinomial(probabilities, 4000, True, generator=generator)
        values += [chi_square(rows, probabilities), independence(rows[::2], rows[1::2], probabilities)]
    # 400 uniform values: their mean is 0.5 +- 0.0144, here within 4 of these.
    assert abs(sum(values) / len(values) - 0.5) < 0.058
    assert min(values) > ALPHA


def test_an_impossible_row_is_rejected():
    assert chi_square(torch.tensor([0] * 99 + [1]), torch.tensor([1.0, 0.0])) == 0


def test_a_shifted_mean_is_rejected():
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(10_000, 5, generator=generator, dtype=torch.float64)
    exact = torch.zeros(5, dtype=torch.float64)
    assert mean_gradient(gradients, exact) > ALPHA
    assert mean_gradient(gradients + torch.tensor([0, 0, 0, 0, 0.1]), exact) < ALPHA


def test_components_without_noise_must_be_equal():
    gradients = torch.ones(10, 2, dtype=torch.float64)
    assert mean_gradient(gradients, torch.ones(2, dtype=torch.float64)) == 1
    assert mean_gradient(gradients, torch.tensor([1.0, 1.001], dtype=torch.float64)) == 0
