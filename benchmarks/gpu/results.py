"""The results of a stage, which are on disk as soon as they are measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from negative_cache.workbench.files import write_json

Value = str | int | float | bool | None
Row = dict[str, Value]
PROFILE = "profile.txt"  # the stage step appends to this file, beside the results


class Results:
    """A JSON list of rows. Its file is replaced with each new row, so that a stage that is killed keeps its rows.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []

    def add(self, **row: Value) -> None:
        """Append a row, and write all rows."""
        self.rows.append(row)
        write_json(self.path, self.rows)


def read_json(path: Path) -> Any:
    """The content of a JSON file; ValueError with its path if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def load(path: Path) -> dict[str, Any]:
    """The content of `gpu.json`; ValueError for any other file."""
    found: dict[str, Any] = read_json(path)
    if not isinstance(found, dict) or not {"machine", "stages"} <= set(found):
        raise ValueError(f"{path} has no machine and stages; expected what `python -m benchmarks gpu` writes.")
    return found
