"""How the fused pass is cut into tiles on a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

MIN_BLOCK, MAX_BLOCK = 16, 256  # the least that a matrix instruction takes; what fits the registers
MANY_QUERIES, WIDE = 1024, 512  # above which the L2 cache is the limit of a pass
RESERVED_MEMORY = 4096  # shared memory, in bytes, for what is not a tile
STRETCH = 32  # rows of a block that are told apart in draws: so many are scored again for each of them


class Tiling(NamedTuple):
    """How the work is cut; results do not depend on it, but for rounding and which draws the seed gives.

    Attributes:
        block_m, block_n, block_k: Queries, rows and columns of a tile.
        block_p: Pairs of query and stretch per program of the second kernel.
        num_warps, num_stages: Warps per program, and tiles of rows on their way at once.
        slots: Programs that the device runs at once.
        block_s: Rows of a stretch, which divides a block.
        is_copied: Whether Hopper's copy engine brings the tiles.
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
    """What of a GPU decides about tiles.

    Attributes:
        memory: Bytes of shared memory that one program may have.
        processors: Number of multiprocessors.
        has_copy_engine: Whether it can copy tiles by itself (compute capability 9.0 and later).
    """

    memory: int
    processors: int
    has_copy_engine: bool


def gpu_tiling(batch: int, dim: int, group_size: int, dtype: torch.dtype, is_aligned: bool, device: Device) -> Tiling:
    """Tiles for a GPU from Ampere on; on Hopper the fastest of some twenty ways that were measured at each size.

    With few queries the pass is bound by reading the rows, so tiles of queries are no larger than the batch. With many
    it is bound by the tensor cores and by what the L2 cache can feed them. Tiles are 128 x 128. Where the copy engine
    brings them (Hopper), no registers hold addresses: two programs of four warps fit a multiprocessor, and one
    multiplies while the other exponentiates. With many queries and wide rows, where the L2 cache is the limit, tiles
    are 128 x 256 there. A chunk has 128 bytes of each row, the widest swizzle. Full float32 products are made without
    tensor cores, in registers: smaller tiles. Rows that no 16 bytes can be read of at once pass through registers too.

    Args:
        group_size: Rows of a group; a block of rows has no more.
        is_aligned: Whether rows start at multiples of 16 bytes and are contiguous.
    """
    size, is_exact = dtype.itemsize, dtype == torch.float32 and precision() == "ieee"
    is_copied = is_aligned and device.has_copy_engine and not is_exact
    limit_m, limit_n, num_stages, num_warps, block_k = 128, 128, 4 if device.memory > 200_000 else 3, 8, 128 // size
    if is_exact:
        limit_m, limit_n, num_stages, block_k = 64, 64, 2, 16
    elif not is_aligned:
        num_stages, block_k = 2, 16 if size == 4 else 32
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
    slots = device.processors * per_processor
    return Tiling(block_m, block_n, block_k, 1, num_warps, num_stages, slots, min(STRETCH, block_n), is_copied)


def precision() -> str:
    """How float32 products may be rounded, in Triton's words."""
    settings: Any = torch.backends.cuda.matmul
    return "tf32" if settings.fp32_precision == "tf32" else "ieee"


def power_of_two(number: int) -> int:
    """The next one; 0 for 0."""
    return 1 << (number - 1).bit_length() if number else 0
