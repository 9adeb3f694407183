"""The commit that results belong to."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str:
    """The commit of this source tree, with a mark if files have changed since; empty without git."""
    found = _git("rev-parse", "--short", "HEAD")
    return found and found + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str:
    """The output of a git command about the folder of this file; empty if it fails."""
    try:
        ended = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return ended.stdout.strip()
