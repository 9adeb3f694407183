"""How the fused pass is cut into tiles on a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

MIN_BLOCK, MAX_BLOCK = 16, 128  # the least that a matrix instruction takes; what fits the registers
RESERVED_MEMORY = 4096  # shared memory, in bytes, for what is not a tile


class Tiling(NamedTuple):
    """How the work is cut; results do not depend on it, but for rounding and which draws the seed gives.

    Attributes:
        block_m, block_n, block_k: Queries, rows and columns of a tile.
        block_p: Pairs of query and block per program of the second kernel.
        num_warps, num_stages: Warps per program, and tiles of rows on their way at once.
        slots: Programs that the device runs at once.
    """

    block_m: int
    block_n: int
    block_k: int
    block_p: int = 1
    num_warps: int = 8
    num_stages: int = 2
    slots: int = 1


def gpu_tiling(
    batch: int, dim: int, group_size: int, dtype: torch.dtype, is_aligned: bool, memory: int, processors: int
) -> Tiling:
    """Tiles for a GPU from Ampere on.

    Two regimes. With few queries the pass is bound by reading the rows, so tiles of queries are no larger than the
    batch. With many it is bound by the tensor cores and by what the L2 cache can feed them: tiles of 128 x 128, eight
    warps (64 accumulators per thread, no spills), and, where the memory on the chip has room for it (Hopper's up to
    256 columns of 16 bits), queries that are read once and two full-width tiles of rows. Else chunks of 128 bytes,
    the widest swizzle, three or four on their way. Full float32 products are made without tensor cores, in registers:
    smaller tiles. Rows that no 16 bytes can be read of at once pass through registers too.

    Args:
        group_size: Rows of a group; a block of rows has no more.
        is_aligned: Whether rows start at multiples of 16 bytes and are contiguous.
        memory: Bytes of shared memory that one program may have.
        processors: Number of multiprocessors.
    """
    size, is_exact = dtype.itemsize, dtype == torch.float32 and precision() == "ieee"
    limit = 64 if is_exact else MAX_BLOCK
    block_m, block_n = (min(max(power_of_two(number), MIN_BLOCK), limit) for number in (batch, group_size))
    width = power_of_two(dim)
    resident = (block_m + 2 * block_n) * width * size
    if is_exact or not is_aligned:
        block_k, num_stages = (16 if size == 4 else 32), 2
    elif width * size <= 512 and resident + RESERVED_MEMORY <= memory:
        block_k, num_stages = width, 2
    else:
        block_k, num_stages = 128 // size, (4 if memory > 200_000 else 3)
    block_k = max(min(block_k, width), 32 if size == 1 else 16)
    num_warps = 8 if block_m * block_n > 64 * 128 else 4
    used = resident if block_k == width else num_stages * (block_m + block_n) * block_k * size
    per_processor = max(1, min(8 // num_warps, memory // (used + RESERVED_MEMORY)))
    return Tiling(block_m, block_n, block_k, 1, num_warps, num_stages, processors * per_processor)


def precision() -> str:
    """How float32 products may be rounded, in Triton's words."""
    settings: Any = torch.backends.cuda.matmul
    return "tf32" if settings.fp32_precision == "tf32" else "ieee"


def power_of_two(number: int) -> int:
    """The next one; 0 for 0."""
    return 1 << (number - 1).bit_length() if number else 0
