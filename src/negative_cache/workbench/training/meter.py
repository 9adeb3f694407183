"""The costs of training: seconds, encoded documents, memory."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.sentence_transformer.losses import (
    CachedGISTEmbedLoss,
    CachedMultipleNegativesRankingLoss,
    GISTEmbedLoss,
)
from torch import nn


class Meter:
    """Measures the training time and counts the documents that the model encodes.

    All inputs of the model except the queries count as documents. Gradient caching encodes queries and documents twice.
    What the guide of a loss encodes counts, too.

    Args:
        model: The model to train.
        loss: The loss of the model. Its first column of inputs is the queries.
    """

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        self._seconds = 0.0
        self._started: float | None = None
        self._num_inputs = 0
        self._num_queries = 0
        self._passes = 2 if isinstance(loss, (CachedMultipleNegativesRankingLoss, CachedGISTEmbedLoss)) else 1
        model.register_forward_pre_hook(self._count_inputs)
        if isinstance(loss, (GISTEmbedLoss, CachedGISTEmbedLoss)):
            self._passes += 1
            loss.guide.register_forward_pre_hook(self._count_inputs)
        loss.register_forward_pre_hook(self._count_queries)

    @property
    def seconds(self) -> float:
        """Seconds for which the meter was running."""
        return self._seconds + (0.0 if self._started is None else time.perf_counter() - self._started)

    @property
    def documents(self) -> int:
        """Documents that were encoded while the meter was running."""
        return self._num_inputs - self._passes * self._num_queries

    def start(self) -> None:
        """Start the meter, if it is not running."""
        if self._started is None:
            self._started = time.perf_counter()

    def stop(self) -> None:
        """Stop the meter."""
        self._seconds, self._started = self.seconds, None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Pause the meter inside this context."""
        is_running = self._started is not None
        self.stop()
        try:
            yield
        finally:
            if is_running:
                self.start()

    def add(self, seconds: float, documents: int) -> None:
        """Add a cost that was measured elsewhere."""
        self._seconds += seconds
        self._num_inputs += documents

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint must contain."""
        return {"seconds": self.seconds, "inputs": self._num_inputs, "queries": self._num_queries}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self._seconds, self._num_inputs, self._num_queries = state["seconds"], state["inputs"], state["queries"]

    def _count_inputs(self, model: nn.Module, arguments: tuple[Any, ...]) -> None:
        if self._started is not None:
            self._num_inputs += _num_texts(arguments[0])

    def _count_queries(self, loss: nn.Module, arguments: tuple[Any, ...]) -> None:
        if self._started is not None:
            self._num_queries += _num_texts(next(iter(arguments[0])))


def _num_texts(features: dict[str, Any]) -> int:
    """The number of texts in a model's input."""
    return len(features["offsets"] if "offsets" in features else features["input_ids"])


def peak_memory_bytes() -> int:
    """Peak allocated GPU memory if there is a GPU, otherwise peak memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii"))):
        return int(found[1]) * 1024  # ru_maxrss is never below the peak of the process that started this one
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
