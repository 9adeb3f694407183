"""Ranks that share a cache: all collectives, and a step in which each rank holds a part of the rows.

Imports `sampling/` and the layers below it. A step over ranks uses `many_ranks.ManyRanks`. This file sends nothing.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def shard_sizes(num_rows: int, num_ranks: int) -> list[int]:
    """Return the rows per rank: equal, or one more on the first ranks if the number of rows does not divide evenly."""
    return [num_rows // num_ranks + (rank < num_rows % num_ranks) for rank in range(num_ranks)]


def rank_seed(seed: int, rank: int) -> int:
    """Return a different seed for each rank; rank 0 gets `seed`."""
    # torch's CPU generator uses the low 32 bits; the odd constant changes them for every rank
    return (seed + rank * 0x9E3779B1) % 2**63


def world() -> dist.ProcessGroup | None:
    """The default process group; None if there is none."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def process_rank() -> int:
    """The rank of this process in the default process group; 0 without one."""
    return 0 if world() is None else dist.get_rank()


def separate(generator: torch.Generator, first_state: Tensor) -> None:
    """Give this process its own random numbers, because processes often start with equal seeds.

    Args:
        generator: It is left unchanged if it was used, seeded or loaded since it was created.
        first_state: Its state when it was created.
    """
    if process_rank() and torch.equal(generator.get_state(), first_state):
        generator.manual_seed(rank_seed(generator.initial_seed(), process_rank()))


def check_picklable(owner: object, group: dist.ProcessGroup | str | None, alternative: str) -> None:
    """Raise TypeError if an object that is being pickled has a process group; `alternative` names the default group."""
    if group is not None and not isinstance(group, str):
        raise TypeError(
            f"A {type(owner).__name__} with a process group cannot be pickled, because the group exists only in this "
            f"process. Use {alternative} for the default group, or save its state instead."
        )
