"""`works`: the tests marked `gpu`, one row each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.gpu.results import Results

PROCESSES = 8
PLUGIN, VARIABLE = "benchmarks.gpu.pytest_rows", "GPU_BENCHMARK_ROWS"


def run(results: Results, prepared: Path, device: torch.device, seconds: float, is_rehearsal: bool) -> None:
    """Run them; raises if one fails."""
    processes = min(PROCESSES, os.cpu_count() or 1)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", str(processes), "-p", "no:cacheprovider"]
    command += ["-p", PLUGIN, "--show-capture=no", "--tb=short", "tests"]
    ended = subprocess.run(command, env={**os.environ, VARIABLE: str(results.path)})
    if ended.returncode:
        raise RuntimeError(f"pytest ended with {ended.returncode}.")
