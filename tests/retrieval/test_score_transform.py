"""Which score transforms are multiplications."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from negative_cache import retrieval
from negative_cache.retrieval import RowPool, Scale, logs, retrieve
from negative_cache.retrieval import score_transform as transform
from negative_cache.retrieval.dense import retrieve_dense
from negative_cache.retrieval.fused import launch as fused
from negative_cache.retrieval.score_transform import factor_of
from support import as_on_a_gpu

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


def test_on_a_gpu_a_function_is_looked_at_once_unless_it_can_change(monkeypatch: pytest.MonkeyPatch):
    looked = []
    original = transform._is_multiplied
    monkeypatch.setattr(transform, "_is_multiplied", lambda *args: (looked.append(1), original(*args))[1])
    temperature = 0.05

    def scaled(scores: Tensor) -> Tensor:
        return torch.div(scores, temperature)

    module = Affine()
    with as_on_a_gpu():
        for _ in range(3):
            assert float(factor_of(scaled, CPU, torch.float32)) == pytest.approx(20)
            assert factor_of(lambda scores: scores + temperature, CPU, torch.float32) is None
        assert len(looked) == 1 + 3  # each lambda is a new one
        for value in (2.0, 5.0):
            module.weight.fill_(value)
            assert float(factor_of(module, CPU, torch.float32)) == value
        module.bias.fill_(-3)
        assert factor_of(module, CPU, torch.float32) is None
        assert factor_of(lambda scores: module.weight * scores, CPU, torch.float32) == 5


@pytest.mark.parametrize("function", [Scale(7.0), lambda s: 7 * s, lambda s: 7 * s + 1, torch.tanh])
def test_scores_are_those_of_the_function(function):
    rng = torch.Generator().manual_seed(0)
    queries, rows = (torch.randn(size, 5, generator=rng) for size in (4, 30))
    pool = RowPool([rows], [torch.ones(30, dtype=torch.bool)])
    exact = RowPool([rows.double()], pool.candidates)
    found = retrieve(queries, pool, generator=rng, score_transform=function, num_top=5)
    truth = retrieve_dense(queries.double(), exact, generator=rng, score_transform=function, num_top=5)
    torch.testing.assert_close(found.lse, truth.lse.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.top_rows, truth.top_rows)


def test_what_runs_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logs, "_said", set())
    pool = RowPool([torch.ones(4, 2)], [torch.ones(4, dtype=torch.bool)])
    with caplog.at_level(logging.INFO, logger="negative_cache"):
        for _ in range(3):
            retrieve(torch.ones(2, 2), pool, generator=torch.Generator())
    assert [record.message for record in caplog.records] == ["Retrieval on cpu: tiled PyTorch, float32 rows."]


class OnAGpu:
    """As much of a tensor as is looked at to choose what runs."""

    device = torch.device("cuda")
    dtype = torch.float32


def test_a_gpu_without_triton_or_with_another_transform_gets_the_tiled_pass(monkeypatch: pytest.MonkeyPatch):
    pool = RowPool([torch.ones(4, 2)], [torch.ones(4, dtype=torch.bool)])
    said = retrieval._why_not_fused(OnAGpu(), pool, torch.tanh, 1, None)
    assert said == (
        "tiled PyTorch, float32 rows: the score transform is no multiplication, which the fused kernel needs."
    )
    monkeypatch.setattr(fused, "_has_triton", lambda: False)
    assert (
        retrieval._why_not_fused(OnAGpu(), pool, None, 1, None)
        == "tiled PyTorch, float32 rows: Triton is not installed."
    )
    monkeypatch.undo()
    assert "at most 16 samples" in (fused.reason_against(torch.ones(1, 2), pool, 17) or "")
    several = RowPool([torch.ones(4, 2)] * 2, [torch.ones(4, dtype=torch.bool)] * 2)
    monkeypatch.setattr(fused, "_has_triton", lambda: True)
    assert "the pool has 2 parts" in (retrieval._why_not_fused(OnAGpu(), several, None, 1, None) or "")
