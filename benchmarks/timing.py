"""Times of calls that take turns, so that a slow moment of the machine affects all of them."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

Call = TypeVar("Call", bound=Callable[[], object])


def median_ms(
    calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, label: str
) -> dict[str, float]:
    """Median milliseconds of each call over rounds A B C A B C ..., after a warm-up round.

    Args:
        calls: The calls, by name.
        repeats: Number of rounds.
        device: Synchronized before and after each call.
        label: Shown on stderr while it runs.

    Returns:
        The times, without calls that run out of GPU memory.
    """
    progress(f"{label}: warming up")
    able = {name: call for name, call in calls.items() if _fits(call, device)}
    times: dict[str, list[float]] = {name: [] for name in able}
    for number in range(repeats):
        progress(f"{label}: round {number + 1} of {repeats}")
        for name, call in able.items():
            times[name].append(seconds(call, device))
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def medians_in_turns(
    calls: Mapping[str, Call], measure: Callable[[Call], float], rounds: int, least_rounds: int, *, most_ms: float
) -> dict[str, float]:
    """Median of the measured times of each call, in rounds in which they take turns.

    Args:
        calls: The calls, by name.
        measure: Runs a call, and returns its milliseconds.
        rounds: Highest number of rounds.
        least_rounds: Lowest number of rounds of each call.
        most_ms: Total time after which a call gets no further rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name, call in calls.items():
            if number < least_rounds or sum(times[name]) < most_ms:
                times[name].append(measure(call))
    return {name: statistics.median(values) for name, values in times.items()}


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of one call, until the device has finished it."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def progress(message: str) -> None:
    """Print a line to stderr; on a terminal, the next one replaces it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)
    else:
        print(message, file=sys.stderr, flush=True)


def _fits(call: Callable[[], object], device: torch.device) -> bool:
    try:
        seconds(call, device)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True
