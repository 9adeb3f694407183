"""Rows of one stage, on disk as soon as they are measured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Value = str | int | float | bool | None
Row = dict[str, Value]
PROFILE = "profile.txt"  # beside the results: to which the stage step appends


class Results:
    """A JSON list of rows, replaced as a whole with each new row, so that a killed stage keeps what it had.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []

    def add(self, **row: Value) -> None:
        """Append a row and write all."""
        self.rows.append(row)
        write_json(self.path, self.rows)


def write_json(path: Path, value: object) -> None:
    """Write a file that is there whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def read_json(path: Path) -> Any:
    """The content of a JSON file; ValueError, naming it, for another one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def load(path: Path) -> dict[str, Any]:
    """`gpu.json`; ValueError for a file that is something else."""
    found: dict[str, Any] = read_json(path)
    if not isinstance(found, dict) or not {"machine", "stages"} <= set(found):
        raise ValueError(f"{path} has no machine and stages; expected what `python -m benchmarks gpu` writes.")
    return found
