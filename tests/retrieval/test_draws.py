"""The draws of the tiled and of the dense pass: they follow the softmax, independently."""

from __future__ import annotations

import math

import pytest
import torch

from negative_cache.retrieval import Search, randomness
from negative_cache.retrieval.dense import retrieve_dense
from negative_cache.retrieval.tiled import retrieve_tiled
from retrieval_problems import Population, generator, make_population, pool_of, worst_independence, worst_p_value
from stats import ALPHA, chi_square, independence


@pytest.mark.parametrize("tile_rows", [1, 7, 16, 40, None])
@pytest.mark.parametrize("top_k", [None, 9])
def test_draws_follow_the_softmax(tile_rows: int | None, top_k: int | None):
    population = make_population(top_k=top_k)
    found = retrieve_tiled(population.search._replace(num_samples=2), generator(), tile_rows)
    assert worst_p_value(population, found.rows) > ALPHA


@pytest.mark.parametrize("top_k", [None, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_draws_follow_the_softmax_of_narrow_rows(dtype: torch.dtype, top_k: int | None):
    population = make_population(dtype, top_k=top_k)
    assert worst_p_value(population, retrieve_tiled(population.search, generator(), tile_rows=16).rows) > ALPHA


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_draws_follow_the_softmax_over_many_tiles(dtype: torch.dtype):
    population = make_population(dtype, rows=1500, repeats=10_000)
    assert worst_p_value(population, retrieve_tiled(population.search, generator(), tile_rows=10).rows) > ALPHA


@pytest.mark.parametrize("top_k", [None, 9])
def test_draws_of_the_dense_pass_follow_the_softmax(top_k: int | None):
    population = make_population(top_k=top_k)
    assert worst_p_value(population, retrieve_dense(population.search, generator()).rows) > ALPHA


def test_without_some_rows_the_others_are_drawn_by_the_same_law():
    population = make_population(has_masks=False)
    kept = torch.arange(40) % 3 > 0
    dropped = pool_of(population.search.pool.embeddings[kept])
    drawn = retrieve_tiled(population.search._replace(pool=dropped), generator(), tile_rows=7).rows
    probabilities = population.probabilities * kept
    probabilities = probabilities / probabilities.sum(1, keepdim=True)
    rows = kept.nonzero().squeeze(1)[drawn]
    assert worst_p_value(population._replace(probabilities=probabilities), rows) > ALPHA


@pytest.mark.parametrize("top_k", [None, 100_001])
def test_rare_rows_are_not_lost(top_k: int | None):
    """100,000 equal rows beside one that has half of the mass, in float32: half of the draws are spread evenly."""
    scores = torch.zeros(100_001, 1)
    scores[70_000] = math.log(100_000)
    search = Search(torch.ones(4, 1), pool_of(scores), num_samples=4000, top_k=top_k)
    drawn = retrieve_tiled(search, generator()).rows.flatten()
    # 16,000 draws put in 20 bins of rows, and the one heavy row on its own.
    bins = torch.where(drawn == 70_000, 20, drawn // 5001)
    sizes = torch.bincount(torch.arange(100_001) // 5001, minlength=21).double()
    sizes[70_000 // 5001] -= 1
    sizes[20] = 100_000
    assert chi_square(bins, sizes / sizes.sum()) > ALPHA


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 2), (1 - 2**-24, 4)])
def test_a_row_without_probability_is_never_drawn(uniform: float, expected: int, monkeypatch: pytest.MonkeyPatch):
    """Not even by the lowest and the highest uniform, which chance does not show in the time of a test."""
    scores = torch.tensor([[-torch.inf, -torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]])
    monkeypatch.setattr(randomness, "uniforms", lambda shape, *_: torch.full(shape, uniform))
    assert randomness.sample(scores, 2, generator()).tolist() == [[expected] * 2]


def small_population(dtype: torch.dtype = torch.float64) -> Population:
    """One query, whose joint law has few cells, so that dependence shows."""
    return make_population(dtype, rows=8, distinct=1, has_masks=False, repeats=40_000)


@pytest.mark.parametrize("tile_rows", [1, 3, 8])
@pytest.mark.parametrize("top_k", [None, 5])
def test_draws_are_independent(tile_rows: int, top_k: int | None):
    search = small_population().search._replace(num_samples=3, top_k=top_k)
    drawn = retrieve_tiled(search, generator(), tile_rows).rows
    probabilities = make_population(rows=8, distinct=1, has_masks=False, repeats=1, top_k=top_k).probabilities[0]
    assert worst_independence(drawn, probabilities) > ALPHA


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_successive_calls_are_independent(dtype: torch.dtype):
    population, source = small_population(dtype), generator()
    first, second = (retrieve_tiled(population.search, source, tile_rows=3).rows[:, 0] for _ in range(2))
    assert independence(first, second, population.probabilities[0]) > ALPHA


# The checks above must reject wrong samplers at the same number of draws.


@pytest.mark.parametrize("factor", [1.05, 1 / 1.05])
def test_a_wrong_temperature_is_rejected(factor: float):
    population = make_population()
    wrong = population.search._replace(score_transform=lambda scores: factor * scores)
    assert worst_p_value(population, retrieve_tiled(wrong, generator(), tile_rows=16).rows) < ALPHA


@pytest.mark.parametrize("rank", [0, 3])
def test_a_lost_row_is_rejected(rank: int):
    population = make_population()
    pool, lost = population.search.pool, population.probabilities[0].argsort(descending=True)[rank]
    wrong = pool._replace(is_candidate=pool.is_candidate & (torch.arange(40) != lost))
    drawn = retrieve_tiled(population.search._replace(pool=wrong), generator(), tile_rows=16).rows
    assert worst_p_value(population, drawn) < ALPHA


def test_shared_noise_is_rejected():
    population = small_population()
    probabilities = population.probabilities[0]
    drawn = retrieve_tiled(population.search._replace(num_samples=2), generator(), tile_rows=3).rows
    between_queries = drawn[: len(drawn) // 2].repeat_interleave(2, 0)
    assert worst_p_value(population, between_queries) > ALPHA  # each draw alone is right
    assert worst_independence(between_queries, probabilities) < ALPHA
    between_samples = drawn[:, :1].expand(-1, 2)
    assert worst_independence(between_samples, probabilities) < ALPHA
