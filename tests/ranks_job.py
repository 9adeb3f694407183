"""The command line, except that the cache of the last checkpoint is kept next to the output.

Tests start this file with torchrun.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from negative_cache.workbench.cli import app
from negative_cache.workbench.training import driver

clear = driver._clear


def clear_but_keep_the_cache(folder: Path) -> None:
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    kept = folder.with_suffix(".cache")
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(newest / "negative_cache", kept)
    clear(folder)


if __name__ == "__main__":
    driver._clear = clear_but_keep_the_cache
    app()
