"""The fused pass: against the dense one, its draws against the softmax, and its kernels through the GPU compiler.

Where there is a GPU the kernels run on it, else in Triton's interpreter, whose tiles may be larger.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_retrieval import (
    Case,
    Population,
    generator,
    make_case,
    make_population,
    run,
    to_float64,
    worst_independence,
    worst_p_value,
)
from torch import Tensor

from negative_cache.cache.specs import dequantize, quantize
from negative_cache.retrieval import RowPool
from negative_cache.retrieval.dense import dense_scores, grouped_top_k, retrieve_dense
from stats import ALPHA, chi_square
from support import Recorder

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")
fused = pytest.importorskip("negative_cache.retrieval.fused.launch")
Tiling = fused.Tiling

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
# Half of the distance of neighbouring numbers at 1: what rounding a query to the dtype of the rows costs at most.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}
# One segment, several, and more than there are blocks.
PAIRS = 1 if ON_GPU else 64
TILINGS = [
    Tiling(16, 16, 32, PAIRS, 4, 2, 1),
    Tiling(16, 32, 32, PAIRS, 4, 2, 5),
    Tiling(32, 16, 64, 2 * PAIRS, 4, 2, 100),
]
DRAWS = Tiling(64, 16, 32, 1, 4, 2, 264) if ON_GPU else Tiling(8192, 16, 32, 1024, 4, 2, 6)
MANY_SLOTS = 10**6  # a segment for each block


def moved(pool: RowPool) -> RowPool:
    scales = [None if scale is None else scale.to(DEVICE) for _, scale in pool.parts]
    return RowPool([part.to(DEVICE) for part in pool.embeddings], [c.to(DEVICE) for c in pool.candidates], scales)


def retrieve_fused(queries: Tensor, pool: RowPool, *, excluded: Tensor | None = None, **settings):
    """On the GPU, if there is one, and back."""
    excluded = None if excluded is None else excluded.to(DEVICE)
    found = fused.retrieve_fused(queries.to(DEVICE), moved(pool), excluded=excluded, **settings)
    return type(found)(*(None if value is None else value.cpu() for value in found))


def make(batch: int, rows: int, dim: int, dtype: torch.dtype, masks: bool = True) -> Case:
    """float32 queries and rows of a dtype."""
    rng = generator(batch * 10_000 + rows + dim)
    queries, table = torch.randn(batch, dim, generator=rng), torch.randn(rows, dim, generator=rng)
    candidates = torch.rand(rows, generator=rng) < 0.7 if masks else torch.ones(rows, dtype=torch.bool)
    excluded = torch.randint(-1, rows, (batch, 3), generator=rng) if masks else None
    if dtype == torch.int8:
        values, scales = quantize(table)
        return Case(queries, RowPool([values], [candidates], [scales]), excluded)
    return Case(queries, RowPool([table.to(dtype)], [candidates]), excluded)


def exact(case: Case) -> Case:
    """The same numbers in float64."""
    parts = [rows.double() if scale is None else dequantize(rows, scale).double() for rows, scale in case.pool.parts]
    return Case(case.queries.double(), RowPool(parts, case.pool.candidates), case.excluded)


def as_rounded(case: Case) -> Case:
    """With the queries that the product sees: in the dtype of the rows."""
    dtype = case.pool.embeddings[0].dtype
    queries = dequantize(*quantize(case.queries)) if dtype == torch.int8 else case.queries.to(dtype).float()
    return case._replace(queries=queries)


def arithmetic_error(case: Case, lse: Tensor) -> Tensor:
    """`[batch]`: of float32 dot products, of exp and of sums over less than 32 blocks of less than 256 rows."""
    truth = exact(case)
    products = (truth.queries.abs() @ truth.pool.embeddings[0].abs().T).amax(1)
    return 2.0**-24 * (truth.queries.shape[1] * products + 32 + 256 + 4 * lse.abs().clamp(min=1, max=1e30))


def rounding_error(case: Case) -> Tensor:
    """`[batch]`: how far a score may move because the query is rounded to the dtype of the rows."""
    rows, dtype = exact(case).pool.embeddings[0].abs(), case.pool.embeddings[0].dtype
    if dtype == torch.int8:
        return quantize(case.queries)[1] / 2 * rows.sum(1).max()
    return ROUNDING[dtype] * (case.queries.abs().double() @ rows.T).amax(1)


# Against the dense pass


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 257, 17), (20, 100, 70)], ids=str)
def test_lse_equals_the_dense_one(shape: tuple[int, int, int], dtype: torch.dtype):
    case = make(*shape, dtype, masks=shape[0] > 1)
    for tiling, top_k in zip([*TILINGS, None], [None, None, min(shape[1], 9), 1], strict=True):
        lse = run(retrieve_fused, case, tiling=tiling, top_k=top_k).lse
        assert lse.dtype == torch.float32
        for truth_case, tolerance in ((as_rounded(case), 0.0), (case, rounding_error(case))):
            truth = run(retrieve_dense, exact(truth_case), top_k=top_k).lse
            assert torch.equal(lse.isfinite(), truth.isfinite())
            error = torch.where(truth.isfinite(), lse - truth, 0).abs()
            assert bool((error <= tolerance + arithmetic_error(case, truth)).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copied_tiles_give_the_same_numbers(dtype: torch.dtype):
    """Several chunks of columns, the last one cut; rows and queries that do not fill their tiles; any groups."""
    case = make(20, 300, 80, dtype)
    tiling = Tiling(16, 64, 64, PAIRS, 4, 2, 5, 16)
    for top_k in (None, 7):
        settings = {"top_k": top_k, "num_top": 9, "num_samples": 3}
        loaded = run(retrieve_fused, case, tiling=tiling, **settings)
        copied = run(retrieve_fused, case, tiling=tiling._replace(is_copied=True), **settings)
        for a, b in zip(loaded, copied, strict=True):
            assert torch.equal(a, b) if a is not None else b is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_best_rows_equal_the_dense_ones(dtype: torch.dtype):
    """Scores of small integers are exact and often equal: ties must go to the lowest row."""
    for number, (batch, rows) in enumerate([(1, 1), (4, 37)], 1):
        case = make_case(batch, rows, torch.float32, is_integer=True, masks=True)
        table = case.pool.embeddings[0]
        if dtype == torch.int8:  # full scale in each row and query, so that quantising is exact
            table = torch.cat([table, torch.full((rows, 1), 127.0)], 1)
            case = case._replace(queries=torch.cat([case.queries, torch.full((batch, 1), 127.0)], 1))
            pool = RowPool([table.to(dtype)], case.pool.candidates, [torch.ones(rows)])
        else:
            pool = RowPool([table.to(dtype)], case.pool.candidates)
        for top_k, counts in ((None, (1, 4, rows + 3)), (1, (2,)), ((rows + 2) // 3, (5,)), (rows, (rows + 3,))):
            for num_top in counts:
                settings = {"top_k": top_k, "num_top": num_top}
                truth = run(
                    retrieve_dense, to_float64(case._replace(pool=RowPool([table], pool.candidates))), **settings
                )
                found = run(retrieve_fused, case._replace(pool=pool), tiling=TILINGS[number], **settings)
                assert torch.equal(found.top_rows, truth.top_rows)
                assert torch.equal(found.top_scores.double(), truth.top_scores)


def test_equal_scores_go_to_the_lowest_row():
    """Over several blocks, whose maxima are all equal."""
    pool = RowPool([torch.ones(100, 2)], [torch.arange(100) >= 3])
    for tiling in TILINGS:
        settings = {"generator": generator(), "tiling": tiling}
        found = retrieve_fused(torch.ones(2, 2), pool, num_top=40, **settings)
        assert found.top_rows.tolist() == [list(range(3, 43))] * 2
        grouped = retrieve_fused(torch.ones(2, 2), pool, num_top=3, top_k=3, **settings)
        assert grouped.top_rows.tolist() == [[3, 34, 67]] * 2


def test_nothing_valid():
    table = torch.randn(40, 6, generator=generator())
    excluded = torch.stack([torch.arange(40), torch.full((40,), -1)])  # more than the kernel holds in registers
    for candidates in (torch.ones(40, dtype=torch.bool), torch.zeros(40, dtype=torch.bool)):
        pool = RowPool([table], [candidates])
        for top_k in (None, 3):
            settings = {"top_k": top_k, "num_samples": 3, "num_top": 2, "tiling": TILINGS[1]}
            found = retrieve_fused(table[:2], pool, generator=generator(), excluded=excluded, **settings)
            assert found.lse.isfinite().tolist() == [False, bool(candidates.any())]
            assert found.top_rows[0].tolist() == [-1, -1]
            assert found.top_scores[0].tolist() == [-math.inf] * 2
            assert bool(((found.rows >= 0) & (found.rows < 40)).all())


@pytest.mark.parametrize("count", [0, 1, 17, 40])
def test_any_number_of_rows_may_be_excluded(count: int):
    case = make(5, 300, 6, torch.float32)
    excluded = torch.randint(-1, 300, (count, 5), generator=generator(count)).T  # columns are far apart
    for top_k in (None, 7):
        settings = {"top_k": top_k, "num_top": 9}
        truth = run(retrieve_dense, case._replace(excluded=excluded), **settings)
        found = run(retrieve_fused, case._replace(excluded=excluded), tiling=TILINGS[1], **settings)
        torch.testing.assert_close(found.lse, truth.lse)
        assert torch.equal(found.top_rows, truth.top_rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_need_be_contiguous(dtype: torch.dtype):
    case = make(9, 70, 12, dtype)
    (rows, scales), candidates = next(case.pool.parts), case.pool.candidates[0]
    for table in (rows[:, ::2], rows.T.contiguous().T[:, :6], rows[:, 1:7]):
        copied = RowPool([table.contiguous()], [candidates], [scales])
        spread = RowPool(
            [table],
            [candidates.repeat_interleave(2)[::2]],
            [None if scales is None else scales.repeat_interleave(3)[::3]],
        )
        queries = case.queries.T.contiguous().T[:, :6]
        for top_k in (None, 7):
            settings = {"generator": generator(), "num_top": 3, "num_samples": 2, "top_k": top_k}
            found = retrieve_fused(queries, spread, **settings)
            truth = retrieve_fused(queries.contiguous(), copied, **{**settings, "generator": generator()})
            for a, b in zip(found, truth, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_queries_of_any_size_fit_half_precision(size: float):
    """Scaled queries may leave fp16's range, which ends at 65,504 and has few digits below 6e-5."""
    case = make(4, 50, 8, torch.float16)
    scaled = case._replace(queries=size * case.queries)
    truth = run(retrieve_dense, exact(scaled)).lse
    error = (run(retrieve_fused, scaled).lse - truth).abs()
    assert bool((error <= rounding_error(scaled) + arithmetic_error(scaled, truth)).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_factor_multiplies_the_scores(dtype: torch.dtype):
    case = make(6, 80, 16, dtype)
    for factor in (-7.5, torch.tensor(7.5, device=DEVICE)):
        scaled = case._replace(queries=float(factor) * case.queries)
        truth = run(retrieve_dense, exact(scaled), num_top=3)
        found = run(retrieve_fused, case, factor=factor, num_top=3)
        error = rounding_error(scaled) + arithmetic_error(scaled, truth.lse)
        assert bool(((found.lse - truth.lse).abs() <= error).all())
        assert bool(((found.top_scores - truth.top_scores).abs() <= error[:, None]).all())


@pytest.mark.parametrize("size", [1e3, 1e10, 2.5e38])
def test_scores_of_any_size_keep_hidden_rows_hidden(size: float):
    """Products with log2(e) of such scores would overflow, or be rounded by more than the differences that count."""
    table = torch.where(torch.arange(200) % 7 == 0, 1.0, -1.0)[:, None].repeat(1, 16) / 4
    candidates = torch.arange(200) >= 70
    case = Case(size / 4 * torch.ones(3, 16), RowPool([table], [candidates]), None)
    found = run(retrieve_fused, case, num_samples=4, tiling=TILINGS[1])
    assert bool((found.rows >= 70).all())
    assert bool((found.rows % 7 == 0).all())
    truth = size + math.log(19)  # rows 70, 77, ..., 196
    torch.testing.assert_close(found.lse, torch.full((3,), truth), rtol=1e-6, atol=1e-5)


def test_numbers_of_samples_and_of_best_rows():
    case = make(3, 50, 6, torch.float32)
    for top_k in (None, 7):
        for num_samples, num_top in ((0, 0), (0, 2), (1, 0), (5, 60)):
            settings = {"num_samples": num_samples, "num_top": num_top, "top_k": top_k}
            found = run(retrieve_fused, case, **settings)
            truth = run(retrieve_dense, case, **settings)
            for a, b in zip(found[:4], truth[:4], strict=True):
                assert a.shape == b.shape
                assert a.dtype == b.dtype
            visible = dense_scores(case.queries, case.pool, None, case.excluded) > -torch.inf
            assert bool(visible.gather(1, found.rows).all())


def test_draws_with_top_k_are_best_rows():
    case = make(40, 300, 6, torch.float32)
    scores = dense_scores(case.queries, case.pool, None, case.excluded)
    _, best = grouped_top_k(scores, 7)
    rows = run(retrieve_fused, case, num_samples=8, top_k=7, tiling=TILINGS[0]).rows
    assert bool((rows[:, :, None] == best[:, None]).any(2).all())


def test_draws_are_reproducible_and_advance_the_generator():
    case = make(64, 100, 6, torch.float32)
    source = generator(3)
    first = retrieve_fused(case.queries, case.pool, generator=source).rows
    assert torch.equal(first, retrieve_fused(case.queries, case.pool, generator=generator(3)).rows)
    assert not torch.equal(first, retrieve_fused(case.queries, case.pool, generator=source).rows)


# What it takes


def test_what_it_cannot_take_is_named():
    queries, table, candidates = torch.ones(2, 4), torch.ones(6, 4), torch.ones(6, dtype=torch.bool)
    cases = {
        "2 parts": RowPool([table, table], [candidates, candidates]),
        "torch.float64": RowPool([table.double()], [candidates]),
        "int8 rows need scales": RowPool([table.to(torch.int8)], [candidates]),
        "nothing to score": RowPool([table[:0]], [candidates[:0]]),
        "strides": RowPool([torch.ones(1, 1).expand(6, 4).as_strided((6, 1), (0, 2**31))], [candidates]),
    }
    for words, pool in cases.items():
        assert words in fused.reason_against(queries, pool)
        with pytest.raises(ValueError, match=words):
            fused.retrieve_fused(queries[:, : pool.embeddings[0].shape[1]], pool, generator=generator())
    taken = moved(RowPool([table], [candidates]))
    assert fused.reason_against(queries.to(DEVICE), taken) is None
    for settings in ({"top_k": 0}, {"top_k": 7}):
        with pytest.raises(ValueError, match="top_k is"):
            fused.retrieve_fused(queries.to(DEVICE), taken, generator=generator(), **settings)
    with pytest.raises(ValueError, match="expected"):
        fused.retrieve_fused(queries[:, :3].to(DEVICE), taken, generator=generator())


def test_other_devices_are_named(monkeypatch: pytest.MonkeyPatch):
    pool = RowPool([torch.ones(6, 4)], [torch.ones(6, dtype=torch.bool)])
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "not an NVIDIA GPU" in fused.reason_against(torch.ones(2, 4), pool)
    monkeypatch.setattr(fused, "_has_triton", lambda: False)
    assert "not installed" in fused.reason_against(torch.ones(2, 4), pool)


def test_triton_is_imported_on_use_alone():
    code = "import sys, negative_cache, negative_cache.retrieval.fused.launch; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Memory


class Names(Recorder):
    """Names of the operations too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("settings", [{"num_samples": 3}, {"num_top": 2}, {"top_k": 16, "num_top": 4}], ids=str)
def test_no_tensor_has_a_score_per_query_and_row(settings: dict[str, int]):
    """And no operation waits for values: reads of a scalar, or tensors whose size depends on them."""
    batch, rows = 256, 4096
    case = make(batch, rows, 16, torch.float32)
    queries, pool, excluded = case.queries.to(DEVICE), moved(case.pool), case.excluded.to(DEVICE)
    tiling = Tiling(64, 64, 16, 1, 4, 2, 4) if ON_GPU else Tiling(256, 128, 16, 256, 4, 2, 4)
    with Names() as recorder:
        fused.retrieve_fused(queries, pool, generator=generator(), excluded=excluded, tiling=tiling, **settings)
    assert recorder.largest < batch * rows // 4
    waiting = {"_local_scalar_dense", "nonzero", "masked_select", "unique2", "equal", "index", "index_put_"}
    assert not recorder.names & waiting


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_waits_for_the_gpu(dtype: torch.dtype):
    case = make(64, 5000, 32, dtype)
    queries, pool, excluded = case.queries.to(DEVICE), moved(case.pool), case.excluded.to(DEVICE)
    for mode in ("default", "error"):  # compiled in the first round
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for settings in ({"num_top": 5}, {"top_k": 16, "num_top": 5}):
                fused.retrieve_fused(queries, pool, generator=generator(), excluded=excluded, **settings)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# Draws


def population(dtype: torch.dtype = torch.float32, **settings) -> Population:
    return make_population(dtype, **settings)


def draws(people: Population, seed: int = 0, **settings) -> Tensor:
    return run(retrieve_fused, people.case, seed, **{"tiling": DRAWS, **settings}).rows


@pytest.mark.parametrize("top_k", [None, 9])
@pytest.mark.parametrize("slots", [1, MANY_SLOTS])
def test_draws_follow_the_softmax(slots: int, top_k: int | None):
    """Of one segment, and of as many as there are blocks; with hidden and excluded rows."""
    people = population(rows=120, top_k=top_k, repeats=12_000)
    drawn = draws(people, num_samples=2, top_k=top_k, tiling=DRAWS._replace(slots=slots))
    assert worst_p_value(people, drawn) > ALPHA


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_draws_follow_the_softmax_of_narrow_rows(dtype: torch.dtype):
    people = population(dtype, rows=120, repeats=12_000)
    assert worst_p_value(people, draws(people)) > ALPHA


def test_draws_follow_the_softmax_of_quantized_rows():
    people = population(rows=120)
    values, scales = quantize(people.case.pool.embeddings[0])
    case = people.case._replace(pool=RowPool([values], people.case.pool.candidates, [scales]))
    some = case._replace(queries=case.queries[:: people.repeats], excluded=case.excluded[:: people.repeats])
    truth = exact(as_rounded(some))
    probabilities = dense_scores(truth.queries, truth.pool, None, some.excluded).softmax(1)
    people = people._replace(case=case, probabilities=probabilities)
    assert worst_p_value(people, draws(people)) > ALPHA


@pytest.mark.parametrize("is_copied", [False, True])
def test_draws_follow_the_softmax_over_many_blocks(is_copied: bool):
    """Of several stretches each, loaded by threads or by the copy engine, which wants rows of whole 16 bytes."""
    people = population(rows=1000, repeats=8000)
    pad = torch.nn.functional.pad
    (table,) = people.case.pool.embeddings
    case = people.case._replace(
        queries=pad(people.case.queries, (0, 10)), pool=people.case.pool._replace(embeddings=[pad(table, (0, 10))])
    )
    tiling = DRAWS._replace(block_n=64, block_k=16, block_s=16, is_copied=is_copied)
    assert worst_p_value(people, draws(people._replace(case=case), tiling=tiling)) > ALPHA


def test_draws_are_independent():
    """Of queries, of samples, and of successive calls."""
    people = population(rows=40, distinct=1, hidden=False, repeats=20_000)
    source = generator()
    settings = {"generator": source, "num_samples": 3, "tiling": DRAWS._replace(block_m=min(DRAWS.block_m, 4096))}
    drawn, later = (retrieve_fused(people.case.queries, people.case.pool, **settings).rows for _ in range(2))
    assert worst_independence(drawn, people.probabilities[0]) > ALPHA
    assert worst_independence(torch.stack([drawn[:, 0], later[:, 0]], 1), people.probabilities[0]) > ALPHA


def test_rare_rows_are_not_lost():
    """131,071 equal rows beside one that has half of the mass: the other draws are spread evenly."""
    count, heavy = 131_072, 70_000
    scores = torch.zeros(count, 1)
    scores[heavy] = math.log(count - 1)
    pool = RowPool([scores], [torch.ones(count, dtype=torch.bool)])
    tiling = None if ON_GPU else Tiling(16, 1024, 16, 512, 4, 2, 3)
    drawn = retrieve_fused(
        torch.ones(16, 1), pool, generator=generator(), num_samples=512, tiling=tiling
    ).rows.flatten()
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
    wrong = people._replace(case=people.case._replace(queries=factor * people.case.queries))
    assert worst_p_value(people, draws(wrong)) < ALPHA


@pytest.mark.parametrize("stage", ["segment", "row"])
def test_a_wrong_stage_is_rejected(stage: str, monkeypatch: pytest.MonkeyPatch):
    """A segment drawn evenly, and a row of a stretch drawn at another temperature."""
    people, right = population(rows=120), fused._draw

    def wrong(operands, tiling, seed, best, total, *rest):
        if stage == "segment":
            return right(operands, tiling, seed, torch.zeros_like(best), (total > 0).float(), *rest)
        return right(operands._replace(queries=0.8 * operands.queries), tiling, seed, best, total, *rest)

    monkeypatch.setattr(fused, "_draw", wrong)
    assert worst_p_value(people, draws(people, tiling=DRAWS._replace(slots=MANY_SLOTS))) < ALPHA


def test_shared_noise_is_rejected():
    people = population(rows=40, distinct=1, hidden=False, repeats=20_000)
    drawn = draws(people, num_samples=2)
    assert worst_independence(drawn[:10_000].repeat_interleave(2, 0), people.probabilities[0]) < ALPHA
    assert worst_independence(drawn[:, :1].expand(-1, 2), people.probabilities[0]) < ALPHA


# The compiler


def test_kernels_compile_for_gpus(tmp_path: Path):
    """To machine code, without spilled registers, in the shared memory that there is; needs no GPU."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    job = Path(__file__).parents[1].joinpath("compile_job.py")
    result = subprocess.run([sys.executable, str(job)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "compiled" in result.stdout
