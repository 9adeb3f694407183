"""What the library says once per process."""

from __future__ import annotations

import logging

logger = logging.getLogger("negative_cache")

_said: set[str] = set()


def say_once(message: str) -> None:
    """Log a message at level INFO, unless it was logged before."""
    if message not in _said:
        _said.add(message)
        logger.info(message)
