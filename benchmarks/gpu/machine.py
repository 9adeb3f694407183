"""What numbers depend on, beside the sizes."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.commit import commit
from benchmarks.peak import peak_bytes

PACKAGES = ("torch", "triton", "sentence-transformers", "transformers")
# Dense products in bfloat16, from the makers' data sheets, in TFLOP/s; int8 has twice as many.
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
MODEL, DATA = "minilm", "data"  # what is prepared
COMMIT = "commit.txt"  # among the prepared files, for a source tree that travels without its history


def describe(prepared: Path) -> dict[str, str]:
    """Card, versions and commit; that of the prepared files too, where it is another one."""
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
    said = file.read_text(encoding="utf-8").strip() if file.exists() else found["commit"]
    if found["commit"] == "unknown":
        found["commit"] = said
    elif found["commit"] != said:  # a source tree may travel with an old history
        found["commit"] += f", prepared at {said}"
    return found


def peak_of(device: str, dtype: str) -> float | None:
    """TFLOP/s of dense products, None where they are not known."""
    known = next((peak for name, peak in PEAKS.items() if name in device), None)
    if known is None or dtype == "float32":
        return None
    return 2 * known if dtype == "int8" else known


def peak_megabytes(call: Callable[[], object], device: torch.device) -> float | None:
    """Memory of a GPU that a call takes beyond what is in use; None on a CPU."""
    peak = peak_bytes(call, device) if device.type == "cuda" else None
    return None if peak is None else round(peak / 1e6, 2)
