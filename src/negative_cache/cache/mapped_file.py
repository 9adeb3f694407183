"""Tensors in files of a memory map: as large as the disk allows, whatever the memory."""

from __future__ import annotations

import errno
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Pages stay mapped after a read or write, and the OS maps up to 64 kB around each that is touched. Beyond this many
# bytes they are let go: they leave the process's resident memory, not the OS's cache.
_AROUND, _MOST_RESIDENT = 1 << 16, 1 << 28
_COPIED_AT_ONCE = 1 << 24
_CAN_ADVISE = hasattr(mmap, "MADV_DONTNEED") and hasattr(mmap, "MADV_WILLNEED")


def check_folder(folder: str | Path) -> None:
    """Raise ValueError unless files can be made in the folder."""
    if not os.path.isdir(folder):
        raise ValueError(f"`feature_folder` is {str(folder)!r}, which is no folder. Make it first, on a local disk.")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"`feature_folder` is {str(folder)!r}, a folder in which this process may not write.")


def check_space(folder: str | Path, num_bytes: int) -> None:
    """Raise OSError unless the folder's disk has room for that much; a map whose disk is full kills the process."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise OSError(
            errno.ENOSPC,
            f"The features may grow to {num_bytes / 1e9:.1f} GB, but the disk has {free / 1e9:.1f} GB free",
            str(folder),
        )


class MappedFile:
    """A tensor of zeros in a file without a name: sparse until it is written, and gone with the process.

    Args:
        folder: Where the file is.
        shape: `[num_rows, ...]`.
        dtype: dtype of the values.

    Attributes:
        tensor: The whole file as a tensor of this shape.

    Raises:
        OSError: The folder does not exist, or its disk has not enough room.
    """

    def __init__(self, folder: str | Path, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.folder = Path(folder)
        self._row_bytes = math.prod(shape[1:]) * dtype.itemsize
        num_bytes = shape[0] * self._row_bytes
        check_space(folder, num_bytes)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(max(num_bytes, 1))
            self._map = mmap.mmap(file.fileno(), max(num_bytes, 1))
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self.tensor: Tensor = self._bytes[:num_bytes].view(dtype).view(*shape)
        self._num_touched = 0

    def expect(self, rows: Tensor) -> None:
        """Before `rows [n]` are read or written: have the OS read them all at once, not one after the other."""
        if not _CAN_ADVISE or self._row_bytes == 0:
            return
        self._num_touched += len(rows) * max(self._row_bytes, _AROUND)
        if self._num_touched > _MOST_RESIDENT:
            self.release()
        for row in rows.tolist():
            start = row * self._row_bytes
            first = start - start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, first, start + self._row_bytes - first)

    def release(self) -> None:
        """Give the memory of all pages back; what is in them stays."""
        if _CAN_ADVISE:
            self._map.madvise(mmap.MADV_DONTNEED)
        self._num_touched = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> MappedFile:
        """A file of its own with the same content, sparse where this one is zero."""
        copied = MappedFile(self.folder, self.tensor.shape, self.tensor.dtype)
        parts = zip(*(torch.split(file._bytes, _COPIED_AT_ONCE) for file in (copied, self)), strict=True)
        for part, source in parts:
            if bool(source.any()):
                part.copy_(source)
            self.release()
            copied.release()
        return copied
