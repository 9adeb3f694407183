"""Copies between host memory and an accelerator through page-locked memory, asynchronous where that is safe."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

logger = logging.getLogger("negative_cache")


def is_staged(first: torch.device, second: torch.device) -> bool:
    """Whether copies between two devices go through page-locked host memory."""
    return {first.type, second.type} == {"cpu", "cuda"}


def new_staging(like: Tensor) -> Tensor:
    """Page-locked host memory for a copy. torch does not reuse it until all copies from and to it have finished."""
    return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=True)


def wait_for(device: torch.device) -> None:
    """Synchronize the host with the current stream of an accelerator."""
    torch.cuda.current_stream(device).synchronize()


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device. Copies from host memory to an accelerator are asynchronous, ordered by its stream."""
    if value.device.type == "cpu" and is_staged(value.device, device):
        return new_staging(value).copy_(value).to(device, non_blocking=True)
    return value.to(device)


def bring(values: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors to a device. Copies to host memory are complete on return, after one synchronization per source."""
    if device.type != "cpu":
        return [to_device(value, device) for value in values]
    staged = [value for value in values if is_staged(value.device, device)]
    copies = [new_staging(value).copy_(value, non_blocking=True) for value in staged]
    for source in {value.device for value in staged}:
        wait_for(source)
    arrived = iter(copies)
    return [next(arrived) if is_staged(value.device, device) else value.to(device) for value in values]


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device, reader: torch.device) -> Tensor:
    """Zeros on a device; page-locked if they are in host memory, `reader` is a GPU and enough memory is free."""
    if device.type == "cpu" and is_staged(device, reader):
        try:
            return torch.zeros(shape, dtype=dtype, device="cpu", pin_memory=True)
        except RuntimeError as error:
            logger.info(f"Features of shape {list(shape)} are kept in memory that is not page-locked: {error}")
    return torch.zeros(shape, dtype=dtype, device=device)
