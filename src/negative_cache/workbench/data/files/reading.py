"""Rows of data files, each with its place in the file."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from negative_cache.workbench.data.files.columns import check_differ, quoted
from negative_cache.workbench.data.files.opening import (
    encoding_of,
    open_text,
    read_errors,
    uncompressed_name,
)
from negative_cache.workbench.data.files.tables import MissingCell, table_rows
from negative_cache.workbench.data.retrieval_data import DataError
from negative_cache.workbench.suggestions import DOCUMENTS_ALONE

RawRows = Iterator[tuple[str, Any]]
"""Pairs of a place such as "FILE, line 3", for messages, and the row: a dict of its columns, or a list."""

ROW_FILES = ".jsonl, .json, .csv, .tsv, .parquet or .arrow"
_ROWS_AT_ONCE = 1024
_CHARS_AT_ONCE = 1 << 20
_BLANK = re.compile(r"[ \t\r\n]*")


def file_rows(
    path: Path, encoding: str | None = None, notes: list[str] | None = None, asked: Sequence[str] = ()
) -> RawRows:
    """Rows of a file, read as they are asked for.

    A .json or .jsonl file has one object or list per line, or is an array of them, or an object with an array "data".
    Such an object may have a "corpus", an object with a "path" or a list of these (NeMo); then the first row is
    {"corpus": [path, ...]}. A .csv, .tsv or .txt file without a heading has rows that are lists. All files but .parquet
    and .arrow may be compressed: .gz, .bz2, .xz, .zst.

    Args:
        path: The file.
        encoding: Its encoding; None for UTF-8, or what is detected if it is not UTF-8.
        notes: Decisions are added, such as the encoding and the delimiter, before this function returns.
        asked: Names of columns that make the first line of a table a heading, in addition to the known ones.

    Raises:
        DataError: The file cannot be read; the message has the line.
    """
    notes = [] if notes is None else notes
    kind = uncompressed_name(path).rsplit(".", 1)[-1]
    if kind in ("jsonl", "json", "ndjson"):
        return _json(path, encoding_of(path, encoding, notes))
    if kind in ("csv", "tsv", "txt"):
        return table_rows(path, kind == "csv", encoding, notes, asked)
    if kind == "parquet":
        return _parquet_rows(path)
    if kind == "arrow":
        return _arrow_rows(path)
    raise DataError(f"{path}: unknown file type; expected {ROW_FILES}. {DOCUMENTS_ALONE}")


def text_in(row: dict[str, Any], key: str, place: str) -> str:
    """The text of a key or column of a row.

    Raises:
        DataError: It is missing, null, blank, not a text, or not valid Unicode.
    """
    if key not in row:
        raise DataError(f"{place}: there is no {key!r}, only {quoted(row)}.")
    return checked_text(row[key], key, place)


def checked_text(text: object, key: str, place: str) -> str:
    """A value that is a text.

    Raises:
        DataError: It is null, a missing value, blank, not a text, or not valid Unicode.
    """
    if not isinstance(text, str):
        found = "null" if text is None else f"of type {type(text).__name__}"
        raise DataError(f"{place}: {key!r} is {found}; expected a text.")
    if isinstance(text, MissingCell):
        raise DataError(
            f"{place}: {key!r} is {str(text)!r}, a missing value; expected a text. Remove the row, or fill it in."
        )
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


def lines(path: Path, encoding: str | None, notes: list[str]) -> Iterator[tuple[str, str]]:
    """Non-blank lines of a text file, each with its place; see `encoding_of`."""
    return _lines(path, encoding_of(path, encoding, notes))


def _lines(path: Path, encoding: str) -> Iterator[tuple[str, str]]:
    number = 0
    with open_text(path, encoding) as file, read_errors(path, lambda: number):
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}, line {number}", line.rstrip("\r\n")


def _json(path: Path, encoding: str) -> RawRows:
    with read_errors(path), open_text(path, encoding) as file:
        is_array, corpus = _layout(_Json(file, path))
    if not is_array:
        yield from _json_lines(path, encoding)
        return
    if corpus:
        yield str(path), {"corpus": corpus}
    with open_text(path, encoding) as file:
        found = _Json(file, path)
        with read_errors(path, lambda: found.line):
            _layout(found)
            yield from found.elements()


def _json_lines(path: Path, encoding: str) -> RawRows:
    decoder = json.JSONDecoder(object_pairs_hook=_without_repeated_keys)
    for place, text in _lines(path, encoding):
        try:
            yield place, decoder.decode(text)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{place}: not JSON: {error}. Expected one object or list per line, unless the file is an array, or an "
                'object with an array "data".'
            ) from error


class _Json:
    """Values of a JSON text, which is read piece by piece.

    Args:
        file: The text.
        path: Its path, for messages.
    """

    def __init__(self, file: IO[str], path: Path) -> None:
        self._file, self._path = file, path
        self._decoder = json.JSONDecoder(object_pairs_hook=_without_repeated_keys)
        self._text, self._at = "", 0
        self.line = 1

    def next_character(self) -> str:
        """The next character that is not a blank, which is not consumed; empty at the end."""
        while True:
            self._advance(_BLANK.match(self._text, self._at).end())  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read():
                return ""

    def take(self, characters: str) -> str:
        """Consume the next character, which is one of these."""
        found = self.next_character()
        if not found or found not in characters:
            expected = " or ".join(repr(character) for character in characters)
            raise DataError(f"{self._place()}: not JSON: expected {expected}, got {found or 'the end of the file'!r}.")
        self._advance(self._at + 1)
        return found

    def value(self) -> Any:
        """Consume a value."""
        self.next_character()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # a value that is not complete is wrong at the end of the text, or within the string that ends it
                is_cut = error.pos >= len(self._text) - 8 or error.msg.startswith("Unterminated string")
                if is_cut and self._read():
                    continue
                line = self.line + self._text.count("\n", self._at, error.pos)
                raise DataError(f"{self._path}, line {line}: not JSON: {error.msg}.") from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self._place()}: not JSON: {error}.") from error
            if end == len(self._text) and self._read():  # a number may go on
                continue
            self._advance(end)
            return value

    def elements(self) -> RawRows:
        """Consume the elements of an array whose bracket is consumed."""
        if self.next_character() == "]":
            return
        for number in itertools.count(1):
            self.next_character()
            place = f"{self._place()}, element {number}"
            yield place, self.value()
            if self.take(",]") == "]":
                return

    def _advance(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def _read(self) -> bool:
        """Read on, twice as much if the present value is long; False at the end of the file."""
        rest = self._text[self._at :]
        read = self._file.read(max(_CHARS_AT_ONCE, len(rest)))
        self._text, self._at = rest + read, 0
        return bool(read)

    def _place(self) -> str:
        return f"{self._path}, line {self.line}"


def _layout(found: _Json) -> tuple[bool, list[str]]:
    """Consume a JSON text up to the first element of its array of rows.

    Returns:
        Whether there is such an array, the text itself or its key "data", and the paths of a "corpus" before "data".
    """
    first = found.next_character()
    if first == "[":
        found.take("[")
        return found.next_character() in "[{]", []  # otherwise a row, ["query", "positive", ...]
    if first != "{":
        return False, []
    corpus: list[str] = []
    found.take("{")
    try:
        while found.next_character() == '"':
            key = found.value()
            found.take(":")
            if key == "data" and found.next_character() == "[":
                found.take("[")
                return True, corpus
            value = found.value()
            if key == "corpus":
                corpus = [part["path"] for part in (value if isinstance(value, list) else [value])]
            if found.take(",}") == "}":
                break
    except (DataError, TypeError, KeyError):  # reported when the file is read as lines
        pass
    return False, []


def _parquet_rows(path: Path) -> RawRows:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except Exception as error:
        raise DataError(f"{path}: not readable as parquet: {error}") from error
    check_differ(file.schema_arrow.names, str(path))
    return _batch_rows(path, file.iter_batches(_ROWS_AT_ONCE))


def _arrow_rows(path: Path) -> RawRows:
    import pyarrow

    source = pyarrow.memory_map(str(path))
    try:
        try:
            file = pyarrow.ipc.open_file(source)
            batches = (file.get_batch(number) for number in range(file.num_record_batches))
        except pyarrow.ArrowInvalid:  # a stream, as the datasets library writes it
            source.seek(0)
            batches = file = pyarrow.ipc.open_stream(source)
    except Exception as error:
        raise DataError(f"{path}: not readable as Arrow: {error}") from error
    check_differ(file.schema.names, str(path))
    return _batch_rows(path, batches)


def _batch_rows(path: Path, batches: Iterator[Any]) -> RawRows:
    number = 0
    try:
        for batch in batches:
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                for row in batch.slice(start, _ROWS_AT_ONCE).to_pylist():
                    yield f"{path}, row {number}", row
                    number += 1
    except (OSError, ValueError) as error:
        raise DataError(f"{path}, after row {number}: not readable: {error}") from error


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"a key occurs twice among {quoted(key for key, _ in pairs)}")
    return row
