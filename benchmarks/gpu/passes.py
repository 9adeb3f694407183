"""`passes`: one pass over the cached rows, against the bare product and what else would do the same.

Times are of the device alone, by events around each call, in rounds in which all ways take turns.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.dense_baseline import SCALE
from benchmarks.gpu.machine import peak_megabytes, peak_of
from benchmarks.gpu.markdown import COMPILED, PORT
from benchmarks.gpu.results import Results, Row
from benchmarks.timing import medians_in_turns, seconds
from negative_cache.cache.specs import dequantize, quantize
from negative_cache.retrieval import Retrieved, RowPool, Scale, explain, retrieve
from negative_cache.retrieval.fused import launch as triton_pass
from negative_cache.retrieval.fused.launch import retrieve_fused
from negative_cache.retrieval.fused.tiling import Tiling
from negative_cache.retrieval.tiled import retrieve_streaming

CHUNK = 65_536  # rows that are made at once
LEAST_ROWS = 2**17
ROUNDS, LEAST_ROUNDS = 9, 3
MOST_SECONDS = 0.25  # of one way at one size; fewer rounds if they take longer
FUSED = "fused"
HEAD_START = 8_000_000  # cycles in which the host queues a call, or its own time for the launches would be measured
TF32 = ("tf32", "tf32x3")  # one product of rounded operands, and three that together are nearly exact
CHECKED = 4  # queries whose logsumexp is compared with the exact one
CANDIDATES = 8  # draws per query that the default loss asks for


@dataclass(frozen=True)
class Shape:
    """A size of the pass."""

    batch: int
    rows: int
    dim: int
    dtype: str


def shapes(is_rehearsal: bool) -> Iterator[Shape]:
    """All sizes; first those that most users have."""
    batches, sizes, dims = (
        ((32, 128, 512, 4096), (2**17, 2**20), (768, 384)) if not is_rehearsal else ((16,), (512,), (64,))
    )
    for rows in sizes:
        for dim in dims:
            for dtype in ("bfloat16", "int8", "float32"):
                for batch in batches:
                    yield Shape(batch, rows, dim, dtype)


def run(results: Results, prepared: Path, device: torch.device, limit: float, is_rehearsal: bool) -> None:
    """Measure every shape."""
    torch.manual_seed(0)
    if device.type == "cuda":
        compile_all([shape for shape in shapes(is_rehearsal) if shape.rows == LEAST_ROWS])
    pool, made_for = None, None
    for shape in shapes(is_rehearsal):
        if made_for != (shape.rows, shape.dim, shape.dtype):
            pool = None  # freed before the next one is made
            pool, made_for = make_pool(shape, device), (shape.rows, shape.dim, shape.dtype)
        assert pool is not None
        queries = normalize(torch.randn(shape.batch, shape.dim, device=device), dim=1)
        rows = measure(shape, queries, pool)
        for row in rows:
            results.add(**row)
        print(shape, {row["way"]: row.get("ms") for row in rows}, flush=True)


def compile_all(sizes: Sequence[Shape]) -> None:
    """Compile the kernels of these sizes, in many processes at once; this one then finds them in Triton's cache."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(max((os.cpu_count() or 1) - 2, 1)) as workers:
        compiling = workers.map_async(_compile, sizes, chunksize=1)
        few = torch.randn(64, 384, device="cuda", dtype=torch.bfloat16)
        compiled_draw(few, few.repeat(4, 1))
        compiling.wait()


def _compile(shape: Shape) -> None:
    """Runs in a process of its own: a pass over rows with any values."""
    device, dtype = torch.device("cuda"), getattr(torch, shape.dtype)
    rows = torch.empty(shape.rows, shape.dim, dtype=dtype, device=device)
    scales = torch.ones(shape.rows, device=device) if dtype == torch.int8 else None
    pool = RowPool([rows], [torch.ones(shape.rows, dtype=torch.bool, device=device)], [scales])
    queries, generator = torch.randn(shape.batch, shape.dim, device=device), torch.Generator()
    for num_samples in draws_of(shape.dtype):
        fused(queries, pool, generator, num_samples)
    for precision in TF32 if dtype == torch.float32 else ():
        fused_on_tensor_cores(queries, pool, generator, precision)
    torch.cuda.synchronize()


def make_pool(shape: Shape, device: torch.device) -> RowPool:
    """Random rows of length 1, all of them candidates."""
    dtype = getattr(torch, shape.dtype)
    rows = torch.empty(shape.rows, shape.dim, dtype=dtype, device=device)
    scales = torch.empty(shape.rows, device=device) if dtype == torch.int8 else None
    for start in range(0, shape.rows, CHUNK):
        part = slice(start, min(start + CHUNK, shape.rows))
        values = normalize(torch.randn(part.stop - start, shape.dim, device=device), dim=1)
        if scales is None:
            rows[part] = values
        else:
            rows[part], scales[part] = quantize(values)
    return RowPool([rows], [torch.ones(shape.rows, dtype=torch.bool, device=device)], [scales])


def draws_of(dtype: str) -> tuple[int, ...]:
    """Draws per query; float32 rows, whose kernels take long to compile, with one alone."""
    return (1,) if dtype == "float32" else (1, CANDIDATES)


def ways(shape: Shape, queries: Tensor, pool: RowPool) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    rows, generator = pool.embeddings[0], torch.Generator().manual_seed(0)
    found: dict[str, Callable[[], object]] = {
        FUSED if count == 1 else f"{FUSED}, {count} draws": partial(fused, queries, pool, generator, count)
        for count in draws_of(shape.dtype)
    }
    found["tiled"] = partial(retrieve_streaming, SCALE * queries, pool, generator=generator)
    if rows.dtype == torch.int8:
        operand = quantize(queries)[0]
        found["product"] = lambda: torch._int_mm(operand, rows.T)
    else:
        narrow = (SCALE * queries).to(rows.dtype)
        found["product"] = lambda: torch.mm(narrow, rows.T)
    if rows.dtype == torch.bfloat16:
        found[COMPILED] = partial(compiled_draw, narrow, rows)
    if rows.dtype == torch.float32:
        found |= {f"{FUSED}, {name}": partial(fused_on_tensor_cores, queries, pool, generator, name) for name in TF32}
        found[PORT] = lambda: gumbel_draw(SCALE * (queries @ rows.T))
    return found


def fused(queries: Tensor, pool: RowPool, generator: torch.Generator, num_samples: int) -> Retrieved:
    """The pass as a loss runs it; on a CPU the same kernels in Triton's interpreter."""
    if queries.is_cuda:
        return retrieve(queries, pool, generator=generator, score_transform=Scale(SCALE), num_samples=num_samples)
    return retrieve_fused(SCALE * queries, pool, generator=generator, num_samples=num_samples)


def fused_on_tensor_cores(queries: Tensor, pool: RowPool, generator: torch.Generator, precision: str) -> Retrieved:
    """The pass over float32 rows on tensor cores, as it is not run: a candidate to replace the exact one."""
    processors = torch.cuda.get_device_properties(queries.device).multi_processor_count if queries.is_cuda else 1
    tiling = Tiling(64, 128, 32, 1 if queries.is_cuda else 64, 4, 3, 2 * processors, 32, queries.is_cuda)
    with mock.patch.object(triton_pass, "precision", return_value=precision):
        return retrieve_fused(queries, pool, generator=generator, factor=SCALE, tiling=tiling)


def lse_error(call: Callable[[], object], queries: Tensor, pool: RowPool) -> float | None:
    """How far the logsumexp of the first queries is from the exact one; None for a call that gives none."""
    found = call()
    if not isinstance(found, Retrieved):
        return None
    (rows, scales), some = next(pool.parts), queries[:CHECKED].double()
    scores = []
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        values = rows[part] if scales is None else dequantize(rows[part], scales[part])
        scores.append(SCALE * some @ values.double().T)
    return float((found.lse[:CHECKED] - torch.cat(scores, dim=1).logsumexp(1)).abs().max())


def gumbel_draw(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Logsumexp and a draw of each row of scores."""
    noise = -torch.log(-torch.log(torch.rand_like(scores)))
    return scores.logsumexp(dim=1), (scores + noise).argmax(dim=1)


@torch.compile(dynamic=True, backend="inductor" if torch.cuda.is_available() else "eager")
def compiled_draw(queries: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The same from a product, as a user would write it; a rehearsal has no time for a compiler."""
    return gumbel_draw((queries @ rows.T).float())


def measure(shape: Shape, queries: Tensor, pool: RowPool) -> list[Row]:
    """A row for each way, all beside the bare product of this run."""
    calls, peaks, failed = ways(shape, queries, pool), {}, {}
    for name, call in list(calls.items()):
        try:
            call()  # compiles
            peaks[name] = peak_megabytes(call, queries.device)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
            if queries.is_cuda:
                torch.cuda.empty_cache()
    able = {name: call for name, call in calls.items() if name in peaks}
    times = medians_in_turns(
        able, partial(milliseconds, device=queries.device), ROUNDS, LEAST_ROUNDS, most_ms=1000 * MOST_SECONDS
    )
    product, operations = times.get("product"), 2 * shape.batch * shape.rows * shape.dim
    peak = peak_of(torch.cuda.get_device_name() if queries.is_cuda else "cpu", shape.dtype)
    made = []
    for name in calls:
        row: Row = {"batch": shape.batch, "rows": shape.rows, "dim": shape.dim, "dtype": shape.dtype, "way": name}
        if name in failed:
            row["failed"] = failed[name]
        else:
            tera = operations / times[name] / 1e9
            row |= {"ms": round(times[name], 4), "teraflops": round(tera, 1), "extra_mb": peaks[name]}
            row["lse_error"] = lse_error(calls[name], queries, pool)
            row["of_product"] = None if product is None else round(times[name] / product, 3)
            row["of_peak"] = None if peak is None else round(tera / peak, 3)
        if name == FUSED:
            row["runs"] = explain(queries, pool)
        made.append(row)
    return made


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of one call on the device, from its first kernel to its last."""
    if device.type != "cuda":
        return 1000 * seconds(call, device)
    cuda: Any = torch.cuda
    begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    cuda._sleep(HEAD_START)
    begin.record()
    call()
    end.record()
    end.synchronize()
    elapsed: float = begin.elapsed_time(end)
    return elapsed
