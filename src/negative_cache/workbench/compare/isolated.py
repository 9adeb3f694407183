"""A part of a comparison in a separate process, so that peak memory is measured per run."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from negative_cache.workbench.data import load_data
from negative_cache.workbench.evaluation import OnProgress
from negative_cache.workbench.suggestions import unfinished_folder
from negative_cache.workbench.training.config import RunConfig, RunFailedError
from negative_cache.workbench.training.driver import RunOptions, run
from negative_cache.workbench.training.record import RunRecord

EXIT_SECONDS = 30  # in which a process must exit after it has sent its record
REPORT_SECONDS = 0.2  # between two reports of progress


class Task(Protocol):
    """What a new process does. A task is pickled."""

    def __call__(self, on_progress: OnProgress) -> Any:
        """Do it, and return the result."""


@dataclass(frozen=True)
class Job:
    """A run.

    Attributes:
        config: The configuration.
        options: What to measure and keep.
    """

    config: RunConfig
    options: RunOptions

    def __call__(self, on_progress: OnProgress) -> RunRecord | None:
        """Train, or continue the run, and return its record."""
        data = load_data(self.config.data, self.config.data_options).with_dev()
        output = self.config.output
        return run(
            self.config,
            data,
            self.options,
            resume=Path(output).exists() or unfinished_folder(output).exists(),
            on_step=lambda step, steps, _: on_progress(step, steps),
        )


def run_isolated(name: str, task: Task, on_progress: OnProgress | None = None) -> Any:
    """Do a task in a new process, which is forked, if possible, from one that has imported the libraries.

    Args:
        name: Its name in messages.
        task: The task.
        on_progress: Called with (done, total).

    Returns:
        The result of the task.

    Raises:
        RunFailedError: The task failed, or its process was killed.
    """
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    if can_fork:
        context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_and_send, args=(sender, task), daemon=True)
    process.start()
    sender.close()
    try:
        while (message := receiver.recv())[0] == "progress":
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
        raise RunFailedError(f"The run {name} failed: {message[1]}")
    return message[1]


def _run_and_send(sender: Connection, task: Task) -> None:
    """In the new process: send ("progress", done, total) repeatedly, then ("result", result) or ("error", text)."""
    last = 0.0

    def on_progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() > last + REPORT_SECONDS or done == total:
            last = time.monotonic()
            sender.send(("progress", done, total))

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process terminates this one
    threading.Thread(target=_exit_with_the_parent, daemon=True).start()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        message: tuple[str, Any] = ("result", task(on_progress))
    except (ValueError, OSError, RunFailedError) as error:
        message = ("error", str(error))
    except Exception:
        message = ("error", traceback.format_exc())
    with contextlib.suppress(BrokenPipeError):  # the parent process was killed, so nothing reads the message
        sender.send(message)


def _exit_with_the_parent() -> None:
    """Exit when the parent process is killed. A call of `compare` that continues would write to the same folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
