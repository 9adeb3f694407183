"""Two ranks on separate hosts, which only a virtual cable connects."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.two_hosts import CANNOT_RUN


def test_two_hosts_train_the_model_that_one_host_trains():
    command = [sys.executable, "-m", "benchmarks.two_hosts"]
    folder = Path(__file__).parents[2]
    ended = subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=280)
    if ended.returncode == CANNOT_RUN:
        pytest.skip(ended.stdout)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "equal, bit for bit" in ended.stdout
