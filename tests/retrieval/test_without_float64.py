"""Devices without float64, such as Apple's MPS, simulated on the CPU: float32 sums, and float32 uniforms below 1."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from negative_cache.retrieval import Search, randomness
from negative_cache.retrieval.tiled import retrieve_tiled
from retrieval_problems import generator, in_float64, make_population, pool_of, random_search, worst_p_value
from stats import ALPHA, chi_square, independence
from support import as_without_float64

EPS = 2.0**-24  # half of the distance from 1 to the next float32


@pytest.fixture(autouse=True)
def without_float64() -> Iterator[None]:
    with as_without_float64():
        yield


def test_uniforms_are_below_1():
    """The largest of these draws is nearer to 1 than to any smaller float32."""
    source, cpu = generator(174), torch.device("cpu")
    exact = torch.rand(200_000, generator=generator(174), dtype=torch.float64)
    assert float(exact.float().max()) == 1.0
    drawn = randomness.uniforms((200_000,), source, cpu)
    assert drawn.dtype == torch.float32
    assert float(drawn.max()) == 1 - EPS
    assert float((drawn - exact).abs().max()) <= EPS
    assert torch.equal(source.get_state(), _after(200_000))  # as many numbers as on other devices


def _after(count: int) -> Tensor:
    source = generator(174)
    torch.rand(count, generator=source, dtype=torch.float64)
    return source.get_state()


# Draws


@pytest.mark.parametrize("tile_rows", [7, 40])
@pytest.mark.parametrize("top_k", [None, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_draws_follow_the_softmax(tile_rows: int, top_k: int | None, dtype: torch.dtype):
    population = make_population(dtype, top_k=top_k)
    found = retrieve_tiled(population.search._replace(num_samples=2), generator(), tile_rows)
    assert worst_p_value(population, found.rows) > ALPHA


def test_draws_follow_the_softmax_over_many_tiles():
    population = make_population(torch.float32, rows=1500, repeats=10_000)
    assert worst_p_value(population, retrieve_tiled(population.search, generator(), tile_rows=10).rows) > ALPHA


@pytest.mark.parametrize("top_k", [None, 100_001])
def test_rare_rows_are_not_lost(top_k: int | None):
    """100,000 equal rows beside one that has half of the mass: half of the draws are spread evenly."""
    scores = torch.zeros(100_001, 1)
    scores[70_000] = math.log(100_000)
    search = Search(torch.ones(4, 1), pool_of(scores), num_samples=4000, top_k=top_k)
    drawn = retrieve_tiled(search, generator()).rows.flatten()
    bins = torch.where(drawn == 70_000, 20, drawn // 5001)
    sizes = torch.bincount(torch.arange(100_001) // 5001, minlength=21).double()
    sizes[70_000 // 5001] -= 1
    sizes[20] = 100_000
    assert chi_square(bins, sizes / sizes.sum()) > ALPHA


def test_draws_are_independent():
    population = make_population(torch.float32, rows=8, distinct=1, has_masks=False, repeats=40_000)
    for top_k in (None, 8):
        drawn = retrieve_tiled(population.search._replace(num_samples=2, top_k=top_k), generator(), tile_rows=3).rows
        assert independence(drawn[:, 0], drawn[:, 1], population.probabilities[0]) > ALPHA
        assert independence(drawn[0::2, 0], drawn[1::2, 0], population.probabilities[0]) > ALPHA


def test_a_wrong_temperature_is_rejected():
    population = make_population(torch.float32)
    wrong = population.search._replace(score_transform=lambda scores: 1.05 * scores)
    assert worst_p_value(population, retrieve_tiled(wrong, generator(), tile_rows=16).rows) < ALPHA


# Accuracy of the sums


@pytest.mark.parametrize("tile_rows", [128, None])
def test_the_lse_over_many_tiles_is_nearly_that_of_float64_sums(tile_rows: int | None):
    """Each tile adds at most the rounding of its cumulative sum, a logarithm and a logaddexp, 2 units each."""
    search = random_search(16, 131_072, torch.float32)
    found = retrieve_tiled(search, generator(), tile_rows).lse
    with as_without_float64(False):
        expected = retrieve_tiled(search, generator(), tile_rows).lse
    tiles = 1024 if tile_rows else 8
    assert found.dtype == torch.float32
    error = (found - expected).abs() / expected.abs()
    assert float(error.max()) <= 6 * tiles * EPS
    exact = torch.stack([x.logsumexp(0) for x in (in_float64(search).queries @ in_float64(search).pool.embeddings.T)])
    assert float(((found - exact).abs() / exact.abs()).max()) <= (6 * tiles + 2 * search.queries.shape[1]) * EPS


def test_each_of_131_072_positions_has_its_interval_of_uniforms(monkeypatch: pytest.MonkeyPatch):
    """A thousandth of an interval inside both of its ends, the position is drawn. A single float32 sum is too coarse.

    Uniforms, sums and their products are rounded by 4 EPS together. Intervals of weights from 0.5 to 1.5 are at least
    0.3 / 363 long in a block, of which 4 EPS are 0.03 %; in a single sum they are 361 times as short.
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
