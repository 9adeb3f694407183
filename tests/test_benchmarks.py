"""The benchmarks run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def test_ranks():
    command = [sys.executable, "-m", "benchmarks.ranks", "--ranks", "1", "2", "--batch-size", "4"]
    command += ["--cache-size", "256", "--dim", "16", "--length", "8", "--repeats", "2"]
    folder = Path(__file__).parents[1]
    ended = subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=100, check=True)
    rows = [line.split() for line in ended.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert [row[:2] for row in rows] == [["1", "4"], ["1", "8"], ["2", "4"]]
    integers, queries = (float(number) for number in rows[2][3:5])
    assert (integers, queries) == (0.1, 0.3)  # 16 integers; 4 queries of 16 floats, and a number for each draw


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_features(tmp_path):
    command = [sys.executable, "-m", "benchmarks.features", "--items", "512", "--length", "32", "--batch-size", "8"]
    command += ["--repeats", "3", "--memory-limit-mb", "0", "--folder", str(tmp_path)]
    folder = Path(__file__).parents[1]
    ended = subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=100, check=True)
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("int32 [512, 32]: 0.1 MB")
    assert [line[:16].strip() for line in lines[3:]] == ["file, limited", "memory", "ratio"]
    assert all(float(number) >= 0 for line in lines[3:] for number in line[16:].split())
