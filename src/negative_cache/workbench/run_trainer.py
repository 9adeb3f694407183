"""The trainer of a run: sentence-transformers' own, which also logs time and memory and says how it goes on."""

from __future__ import annotations

import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from negative_cache.checkpoint import CheckpointError
from negative_cache.integrations.trainer import NegativeCacheTrainer
from negative_cache.workbench.config import RunFailedError
from negative_cache.workbench.memory_bank import MemoryBankLoss

QUEUE = "memory_bank.safetensors"

Progress = Callable[[int, int, dict[str, float]], None]


def peak_memory_bytes() -> int:
    """Most memory that was in use: of the GPU's allocator if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii"))):
        return int(found[1]) * 1024  # ru_maxrss would be at least what the process that started this one had
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class RunTrainer(NegativeCacheTrainer):
    """Adds time and memory to what is logged, and a memory bank's queue to checkpoints."""

    resumed_from = 0
    started = seconds = 0.0

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Also the seconds of training and the peak memory so far."""
        if "loss" in logs:
            logs["seconds"] = round(self._seconds_before() + time.perf_counter() - self.started, 3)
            logs["peak_memory_bytes"] = peak_memory_bytes()
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As everywhere. Its time is not that of training."""
        began = time.perf_counter()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.started += time.perf_counter() - began

    def _seconds_before(self) -> float:
        """Those of the processes that this one goes on from, at their last log before the checkpoint."""
        if not self.resumed_from:
            return 0.0
        rows = (row for row in reversed(self.state.log_history) if row["step"] <= self.resumed_from)
        return next((row["seconds"] for row in rows if "seconds" in row), 0.0)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if isinstance(self.loss, MemoryBankLoss):
            save_file(self.loss.queue_state(), Path(output_dir) / QUEUE)

    def _restore(self, checkpoint_path: str) -> None:
        super()._restore(checkpoint_path)
        if isinstance(self.loss, MemoryBankLoss):
            self.loss.load_queue_state(load_file(Path(checkpoint_path) / QUEUE))


class ProgressCallback(TrainerCallback):
    """Reports steps and the latest logs."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.latest: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        self.latest.update(logs or {})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress(state.global_step, state.max_steps, self.latest)


class _LogTheLastStep(TrainerCallback):
    """However often the others are logged."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_log |= state.global_step >= state.max_steps


class _StopBetweenSteps(TrainerCallback):
    """While it is entered, Ctrl-C ends training after the step that is under way; a second one at once.

    An interrupt at any moment may be taken for a failure of what it meets, such as the writing of a checkpoint, or get
    lost in a callback from C.
    """

    def __init__(self) -> None:
        self._is_asked = False
        self._is_ours = False

    def __enter__(self) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        self._is_ours = is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._is_ours:
            signal.signal(signal.SIGINT, self._ask)

    def __exit__(self, *_: object) -> None:
        if self._is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _ask(self, *_: object) -> None:
        if self._is_asked:
            raise KeyboardInterrupt
        self._is_asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._is_asked:
            raise KeyboardInterrupt


def train_to_the_end(trainer: RunTrainer, checkpoint: str | None = None) -> None:
    """Train, and note the seconds without evaluations.

    Raises:
        RunFailedError: Values that are not finite, or batches that the loss refuses.
    """
    trainer.started = time.perf_counter()
    stop = _StopBetweenSteps()
    trainer.add_callback(stop)
    trainer.add_callback(_LogTheLastStep())
    try:
        with stop:
            trainer.train(resume_from_checkpoint=checkpoint)
    except CheckpointError:
        raise
    except ValueError as error:
        raise RunFailedError(f"Training failed after step {trainer.state.global_step}: {error}") from error
    trainer.seconds = time.perf_counter() - trainer.started
