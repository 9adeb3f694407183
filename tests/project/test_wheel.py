"""Wheel and sdist have what they should; `make wheel` also installs and tests what was built."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import check_wheel
import negative_cache

ROOT = Path(__file__).parents[2]


def test_wheel_and_sdist(tmp_path):
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    built = subprocess.run(command, text=True, capture_output=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    check_wheel.main(tmp_path)


def test_one_version_everywhere():
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited is not None
    assert cited[1] == negative_cache.__version__
    assert f"## {negative_cache.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
