"""Rows of .csv, .tsv and .txt files: the delimiter, the heading, quotes, and missing values."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from negative_cache.workbench.data.files import columns
from negative_cache.workbench.data.files.opening import encoding_of, open_text, read_errors
from negative_cache.workbench.data.retrieval_data import DataError
from negative_cache.workbench.suggestions import DOCUMENTS_ALONE

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_SAMPLE, _SAMPLE_ROWS = 1 << 16, 20
_ADVICE = {
    True: "Write a value that has a {}, a quote or a line break in quotes, and each quote inside it twice.",
    False: "Quotes are plain characters in .tsv; use .csv or .jsonl for values with tabs or line breaks.",
}
_MARKERS = {  # of missing values, as pandas, R, spreadsheets and databases write them
    "nan", "NaN", "NAN", "<NA>", "NA", "N/A", "n/a", "#N/A", "None", "null", "NULL", "Null", "\\N",
}  # fmt: skip


class MissingCell(str):
    """A cell of a table that stands for a missing value, such as "NaN"."""


def table_rows(
    path: Path, is_csv: bool, encoding: str | None, notes: list[str], asked: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """Rows of a table: column -> value, or the list of the values if the first line is not a heading.

    Only CSV has quoted values; in TSV, quotes are characters like any other. A marker of a missing value is a
    `MissingCell`.

    Args:
        path: The file.
        is_csv: Whether it is CSV; otherwise TSV.
        encoding: See `encoding_of`.
        notes: Notes of the encoding, the delimiter and a missing heading are added.
        asked: Names of columns that make the first line a heading, in addition to the known ones.
    """
    encoding = encoding_of(path, encoding, notes)
    with read_errors(path), open_text(path, encoding) as file:
        sample = file.read(_SAMPLE)
    dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    if is_csv:
        if sample[:4].lower() == "sep=":
            raise DataError(f"{path}, line 1: {sample.splitlines()[0]!r} is for Excel alone. Remove the line.")
        dialect = {"delimiter": _delimiter(sample, asked), "strict": True}
        if dialect["delimiter"] != ",":
            notes.append(f"{path}: the columns are separated by {_DELIMITERS[dialect['delimiter']]}.")
    first, *rows = _parsed(sample, dialect) or [[]]
    if not is_csv and len(first) == 1:
        raise DataError(
            f"{path}, line 1: there is no tab, which separates the columns of a .tsv or .txt file: {first[0][:60]!r}. "
            f"If another character separates them, name the file .csv. {DOCUMENTS_ALONE}"
        )
    has_heading = columns.is_heading(first, asked, rows)
    values = ", ".join(repr(value[:40]) for value in first)
    if has_heading and not columns.is_sure_heading(first, asked):
        notes.append(
            f"{path}: the first line is read as names of columns, because it looks like a heading: {values}. If it is "
            "data, put a line with names before it."
        )
    if not has_heading:
        notes.append(
            f"{path}: the first line is read as data, because it has no known name of a column and does not look like "
            f"a heading: {values}."
        )
    return _rows(path, encoding, dialect, has_heading)


def _rows(path: Path, encoding: str, dialect: dict[str, Any], has_heading: bool) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**30)
    is_csv = "quoting" not in dialect
    advice = _ADVICE[is_csv].format(_DELIMITERS[dialect["delimiter"]].removesuffix("s"))
    with open_text(path, encoding) as file:
        reader = csv.reader(file, **dialect)
        names: list[str] | None = None
        width = num_named = 0
        with read_errors(path, lambda: reader.line_num):
            try:
                for values in filter(None, reader):  # without blank lines
                    place = f"{path}, line {reader.line_num}"
                    if not width:
                        width = len(values)
                        num_named = _num_named(values) if has_heading else width
                        if has_heading:
                            names = columns.check_differ(values[:num_named], place)
                            continue
                    if len(values) != width:
                        raise DataError(
                            f"{place}: expected {width} columns as in the first line, got {len(values)}. {advice}"
                        )
                    if beyond := "".join(values[num_named:]).strip():
                        raise DataError(
                            f"{place}: the first line has no name for the column of {beyond[:40]!r}. Add a name, or "
                            "remove the value."
                        )
                    cells = [MissingCell(value) if value in _MARKERS else value for value in values]
                    yield place, dict(zip(names, cells, strict=False)) if names else cells
            except csv.Error as error:
                raise DataError(f"{path}, after line {reader.line_num}: {error}. {advice}") from error


def _num_named(names: list[str]) -> int:
    """The number of columns without those at the end that have no name, as Excel writes empty columns."""
    return max((number for number, name in enumerate(names, start=1) if name.strip()), default=0)


def _delimiter(sample: str, asked: Sequence[str]) -> str:
    """The first delimiter of `_DELIMITERS` whose heading has a known name, or that gives rows of the same length."""
    tables = {delimiter: _parsed(sample, {"delimiter": delimiter, "strict": True}) for delimiter in _DELIMITERS}
    wide = {delimiter: rows for delimiter, rows in tables.items() if rows and len(rows[0]) > 1}
    named = [
        delimiter for delimiter, rows in wide.items()
        if any(name in asked or columns.is_known(name) for name in rows[0])
    ]  # fmt: skip
    even = [delimiter for delimiter, rows in wide.items() if len({len(row) for row in rows}) == 1]
    return next(iter([*named, *even, ","]))


def _parsed(sample: str, dialect: dict[str, Any]) -> list[list[str]]:
    """The first rows of a text that may end within a row; none after one that cannot be parsed."""
    rows: list[list[str]] = []
    reader = csv.reader(io.StringIO(sample, newline=""), **dialect)
    try:
        for row in filter(None, reader):
            rows.append(row)
            if len(rows) > _SAMPLE_ROWS:
                break
    except csv.Error:
        return rows
    is_cut = len(sample) == _SAMPLE or len(rows) > _SAMPLE_ROWS
    return rows[:-1] if is_cut and len(rows) > 1 else rows
