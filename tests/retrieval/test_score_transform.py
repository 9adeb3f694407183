"""Which score transforms count as multiplications."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from negative_cache.retrieval import Scale, retrieve
from negative_cache.retrieval.dense import retrieve_dense
from negative_cache.retrieval.score_transform import factor_of
from retrieval_problems import generator, in_float64, random_search
from support import Recorder, as_on_a_gpu

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("function", "factor"),
    [
        (None, 1.0),
        (Scale(3.5), 3.5),
        (lambda s: 20.0 * s, 20.0),
        (lambda s: s / 0.05, 20.0),
        (lambda s: s * torch.tensor(0.3).exp(), 1.3498588),
        (lambda s: -s, -1.0),
        (lambda s: s, 1.0),
        (lambda s: s * 0, 0.0),
    ],
)
def test_multiplications_are_found(function, factor: float):
    assert float(factor_of(function, CPU, torch.float32)) == pytest.approx(factor, rel=1e-6)
    assert float(factor_of(function, CPU, torch.float64)) == pytest.approx(factor, rel=1e-7)


@pytest.mark.parametrize(
    "function",
    [
        lambda s: s + 1,
        lambda s: 20 * s - 1e-3,
        torch.tanh,
        torch.relu,
        torch.abs,
        lambda s: s.clamp(max=1e6),
        lambda s: s.clamp(min=1e-4),
        lambda s: torch.nn.functional.leaky_relu(s, 0.999),
        lambda s: s * s,
        lambda s: s.round(),
        lambda s: s.clamp_(-5, 5),
        torch.nn.ReLU(inplace=True),
        lambda s: s.abs_(),
        lambda s: s + 1e-3 * torch.sin(torch.pi * s),
        lambda s: s * s.shape[1] * torch.linspace(0, 1, len(s))[:, None],
        lambda s: s.sum(),
        lambda s: s @ torch.ones(5, 5),
        lambda s: [s],
    ],
)
def test_everything_else_is_not(function):
    assert factor_of(function, CPU, torch.float32) is None


class Affine(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = torch.tensor(2.0), torch.tensor(0.0)

    def forward(self, scores: Tensor) -> Tensor:
        return self.weight * scores + self.bias


def test_on_a_gpu_a_function_is_checked_once_unless_it_can_change():
    temperature, module = 0.05, Affine()

    def scaled(scores: Tensor) -> Tensor:
        return torch.div(scores, temperature)

    def checked(function) -> tuple[float | None, bool]:
        """The factor, and whether a value was read, which synchronizes a GPU."""
        with as_on_a_gpu(), Recorder() as recorder:
            factor = factor_of(function, CPU, torch.float32)
        return None if factor is None else float(factor), "_local_scalar_dense" in recorder.names

    for number in range(3):
        factor, is_read = checked(scaled)
        assert factor == pytest.approx(20)
        assert is_read == (number == 0)
        assert checked(lambda scores: scores + temperature) == (None, True)  # each lambda is a new function
    for value in (2.0, 5.0):
        module.weight.fill_(value)
        assert checked(module) == (value, True)
    module.bias.fill_(-3)
    assert checked(module) == (None, True)
    assert checked(lambda scores: module.weight * scores) == (5, True)


@pytest.mark.parametrize("function", [Scale(7.0), lambda s: 7 * s, lambda s: 7 * s + 1, torch.tanh])
def test_scores_are_those_of_the_function(function):
    search = random_search(4, 30, torch.float32)._replace(score_transform=function, num_best=5)
    found = retrieve(search, generator())
    truth = retrieve_dense(in_float64(search), generator())
    torch.testing.assert_close(found.lse, truth.lse.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.best_rows, truth.best_rows)
