"""A measurement in its own process, with limits of time and memory.

Where the system supports it, processes are forked from a server that has only imported libraries.
"""

from __future__ import annotations

import multiprocessing
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

NO_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "MemoryError")

Measurement = Callable[..., dict[str, float | None]]


class LimitError(Exception):
    """The measurement reached its limit of time or memory."""


def run(
    function: Measurement,
    *arguments: object,
    seconds: float | None = None,
    num_bytes: float | None = None,
) -> dict[str, float | None]:
    """Call a function in a new process.

    Args:
        function: A module's function.
        arguments: Its arguments, which are pickled.
        seconds: Time limit.
        num_bytes: Limit of the memory that the process allocates; has an effect on Linux without a GPU.

    Raises:
        LimitError: It took more time or memory than allowed.
        RuntimeError: It failed.
    """
    context = new_context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, arguments, num_bytes))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise LimitError(f"more than {seconds:g} s")
        result, error = receiver.recv()
    except EOFError:
        process.join()
        result, error = None, f"the process ended with {process.exitcode}"
        if num_bytes is not None and process.exitcode < 0:  # C++ aborts when an allocation fails
            raise LimitError(f"more than {num_bytes / 1e9:.1f} GB, or crashed ({process.exitcode})") from None
    else:
        process.join()
    finally:
        process.kill()
        process.join()
        receiver.close()
    if error is None:
        found: dict[str, float | None] = result
        return found
    if num_bytes is not None and any(text in error for text in NO_MEMORY):
        raise LimitError(f"more than {num_bytes / 1e9:.1f} GB")
    raise RuntimeError(f"{function.__module__}.{function.__name__} failed: {error}")


def new_context() -> Any:
    """How to start processes: forked from a server without a GPU context if the system can do that, else spawned."""
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    return multiprocessing.get_context("forkserver" if can_fork else "spawn")


def _call(
    sender: Connection,
    function: Measurement,
    arguments: tuple[object, ...],
    num_bytes: float | None,
) -> None:
    """Runs in the new process: send (result, None) or (None, traceback)."""
    message: tuple[dict[str, float | None] | None, str | None]
    try:
        if num_bytes is not None:
            _limit_memory(int(num_bytes))
        message = function(*arguments), None
    except Exception:
        message = None, traceback.format_exc()
    sender.send(message)


def _limit_memory(num_bytes: int) -> None:
    import torch

    if sys.platform == "linux" and not torch.cuda.is_available():
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))
