"""How one element is picked from each row of scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from negative_cache import AbstractRetrievalFn, GumbelMaxRetrievalFn, MaxScoreRetrievalFn

SCORES = torch.tensor([1.5, 0.0, -1.0, 2.0, 0.5, 1.0, -0.5, 1.8])
NUM_DRAWS = 200_000
LEVEL = 1e-4


def p_value(retrieval_fn: AbstractRetrievalFn, expected: Tensor, scores: Tensor = SCORES) -> float:
    """Of the chi-square test that the draws follow `expected`."""
    drawn = retrieval_fn(scores.repeat(NUM_DRAWS, 1)).squeeze(1)
    counts = drawn.bincount(minlength=len(scores))
    return float(stats.chisquare(counts.numpy(), (expected.double() * NUM_DRAWS).numpy()).pvalue)


@pytest.mark.parametrize("inv_temp", [1.0, 0.3, 2.0])
def test_gumbel_max_draws_from_the_softmax(inv_temp: float) -> None:
    torch.manual_seed(0)
    assert p_value(GumbelMaxRetrievalFn(inv_temp), (inv_temp * SCORES.double()).softmax(0)) > LEVEL


def test_the_check_rejects_a_temperature_off_by_five_percent() -> None:
    torch.manual_seed(0)
    assert p_value(GumbelMaxRetrievalFn(1.05), SCORES.double().softmax(0)) < LEVEL


def test_the_check_rejects_a_dropped_element() -> None:
    torch.manual_seed(0)
    scores = SCORES.clone()
    scores[2] = -torch.inf
    assert p_value(GumbelMaxRetrievalFn(), SCORES.double().softmax(0), scores) < LEVEL


def test_rows_are_drawn_independently() -> None:
    torch.manual_seed(0)
    first, second = GumbelMaxRetrievalFn()(torch.zeros(2 * NUM_DRAWS, 2)).view(2, NUM_DRAWS)
    table = (2 * first + second).bincount(minlength=4).view(2, 2).numpy()
    assert stats.chi2_contingency(table).pvalue > LEVEL


@pytest.mark.parametrize("retrieval_fn", [GumbelMaxRetrievalFn(), MaxScoreRetrievalFn()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shape_dtype_and_masked_elements(retrieval_fn: AbstractRetrievalFn, dtype: torch.dtype) -> None:
    scores = torch.full((50, 9), -torch.inf, dtype=dtype)
    scores[:, 4] = -1000
    indices = retrieval_fn(scores)
    assert indices.dtype == torch.int64
    assert indices.tolist() == [[4]] * 50


def test_max_score_takes_the_first_of_the_highest() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 1.0]])
    assert MaxScoreRetrievalFn()(scores).tolist() == [[1], [0]]


class Perturbed(TorchDispatchMode):
    """Keeps what the maximum is taken over."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "argmax" in str(func):
            self.scores = args[0].clone()
        return func(*args, **(kwargs or {}))


def num_ties_at_the_top(noise: Tensor) -> int:
    top = noise[noise > 10]
    return len(top) - len(top.unique())


def test_noise_has_no_ties_at_the_top() -> None:
    torch.manual_seed(0)
    with Perturbed() as perturbed:
        GumbelMaxRetrievalFn()(torch.zeros(1, 2**23))
    noise = perturbed.scores.flatten()
    assert noise.isfinite().all()
    assert (noise > 10).sum() > 300
    assert num_ties_at_the_top(noise) == 0
    assert (noise == noise.max()).sum() == 1
    coarse = -(-torch.randint(1, 2**24, (2**23,)).double().div(2**24).log()).log()
    assert num_ties_at_the_top(coarse) > 50


def test_noise_goes_beyond_the_end_of_24_bits() -> None:
    torch.manual_seed(27)  # one of the few seeds with which so few draws get there
    with Perturbed() as perturbed:
        GumbelMaxRetrievalFn()(torch.zeros(1, 2**20))
    assert perturbed.scores.max() > 16.7


def test_noise_is_never_infinite() -> None:
    scores = torch.full((1, 2**22), -3e38)
    scores[0, 7] = 3e38  # only infinite noise could beat it
    assert GumbelMaxRetrievalFn()(scores).item() == 7


def test_a_retrieval_fn_of_ones_own() -> None:
    class Last(AbstractRetrievalFn):
        def forward(self, scores: Tensor) -> Tensor:
            return torch.full((len(scores), 1), scores.shape[1] - 1)

    assert Last()(torch.zeros(2, 3)).tolist() == [[2], [2]]
    with pytest.raises(TypeError, match="abstract"):
        AbstractRetrievalFn()  # type: ignore[abstract]
