"""Which folders have a run or a comparison to report, checked without the libraries that take seconds to import."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from negative_cache.workbench.evaluation.defaults import COMPARISON
from negative_cache.workbench.model_names import is_model
from negative_cache.workbench.suggestions import UNFINISHED, did_you_mean_path, unfinished_folder
from negative_cache.workbench.training.config import RunError
from negative_cache.workbench.training.record import RECORD


def check_folders(folders: Sequence[Path]) -> None:
    """Raise RunError if a folder has neither a run nor a comparison, or is given twice."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise RunError(f"A folder is given twice: {', '.join(map(str, folders))}. Give each folder once.")
    for folder in folders:
        if not has_results(folder):
            raise RunError(_no_results(folder))


def has_results(folder: Path) -> bool:
    """Whether a folder has a finished run or a comparison."""
    return (folder / RECORD).is_file() or (folder / COMPARISON).is_file()


def _no_results(folder: Path) -> str:
    """Why there is nothing to report, and what to do."""
    if is_model(folder):
        evaluate = shlex.join(["negative-cache", "evaluate", "--model", str(folder), "--data", "DATA"])
        return f"{folder} holds a model, but no run of negative-cache train ({RECORD}). Measure it with: {evaluate}"
    unfinished = folder if folder.exists() else unfinished_folder(str(folder))
    if unfinished.suffix == UNFINISHED and unfinished.is_dir():
        return (
            f"The run in {unfinished} is not finished. Continue it with the same train command and --resume; "
            "tensorboard shows its curves."
        )
    if not folder.is_dir():
        near = did_you_mean_path(str(folder), suits=has_results)
        return f"{folder} is not a directory.{near} Give the --output of train or compare."
    return (
        f"{folder} has neither {RECORD} nor {COMPARISON}: it is neither a finished run nor a comparison. Give the "
        "--output of train or compare."
    )
