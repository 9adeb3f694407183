"""The processes of a run that `torchrun` or `accelerate launch` started; alone without them."""

from __future__ import annotations

import functools
import logging
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from negative_cache.distributed.ranks import Ranks, process_rank, world

logger = logging.getLogger("negative_cache")


def start() -> int:
    """Join the other processes, however they were launched: NCCL with GPUs, gloo without.

    Returns:
        The rank of this process, 0 if it is alone.
    """
    from accelerate import PartialState

    _warn_of_shared_store()
    PartialState(cpu=not torch.cuda.is_available())
    return process_rank()


def count() -> int:
    """How many processes there are."""
    return Ranks(world()).size


def wait() -> None:
    """Until all processes are here, however long one of them evaluates; raises if one of them is gone."""
    if count() > 1:
        dist.barrier(group=_patient_group())


def _warn_of_shared_store() -> None:
    """torchrun restarts processes with a store that has what the last ones wrote; see pytorch/pytorch#135712."""
    can_restart = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    if can_restart and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("RANK") == "0":
        logger.warning(
            "After a failure torchrun's restart may not connect: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where you "
            "start it with --max-restarts."
        )


@functools.cache
def _patient_group() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))
