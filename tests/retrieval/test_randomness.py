"""Uniforms, and draws of positions: float32 has 24 bits, and nothing is lost by that."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from negative_cache.retrieval import randomness
from retrieval_problems import generator
from stats import ALPHA, chi_square

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_uniforms_are_those_in_fixed_point_and_below_1(dtype: torch.dtype):
    count, limits = 200_000, torch.finfo(dtype)
    integers = randomness.uniforms((count,), generator(174), CPU, torch.int64)
    drawn = randomness.uniforms((count,), generator(174), CPU, dtype)
    assert drawn.dtype == dtype
    assert integers.dtype == torch.int64
    assert 0 <= int(integers.min()) < 2**62 / 1000
    assert 2**62 * 0.999 < int(integers.max()) < 2**62
    exact = integers.double() * 2.0**-62
    assert float((drawn.double() - exact).abs().max()) <= limits.eps / 2
    assert float(drawn.max()) <= 1 - limits.eps / 2


def test_a_uniform_that_rounds_to_1_is_below_1(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(randomness, "_random_integers", lambda *_: torch.tensor([2**62 - 1]))
    for dtype in (torch.float32, torch.float64):
        assert torch.tensor(2**62 - 1).to(dtype) == 2**62  # it does round
        drawn = randomness.uniforms((1,), generator(), CPU, dtype)
        assert float(drawn) == 1 - torch.finfo(dtype).eps / 2


def test_small_uniforms_are_not_multiples_of_24_bits():
    """A tile is entered if a uniform is below its chance, which may be far below 2^-24."""
    drawn = randomness.uniforms((2**22,), generator(), CPU)
    small = drawn[drawn < 2**-8].double() * 2**24
    assert len(small) > 10_000
    assert len(small.unique()) > 0.99 * len(small)
    assert len(small.floor().unique()) < 0.99 * len(small)  # as multiples of 2^-24, many would be equal


def test_all_bits_of_uniforms_in_fixed_point_are_fair():
    integers = randomness.uniforms((20_000,), generator(), CPU, torch.int64)
    for first in range(0, 62, 4):
        bits = min(4, 62 - first)
        assert chi_square((integers >> first) & (2**bits - 1), torch.full((2**bits,), 2.0**-bits)) > ALPHA


def test_each_of_131_072_positions_has_its_interval_of_uniforms(monkeypatch: pytest.MonkeyPatch):
    """A thousandth of an interval inside both of its ends, the position is drawn. A single float32 sum is too coarse.

    Uniforms, sums and their products are rounded by 4 eps together, with eps = 2^-24. Intervals of weights from 0.5 to
    1.5 are at least 0.3 / 363 long in a block, of which 4 eps are 0.03 %; in a single sum they are 361 times as short.
    """
    size, inside = 363, 1e-3  # the square root of the number of positions
    scores = (0.5 + torch.rand(1, 131_072, generator=generator())).log()
    weights = scores.double().exp().flatten()
    blocks = torch.nn.functional.pad(weights, (0, -len(weights) % size)).view(-1, size)
    positions = torch.randint(len(weights), (5000,), generator=generator())
    block, within = positions // size, positions % size

    def ends(weights: Tensor, at: Tensor) -> Tensor:
        """Uniforms just inside both ends of the intervals of positions `[rows, n]`: `[rows, 2 * n]`."""
        total, cumulative = weights.sum(1, keepdim=True), weights.cumsum(1)
        start, length = ((x / total).gather(1, at) for x in (cumulative - weights, weights))
        return torch.cat([start + inside * length, start + (1 - inside) * length], dim=1)

    expected = torch.cat([positions, positions])[None]
    of_block = ends(blocks.sum(1)[None], block[None])
    of_within = ends(blocks[block], within[:, None]).T.reshape(1, -1)
    for other in (of_within, of_within.roll(len(positions), 1)):  # both ends in the block at each end of the block
        monkeypatch.setattr(randomness, "uniforms", lambda *_, other=other: torch.stack([of_block, other]).float())
        assert torch.equal(randomness.sample(scores, expected.shape[1], generator()), expected)
    single = randomness.inverse_cdf(scores.exp().cumsum(1), ends(weights[None], positions[None]).float())
    assert float((single != expected).double().mean()) > 0.01  # the check can fail
