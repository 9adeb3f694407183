"""The processes of a run: those that `torchrun` or `accelerate launch` started, or only this one."""

from __future__ import annotations

import functools
import logging
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from negative_cache.distributed import process_rank, world
from negative_cache.distributed.collectives import Ranks

logger = logging.getLogger("negative_cache")


def start() -> int:
    """Initialize the process group, if there are several processes: NCCL with GPUs, gloo without.

    Returns:
        The rank of this process.
    """
    from accelerate import PartialState

    _warn_of_shared_store()
    PartialState(cpu=not torch.cuda.is_available())
    return process_rank()


def count() -> int:
    """The number of processes."""
    return Ranks(world()).size


def wait() -> None:
    """Wait for all processes, however long one of them evaluates; raises if one has exited."""
    if count() > 1:
        Ranks(_patient_group()).share_integers([0], torch.device("cpu"))


def of_first(flag: bool) -> bool:
    """The flag of rank 0, on all ranks."""
    if count() == 1:
        return flag
    return bool(Ranks(_patient_group()).share_integers([flag], torch.device("cpu"))[0][0])


def _warn_of_shared_store() -> None:
    """Warn that torchrun restarts processes with a store that holds old values, see pytorch/pytorch#135712."""
    can_restart = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    if can_restart and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("RANK") == "0":
        logger.warning(
            "After a failure, processes that torchrun restarts may not connect. Set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 when you start it with --max-restarts."
        )


@functools.cache
def _patient_group() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))
