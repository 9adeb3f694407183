"""Peak memory of a call.

On a GPU, torch measures it. On Linux, the kernel does: VmHWM in /proc/self/status is the peak memory of the process,
and writing 5 to /proc/self/clear_refs resets it to the current use. The peak of a call is the difference of the two.
Free memory that the C library keeps counts as used and would hide what the call takes from it, so it is returned to
the system before. The kernel counts in batches of pages, so about 100 kB may be missing.
"""

from __future__ import annotations

import ctypes
import gc
import re
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.timing import synchronize

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Options of mallopt, and the size from which blocks are returned to the kernel when they are freed.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LEAST_BYTES = 65536


def peak_bytes(call: Callable[[], object], device: torch.device, base: int | None = None) -> int | None:
    """The peak memory of a call beyond `base` bytes, or beyond the memory in use before it.

    Returns:
        Bytes; None where neither a GPU nor Linux measures it.
    """
    before = used_bytes(device)
    if before is None:
        return None
    base = before if base is None else base
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - base
    try:
        CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return None
    call()
    return _status("VmHWM") - base


class OwnMemory:
    """Samples the memory of this process that is not pages of files, while it is active as a context manager.

    The system can drop pages of files that are mapped into memory, and reads them again when they are needed.

    Attributes:
        peak: Largest number of bytes that was seen; None where Linux does not measure it.
    """

    SECONDS = 0.1  # between two samples

    def __init__(self) -> None:
        self.peak: int | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> OwnMemory:
        if STATUS.exists():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak or 0, _status("RssAnon"))
            if self._is_over.wait(self.SECONDS):
                return


def used_bytes(device: torch.device) -> int | None:
    """Memory in use, after free memory has been returned to the system; None where it is unknown."""
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        return int(torch.cuda.memory_allocated(device))
    if not (STATUS.exists() and CLEAR.exists()):
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return _status("VmRSS")


def return_freed_memory_at_once() -> None:
    """Make the C library, if it can, return freed blocks at once: slower, but only memory in use is counted."""
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is not None:
        option(_MMAP_THRESHOLD, _LEAST_BYTES)
        option(_TRIM_THRESHOLD, _LEAST_BYTES)


def available_bytes(device: torch.device) -> float:
    """Available memory; infinite where it is unknown."""
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
