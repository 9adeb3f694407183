"""The commit that numbers are of."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str:
    """The commit of this source tree, marked if it was changed since; empty without git."""
    found = _git("rev-parse", "--short", "HEAD")
    return found and found + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str:
    """What git says about the folder of this file; empty without git."""
    try:
        ended = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return ended.stdout.strip()
