"""Products with rows that are narrower than the scores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from negative_cache.cache.columns import dequantize, make_column, quantize
from negative_cache.cache.specs import QuantizedFeature
from negative_cache.retrieval import Search, tile_scores
from negative_cache.retrieval.dense import retrieve_dense
from negative_cache.retrieval.tiled import retrieve_tiled
from retrieval_problems import generator, in_float64, pool_of, random_search


def int8_search(batch: int, rows: int, dim: int) -> Search:
    """float32 queries, and int8 rows of very different lengths."""
    rng = generator(batch + rows)
    queries = torch.randn(batch, dim, generator=rng)
    pool = pool_of(*quantize(torch.randn(rows, dim, generator=rng) * torch.rand(rows, 1, generator=rng)))
    return Search(queries, pool._replace(is_candidate=torch.rand(rows, generator=rng) < 0.8), num_best=4)


@pytest.mark.parametrize("in_integers", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 100, 5), (16, 700, 64), (130, 2000, 33)], ids=str)
def test_int8_rows_give_the_scores_of_rounded_queries(
    shape: tuple[int, int, int], in_integers: bool, monkeypatch: pytest.MonkeyPatch
):
    """Integers are summed exactly; what remains is the rounding of the queries, which is bounded."""
    monkeypatch.setattr(tile_scores, "multiplies_integers", lambda device: in_integers)
    search = int8_search(*shape)
    exact, (rounded, steps) = in_float64(search), quantize(search.queries)
    if in_integers:
        exact = exact._replace(queries=rounded.double() * steps.double()[:, None])
    largest = exact.pool.embeddings.abs().sum(dim=1).amax()
    for top_k in (None, (shape[1] + 2) // 3):
        found = retrieve_tiled(search._replace(top_k=top_k), generator())
        truth = retrieve_dense(exact._replace(top_k=top_k), generator())
        unrounded = retrieve_dense(in_float64(search)._replace(top_k=top_k), generator())
        if in_integers:
            # a score has three roundings to float32, lse as many again; both relative to the largest score
            tolerance = 2**-20 * (1 + float((exact.queries @ exact.pool.embeddings.T).abs().amax()))
            assert torch.equal(found.best_rows, truth.best_rows)
        else:  # the CPU may multiply as bfloat16, which rounds queries to 8 bits
            tolerance = float(2**-8 * search.queries.abs().amax() * largest)
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
    queries, rows = torch.randn(16, 256, generator=generator()), torch.randn(3000, 256, generator=generator(1))
    search = Search(queries, pool_of(rows.to(dtype)))
    found = retrieve_tiled(search, generator())
    truth = retrieve_dense(in_float64(search), generator())
    largest = (queries.abs() @ rows.to(dtype).float().abs().T).amax(dim=1)
    bound = (2**-8 if dtype == torch.bfloat16 else 2**-18) * largest
    assert bool(((found.lse - truth.lse).abs() <= bound).all())


def test_the_setting_for_bfloat16_products_is_restored_after_an_error():
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision

    def fail(scores: Tensor) -> Tensor:
        assert settings.fp32_precision == "bf16"
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        retrieve_tiled(random_search(2, 10, torch.bfloat16)._replace(score_transform=fail), generator())
    assert settings.fp32_precision == before


def test_passes_that_overlap_restore_the_setting():
    settings = torch.backends.mkldnn.matmul
    pool = random_search(1, 4, torch.bfloat16).pool
    before = settings.fp32_precision
    first, second = tile_scores.narrow_products(pool), tile_scores.narrow_products(pool)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert settings.fp32_precision == "bf16"
    second.__exit__(None, None, None)
    assert settings.fp32_precision == before
    assert torch.get_float32_matmul_precision() == "highest"


def test_scales_stay_float32_when_a_module_is_cast():
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
    search = Search(torch.randint(-3, 3, (4, 8), generator=generator()).float(), pool_of(rows))
    found, truth = retrieve_tiled(search, generator()), retrieve_dense(in_float64(search), generator())
    torch.testing.assert_close(found.lse.double(), truth.lse)
