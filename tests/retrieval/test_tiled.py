"""The tiled pass against the dense one: values, best rows and memory."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch import Tensor

from negative_cache.retrieval import Search
from negative_cache.retrieval.dense import grouped_top_k, retrieve_dense
from negative_cache.retrieval.search import dense_scores
from negative_cache.retrieval.tiled import mine_groups, retrieve_tiled
from retrieval_problems import DIM, generator, in_float64, pool_of, random_search
from support import Recorder, as_on_a_gpu

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Relative to the size of lse: a few ulps of the dtype in which scores are computed.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 5e-7, torch.float16: 5e-7}
# Batch, rows, rows per tile: fewer rows than a tile, multiples of a tile or not, tiles of one row, single queries.
SHAPES = [(1, 1, 256), (1, 100, 7), (3, 64, 16), (5, 257, 64), (4, 10, None), (2, 90, 1), (7, 129, 128), (2, 5, 5)]


def relative_error(lse: Tensor, truth: Tensor) -> float:
    assert torch.equal(lse.isfinite(), truth.isfinite())
    finite = truth.isfinite()
    if not bool(finite.any()):
        return 0.0
    return float(((lse.double() - truth)[finite].abs() / truth[finite].abs().clamp(min=1)).max())


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lse_is_as_exact_as_the_dense_one(shape: tuple[int, int, int | None], dtype: torch.dtype, scale: float):
    batch, rows, tile_rows = shape
    for has_masks in (False, True):
        search = random_search(batch, rows, dtype, has_masks=has_masks)
        for top_k in (None, 1, (rows + 1) // 2, rows):
            search = search._replace(score_transform=lambda scores: scale * scores, top_k=top_k)
            truth = retrieve_dense(in_float64(search), generator()).lse
            plain = retrieve_dense(search, generator()).lse
            lse = retrieve_tiled(search, generator(), tile_rows).lse
            assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert relative_error(lse, truth) <= 2 * relative_error(plain, truth) + TOLERANCE[dtype]


@pytest.mark.parametrize("tile_rows", [128, None])
def test_the_float32_lse_does_not_drift_over_many_tiles(tile_rows: int | None):
    """In units of 2^-24, half a unit in the last place of 1; products of small integers are exact.

    Each tile rounds the running sum once, by at most 1 unit, at random: six standard deviations are
    6 * (tiles / 3)^0.5. Exponentials and sums of blocks are wrong by up to 4 units, the logarithm and lse, which is
    below 16, by up to 8 each.
    """
    rows = 65_536
    search = random_search(16, rows, torch.float32, has_integers=True)
    search = search._replace(score_transform=lambda scores: 0.25 * scores)
    found = retrieve_tiled(search, generator(), tile_rows).lse
    exact = dense_scores(in_float64(search)).logsumexp(1)
    assert found.dtype == torch.float32
    assert float(exact.max()) < 16
    tiles = rows / (tile_rows or 16_384)
    assert float((found - exact).abs().max()) * 2**24 <= 6 * math.sqrt(tiles / 3) + 4 + 2 * 8


def test_the_lse_of_float64_rows_has_no_float32_in_it():
    search = random_search(16, 65_536, torch.float64)
    found, exact = retrieve_tiled(search, generator()).lse, dense_scores(search).logsumexp(1)
    torch.testing.assert_close(found, exact, rtol=1e-14, atol=0)


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_best_rows_equal_the_dense_ones(shape: tuple[int, int, int | None], dtype: torch.dtype, scale: float):
    """Scores of small integers are exact and often equal: of equal ones the lowest row counts, tiled or not."""
    batch, rows, tile_rows = shape
    search = random_search(batch, rows, dtype, has_integers=True, has_masks=True)
    search = search._replace(score_transform=lambda scores: scale * scores)
    for top_k in (None, 1, (rows + 1) // 2, rows):
        for num_best in (0, 1, 4, rows + 3):
            search = search._replace(top_k=top_k, num_best=num_best)
            truth = retrieve_dense(in_float64(search), generator()).best_rows
            assert torch.equal(retrieve_tiled(search, generator(), tile_rows).best_rows, truth)


@pytest.mark.parametrize("tile_rows", [1, 4, 16, 100])
def test_of_equal_scores_the_lowest_row_is_returned(tile_rows: int):
    pool = pool_of(torch.ones(30, 2))._replace(is_candidate=torch.arange(30) >= 3)
    search = Search(torch.ones(2, 2), pool, num_best=5)
    assert retrieve_tiled(search, generator(), tile_rows).best_rows.tolist() == [[3, 4, 5, 6, 7]] * 2
    search = search._replace(num_best=3, top_k=3)
    assert retrieve_tiled(search, generator(), tile_rows).best_rows.tolist() == [[3, 10, 20]] * 2


@pytest.mark.parametrize("rows", [10, 37, 64])
@pytest.mark.parametrize("k", [1, 3, 8, 10])
def test_mined_groups_equal_the_dense_ones(rows: int, k: int):
    search = random_search(4, rows, torch.float32, has_integers=True, has_masks=True)
    scores, positions = mine_groups(search, k)
    truth, expected = grouped_top_k(dense_scores(search), k)
    assert torch.equal(scores, truth)
    assert torch.equal(positions[truth > -torch.inf], expected[truth > -torch.inf])


def test_mined_groups_are_contiguous():
    """Retrieval functions of the earlier implementations take views of them."""
    for values in mine_groups(random_search(3, 4096, torch.float32), 8):
        assert values.is_contiguous()


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("retrieve_fn", [retrieve_tiled, retrieve_dense])
def test_a_query_without_rows_gets_minus_infinity(retrieve_fn, top_k: int | None):
    """One query has all of its rows excluded; then no row is a candidate."""
    table = torch.randn(6, DIM, generator=generator())
    excluded = torch.stack([torch.arange(6), torch.full((6,), -1)])
    search = Search(table[:2], pool_of(table), excluded=excluded, top_k=top_k, num_samples=2, num_best=2)
    found = retrieve_fn(search, generator())
    assert found.lse[0] == -torch.inf
    assert found.lse[1].isfinite()
    assert found.best_rows[0].tolist() == [-1, -1]
    assert bool(((found.rows >= 0) & (found.rows < 6)).all())
    hidden = search.pool._replace(is_candidate=torch.zeros(6, dtype=torch.bool))
    nothing = retrieve_fn(search._replace(pool=hidden, excluded=None), generator())
    assert nothing.lse.tolist() == [-math.inf] * 2
    assert nothing.best_rows.tolist() == [[-1, -1]] * 2
    assert bool(((nothing.rows >= 0) & (nothing.rows < 6)).all())


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_batch_may_be_empty(top_k: int | None):
    search = Search(torch.ones(0, DIM), random_search(2, 512, torch.float32).pool, top_k=top_k, num_best=3)
    found = retrieve_tiled(search, generator())
    assert found.lse.shape == (0,)
    assert found.rows.shape == (0, 1)
    assert found.best_rows.shape == (0, 2 if top_k else 3)


@pytest.mark.parametrize("top_k", [None, 7])
def test_queries_and_rows_need_not_be_contiguous(top_k: int | None):
    wide = torch.randn(DIM, 9, generator=generator())
    table = torch.randn(50, 2 * DIM, generator=generator())[:, ::2]
    search = Search(wide.T, pool_of(table), num_best=3, top_k=top_k)
    found = retrieve_tiled(search, generator(), tile_rows=16)
    truth = retrieve_dense(search._replace(queries=wide.T.contiguous(), pool=pool_of(table.contiguous())), generator())
    torch.testing.assert_close(found.lse, truth.lse)
    assert torch.equal(found.best_rows, truth.best_rows)


def test_rows_that_are_no_candidates_are_as_good_as_gone():
    search = random_search(4, 60, torch.float64, has_integers=True)._replace(num_best=6)
    kept = torch.rand(60, generator=generator(5)) < 0.5
    masked = search._replace(pool=search.pool._replace(is_candidate=kept))
    dropped = search._replace(pool=pool_of(search.pool.embeddings[kept]))
    first, second = (retrieve_tiled(s, generator(), tile_rows=8) for s in (masked, dropped))
    torch.testing.assert_close(first.lse, second.lse, rtol=1e-14, atol=0)
    assert torch.equal(first.best_rows, kept.nonzero().squeeze(1)[second.best_rows])


@pytest.mark.parametrize("top_k", [None, 5])
def test_a_row_excluded_for_all_queries_is_as_one_that_is_no_candidate(top_k: int | None):
    search = random_search(4, 60, torch.float64, has_integers=True)._replace(num_best=6, top_k=top_k)
    kept = torch.rand(60, generator=generator(5)) < 0.5
    masked = search._replace(pool=search.pool._replace(is_candidate=kept))
    excluded = search._replace(excluded=(~kept).nonzero().squeeze(1).expand(4, -1))
    first, second = (retrieve_tiled(s, generator(), tile_rows=8) for s in (masked, excluded))
    for a, b in zip(first[:4], second[:4], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reads", [True, False])
def test_what_a_transform_makes_of_a_row_that_is_no_candidate_does_not_matter(reads: bool):
    rows = torch.cat([torch.ones(10, 2), torch.zeros(90, 2)])
    pool = pool_of(rows)._replace(is_candidate=torch.arange(100) < 10)
    with contextlib.nullcontext() if reads else as_on_a_gpu():
        found = retrieve_tiled(Search(torch.ones(3, 2), pool, lambda scores: 1 / scores), generator())
    torch.testing.assert_close(found.lse, torch.full((3,), 0.5 + math.log(10)))


def largest_tensor(retrieve_fn, batch: int, rows: int, **options: int) -> int:
    search = random_search(batch, rows, torch.float32)._replace(**options)
    search = search._replace(excluded=torch.zeros(batch, 2, dtype=torch.int64))
    with Recorder() as recorder:
        retrieve_fn(search, generator())
    return recorder.largest


@pytest.mark.parametrize("options", [{}, {"num_samples": 3, "num_best": 10}, {"top_k": 64}], ids=str)
def test_memory_does_not_grow_with_the_rows(options: dict[str, int]):
    batch, rows = 128, 32768
    small = largest_tensor(retrieve_tiled, batch, rows, **options)
    large = largest_tensor(retrieve_tiled, batch, 3 * rows, **options)
    assert small < batch * rows
    assert large <= small


def test_the_memory_test_sees_the_dense_matrix():
    assert largest_tensor(retrieve_dense, 16, 512) >= 16 * 512
