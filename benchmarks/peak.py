"""Peak memory of a call.

On a GPU torch counts it. On Linux the kernel does: VmHWM of /proc/self/status is the most that the process ever had in
memory; writing 5 to /proc/self/clear_refs sets it back to what it has now. What the call adds to that is its peak.
Free memory that the C library has kept counts as in use, and would hide what the call takes from it: it is given back
before. The kernel counts in batches of pages, so that some 100 kB may be missing.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.timing import synchronise

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Numbers of mallopt, and the size from which blocks come from the kernel and go back there when they are freed.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LEAST_BYTES = 65536


def peak_bytes(call: Callable[[], object], device: torch.device, base: int | None = None) -> int | None:
    """The most memory that a call has in use beyond `base` bytes, or beyond what is in use before it.

    Returns:
        Bytes; None where neither a GPU nor Linux counts them.
    """
    before = used_bytes(device)
    if before is None:
        return None
    base = before if base is None else base
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronise(device)
        return int(torch.cuda.max_memory_allocated(device)) - base
    try:
        CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return None
    call()
    return _status("VmHWM") - base


def used_bytes(device: torch.device) -> int | None:
    """Memory in use, after everything free has been given back; None where it is unknown."""
    gc.collect()
    if device.type == "cuda":
        synchronise(device)
        return int(torch.cuda.memory_allocated(device))
    if not (STATUS.exists() and CLEAR.exists()):
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return _status("VmRSS")


def give_memory_back_at_once() -> None:
    """From now on no freed block is kept, which is slower, but shows what is in use; where the C library can."""
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is not None:
        option(_MMAP_THRESHOLD, _LEAST_BYTES)
        option(_TRIM_THRESHOLD, _LEAST_BYTES)


def available_bytes(device: torch.device) -> float:
    """Memory that could be taken; infinite where it is unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    return _kilobytes(info, "MemAvailable") if info.exists() else float("inf")


def _status(name: str) -> int:
    return _kilobytes(STATUS, name)


def _kilobytes(path: Path, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None, f"{path} has no {name}"
    return 1024 * int(found[1])
