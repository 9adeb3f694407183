"""The fused pass: against the dense one, its draws against the softmax, and its kernels through the GPU compiler.

The kernels run on a GPU if there is one, otherwise in Triton's interpreter, whose tiles may be larger.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from negative_cache.cache.columns import dequantize, quantize
from negative_cache.retrieval import Retrieved, RowPool, Search
from negative_cache.retrieval.dense import grouped_top_k, retrieve_dense
from negative_cache.retrieval.search import dense_scores
from retrieval_problems import (
    Population,
    generator,
    in_float64,
    make_population,
    pool_of,
    random_search,
    worst_independence,
    worst_p_value,
)
from stats import ALPHA, chi_square
from support import Recorder

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")
fused = pytest.importorskip("negative_cache.retrieval.fused.launch")
Tiling = fused.Tiling

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
# Half of the distance of neighbouring numbers at 1: the largest error of a query that is rounded to the rows' dtype.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}
MANY_SLOTS = 10**6  # a segment for each block


def tiling(
    block_m: int, block_n: int, block_k: int, slots: int, block_s: int = 16, block_p: int = 1 if ON_GPU else 64
) -> Tiling:
    return Tiling(block_m, block_n, block_k, block_p, num_warps=4, num_stages=2, slots=slots, block_s=block_s)


# One segment, several, and more than there are blocks.
TILINGS = [tiling(16, 16, 32, slots=1), tiling(16, 32, 32, slots=5), tiling(32, 16, 64, slots=100)]
DRAWS = tiling(64, 16, 32, slots=264) if ON_GPU else tiling(8192, 16, 32, slots=6, block_p=4096)


def on_device(search: Search) -> Search:
    pool = RowPool(*(None if value is None else value.to(DEVICE) for value in search.pool))
    excluded = None if search.excluded is None else search.excluded.to(DEVICE)
    return search._replace(queries=search.queries.to(DEVICE), pool=pool, excluded=excluded)


def retrieve_fused(
    search: Search, seed: int = 0, factor: float | Tensor = 1.0, tiling: Tiling | None = None
) -> Retrieved:
    """Run the pass on the GPU, if there is one; the result is on the CPU."""
    found = fused.retrieve_fused(on_device(search), generator(seed), factor, tiling)
    return Retrieved(*(None if value is None else value.cpu() for value in found))


def make(batch: int, rows: int, dim: int, dtype: torch.dtype, has_masks: bool = True) -> Search:
    """float32 queries and rows of a dtype."""
    return random_search(batch, rows, dtype, dim, query_dtype=torch.float32, has_masks=has_masks)


def with_rounded_queries(search: Search) -> Search:
    """With the queries that the product sees: in the dtype of the rows."""
    dtype = search.pool.embeddings.dtype
    queries = search.queries
    rounded = dequantize(*quantize(queries)) if dtype == torch.int8 else queries.to(dtype).float()
    return search._replace(queries=rounded)


def arithmetic_error(search: Search, lse: Tensor) -> Tensor:
    """`[batch]`: of float32 dot products, of exp and of sums over less than 32 blocks of less than 256 rows."""
    truth = in_float64(search)
    products = (truth.queries.abs() @ truth.pool.embeddings.abs().T).amax(1)
    return 2.0**-24 * (truth.queries.shape[1] * products + 32 + 256 + 4 * lse.abs().clamp(min=1, max=1e30))


def rounding_error(search: Search) -> Tensor:
    """`[batch]`: how far a score may move because the query is rounded to the dtype of the rows."""
    rows, dtype = in_float64(search).pool.embeddings.abs(), search.pool.embeddings.dtype
    if dtype == torch.int8:
        return quantize(search.queries)[1] / 2 * rows.sum(1).max()
    return ROUNDING[dtype] * (search.queries.abs().double() @ rows.T).amax(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 130, 17), (20, 70, 70)], ids=str)
def test_lse_equals_the_dense_one(shape: tuple[int, int, int], dtype: torch.dtype):
    search = make(*shape, dtype, has_masks=shape[0] > 1)
    for sizes, top_k in zip([*TILINGS, None], [None, None, min(shape[1], 3), 1], strict=True):
        search = search._replace(top_k=top_k)
        lse = retrieve_fused(search, tiling=sizes).lse
        assert lse.dtype == torch.float32
        for truth_of, tolerance in ((with_rounded_queries(search), 0.0), (search, rounding_error(search))):
            truth = retrieve_dense(in_float64(truth_of), generator()).lse
            assert torch.equal(lse.isfinite(), truth.isfinite())
            error = torch.where(truth.isfinite(), lse - truth, 0).abs()
            assert bool((error <= tolerance + arithmetic_error(search, truth)).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copied_tiles_give_the_same_numbers(dtype: torch.dtype):
    """Several chunks of columns, the last one cut; rows and queries that do not fill their tiles; any groups."""
    loading = tiling(16, 64, 64, slots=5)
    for top_k in (None, 3):
        search = make(20, 200, 80, dtype)._replace(top_k=top_k, num_best=9, num_samples=3)
        loaded = retrieve_fused(search, tiling=loading)
        copied = retrieve_fused(search, tiling=loading._replace(is_copied=True))
        for a, b in zip(loaded, copied, strict=True):
            assert (a is None) == (b is None)
            if a is not None:  # the interpreter's product may add up in another order: some units in the last place
                torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_best_rows_equal_the_dense_ones(dtype: torch.dtype):
    """Scores of small integers are exact and often equal: of equal ones the lowest row counts."""
    for number, (batch, rows) in enumerate([(1, 7), (4, 37)], 1):
        search = random_search(batch, rows, torch.float32, has_integers=True, has_masks=True)
        pool, scales = search.pool, None
        if dtype == torch.int8:  # full scale in each row and query, so that quantizing is exact
            search = search._replace(queries=pad(search.queries, (0, 1), value=127.0))
            pool, scales = pool._replace(embeddings=pad(pool.embeddings, (0, 1), value=127.0)), torch.ones(rows)
        search = search._replace(pool=pool._replace(embeddings=pool.embeddings.to(dtype), scales=scales))
        cases = [(None, 1), (None, rows + 3), (1, 2), ((rows + 2) // 8, 5)]
        for top_k, num_best in cases:
            search = search._replace(top_k=top_k, num_best=num_best)
            truth = retrieve_dense(in_float64(search), generator())
            found = retrieve_fused(search, tiling=TILINGS[number])
            assert torch.equal(found.best_rows, truth.best_rows)
            assert torch.equal(found.best_scores.double(), truth.best_scores)


@pytest.mark.parametrize(("rows", "top_k", "num_best"), [(1, 1, 4), (10, 10, 13), (23, 7, 5)])
def test_groups_may_have_a_single_row(rows: int, top_k: int, num_best: int):
    search = random_search(4, rows, torch.float32, has_integers=True, has_masks=True)
    search = search._replace(top_k=top_k, num_best=num_best)
    found, truth = retrieve_fused(search, tiling=TILINGS[2]), retrieve_dense(search, generator())
    assert torch.equal(found.best_rows, truth.best_rows)
    assert torch.equal(found.best_scores, truth.best_scores)


def test_of_equal_scores_the_lowest_row_is_returned():
    """Over several blocks, whose maxima are all equal."""
    pool = pool_of(torch.ones(100, 2))._replace(is_candidate=torch.arange(100) >= 3)
    search = Search(torch.ones(2, 2), pool, num_best=40)
    for sizes in TILINGS:
        assert retrieve_fused(search, tiling=sizes).best_rows.tolist() == [list(range(3, 43))] * 2
        grouped = retrieve_fused(search._replace(num_best=3, top_k=3), tiling=sizes)
        assert grouped.best_rows.tolist() == [[3, 34, 67]] * 2


@pytest.mark.parametrize("top_k", [None, 3])
def test_a_query_without_rows_gets_minus_infinity(top_k: int | None):
    table = torch.randn(40, 6, generator=generator())
    excluded = torch.stack([torch.arange(40), torch.full((40,), -1)])  # more than the kernel holds in registers
    for is_candidate in (torch.ones(40, dtype=torch.bool), torch.zeros(40, dtype=torch.bool)):
        search = Search(table[:2], RowPool(table, is_candidate), None, excluded, None, top_k)
        found = retrieve_fused(search._replace(num_samples=3, num_best=2), tiling=TILINGS[1])
        assert found.lse.isfinite().tolist() == [False, bool(is_candidate.any())]
        assert found.best_rows[0].tolist() == [-1, -1]
        assert found.best_scores[0].tolist() == [-math.inf] * 2
        assert bool(((found.rows >= 0) & (found.rows < 40)).all())


@pytest.mark.parametrize("count", [0, 1, 17, 40])
def test_any_number_of_rows_may_be_excluded(count: int):
    excluded = torch.randint(-1, 150, (count, 5), generator=generator(count)).T  # columns are far apart
    for top_k in (None, 3):
        search = make(5, 150, 6, torch.float32)._replace(excluded=excluded, top_k=top_k, num_best=9)
        truth, found = retrieve_dense(search, generator()), retrieve_fused(search, tiling=TILINGS[1])
        torch.testing.assert_close(found.lse, truth.lse)
        assert torch.equal(found.best_rows, truth.best_rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_need_be_contiguous(dtype: torch.dtype):
    search = make(9, 70, 12, dtype)._replace(num_best=3, num_samples=2)
    (rows, is_candidate, scales, _), queries = search.pool, search.queries.T.contiguous().T[:, :6]
    spread_scales = None if scales is None else scales.repeat_interleave(3)[::3]
    for table in (rows[:, ::2], rows.T.contiguous().T[:, :6], rows[:, 1:7]):
        spread = RowPool(table, is_candidate.repeat_interleave(2)[::2], spread_scales)
        copied = RowPool(table.contiguous(), is_candidate, scales)
        for top_k in (None, 2):
            found = retrieve_fused(search._replace(queries=queries, pool=spread, top_k=top_k))
            truth = retrieve_fused(search._replace(queries=queries.contiguous(), pool=copied, top_k=top_k))
            for a, b in zip(found, truth, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_queries_of_any_size_fit_half_precision(size: float):
    """Scaled queries may leave fp16's range, which ends at 65,504 and has few digits below 6e-5."""
    search = make(4, 50, 8, torch.float16)
    search = search._replace(queries=size * search.queries)
    truth = retrieve_dense(in_float64(search), generator()).lse
    error = (retrieve_fused(search).lse - truth).abs()
    assert bool((error <= rounding_error(search) + arithmetic_error(search, truth)).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_factor_multiplies_the_scores(dtype: torch.dtype):
    search = make(6, 80, 16, dtype)._replace(num_best=3)
    for factor in (-7.5, torch.tensor(7.5, device=DEVICE)):
        scaled = search._replace(queries=float(factor) * search.queries)
        truth = retrieve_dense(in_float64(scaled), generator())
        found = retrieve_fused(search, factor=factor)
        error = rounding_error(scaled) + arithmetic_error(scaled, truth.lse)
        assert bool(((found.lse - truth.lse).abs() <= error).all())
        assert bool(((found.best_scores - truth.best_scores).abs() <= error[:, None]).all())


@pytest.mark.parametrize("size", [1e3, 1e10, 2.5e38])
def test_scores_of_any_size_keep_hidden_rows_hidden(size: float):
    """Products with log2(e) of such scores would overflow, or be rounded by more than the differences that count."""
    table = torch.where(torch.arange(200) % 7 == 0, 1.0, -1.0)[:, None].repeat(1, 16) / 4
    search = Search(size / 4 * torch.ones(3, 16), RowPool(table, torch.arange(200) >= 70), num_samples=4)
    found = retrieve_fused(search, tiling=TILINGS[1])
    assert bool((found.rows >= 70).all())
    assert bool((found.rows % 7 == 0).all())
    truth = size + math.log(19)  # rows 70, 77, ..., 196
    torch.testing.assert_close(found.lse, torch.full((3,), truth), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("top_k", [None, 7])
@pytest.mark.parametrize(("num_samples", "num_best"), [(0, 0), (0, 2), (1, 0), (5, 60)])
def test_shapes_and_dtypes_are_those_of_the_dense_pass(num_samples: int, num_best: int, top_k: int | None):
    search = make(3, 50, 6, torch.float32)._replace(num_samples=num_samples, num_best=num_best, top_k=top_k)
    found, truth = retrieve_fused(search), retrieve_dense(search, generator())
    for a, b in zip(found[:4], truth[:4], strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
    assert bool((dense_scores(search) > -torch.inf).gather(1, found.rows).all())


def test_draws_with_top_k_are_best_rows():
    search = make(40, 300, 6, torch.float32)._replace(num_samples=8, top_k=7)
    _, best = grouped_top_k(dense_scores(search), 7)
    rows = retrieve_fused(search, tiling=TILINGS[0]).rows
    assert bool((rows[:, :, None] == best[:, None]).any(2).all())


def test_draws_are_reproducible_and_advance_the_generator():
    search, source = on_device(make(64, 100, 6, torch.float32)), generator(3)
    first = fused.retrieve_fused(search, source).rows
    assert torch.equal(first, fused.retrieve_fused(search, generator(3)).rows)
    assert not torch.equal(first, fused.retrieve_fused(search, source).rows)


def test_what_it_cannot_take_is_named():
    queries, table = torch.ones(2, 4), torch.ones(6, 4)
    cases = {
        "torch.float64": pool_of(table.double()),
        "int8 rows need scales": pool_of(table.to(torch.int8)),
        "nothing to score": pool_of(table[:0]),
        "strides": pool_of(torch.ones(1, 1).expand(6, 4).as_strided((6, 1), (0, 2**31))),
    }
    for words, pool in cases.items():
        search = Search(queries[:, : pool.embeddings.shape[1]], pool)
        assert words in fused.reason_against(search)
        with pytest.raises(ValueError, match=words):
            fused.retrieve_fused(search, generator())
    taken = on_device(Search(queries, pool_of(table)))
    assert fused.reason_against(taken) is None
    for top_k in (0, 7):
        with pytest.raises(ValueError, match="top_k is"):
            fused.retrieve_fused(taken._replace(top_k=top_k), generator())
    with pytest.raises(ValueError, match="expected"):
        fused.retrieve_fused(taken._replace(queries=taken.queries[:, :3]), generator())


def test_other_devices_are_named(monkeypatch: pytest.MonkeyPatch):
    search = Search(torch.ones(2, 4), pool_of(torch.ones(6, 4)))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "not an NVIDIA GPU" in fused.reason_against(search)
    monkeypatch.setattr(fused, "HAS_TRITON", False)
    assert "not installed" in fused.reason_against(search)


def test_triton_is_imported_on_first_use():
    code = "import sys, negative_cache, negative_cache.retrieval.fused.launch; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("options", [{"num_samples": 3}, {"num_best": 2}, {"top_k": 16, "num_best": 4}], ids=str)
def test_no_tensor_has_a_score_per_query_and_row(options: dict[str, int]):
    """And no operation synchronizes: none reads a scalar, or makes a tensor whose size depends on values."""
    batch, rows = 256, 4096
    search = on_device(make(batch, rows, 16, torch.float32)._replace(**options))
    sizes = tiling(64, 64, 16, slots=4) if ON_GPU else tiling(256, 128, 16, slots=4, block_p=256)
    with Recorder() as recorder:
        fused.retrieve_fused(search, generator(), tiling=sizes)
    assert recorder.largest < batch * rows // 4
    synchronizing = {"_local_scalar_dense", "nonzero", "masked_select", "unique2", "equal", "index", "index_put_"}
    assert not recorder.names & synchronizing


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_synchronizes_the_gpu(dtype: torch.dtype):
    search = on_device(make(64, 5000, 32, dtype))
    for mode in ("default", "error"):  # compiled in the first round
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for top_k in (None, 16):
                fused.retrieve_fused(search._replace(num_best=5, top_k=top_k), generator())
        finally:
            torch.cuda.set_sync_debug_mode("default")


def population(dtype: torch.dtype = torch.float32, **options) -> Population:
    return make_population(dtype, **options)


def draws(people: Population, tiling: Tiling = DRAWS, **options: int) -> Tensor:
    return retrieve_fused(people.search._replace(**options), tiling=tiling).rows


@pytest.mark.parametrize(("slots", "top_k"), [(1, None), (MANY_SLOTS, None), (MANY_SLOTS, 3)])
def test_draws_follow_the_softmax(slots: int, top_k: int | None):
    """Of one segment, and of as many as there are blocks; with hidden and excluded rows."""
    people = population(rows=120, top_k=top_k, repeats=12_000)
    assert worst_p_value(people, draws(people, DRAWS._replace(slots=slots), num_samples=2)) > ALPHA


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_draws_follow_the_softmax_of_narrow_rows(dtype: torch.dtype):
    people = population(dtype, rows=120, repeats=12_000)
    assert worst_p_value(people, draws(people)) > ALPHA


def test_draws_follow_the_softmax_of_quantized_rows():
    people = population(rows=120, repeats=12_000)
    values, scales = quantize(people.search.pool.embeddings)
    search = people.search._replace(pool=people.search.pool._replace(embeddings=values, scales=scales))
    some = search._replace(queries=search.queries[:: people.repeats], excluded=search.excluded[:: people.repeats])
    probabilities = dense_scores(in_float64(with_rounded_queries(some))).softmax(1)
    people = people._replace(search=search, probabilities=probabilities)
    assert worst_p_value(people, draws(people)) > ALPHA


@pytest.mark.parametrize("is_copied", [False, True])
def test_draws_follow_the_softmax_over_many_blocks(is_copied: bool):
    """Of several stretches each, loaded by threads or by the copy engine, which wants rows of whole 16 bytes."""
    people = population(rows=1000, repeats=8000)
    pool = people.search.pool._replace(embeddings=pad(people.search.pool.embeddings, (0, 10)))
    search = people.search._replace(queries=pad(people.search.queries, (0, 10)), pool=pool)
    sizes = DRAWS._replace(block_n=64, block_k=16, is_copied=is_copied)
    assert worst_p_value(people, draws(people._replace(search=search), sizes)) > ALPHA


def constant_query() -> Population:
    return population(rows=40, distinct=1, has_masks=False, repeats=20_000)


def test_draws_are_independent():
    """Of queries, of samples, and of successive calls."""
    people, source = constant_query(), generator()
    search, sizes = on_device(people.search._replace(num_samples=3)), DRAWS._replace(block_m=min(DRAWS.block_m, 4096))
    drawn, later = (fused.retrieve_fused(search, source, tiling=sizes).rows.cpu() for _ in range(2))
    assert worst_independence(drawn, people.probabilities[0]) > ALPHA
    assert worst_independence(torch.stack([drawn[:, 0], later[:, 0]], 1), people.probabilities[0]) > ALPHA


def test_rare_rows_are_not_lost():
    """131,071 equal rows beside one that has half of the mass: the other draws are spread evenly."""
    count, heavy = 131_072, 70_000
    scores = torch.zeros(count, 1)
    scores[heavy] = math.log(count - 1)
    search = Search(torch.ones(16, 1), pool_of(scores), num_samples=512)
    sizes = None if ON_GPU else tiling(16, 1024, 16, slots=3, block_p=4096)
    drawn = retrieve_fused(search, tiling=sizes).rows.flatten()
    # 8,192 draws put in 20 bins of rows, and the one heavy row on its own; and by their place in a block.
    sizes = torch.bincount(torch.arange(count) // 6554, minlength=21).double()
    sizes[heavy // 6554] -= 1
    sizes[20] = count - 1
    assert chi_square(torch.where(drawn == heavy, 20, drawn // 6554), sizes / sizes.sum()) > ALPHA
    rare = drawn[drawn != heavy]
    assert chi_square(rare % 1024 // 64, torch.full((16,), 1 / 16)) > ALPHA
    assert len(rare.unique()) > 0.95 * len(rare)


# The checks above must reject wrong samplers at the same number of draws.


@pytest.mark.parametrize("factor", [1.05, 1 / 1.05])
def test_a_wrong_temperature_is_rejected(factor: float):
    people = population()
    wrong = people.search._replace(queries=factor * people.search.queries)
    assert worst_p_value(people, draws(people._replace(search=wrong))) < ALPHA


@pytest.mark.parametrize("stage", ["segment", "row"])
def test_a_wrong_stage_is_rejected(stage: str, monkeypatch: pytest.MonkeyPatch):
    """A segment drawn evenly, and a row of a stretch drawn at another temperature."""
    people, right = population(rows=120, repeats=12_000), fused._draw

    def wrong(operands, tiling, state, num_samples):
        if stage == "segment":
            state = state._replace(best=torch.zeros_like(state.best), total=(state.total > 0).float())
        else:
            operands = operands._replace(queries=0.8 * operands.queries)
        return right(operands, tiling, state, num_samples)

    monkeypatch.setattr(fused, "_draw", wrong)
    assert worst_p_value(people, draws(people, DRAWS._replace(slots=MANY_SLOTS))) < ALPHA


def test_shared_noise_is_rejected():
    people = constant_query()
    drawn = draws(people, num_samples=2)
    assert worst_independence(drawn[:10_000].repeat_interleave(2, 0), people.probabilities[0]) < ALPHA
    assert worst_independence(drawn[:, :1].expand(-1, 2), people.probabilities[0]) < ALPHA


def test_kernels_compile_for_gpus(tmp_path: Path):
    """To machine code, without spilled registers, in the shared memory that there is; needs no GPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    job = Path(__file__).parents[1].joinpath("compile_job.py")
    result = subprocess.run([sys.executable, str(job)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "compiled" in result.stdout
