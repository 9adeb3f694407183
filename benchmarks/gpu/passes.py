"""`passes`: one pass over the cached rows, beside the bare product and other implementations of the same.

Times are those of the device alone, measured by events around each call, in rounds in which all calls take turns.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.dense_baseline import SCALE
from benchmarks.gpu.machine import peak_megabytes, peak_of
from benchmarks.gpu.markdown import COMPILED, PORT
from benchmarks.gpu.results import Results, Row
from benchmarks.timing import medians_in_turns, seconds
from negative_cache.cache.columns import dequantize, quantize
from negative_cache.retrieval import Retrieved, RowPool, Scale, Search, explain, retrieve
from negative_cache.retrieval.fused.launch import retrieve_fused
from negative_cache.retrieval.tiled import retrieve_tiled

CHUNK = 65_536  # rows that are made at once
LEAST_ROWS = 2**17
ROUNDS, LEAST_ROUNDS = 9, 3
MOST_SECONDS = 0.25  # per call and size; fewer rounds if they take longer
FUSED = "fused"
HEAD_START = 8_000_000  # cycles in which the host queues a call; otherwise its launch time would be measured
TF32 = "tf32"  # one product of rounded operands, which PyTorch's precision "high" allows
CHECKED = 4  # queries whose logsumexp is compared with the exact one
DRAWS = (1, 8)  # per query; the default loss uses 8


@dataclass(frozen=True)
class Shape:
    """A size of the pass."""

    batch: int
    rows: int
    dim: int
    dtype: str


def shapes(is_rehearsal: bool) -> Iterator[Shape]:
    """All sizes, the most common ones first."""
    if is_rehearsal:
        yield from (Shape(16, 256, 32, dtype) for dtype in ("bfloat16", "int8", "float32"))
        return
    batches, sizes, dims = (32, 128, 512, 4096), (2**17, 2**20), (768, 384)
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
        rows = measure(shape, Search(queries, pool, Scale(SCALE)))
        for row in rows:
            results.add(**row)
        print(shape, {row["way"]: row.get("ms") for row in rows}, flush=True)


def compile_all(sizes: Sequence[Shape]) -> None:
    """Compile the kernels of these sizes into Triton's cache, in many processes at once."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(max((os.cpu_count() or 1) - 2, 1)) as workers:
        compiling = workers.map_async(_compile, sizes, chunksize=1)
        few = torch.randn(64, 384, device="cuda", dtype=torch.bfloat16)
        compiled_draw(few, few.repeat(4, 1))
        compiling.wait()


def _compile(shape: Shape) -> None:
    """Run each pass once, over rows with arbitrary values; called in its own process."""
    device, dtype = torch.device("cuda"), getattr(torch, shape.dtype)
    rows = torch.empty(shape.rows, shape.dim, dtype=dtype, device=device)
    scales = torch.ones(shape.rows, device=device) if dtype == torch.int8 else None
    pool = RowPool(rows, torch.ones(shape.rows, dtype=torch.bool, device=device), scales)
    search = Search(torch.randn(shape.batch, shape.dim, device=device), pool, Scale(SCALE))
    generator = torch.Generator()
    for num_samples in DRAWS:
        fused(search._replace(num_samples=num_samples), generator)
    if dtype == torch.float32:
        fused_tf32(search, generator)
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
    return RowPool(rows, torch.ones(shape.rows, dtype=torch.bool, device=device), scales)


def ways(shape: Shape, search: Search) -> dict[str, Callable[[], object]]:
    """The calls to measure, by name."""
    queries, rows, generator = search.queries, search.pool.embeddings, torch.Generator().manual_seed(0)
    calls: dict[str, Callable[[], object]] = {
        FUSED if count == 1 else f"{FUSED}, {count} draws": partial(
            fused, search._replace(num_samples=count), generator
        )
        for count in DRAWS
    }
    calls["tiled"] = partial(retrieve_tiled, Search(SCALE * queries, search.pool), generator)
    if rows.dtype == torch.int8:
        operand = quantize(queries)[0]
        calls["product"] = lambda: torch._int_mm(operand, rows.T)
    else:
        narrow = (SCALE * queries).to(rows.dtype)
        calls["product"] = lambda: torch.mm(narrow, rows.T)
    if rows.dtype == torch.bfloat16:
        calls[COMPILED] = partial(compiled_draw, narrow, rows)
    if rows.dtype == torch.float32:
        calls[f"{FUSED}, {TF32}"] = partial(fused_tf32, search, generator)
        calls[PORT] = lambda: gumbel_draw(SCALE * (queries @ rows.T))
    return calls


def fused(search: Search, generator: torch.Generator) -> Retrieved:
    """The pass as a loss runs it; on a CPU, the same kernels in Triton's interpreter."""
    return retrieve(search, generator) if search.queries.is_cuda else retrieve_fused(search, generator, SCALE)


def fused_tf32(search: Search, generator: torch.Generator) -> Retrieved:
    """The pass over float32 rows with one product of rounded operands, as `set_float32_matmul_precision` allows."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return fused(search, generator)
    finally:
        torch.set_float32_matmul_precision(before)


def lse_error(call: Callable[[], object], search: Search) -> float | None:
    """The largest error of the logsumexp of the first queries; None for a call that returns no logsumexp."""
    result = call()
    if not isinstance(result, Retrieved):
        return None
    rows, scales, some = search.pool.embeddings, search.pool.scales, search.queries[:CHECKED].double()
    scores = []
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        values = rows[part] if scales is None else dequantize(rows[part], scales[part])
        scores.append(SCALE * some @ values.double().T)
    return float((result.lse[:CHECKED] - torch.cat(scores, dim=1).logsumexp(1)).abs().max())


def gumbel_draw(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Logsumexp and a draw of each row of scores."""
    noise = -torch.log(-torch.log(torch.rand_like(scores)))
    return scores.logsumexp(dim=1), (scores + noise).argmax(dim=1)


@torch.compile(dynamic=True, backend="inductor" if torch.cuda.is_available() else "eager")
def compiled_draw(queries: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The same from a product, as a user would write it; a rehearsal does not compile it."""
    return gumbel_draw((queries @ rows.T).float())


def measure(shape: Shape, search: Search) -> list[Row]:
    """A row for each call, all beside the bare product of this run."""
    device, peaks, failed = search.queries.device, dict[str, float | None](), dict[str, str]()
    calls = ways(shape, search)
    for name, call in calls.items():
        try:
            call()  # compiles
            peaks[name] = peak_megabytes(call, device)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
            if device.type == "cuda":
                torch.cuda.empty_cache()
    able = {name: calls[name] for name in peaks}
    times = medians_in_turns(
        able, partial(milliseconds, device=device), ROUNDS, LEAST_ROUNDS, most_ms=1000 * MOST_SECONDS
    )
    rows: list[Row] = []
    for name, call in calls.items():
        row: Row = {"batch": shape.batch, "rows": shape.rows, "dim": shape.dim, "dtype": shape.dtype, "way": name}
        if name in failed:
            row["failed"] = failed[name]
        else:
            row |= _speed(shape, times[name], times.get("product"), device)
            row |= {"extra_mb": peaks[name], "lse_error": lse_error(call, search)}
        if name == FUSED:
            row["runs"] = explain(search)
        rows.append(row)
    return rows


def _speed(shape: Shape, ms: float, product_ms: float | None, device: torch.device) -> Row:
    """The time of a call, also relative to that of the product, and to the peak of the card."""
    teraflops = 2 * shape.batch * shape.rows * shape.dim / ms / 1e9
    peak = peak_of(torch.cuda.get_device_name() if device.type == "cuda" else "cpu", shape.dtype)
    return {
        "ms": round(ms, 4),
        "teraflops": round(teraflops, 1),
        "of_product": None if product_ms is None else round(ms / product_ms, 3),
        "of_peak": None if peak is None else round(teraflops / peak, 3),
    }


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of one call on the device, from its first kernel to the end of its last."""
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
