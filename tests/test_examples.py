"""The examples run as their first lines say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_several_ranks_go_on_with_another_number_of_them(tmp_path: Path):
    def run(ranks: int, steps: int) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += [str(EXAMPLES / "several_ranks.py"), "--folder", str(tmp_path / "run")]
        command += ["--steps", str(steps), "--save-steps", "10"]
        return subprocess.run(command, check=True, text=True, capture_output=True, timeout=100).stdout

    assert "step 20: loss" in run(2, 20)
    assert "step 10" not in (second := run(1, 30))
    assert "step 30: loss" in second
