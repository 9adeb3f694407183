"""The sizes of the tiles of the fused pass on a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

MIN_BLOCK, MAX_BLOCK = 16, 256  # the smallest size of a matrix instruction; the largest that fits the registers
MANY_QUERIES, WIDE = 1024, 512  # a pass with more queries and more dimensions is bound by the L2 cache
RESERVED_MEMORY = 4096  # bytes of shared memory that are not used for tiles
STRETCH = 32  # a draw chooses this many rows of a block, which are then scored again


class Tiling(NamedTuple):
    """How the work is divided. It affects only rounding, and which draws a seed gives.

    Attributes:
        block_m: Queries of a tile.
        block_n: Rows of a tile.
        block_k: Columns of a tile.
        block_p: Pairs of query and stretch per program of the second kernel.
        num_warps: Warps per program.
        num_stages: Tiles of rows that are loaded at once.
        slots: Programs that the device runs at once.
        block_s: Rows of a stretch; it divides block_n.
        is_copied: Whether Hopper's copy engine loads the tiles.
    """

    block_m: int
    block_n: int
    block_k: int
    block_p: int = 1
    num_warps: int = 8
    num_stages: int = 2
    slots: int = 1
    block_s: int = 16
    is_copied: bool = False


class Device(NamedTuple):
    """The properties of a GPU that tiles depend on.

    Attributes:
        memory: Bytes of shared memory available to one program.
        processors: Number of multiprocessors.
        has_copy_engine: Whether it has an engine that copies tiles (compute capability 9.0 and later).
    """

    memory: int
    processors: int
    has_copy_engine: bool


def gpu_tiling(batch: int, dim: int, group_size: int, dtype: torch.dtype, is_aligned: bool, device: Device) -> Tiling:
    """Tiles for GPUs from Ampere on; on Hopper, the fastest of about twenty variants that were measured at each size.

    With few queries, the pass is bound by reading the rows, so tiles have no more queries than the batch. With many
    queries, it is bound by the tensor cores and the bandwidth of the L2 cache. Tiles are 128 x 128. Where the copy
    engine loads them (Hopper), addresses take no registers: two programs of four warps fit on a multiprocessor, so that
    one multiplies while the other exponentiates. With many queries and wide rows, where the L2 cache is the limit,
    tiles are 128 x 256 there. A chunk has 128 bytes of each row, the widest swizzle. float32 operands are split in
    registers for the tensor cores, see `precision`: tiles are 64 x 128 on Hopper and 64 x 64 elsewhere, where larger
    ones spill registers. Rows that are not aligned to 16 bytes are loaded through registers, too.

    Args:
        batch: Number of queries.
        dim: Dimension of the rows.
        group_size: Rows of a group; a block has no more rows.
        dtype: Dtype of the rows.
        is_aligned: Whether rows start at multiples of 16 bytes and are contiguous.
        device: The GPU.
    """
    size = dtype.itemsize
    is_copied = is_aligned and device.has_copy_engine
    limit_m, limit_n, num_stages, num_warps, block_k = 128, 128, 4 if device.memory > 200_000 else 3, 8, 128 // size
    if size == 4:
        limit_m, limit_n, num_stages, num_warps = 64, 128 if is_copied else 64, 3 if is_aligned else 2, 4
    elif not is_aligned:
        num_stages, block_k = 2, 32
    elif is_copied and size == 2 and batch > MANY_QUERIES and dim > WIDE:
        limit_n = 256
    elif is_copied:
        num_stages, num_warps = (3, 4) if batch > 64 or batch <= 32 else (4, 4)
        block_k = 256 // size if batch <= 32 else block_k
    block_m, block_n = (
        min(max(power_of_two(number), MIN_BLOCK), limit) for number, limit in ((batch, limit_m), (group_size, limit_n))
    )
    block_k = max(min(block_k, power_of_two(dim)), 32 if size == 1 else 16)
    num_warps = num_warps if block_m * block_n > 64 * 128 else 4
    used = num_stages * (block_m + block_n) * block_k * size + RESERVED_MEMORY
    per_processor = max(1, min(8 // num_warps, device.memory // used))
    return Tiling(
        block_m,
        block_n,
        block_k,
        num_warps=num_warps,
        num_stages=num_stages,
        slots=device.processors * per_processor,
        block_s=min(STRETCH, block_n),
        is_copied=is_copied,
    )


def precision() -> str:
    """The precision of float32 products, as Triton names it.

    "tf32x3" adds three products of parts with 11 bits: high x high, high x low and low x high. The result is as exact
    as that of float32 arithmetic, which has no tensor cores and takes six times as long. "tf32" is the first of them
    alone, if `torch.set_float32_matmul_precision` allows it.
    """
    settings: Any = torch.backends.cuda.matmul
    return "tf32" if settings.fp32_precision == "tf32" else "tf32x3"


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below a number; 0 for 0."""
    return 1 << (number - 1).bit_length() if number else 0
