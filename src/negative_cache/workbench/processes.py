"""The processes of a run that `torchrun` or `accelerate launch` started; alone without them."""

from __future__ import annotations

import functools
import os
from datetime import timedelta

import torch
import torch.distributed as dist


def start() -> int:
    """Join the other processes, if there are any: NCCL with GPUs, gloo without.

    Returns:
        The rank of this process, 0 if it is alone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
    return rank()


def rank() -> int:
    """The rank of this process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_restart() -> bool:
    """Whether torchrun started this process anew after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def wait() -> None:
    """Until all processes are here, however long one of them evaluates; raises if one of them is gone."""
    if count() > 1:
        dist.barrier(group=_patient_group())


@functools.cache
def _patient_group() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))
