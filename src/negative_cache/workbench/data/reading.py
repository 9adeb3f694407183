"""Rows of data files, each with its place in the file."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from negative_cache.workbench.data.retrieval_data import DataError

_SURROGATE = re.compile(r"[\ud800-\udfff]")

Rows = Iterator[tuple[str, dict[str, Any]]]
"""Pairs of a place such as "FILE, line 3", for messages, and the row as column -> value."""


def file_rows(path: Path) -> Rows:
    """Rows of a .jsonl, .csv, .tsv or .parquet file."""
    kind = path.name.lower().removesuffix(".gz").rsplit(".", 1)[-1]
    if kind in ("jsonl", "json"):
        return json_rows(path)
    if kind in ("csv", "tsv"):
        return _table_rows(path, "," if kind == "csv" else "\t")
    if kind == "parquet":
        return _parquet_rows(path)
    raise DataError(f"{path}: unknown file type; expected .jsonl, .csv, .tsv or .parquet.")


def hub_rows(name: str) -> Rows:
    """Rows of the training split of a dataset that the datasets library can load."""
    import datasets

    try:
        loaded = datasets.load_dataset(name, split="train")
    except Exception as error:
        raise DataError(f"The datasets library cannot load {name!r}: {error}") from error
    return ((f"{name}, row {number}", row) for number, row in enumerate(loaded))


def json_rows(path: Path) -> Rows:
    """Objects of a file with one JSON object per line."""
    for place, text in lines(path):
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise DataError(f"{place}: expected a JSON object, got {type(row).__name__}.")
        if "\\u" in text:  # only an escape can be half of a pair; no tokenizer takes such a text
            for key, value in row.items():
                if isinstance(value, str) and (found := _SURROGATE.search(value)):
                    raise DataError(
                        f"{place}: {key!r} has {found[0]!a}, half of a surrogate pair, which is no character. "
                        "Remove or replace it."
                    )
        yield place, row


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """Non-blank lines of a text file, each with its place."""
    with _open(path) as file:
        number = 0
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}, line {number}", line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from error
        except (OSError, EOFError) as error:
            raise DataError(f"{path}, after line {number}: not readable: {error}.") from error


def _table_rows(path: Path, delimiter: str) -> Rows:
    csv.field_size_limit(2**30)
    with _open(path) as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                place = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{place}: expected {len(reader.fieldnames or [])} columns as in the first line.")
                yield place, row
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from error
        except (csv.Error, OSError, EOFError) as error:
            raise DataError(f"{path}, after line {reader.line_num}: {error}.") from error


def _parquet_rows(path: Path) -> Rows:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except Exception as error:
        raise DataError(f"{path}: not readable as parquet: {error}") from error
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows))


def _open(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _not_utf8(path: Path, error: UnicodeDecodeError) -> DataError:
    return DataError(f"{path} is not UTF-8 ({error}). Save it as UTF-8.")
