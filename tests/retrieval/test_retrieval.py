"""The pass over the rows: the tiled one against the dense one, and both samplers against the softmax."""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from negative_cache.cache.columns import make_column
from negative_cache.cache.specs import QuantizedFeature, dequantize, quantize
from negative_cache.retrieval import RowPool, retrieve
from negative_cache.retrieval import dense as reference
from negative_cache.retrieval import matmul as product
from negative_cache.retrieval.dense import dense_scores, grouped_top_k, retrieve_dense
from negative_cache.retrieval.search import group_bounds
from negative_cache.retrieval.tiled import mine_groups, retrieve_streaming
from stats import ALPHA, chi_square, independence
from support import Recorder, as_on_a_gpu

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Relative to the size of lse: some ulps of the dtype in which scores are computed.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 5e-7, torch.float16: 5e-7}
# batch, rows, rows per tile: smaller than a tile, on and off the tile, single rows and queries.
SHAPES = [(1, 1, 256), (1, 100, 7), (3, 64, 16), (5, 257, 64), (4, 10, None), (2, 300, 1), (7, 129, 128), (2, 5, 5)]
DIM = 6


class Case(NamedTuple):
    queries: Tensor
    pool: RowPool
    excluded: Tensor | None


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_case(batch: int, rows: int, dtype: torch.dtype, *, is_integer: bool = False, masks: bool = False) -> Case:
    """Random rows; integer ones have exact dot products in every dtype, and many equal scores."""
    rng = generator(batch * 10_000 + rows)

    def embeddings(count: int) -> Tensor:
        if is_integer:
            return torch.randint(-2, 3, (count, DIM), generator=rng).to(dtype)
        return torch.randn(count, DIM, generator=rng, dtype=torch.float64).to(dtype)

    queries, table = embeddings(batch), embeddings(rows)
    candidates = torch.rand(rows, generator=rng) < 0.7 if masks else torch.ones(rows, dtype=torch.bool)
    excluded = torch.randint(-1, rows, (batch, 3), generator=rng) if masks else None
    return Case(queries, RowPool([table], [candidates]), excluded)


def to_float64(case: Case) -> Case:
    """The same numbers in float64."""
    pool = RowPool([part.double() for part in case.pool.embeddings], case.pool.candidates)
    return Case(case.queries.double(), pool, case.excluded)


def run(fn, case: Case, seed: int = 0, **settings):
    return fn(case.queries, case.pool, excluded=case.excluded, generator=generator(seed), **settings)


def relative_error(lse: Tensor, truth: Tensor) -> float:
    assert torch.equal(lse.isfinite(), truth.isfinite())
    finite = truth.isfinite()
    if not bool(finite.any()):
        return 0.0
    return float(((lse.double() - truth)[finite].abs() / truth[finite].abs().clamp(min=1)).max())


# The reference, against loops


def test_reference_scores_equal_a_loop():
    case = make_case(3, 11, torch.float64, masks=True)
    scores = dense_scores(case.queries, case.pool, lambda s: 3 * s, case.excluded)
    assert case.excluded is not None
    for query in range(3):
        for row in range(11):
            is_hidden = not case.pool.candidates[0][row] or row in case.excluded[query].tolist()
            dot = sum(float(a * b) for a, b in zip(case.queries[query], case.pool.embeddings[0][row], strict=True))
            expected = -math.inf if is_hidden else 3 * dot
            assert float(scores[query, row]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("rows", "k"), [(1, 1), (7, 3), (8, 4), (9, 9), (10, 4), (13, 1)])
def test_reference_groups_equal_a_loop(rows: int, k: int):
    scores = torch.randint(0, 4, (5, rows), generator=generator()).double()
    values, positions = grouped_top_k(scores, k)
    size, num_longer = group_bounds(rows, k)
    for query in range(5):
        start = 0
        for group in range(k):
            length = size + (group < num_longer)
            members = scores[query, start : start + length].tolist()
            assert float(values[query, group]) == max(members)
            assert int(positions[query, group]) == start + members.index(max(members))
            start += length
        assert start == rows


# The tiled pass, against the reference


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lse_is_as_exact_as_the_dense_one(shape: tuple[int, int, int | None], dtype: torch.dtype, scale: float):
    batch, rows, tile_rows = shape
    for masks in (False, True):
        case = make_case(batch, rows, dtype, masks=masks)
        for top_k in (None, 1, (rows + 1) // 2, rows):
            settings = {"score_transform": lambda scores: scale * scores, "top_k": top_k}
            truth = run(retrieve_dense, to_float64(case), **settings).lse
            plain = run(retrieve_dense, case, **settings).lse
            lse = run(retrieve_streaming, case, tile_rows=tile_rows, **settings).lse
            assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert relative_error(lse, truth) <= 2 * relative_error(plain, truth) + TOLERANCE[dtype]


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_best_rows_equal_the_dense_ones(shape: tuple[int, int, int | None], dtype: torch.dtype, scale: float):
    """Scores of small integers are exact and often equal: ties must go to the lowest row, tiled or not."""
    batch, rows, tile_rows = shape
    case = make_case(batch, rows, dtype, is_integer=True, masks=True)
    for top_k in (None, 1, (rows + 1) // 2, rows):
        for num_top in (0, 1, 4, rows + 3):
            settings = {"score_transform": lambda scores: scale * scores, "top_k": top_k, "num_top": num_top}
            truth = run(retrieve_dense, to_float64(case), **settings).top_rows
            assert torch.equal(run(retrieve_streaming, case, tile_rows=tile_rows, **settings).top_rows, truth)


@pytest.mark.parametrize("tile_rows", [1, 4, 16, 100])
def test_equal_scores_go_to_the_lowest_row(tile_rows: int):
    pool = RowPool([torch.ones(30, 2)], [torch.arange(30) >= 3])
    found = retrieve_streaming(torch.ones(2, 2), pool, generator=generator(), num_top=5, tile_rows=tile_rows)
    assert found.top_rows.tolist() == [[3, 4, 5, 6, 7]] * 2
    grouped = retrieve_streaming(torch.ones(2, 2), pool, generator=generator(), num_top=3, top_k=3, tile_rows=tile_rows)
    assert grouped.top_rows.tolist() == [[3, 10, 20]] * 2


@pytest.mark.parametrize("rows", [10, 37, 64])
@pytest.mark.parametrize("k", [1, 3, 8, 10])
def test_mined_groups_equal_the_dense_ones(rows: int, k: int):
    case = make_case(4, rows, torch.float32, is_integer=True, masks=True)
    scores, positions = mine_groups(case.queries, case.pool, k, None, case.excluded)
    truth, expected = grouped_top_k(dense_scores(case.queries, case.pool, None, case.excluded), k)
    assert torch.equal(scores, truth)
    assert torch.equal(positions[truth > -torch.inf], expected[truth > -torch.inf])


@pytest.mark.parametrize("retrieve_fn", [retrieve_streaming, retrieve_dense])
def test_nothing_valid(retrieve_fn):
    """One query has all of its rows excluded, then no row is a candidate at all."""
    table = torch.randn(6, DIM, generator=generator())
    pool = RowPool([table], [torch.ones(6, dtype=torch.bool)])
    excluded = torch.stack([torch.arange(6), torch.full((6,), -1)])
    for top_k in (None, 3):
        found = retrieve_fn(
            table[:2], pool, generator=generator(), excluded=excluded, top_k=top_k, num_samples=2, num_top=2
        )
        assert found.lse[0] == -torch.inf
        assert found.lse[1].isfinite()
        assert found.top_rows[0].tolist() == [-1, -1]
        assert bool(((found.rows >= 0) & (found.rows < 6)).all())
        hidden = RowPool([table], [torch.zeros(6, dtype=torch.bool)])
        nothing = retrieve_fn(table[:2], hidden, generator=generator(), top_k=top_k, num_samples=2, num_top=2)
        assert nothing.lse.tolist() == [-math.inf] * 2
        assert nothing.top_rows.tolist() == [[-1, -1]] * 2
        assert bool(((nothing.rows >= 0) & (nothing.rows < 6)).all())


def test_queries_need_not_be_contiguous():
    wide = torch.randn(DIM, 9, generator=generator())
    table = torch.randn(50, 2 * DIM, generator=generator())[:, ::2]
    pool = RowPool([table], [torch.ones(50, dtype=torch.bool)])
    copied = RowPool([table.contiguous()], pool.candidates)
    for top_k in (None, 7):
        found = retrieve_streaming(wide.T, pool, generator=generator(), num_top=3, top_k=top_k, tile_rows=16)
        truth = retrieve_dense(wide.T.contiguous(), copied, generator=generator(), num_top=3, top_k=top_k)
        torch.testing.assert_close(found.lse, truth.lse)
        assert torch.equal(found.top_rows, truth.top_rows)


@pytest.mark.parametrize("tile_rows", [1, 7, 16, 1000])
def test_several_tensors_form_one_pool(tile_rows: int):
    case = make_case(4, 40, torch.float32, is_integer=True, masks=True)
    table, candidates = case.pool.embeddings[0], case.pool.candidates[0]
    cuts = [0, 1, 13, 30, 40]
    pairs = list(itertools.pairwise(cuts))
    split = RowPool([table[a:b] for a, b in pairs], [candidates[a:b] for a, b in pairs])
    for top_k in (None, 6):
        settings = {"num_top": 5, "num_samples": 3, "top_k": top_k, "tile_rows": tile_rows}
        one, several = (
            run(retrieve_streaming, case, **settings),
            run(retrieve_streaming, case._replace(pool=split), **settings),
        )
        for expected, got in zip(one[:4], several[:4], strict=True):
            assert torch.equal(expected, got)
    rows = torch.tensor([0, 39, 12, 13, 0, 29, 30])
    assert torch.equal(split.gather(rows), table[rows])


@pytest.mark.parametrize("top_k", [None, 5])
def test_masked_rows_are_as_good_as_gone(top_k: int | None):
    case = make_case(4, 60, torch.float64, is_integer=True)
    kept = torch.rand(60, generator=generator(5)) < 0.5
    masked = RowPool(case.pool.embeddings, [kept])
    dropped = RowPool([case.pool.embeddings[0][kept]], [torch.ones(int(kept.sum()), dtype=torch.bool)])
    first = run(retrieve_streaming, case._replace(pool=masked), num_top=6, tile_rows=8)
    second = run(retrieve_streaming, case._replace(pool=dropped), num_top=6, tile_rows=8)
    torch.testing.assert_close(first.lse, second.lse, rtol=1e-14, atol=0)
    assert torch.equal(first.top_rows, kept.nonzero().squeeze(1)[second.top_rows])
    # A row excluded for all queries is masked.
    excluded = (~kept).nonzero().squeeze(1).expand(4, -1)
    third = run(retrieve_streaming, case._replace(excluded=excluded), num_top=6, tile_rows=8, top_k=top_k)
    fourth = run(retrieve_streaming, case._replace(pool=masked), num_top=6, tile_rows=8, top_k=top_k)
    for a, b in zip(third[:4], fourth[:4], strict=True):
        assert torch.equal(a, b)


def test_padding_of_excluded_rows_excludes_nothing():
    case = make_case(3, 20, torch.float32)
    padded = case._replace(excluded=torch.full((3, 4), -1))
    for a, b in zip(run(retrieve, case, num_top=4)[:4], run(retrieve, padded, num_top=4)[:4], strict=True):
        assert torch.equal(a, b)


def test_samples_are_reproducible_and_advance_the_generator():
    case = make_case(64, 100, torch.float32)
    source = generator(3)
    first = retrieve(case.queries, case.pool, generator=source).rows
    assert torch.equal(first, run(retrieve, case, seed=3).rows)
    assert not torch.equal(first, retrieve(case.queries, case.pool, generator=source).rows)


@pytest.mark.parametrize("top_k", [0, 11])
def test_top_k_must_fit_the_rows(top_k: int):
    with pytest.raises(ValueError, match=rf"top_k is {top_k}; .* 1 to the 10 rows"):
        run(retrieve, make_case(2, 10, torch.float32), top_k=top_k)


def test_wrong_queries_are_refused():
    case = make_case(2, 10, torch.float32)
    for queries in (torch.ones(2, DIM + 1), torch.ones(DIM)):
        with pytest.raises(ValueError, match=rf"expected \[batch, {DIM}\]"):
            run(retrieve, case._replace(queries=queries))
    with pytest.raises(ValueError, match="on meta, the cache is on cpu"):
        run(retrieve_streaming, case._replace(queries=torch.ones(2, DIM, device="meta")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype: torch.dtype):
    case = make_case(16, 200, dtype)
    plain = run(retrieve, case, num_top=5)
    with torch.autocast("cpu", torch.bfloat16):
        around = run(retrieve, case, num_top=5)
        unguarded = run(retrieve_dense, case)
    for a, b in zip(plain[:4], around[:4], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert dtype == torch.bfloat16 or not torch.equal(unguarded.lse, plain.lse)  # autocast does matter here


def test_nothing_gets_a_gradient():
    case = make_case(3, 20, torch.float32)
    found = run(retrieve, case._replace(queries=case.queries.requires_grad_()))
    assert not found.lse.requires_grad


# Rows that are narrower than the scores


def narrow_case(batch: int, rows: int, dim: int) -> tuple[Tensor, RowPool, RowPool]:
    """float32 queries, int8 rows with scales, and the same rows in float64."""
    rng = generator(batch + rows)
    queries = torch.randn(batch, dim, generator=rng)
    values, scales = quantize(torch.randn(rows, dim, generator=rng) * torch.rand(rows, 1, generator=rng))
    candidates = [torch.rand(rows, generator=rng) < 0.8]
    exact = values.double() * scales.double()[:, None]
    return queries, RowPool([values], candidates, [scales]), RowPool([exact], candidates)


@pytest.mark.parametrize("in_integers", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 100, 5), (16, 700, 64), (130, 2000, 33)], ids=str)
def test_int8_rows_give_the_scores_of_rounded_queries(
    shape: tuple[int, int, int], in_integers: bool, monkeypatch: pytest.MonkeyPatch
):
    """Integers are summed exactly; what remains is the rounding of the queries, which is bounded."""
    monkeypatch.setattr(product, "multiplies_integers", lambda device: in_integers)
    queries, pool, exact = narrow_case(*shape)
    rounded, steps = quantize(queries)
    seen = rounded.double() * steps.double()[:, None] if in_integers else queries.double()
    for settings in ({"num_top": 4}, {"num_top": 4, "top_k": (shape[1] + 2) // 3}):
        found = retrieve_streaming(queries, pool, generator=generator(), **settings)
        truth = retrieve_dense(seen, exact, generator=generator(), **settings)
        unrounded = retrieve_dense(queries.double(), exact, generator=generator(), **settings)
        largest = exact.embeddings[0].abs().sum(dim=1).amax()
        if in_integers:
            # a score has three roundings to float32, lse as many again; both relative to the largest score
            tolerance = 2**-20 * (1 + float((seen @ exact.embeddings[0].T).abs().amax()))
            assert torch.equal(found.top_rows, truth.top_rows)
        else:  # the CPU may multiply as bfloat16, which rounds queries to 8 bits
            tolerance = float(2**-8 * queries.abs().amax() * largest)
        torch.testing.assert_close(found.lse.double(), truth.lse, rtol=0, atol=tolerance)
        half_a_step = steps.double() / 2 * largest
        finite = unrounded.lse.isfinite()
        assert bool(((found.lse - unrounded.lse).abs() <= half_a_step + tolerance)[finite].all())


def test_int8_rows_are_rounded_to_half_a_step():
    values = torch.randn(50, 3, 7, generator=generator()) * torch.logspace(-30, 30, 50)[:, None, None]
    values[7] = 0
    rounded, scales = quantize(values)
    assert rounded.dtype == torch.int8
    assert scales.shape == (50,)
    step = values.abs().flatten(1).amax(dim=1) / 127
    error = (dequantize(rounded, scales) - values).abs().flatten(1).amax(dim=1)
    assert bool((error <= step * (0.5 + 1e-4)).all())
    assert bool((rounded[7] == 0).all())
    again = quantize(dequantize(rounded, scales))
    assert torch.equal(again[0], rounded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_rows_take_wide_queries(dtype: torch.dtype):
    """CPUs may round queries to bfloat16 (8 bits) to multiply them with bfloat16 rows; sums are float32."""
    queries, rows = (
        torch.randn(16, 256, generator=generator()),
        torch.randn(3000, 256, generator=generator(1)).to(dtype),
    )
    pool, exact = (RowPool([part], [torch.ones(3000, dtype=torch.bool)]) for part in (rows, rows.double()))
    found = retrieve_streaming(queries, pool, generator=generator())
    truth = retrieve_dense(queries.double(), exact, generator=generator())
    bound = (2**-8 if dtype == torch.bfloat16 else 2**-18) * (queries.abs() @ rows.float().abs().T).amax(dim=1)
    assert bool(((found.lse - truth.lse).abs() <= bound).all())


def test_the_setting_for_bfloat16_products_is_put_back():
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision

    def fail(scores: Tensor) -> Tensor:
        assert settings.fp32_precision == "bf16"
        raise RuntimeError("no")

    case = make_case(2, 10, torch.bfloat16)
    with pytest.raises(RuntimeError, match="no"):
        run(retrieve_streaming, case, score_transform=fail)
    assert settings.fp32_precision == before


def test_scales_stay_float32_whatever_a_module_is_cast_to():
    column = make_column(QuantizedFeature([3]), 4, torch.device("cpu"))
    column.write(torch.tensor([1]), torch.tensor([[1.0, -0.3, 0.7]]))
    before = column.scales.clone()
    for cast in (column.half, column.bfloat16, column.double):
        cast()
        assert column.values.dtype == torch.int8
        assert torch.equal(column.scales, before)
        assert column.scales.dtype == torch.float32
    column.write(torch.tensor([2]), torch.tensor([[1.0, -0.3, 0.7]]))
    assert torch.equal(column.read(torch.tensor([1])), column.read(torch.tensor([2])))


def test_integer_rows_without_scales_are_taken_as_they_are():
    rows = torch.randint(-9, 9, (300, 8), generator=generator(), dtype=torch.int8)
    pool, exact = (RowPool([part], [torch.ones(300, dtype=torch.bool)]) for part in (rows, rows.double()))
    queries = torch.randint(-3, 3, (4, 8), generator=generator()).float()
    found = retrieve_streaming(queries, pool, generator=generator())
    truth = retrieve_dense(queries.double(), exact, generator=generator())
    torch.testing.assert_close(found.lse.double(), truth.lse)


def test_what_a_transform_makes_of_an_invisible_row_does_not_matter():
    rows = torch.cat([torch.ones(10, 2), torch.zeros(90, 2)])
    pool = RowPool([rows], [torch.arange(100) < 10])
    for is_free in (True, False):
        with contextlib.nullcontext() if is_free else as_on_a_gpu():
            found = retrieve(torch.ones(3, 2), pool, generator=generator(), score_transform=lambda s: 1 / s)
        torch.testing.assert_close(found.lse, torch.full((3,), 0.5 + math.log(10)))


def test_groups_for_a_retrieval_function_can_be_viewed():
    case = make_case(3, 4096, torch.float32)
    scores, rows = mine_groups(case.queries, case.pool, 8)
    assert scores.is_contiguous()
    assert rows.is_contiguous()
    assert run(retrieve_streaming, make_case(2, 512, torch.float32)._replace(queries=torch.ones(0, DIM)), top_k=2)


def test_passes_that_overlap_put_the_setting_back():
    settings = torch.backends.mkldnn.matmul
    pool = make_case(1, 4, torch.bfloat16).pool
    before = settings.fp32_precision
    first, second = product.narrow_products(pool), product.narrow_products(pool)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert settings.fp32_precision == "bf16"
    second.__exit__(None, None, None)
    assert settings.fp32_precision == before
    assert torch.get_float32_matmul_precision() == "highest"


# Memory


def largest_tensor(fn, batch: int, rows: int, **settings) -> int:
    case = make_case(batch, rows, torch.float32)
    excluded = torch.zeros(batch, 2, dtype=torch.int64)
    with Recorder() as recorder:
        fn(case.queries, case.pool, generator=generator(), excluded=excluded, **settings)
    return recorder.largest


@pytest.mark.parametrize("settings", [{}, {"num_samples": 3, "num_top": 10}, {"top_k": 64}], ids=str)
def test_memory_does_not_grow_with_the_rows(settings: dict[str, int]):
    batch, rows = 128, 32768
    small = largest_tensor(retrieve_streaming, batch, rows, **settings)
    large = largest_tensor(retrieve_streaming, batch, 8 * rows, **settings)
    assert small < batch * rows
    assert large <= small


def test_the_memory_test_sees_the_dense_matrix():
    assert largest_tensor(retrieve_dense, 16, 512) >= 16 * 512


# Sampling


NUM_DRAWS = 40_000


class Population(NamedTuple):
    """Some distinct queries, each many times in one batch, and the exact probabilities of their rows."""

    case: Case
    probabilities: Tensor  # [distinct, num_rows]
    repeats: int

    def of_query(self, drawn: Tensor, query: int) -> Tensor:
        return drawn[query * self.repeats : (query + 1) * self.repeats]


def make_population(
    dtype: torch.dtype = torch.float64,
    *,
    rows: int = 40,
    distinct: int = 2,
    hidden: bool = True,
    top_k: int | None = None,
    repeats: int = NUM_DRAWS // 2,
) -> Population:
    rng = generator(17)
    table = (0.7 * torch.randn(rows, DIM, generator=rng, dtype=torch.float64)).to(dtype)
    queries = torch.randn(distinct, DIM, generator=rng, dtype=torch.float64).to(dtype)
    candidates = torch.ones(rows, dtype=torch.bool)
    excluded = None
    if hidden:
        candidates[5::9] = False
        excluded = torch.stack([torch.tensor([1 + query, -1, rows - 1]) for query in range(distinct)])
    pool = RowPool([table], [candidates])
    scores = dense_scores(queries.double(), RowPool([table.double()], [candidates]), None, excluded)
    if top_k is not None:
        best, at = grouped_top_k(scores, top_k)
        scores = torch.full_like(scores, -torch.inf).scatter(1, at, best)
    many = None if excluded is None else excluded.repeat_interleave(repeats, 0)
    return Population(Case(queries.repeat_interleave(repeats, 0), pool, many), scores.softmax(1), repeats)


def worst_p_value(population: Population, drawn: Tensor) -> float:
    """Of draws `[batch, m]`: each query's and each sample's distribution against the softmax."""
    return min(
        chi_square(population.of_query(drawn, query)[:, sample], population.probabilities[query])
        for query in range(len(population.probabilities))
        for sample in range(drawn.shape[1])
    )


@pytest.mark.parametrize("tile_rows", [1, 7, 16, 40, None])
@pytest.mark.parametrize("top_k", [None, 9])
def test_draws_follow_the_softmax(tile_rows: int | None, top_k: int | None):
    population = make_population(top_k=top_k)
    found = run(retrieve_streaming, population.case, top_k=top_k, num_samples=2, tile_rows=tile_rows)
    assert worst_p_value(population, found.rows) > ALPHA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_draws_follow_the_softmax_of_narrow_rows(dtype: torch.dtype):
    population = make_population(dtype)
    assert worst_p_value(population, run(retrieve_streaming, population.case, tile_rows=16).rows) > ALPHA


def test_draws_follow_the_softmax_over_many_tiles():
    population = make_population(rows=1500, repeats=10_000)
    assert worst_p_value(population, run(retrieve_streaming, population.case, tile_rows=10).rows) > ALPHA


@pytest.mark.parametrize("top_k", [None, 9])
def test_draws_of_the_reference_follow_the_softmax(top_k: int | None):
    population = make_population(top_k=top_k)
    assert worst_p_value(population, run(retrieve_dense, population.case, top_k=top_k).rows) > ALPHA


def test_masked_rows_are_drawn_as_if_they_were_gone():
    """The same law over what is left, whether a row is masked or absent."""
    population = make_population(hidden=False)
    kept = torch.arange(40) % 3 > 0
    dropped = RowPool([population.case.pool.embeddings[0][kept]], [torch.ones(int(kept.sum()), dtype=torch.bool)])
    drawn = run(retrieve_streaming, population.case._replace(pool=dropped), tile_rows=7).rows
    rows = kept.nonzero().squeeze(1)[drawn]
    probabilities = population.probabilities * kept
    probabilities = probabilities / probabilities.sum(1, keepdim=True)
    assert worst_p_value(population._replace(probabilities=probabilities), rows) > ALPHA


def test_rare_rows_are_not_lost():
    """100,000 equal rows beside one that has half of the mass, in float32: half of the draws are spread evenly."""
    scores = torch.zeros(100_001, 1)
    scores[70_000] = math.log(100_000)
    pool = RowPool([scores], [torch.ones(100_001, dtype=torch.bool)])
    drawn = retrieve_streaming(torch.ones(8, 1), pool, generator=generator(), num_samples=2000).rows.flatten()
    # 16,000 draws put in 20 bins of rows, and the one heavy row on its own.
    bins = torch.where(drawn == 70_000, 20, drawn // 5001)
    sizes = torch.bincount(torch.arange(100_001) // 5001, minlength=21).double()
    sizes[70_000 // 5001] -= 1
    sizes[20] = 100_000
    assert chi_square(bins, sizes / sizes.sum()) > ALPHA


def test_a_row_without_probability_is_never_drawn(monkeypatch: pytest.MonkeyPatch):
    """Not even by the uniforms at both ends, which chance does not show in a test's time."""
    scores = torch.tensor([[-torch.inf, -torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]])
    for uniform, expected in ((0.0, 2), (1 - 2**-53, 4)):
        monkeypatch.setattr(
            reference, "uniforms", lambda shape, *_, u=uniform: torch.full(shape, u, dtype=torch.float64)
        )
        assert reference.sample(scores, 2, generator()).tolist() == [[expected] * 2]


# A constant query has a joint law over few cells, so that dependence shows.


def small_population() -> Population:
    return make_population(rows=8, distinct=1, hidden=False, repeats=40_000)


def worst_independence(drawn: Tensor, probabilities: Tensor) -> float:
    """Of draws `[batch, m]` of one query: between neighbours in the batch, far ones, and samples."""
    half = len(drawn) // 2
    pairs = [(drawn[0::2, 0], drawn[1::2, 0]), (drawn[:half, 0], drawn[half:, 0])]
    pairs += [(drawn[:, 0], drawn[:, sample]) for sample in range(1, drawn.shape[1])]
    return min(independence(first, second, probabilities) for first, second in pairs)


@pytest.mark.parametrize("tile_rows", [1, 3, 8])
@pytest.mark.parametrize("top_k", [None, 5])
def test_draws_are_independent(tile_rows: int, top_k: int | None):
    population = small_population()
    drawn = run(retrieve_streaming, population.case, num_samples=3, tile_rows=tile_rows, top_k=top_k).rows
    probabilities = make_population(rows=8, distinct=1, hidden=False, repeats=1, top_k=top_k).probabilities[0]
    assert worst_independence(drawn, probabilities) > ALPHA


def test_successive_calls_are_independent():
    population = small_population()
    source = generator()
    first, second = (
        retrieve_streaming(population.case.queries, population.case.pool, generator=source, tile_rows=3).rows[:, 0]
        for _ in range(2)
    )
    assert independence(first, second, population.probabilities[0]) > ALPHA


# The checks above must reject wrong samplers at the same number of draws.


@pytest.mark.parametrize("factor", [1.05, 1 / 1.05])
def test_a_wrong_temperature_is_rejected(factor: float):
    population = make_population()
    wrong = run(retrieve_streaming, population.case, score_transform=lambda scores: factor * scores, tile_rows=16)
    assert worst_p_value(population, wrong.rows) < ALPHA


@pytest.mark.parametrize("rank", [0, 3])
def test_a_lost_row_is_rejected(rank: int):
    population = make_population()
    candidates = population.case.pool.candidates[0].clone()
    candidates[population.probabilities[0].argsort(descending=True)[rank]] = False
    pool = RowPool(population.case.pool.embeddings, [candidates])
    wrong = run(retrieve_streaming, population.case._replace(pool=pool), tile_rows=16)
    assert worst_p_value(population, wrong.rows) < ALPHA


def test_shared_noise_is_rejected():
    population = small_population()
    probabilities = population.probabilities[0]
    drawn = run(retrieve_streaming, population.case, num_samples=2, tile_rows=3).rows
    between_queries = drawn[: len(drawn) // 2].repeat_interleave(2, 0)
    assert worst_p_value(population, between_queries) > ALPHA  # each draw alone is right
    assert worst_independence(between_queries, probabilities) < ALPHA
    between_samples = drawn[:, :1].expand(-1, 2)
    assert worst_independence(between_samples, probabilities) < ALPHA
