"""The fused pass on a GPU: scores exist only inside a Triton kernel, one tile at a time.

One kernel (`kernels.scan`) reads the rows once. For each query it keeps a running logsumexp and, as a sample, the
number of a stretch of rows. A stretch of each further block replaces it in proportion to the block's share of the sum,
which takes two uniforms per block instead of one per score. Segments of rows run in parallel. A second, small kernel
(`kernels.draw`) merges them, recomputes the scores of the chosen stretches and draws the rows; `kernels.pick` finds the
best rows.

Triton is imported on first use. With TRITON_INTERPRET=1 the kernels run slowly on the CPU, for tests.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from negative_cache.cache.columns import quantize
from negative_cache.retrieval.dense import exact_top_k
from negative_cache.retrieval.fused.tile_sizes import MAX_BLOCK, Device, Tiling, gpu_tiling, power_of_two, precision
from negative_cache.retrieval.randomness import sample, uniforms
from negative_cache.retrieval.search import Retrieved, Search, group_bounds

MAX_HIDDEN = 16  # excluded rows per query that are held in registers; more of them are read again for each block
MAX_SAMPLES = 16  # per query; the state of more samples does not fit the registers, and the tiled pass runs
PICKED_ELEMENTS = 8192  # elements of rows that the kernels after the scan hold at once
ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
HAS_TRITON = importlib.util.find_spec("triton") is not None  # not in a function: torch.compile cannot trace the call


class _Segments(NamedTuple):
    """The division of the rows into groups, and of each group into parts of whole blocks; a segment is one part."""

    num_groups: int
    num_parts: int
    part_blocks: int
    size: int
    num_longer: int

    @property
    def num_segments(self) -> int:
        return self.num_groups * self.num_parts

    def bounds(self, groups: Tensor, parts: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """First row, and the row after the last, of parts of `length` rows, which are numbered within their groups."""
        first = groups * self.size + groups.clamp(max=self.num_longer)
        stop = first + self.size + (groups < self.num_longer)
        starts = first + parts * length
        return starts, torch.minimum(starts + length, stop)


class _Operands(NamedTuple):
    """The inputs of all kernels."""

    queries: Tensor
    query_scales: Tensor | None
    rows: Tensor
    row_scales: Tensor | None
    candidates: Tensor
    excluded: Tensor | None

    @property
    def num_excluded(self) -> int:
        return 0 if self.excluded is None else self.excluded.shape[1]

    def strides(self) -> dict[str, int]:
        excluded = (0, 0) if self.excluded is None else self.excluded.stride()
        return {
            "num_excluded": self.num_excluded,
            "row_stride": self.rows.stride(0),
            "row_step": self.rows.stride(1),
            "scale_stride": 0 if self.row_scales is None else self.row_scales.stride(0),
            "candidate_stride": self.candidates.stride(0),
            "excluded_stride": excluded[0],
            "excluded_step": excluded[1],
        }


def is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def reason_against(search: Search) -> str | None:
    """Why `retrieve_fused` cannot run a search, or should not because of its many samples; None if it can."""
    queries, rows, scales = search.queries, search.pool.embeddings, search.pool.scales
    device = queries.device
    if not HAS_TRITON:
        return "Triton is not installed"
    if search.ceilings is not None or search.pool.biases is not None:
        return "the fused kernel supports no margins, guide or log_q"
    if search.num_samples > MAX_SAMPLES:
        return f"it draws at most {MAX_SAMPLES} samples per query, whose state is in registers"
    if rows.dtype not in ROW_DTYPES:
        return f"the rows are {rows.dtype}"
    if queries.dtype == torch.float64:
        return "the queries are torch.float64"
    if (rows.dtype == torch.int8) != (scales is not None):
        return "int8 rows need scales, and rows of other dtypes have none"
    if scales is not None and scales.dtype != torch.float32:
        return "the scales are not float32"
    if not rows.numel() or not len(queries):
        return "there is nothing to score"
    if max(len(rows), len(queries)) >= 2**31 - MAX_BLOCK:
        return "there are more rows or queries than an int32 can number"
    if MAX_BLOCK * rows.stride(0) + rows.shape[1] * rows.stride(1) >= 2**31:
        return f"the rows' strides {rows.stride()} are too large"
    if is_interpreted():
        return None if device.type == "cpu" else "Triton's interpreter runs on the CPU"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the device is {device.type}, not an NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU's compute capability is below 8.0"
    return None


def retrieve_fused(
    search: Search, generator: torch.Generator, factor: float | Tensor = 1.0, tiling: Tiling | None = None
) -> Retrieved:
    """See `negative_cache.retrieval.retrieve`; all scores are multiplied by a factor instead of a score transform.

    Queries are rounded to the dtype of the rows (for int8, with a scale per query), as the product requires. Sums are
    float32. float32 rows are multiplied in full precision unless `torch.set_float32_matmul_precision` allows less.
    Nothing synchronizes the GPU. GPUs with different numbers of processors give different draws for the same seed.

    Args:
        search: What to retrieve; its score transform is ignored.
        generator: Source of randomness.
        factor: Multiplies all scores.
        tiling: How the work is divided; None to choose by the device and the shapes.
    """
    search.check()
    reason = reason_against(search._replace(num_samples=1))
    if reason is not None:
        raise ValueError(f"The fused pass cannot run: {reason}.")
    operands, top_k = _operands(search, factor), search.top_k
    tiling = tiling or _tiling(operands, len(operands.rows) if top_k is None else -(-len(operands.rows) // top_k))
    with torch.cuda.device_of(operands.rows):  # type: ignore[no-untyped-call]
        if top_k is None:
            return _all_rows(search, operands, tiling, generator)
        return _best_of_groups(search, operands, tiling, generator)


def _all_rows(search: Search, operands: _Operands, tiling: Tiling, generator: torch.Generator) -> Retrieved:
    """The pass without top_k."""
    batch, num_samples, segments = len(operands.queries), search.num_samples, _segments(operands, tiling, 1)
    seed = uniforms((1,), generator, operands.rows.device, torch.int64)
    best = _empty(operands, batch, segments.num_segments)
    state = _ScanState(
        seed=seed,
        best=best,
        total=torch.empty_like(best),
        chosen=_empty(operands, batch, segments.num_segments, power_of_two(num_samples), dtype=torch.int32),
        maxima=best.new_full((batch, segments.num_segments * segments.part_blocks), -torch.inf)
        if search.num_best
        else None,
    )
    _scan(operands, tiling, segments, state)
    lse, rows = _draw(operands, tiling, state, num_samples)
    return Retrieved(lse, rows, *_best_rows(operands, tiling, segments, state.maxima, search.num_best))


def _best_rows(
    operands: _Operands, tiling: Tiling, segments: _Segments, maxima: Tensor | None, num_best: int
) -> tuple[Tensor, Tensor]:
    """Rows and scores of the num_best best rows, which lie in the num_best blocks with the highest maxima.

    Of blocks with equal maxima the first ones suffice: each has a row that precedes the rows of later blocks.
    """
    num_best = min(num_best, len(operands.rows))
    if maxima is None:
        empty = _empty(operands, len(operands.queries), 0)
        return empty.long(), empty
    _, blocks = exact_top_k(maxima, min(num_best, maxima.shape[1]))
    blocks = blocks.sort(dim=1).values  # so that equal scores are in the order of their rows
    starts, stops = segments.bounds(torch.zeros_like(blocks), blocks, tiling.block_n)
    scores = _empty(operands, *blocks.shape, tiling.block_n)
    _pick(operands, tiling, starts, stops, None, scores)
    best_scores, at = exact_top_k(scores.flatten(1), num_best)
    rows = starts.gather(1, at // tiling.block_n) + at % tiling.block_n
    return torch.where(best_scores > -torch.inf, rows, -1), best_scores


def _best_of_groups(search: Search, operands: _Operands, tiling: Tiling, generator: torch.Generator) -> Retrieved:
    """The pass with top_k: find the first block with the best score of each group, then the row in that block."""
    assert search.top_k is not None
    batch, top_k = len(operands.queries), search.top_k
    segments = _segments(operands, tiling, top_k)
    best = _empty(operands, batch, segments.num_segments)
    chosen = torch.empty_like(best, dtype=torch.int32)
    _scan(operands, tiling, segments, _ScanState(best=best, chosen=chosen))

    shape = (batch, top_k, segments.num_parts)
    scores, part = best.view(shape).max(dim=2)
    blocks = chosen.view(shape).gather(2, part[..., None]).squeeze(2).long()
    best_scores, top = exact_top_k(scores, min(search.num_best, top_k))
    drawn = sample(scores, search.num_samples, generator)
    starts, stops = segments.bounds(torch.arange(top_k, device=blocks.device).expand_as(blocks), blocks, tiling.block_n)
    rows = torch.empty_like(starts)
    _pick(operands, tiling, starts, stops, rows, None)
    return Retrieved(
        lse=scores.logsumexp(dim=1),
        rows=rows.gather(1, drawn),
        best_rows=torch.where(best_scores > -torch.inf, rows.gather(1, top), -1),
        best_scores=best_scores,
    )


def _operands(search: Search, factor: float | Tensor) -> _Operands:
    """Queries in the dtype of the rows; fp16 and int8 queries have a scale, as those dtypes have a narrow range."""
    queries, excluded, rows, scales = search.queries.detach(), search.excluded, search.pool.embeddings, None
    if rows.dtype == torch.int8:
        queries, scales = quantize(queries)
        scales = scales * factor
    else:
        queries = queries.float() * factor
    if rows.dtype == torch.float16:
        scales = torch.frexp(queries.abs().amax(dim=1)).exponent.float().exp2()
        queries = queries / scales[:, None]
    if excluded is not None and excluded.shape[1] == 0:
        excluded = None
    queries = queries.to(rows.dtype).contiguous()
    return _Operands(
        queries, scales, rows, search.pool.scales, search.pool.is_candidate.view(torch.uint8), excluded=excluded
    )


def _empty(operands: _Operands, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=operands.rows.device)


class _ScanState(NamedTuple):
    """The results of the scan for each segment, and the seed of its draws; without draws only `best` and `chosen`.

    Attributes:
        best: float32 `[batch, num_segments]`: the highest score.
        chosen: int32: the stretch of each draw, `[batch, num_segments, samples]`; or the best block,
            `[batch, num_segments]`.
        seed: int64 `[1]`.
        total: float32 `[batch, num_segments]`: the sum of exp(score - highest).
        maxima: float32 `[batch, num_segments * part_blocks]`: the highest score of each block.
    """

    best: Tensor
    chosen: Tensor
    seed: Tensor | None = None
    total: Tensor | None = None
    maxima: Tensor | None = None


def _scan(operands: _Operands, tiling: Tiling, segments: _Segments, state: _ScanState) -> None:
    from negative_cache.retrieval.fused import kernels

    batch = len(operands.queries)
    given: Any = operands
    if tiling.is_copied:
        from triton.tools.tensor_descriptor import TensorDescriptor

        given = operands._replace(
            queries=TensorDescriptor.from_tensor(operands.queries, [tiling.block_m, tiling.block_k]),
            rows=TensorDescriptor.from_tensor(operands.rows, [tiling.block_n, tiling.block_k]),
        )
    kernels.scan[(-(-batch // tiling.block_m) * segments.num_segments,)](
        *given,
        state.seed,
        state.best,
        state.total,
        state.chosen,
        state.maxima,
        batch,
        segments.size,
        segments.num_longer,
        segments.num_parts,
        segments.part_blocks,
        segments.num_segments,
        **operands.strides(),
        DIM=operands.rows.shape[1],
        GROUPED=state.total is None,
        SAMPLES=state.chosen.shape[2] if state.chosen.dim() == 3 else 0,
        EXCLUDED=min(power_of_two(operands.num_excluded), MAX_HIDDEN),
        PRECISION=precision(),
        UPCAST=is_interpreted() and operands.rows.dtype == torch.bfloat16,
        INTEGER=operands.rows.dtype == torch.int8,
        COPIED=tiling.is_copied,
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        BLOCK_K=tiling.block_k,
        BLOCK_S=tiling.block_s,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )


def _draw(operands: _Operands, tiling: Tiling, state: _ScanState, num_samples: int) -> tuple[Tensor, Tensor]:
    """Logsumexp `[batch]` and rows `[batch, num_samples]` from the results of a scan over all rows."""
    from negative_cache.retrieval.fused import kernels

    (batch, num_segments), dim, slots = state.best.shape, operands.rows.shape[1], max(num_samples, 1)
    lse = _empty(operands, batch)
    rows = _empty(operands, batch, num_samples, dtype=torch.int64)
    kernels.draw[(-(-batch * slots // tiling.block_p),)](
        *operands,
        state.seed,
        state.best,
        state.total,
        state.chosen,
        lse,
        rows if num_samples else None,
        batch * slots,
        slots,
        num_segments,
        len(operands.rows),
        **operands.strides(),
        DIM=dim,
        SEGMENTS=max(power_of_two(num_segments), 2),
        SAMPLES=state.chosen.shape[2],
        BLOCK_P=tiling.block_p,
        BLOCK_S=tiling.block_s,
        BLOCK_K=min(PICKED_ELEMENTS // tiling.block_s, power_of_two(dim)),
        num_warps=4,
    )
    return lse, rows


def _pick(
    operands: _Operands, tiling: Tiling, starts: Tensor, stops: Tensor, rows: Tensor | None, scores: Tensor | None
) -> None:
    """Write the best row, or all scores, of each block `[batch, n]`."""
    from negative_cache.retrieval.fused import kernels

    count, dim = starts.numel(), operands.rows.shape[1]
    kernels.pick[(-(-count // tiling.block_p),)](
        *operands,
        starts.contiguous(),
        stops.contiguous(),
        rows,
        scores,
        count,
        starts.shape[1],
        **operands.strides(),
        DIM=dim,
        BLOCK_P=tiling.block_p,
        BLOCK_N=tiling.block_n,
        BLOCK_K=min(PICKED_ELEMENTS // tiling.block_n, power_of_two(dim)),
        num_warps=4,
    )


def _segments(operands: _Operands, tiling: Tiling, num_groups: int) -> _Segments:
    """Divide groups into parts, so that the programs fill the device in waves that are nearly full."""
    size, num_longer = group_bounds(len(operands.rows), num_groups)
    num_blocks = -(-(size + (num_longer > 0)) // tiling.block_n)
    others = -(-len(operands.queries) // tiling.block_m) * num_groups

    def duration(parts: int) -> int:
        """Duration in blocks of rows; the start and end of a program cost about one more."""
        return -(-others * parts // tiling.slots) * (-(-num_blocks // parts) + 1)

    parts = min((max(1, min(num_blocks, waves * tiling.slots // others)) for waves in (1, 2, 3, 4)), key=duration)
    part_blocks = -(-num_blocks // parts)
    return _Segments(num_groups, -(-num_blocks // part_blocks), part_blocks, size, num_longer)


def _tiling(operands: _Operands, group_size: int) -> Tiling:
    """The tiling for the device; the interpreter gets the tiles of a GPU, but more pairs at once."""
    batch, rows = len(operands.queries), operands.rows
    device = _device(rows.device)
    if torch.compiler.is_compiling():  # tensor descriptors in compiled code are not tested
        device = device._replace(has_copy_engine=False)
    tiling = gpu_tiling(batch, rows.shape[1], group_size, rows.dtype, _is_aligned(operands), device)
    return tiling if rows.is_cuda else tiling._replace(block_p=64)


def _is_aligned(operands: _Operands) -> bool:
    """Whether rows and queries are contiguous and start at multiples of 16 bytes."""
    return all(
        value.stride(1) == 1 and not (value.data_ptr() | value.stride(0) * value.itemsize) % 16
        for value in (operands.queries, operands.rows)
    )


@functools.cache
def _device(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device(232_448, 1, True)
    properties = torch.cuda.get_device_properties(device)
    memory = getattr(properties, "shared_memory_per_block_optin", 101_376)
    return Device(memory, properties.multi_processor_count, properties.major >= 9)
