"""The machine, the versions and the commit that results depend on."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.commit import commit
from benchmarks.peak import peak_bytes

PACKAGES = ("torch", "triton", "sentence-transformers", "transformers")
# Dense bfloat16 products in TFLOP/s, from the manufacturer's data sheets; int8 products are twice as fast.
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
MODEL, DATA = "minilm", "data"  # folders of the prepared files
COMMIT = "commit.txt"  # one of the prepared files, for a source tree that is copied without its history


def describe(prepared: Path) -> dict[str, str]:
    """Card, versions and commit; also the commit of the prepared files, if it is different."""
    has_gpu = torch.cuda.is_available()
    found = {"device": torch.cuda.get_device_name() if has_gpu else "cpu", "cores": str(os.cpu_count())}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    if has_gpu:
        found["cuda"] = str(torch.version.cuda)
    file, found["commit"] = prepared / COMMIT, commit() or "unknown"
    prepared_at = file.read_text(encoding="utf-8").strip() if file.exists() else found["commit"]
    if found["commit"] == "unknown":
        found["commit"] = prepared_at
    elif found["commit"] != prepared_at:  # a source tree may be copied with an old history
        found["commit"] += f", prepared at {prepared_at}"
    return found


def peak_of(device: str, dtype: str) -> float | None:
    """TFLOP/s of dense products; None if unknown."""
    known = next((peak for name, peak in PEAKS.items() if name in device), None)
    if known is None or dtype == "float32":
        return None
    return 2 * known if dtype == "int8" else known


def peak_megabytes(call: Callable[[], object], device: torch.device) -> float | None:
    """Peak GPU memory of a call, beyond the memory in use before it; None on a CPU."""
    peak = peak_bytes(call, device) if device.type == "cuda" else None
    return None if peak is None else round(peak / 1e6, 2)
