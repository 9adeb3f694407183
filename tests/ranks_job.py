"""The command line, but the last checkpoint's cache is kept beside the output: started by torchrun in a test."""

from __future__ import annotations

import shutil
from pathlib import Path

from negative_cache.workbench import training
from negative_cache.workbench.cli import app

clear = training._clear


def clear_but_keep_the_cache(folder: Path) -> None:
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    kept = folder.with_suffix(".cache")
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(newest / "negative_cache", kept)
    clear(folder)


if __name__ == "__main__":
    training._clear = clear_but_keep_the_cache
    app()
