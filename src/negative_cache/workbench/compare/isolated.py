"""A run of a comparison in a separate process, so that peak memory is measured per run."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from negative_cache.workbench.data import load_data
from negative_cache.workbench.training.config import RunConfig, RunFailedError
from negative_cache.workbench.training.driver import RunOptions, run
from negative_cache.workbench.training.record import RunRecord

EXIT_SECONDS = 30  # in which a process must exit after it has sent its record
REPORT_SECONDS = 0.2  # between two reports of progress


@dataclass(frozen=True)
class Job:
    """The arguments of a run.

    Attributes:
        config: The configuration.
        options: What to measure and keep.
    """

    config: RunConfig
    options: RunOptions


def run_isolated(job: Job, on_progress: Callable[[int, int], None] | None = None) -> RunRecord:
    """Call `run` in a new process, which is forked, if possible, from one that has imported the libraries.

    Args:
        job: The arguments of `run`.
        on_progress: Called with (done, total) steps.

    Raises:
        RunFailedError: The run failed, or its process was killed.
    """
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    if can_fork:
        context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_and_send, args=(sender, job), daemon=True)
    process.start()
    sender.close()
    try:
        while (message := receiver.recv())[0] == "step":
            if on_progress is not None:
                on_progress(*message[1:])
        process.join(EXIT_SECONDS)
    except EOFError:
        process.join()
        message = ("error", f"its process exited with code {process.exitcode}")
    finally:
        process.kill()
        process.join()
        receiver.close()
    if message[0] == "error":
        raise RunFailedError(f"The run {job.config.output} failed: {message[1]}")
    record: RunRecord = message[1]
    return record


def _run_and_send(sender: Connection, job: Job) -> None:
    """In the new process: send ("step", step, steps) repeatedly, then ("record", record) or ("error", text)."""
    last = 0.0

    def on_step(step: int, steps: int, logs: dict[str, float]) -> None:
        nonlocal last
        if time.monotonic() > last + REPORT_SECONDS or step == steps:
            last = time.monotonic()
            sender.send(("step", step, steps))

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process terminates this one
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        data = load_data(job.config.data, job.config.data_options)
        message: tuple[str, Any] = ("record", run(job.config, data, job.options, resume=True, on_step=on_step))
    except (ValueError, OSError) as error:
        message = ("error", str(error))
    except Exception:
        message = ("error", traceback.format_exc())
    with contextlib.suppress(BrokenPipeError):  # the parent process was killed, so nothing reads the message
        sender.send(message)
