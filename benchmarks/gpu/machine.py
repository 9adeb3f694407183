"""What numbers depend on, beside the sizes."""

from __future__ import annotations

import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "sentence-transformers", "transformers")
# Dense products in bfloat16, from the makers' data sheets, in TFLOP/s; int8 has twice as many.
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
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


def commit() -> str:
    """The commit of the source tree, with a plus sign if it was changed since; empty without git."""
    try:
        said = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return said.stdout.strip() + ("+" if changes.stdout else "")
