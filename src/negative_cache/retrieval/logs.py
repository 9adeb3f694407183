"""What the library says once per process."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger("negative_cache")

_said: set[str] = set()


def say_once(message: str) -> None:
    """Log a message at level INFO, unless it was logged before, or the code is being compiled."""
    if torch.compiler.is_compiling():
        return
    if message not in _said:
        _said.add(message)
        logger.info(message)
