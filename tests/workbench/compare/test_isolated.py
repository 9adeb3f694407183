"""Parts of a comparison in separate processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from negative_cache.workbench.compare.isolated import run_isolated
from negative_cache.workbench.evaluation import OnProgress

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Wait:
    """Writes the id of its process to a file, and waits without a report."""

    path: Path

    def __call__(self, on_progress: OnProgress) -> None:
        self.path.with_suffix(".tmp").write_text(str(os.getpid()))
        self.path.with_suffix(".tmp").rename(self.path)
        time.sleep(300)


def wait(path: Path) -> None:
    run_isolated("a wait", Wait(path))


def is_alive(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_ends_when_its_parent_is_killed(tmp_path: Path):
    path = tmp_path / "process"
    script = f"import test_isolated, pathlib; test_isolated.wait(pathlib.Path({str(path)!r}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment)
    try:
        wait_until(path.exists)
        child = int(path.read_text())
        assert is_alive(child)
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not is_alive(child), seconds=20)
