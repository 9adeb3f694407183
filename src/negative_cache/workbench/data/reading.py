"""Rows of data files, each with its place in the file."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from negative_cache.workbench.data.retrieval_data import DataError

Rows = Iterator[tuple[str, dict[str, Any]]]
"""Pairs of a place such as "FILE, line 3", for messages, and the row as column -> value."""


def file_rows(path: Path) -> Rows:
    """Rows of a .jsonl, .csv, .tsv or .parquet file."""
    kind = path.name.lower().removesuffix(".gz").rsplit(".", 1)[-1]
    if kind in ("jsonl", "json"):
        return json_rows(path)
    if kind in ("csv", "tsv"):
        return _table_rows(path, is_csv=kind == "csv")
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
            row = json.loads(text, object_pairs_hook=_without_repeated_keys)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise DataError(f"{place}: expected a JSON object, got {type(row).__name__}.")
        yield place, row


def text_in(row: dict[str, Any], key: str, place: str) -> str:
    """The text of a key or column of a row.

    Raises:
        DataError: It is missing, null, blank, not a text, or not valid Unicode.
    """
    if key not in row:
        raise DataError(f"{place}: there is no {key!r}, only {quoted(row)}.")
    text = row[key]
    if not isinstance(text, str):
        found = "null" if text is None else f"of type {type(text).__name__}"
        raise DataError(f"{place}: {key!r} is {found}; expected a text.")
    if not text.strip():
        raise DataError(f"{place}: {key!r} is empty; expected a text. Remove the row, or fill it in.")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{place}: {key!r} has the lone surrogate {text[error.start]!r} at character {error.start}; it is not "
                "a character. Remove it."
            ) from None
    return text


def quoted(names: Iterable[object]) -> str:
    """Names in sorted order for messages."""
    return ", ".join(sorted(repr(str(name)) for name in names))


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


def _table_rows(path: Path, is_csv: bool) -> Rows:
    """Rows of a table. Only CSV has quoted values; in TSV, quotes are characters like any other."""
    csv.field_size_limit(2**30)
    if is_csv:
        dialect: dict[str, Any] = {"delimiter": ",", "strict": True}
        advice = "Write a value that has a comma, a quote or a line break in quotes, and each quote inside it twice."
    else:
        dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        advice = "Quotes are plain characters in .tsv; use .csv or .jsonl for values with tabs or line breaks."
    with _open(path) as file:
        reader = csv.reader(file, **dialect)
        names: list[str] = []
        try:
            for values in filter(None, reader):  # without blank lines
                place = f"{path}, line {reader.line_num}"
                if not names:
                    names = _column_names(values, place)
                elif len(values) == len(names):
                    yield place, dict(zip(names, values, strict=True))
                else:
                    raise DataError(
                        f"{place}: expected {len(names)} columns as in the first line, got {len(values)}. {advice}"
                    )
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from error
        except csv.Error as error:
            raise DataError(f"{path}, after line {reader.line_num}: {error}. {advice}") from error
        except (OSError, EOFError) as error:
            raise DataError(f"{path}, after line {reader.line_num}: {error}.") from error


def _parquet_rows(path: Path) -> Rows:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except Exception as error:
        raise DataError(f"{path}: not readable as parquet: {error}") from error
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows))


def _column_names(names: list[str], place: str) -> list[str]:
    if repeated := {name for name in names if names.count(name) > 1}:
        raise DataError(f"{place}: several columns have the name {quoted(repeated)}. Rename or remove all but one.")
    return names


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"a key occurs twice among {quoted(key for key, _ in pairs)}")
    return row


def _open(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _not_utf8(path: Path, error: UnicodeDecodeError) -> DataError:
    return DataError(f"{path} is not UTF-8 ({error}). Save it as UTF-8.")
