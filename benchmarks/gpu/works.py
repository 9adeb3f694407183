"""`works`: the tests marked `gpu`, one row each."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.gpu.results import Results

PROCESSES = 14
PLUGIN, VARIABLE = "benchmarks.gpu.pytest_rows", "GPU_BENCHMARK_ROWS"


def run(results: Results, prepared: Path, device: torch.device, seconds: float, is_rehearsal: bool) -> None:
    """Run the tests; raises RuntimeError if one fails."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "--strict-markers", "-m", "gpu", "-p", PLUGIN]
    command += ["-p", "no:cacheprovider", "--show-capture=no", "--tb=short", "tests"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(PROCESSES, os.cpu_count() or 1)), "--dist", "worksteal"]
    ended = subprocess.run(command, env={**os.environ, VARIABLE: str(results.path)})
    if ended.returncode:
        raise RuntimeError(f"pytest ended with {ended.returncode}.")
