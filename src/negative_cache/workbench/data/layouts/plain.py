"""Documents alone: a file or folder of texts to search in, without queries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from negative_cache.workbench.counting import counted
from negative_cache.workbench.data.files import columns
from negative_cache.workbench.data.files.columns import normal, quoted
from negative_cache.workbench.data.files.opening import encoding_of, open_text, read_errors, uncompressed_name
from negative_cache.workbench.data.files.reading import lines
from negative_cache.workbench.data.files.skipping import Skipped
from negative_cache.workbench.data.layouts.beir import read_texts
from negative_cache.workbench.data.layouts.folder import TEXT_FILES, find_documents, find_text_files, has_rows
from negative_cache.workbench.data.layouts.sources import Table
from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.data.retrieval_data import DataError
from negative_cache.workbench.data.texts import Texts

_IDS = ("_id", "id", "docid", "doc_id", "document_id", "corpus_id", "pid", "passage_id", "psg_id")
_TEXTS = ("text", "contents", "content", "passage", "document", "body")
_ALSO = ("title", "metadata")


def read_documents(source: str, options: DataOptions, notes: list[str]) -> Texts:
    """Read documents, which need no ids: a document without one has the number of its row or line as its id.

    Args:
        source: A .txt file with a document per line; a file of rows with a column of texts, and maybe of ids and
            titles; a folder of files of rows, of which corpus.* is preferred; or a folder of .txt and .md files, each
            of which is a document.
        options: `positive_column` is the column of the texts; None for the usual names, or the only one.
        notes: Notes on how the files were read are added to it.

    Raises:
        DataError: The documents cannot be read.
    """
    path, skipped = Path(source), Skipped()
    files = find_text_files(path) if path.is_dir() else []
    kinds = " and ".join(kind for kind in TEXT_FILES if any(file.suffix.lower() == kind for file in files))
    if path.is_file() and uncompressed_name(path).endswith(".txt"):
        notes.append(f"{source}: each line is a document, and its number is the id.")
        tables = [Table(source, partial(_lines, path, options, notes))]
    elif files and not has_rows(path):
        notes.append(f"{source}: each of the {len(files):,} {kinds} files is a document, and its path is the id.")
        tables = [Table(source, partial(_whole_files, path, files, options, notes))]
    else:
        if files:
            notes.append(f"{source}: its files of rows are read. Not read: {counted(len(files), f'{kinds} file')}.")
        found = find_documents(path, options, notes)
        tables = [_named(table, options, notes, len(found) == 1) for table in found]
    corpus = read_texts(tables, "documents", options, notes, skipped)
    notes += skipped.notes(source)
    if not len(corpus):
        raise DataError(f"{source} has no documents.")
    return corpus


def _lines(path: Path, options: DataOptions, notes: list[str]) -> Iterator[tuple[str, Any]]:
    for place, text in lines(path, options.encoding, notes):
        yield place, {"_id": place.rpartition(" ")[2], "text": text}


def _whole_files(
    folder: Path, files: Sequence[Path], options: DataOptions, notes: list[str]
) -> Iterator[tuple[str, Any]]:
    for path in files:
        with read_errors(path), open_text(path, encoding_of(path, options.encoding, notes)) as file:
            yield str(path), {"_id": path.relative_to(folder).as_posix(), "text": file.read().strip()}


def _named(table: Table, options: DataOptions, notes: list[str], is_only: bool) -> Table:
    """The table with the columns _id and text, whatever their names are."""
    first = next(table.rows(), None)
    if first is not None and isinstance(first[1], list) and len(first[1]) == 1:
        table = _with_name(table)
        first = next(table.rows())
    if first is None or not isinstance(first[1], dict):
        return table  # an id and a text, as in MS MARCO
    place, row = first
    id_name, text_name = columns.first_of(_IDS, row), options.positive_column or columns.first_of(_TEXTS, row)
    if text_name is None:
        others = [name for name in row if columns.has_text(name) and normal(name) not in _ALSO]
        if len(others) != 1:
            raise DataError(
                f"{place}: no column of texts is known, only {quoted(row)}. Name the column of the documents with "
                "--positive-column."
            )
        (text_name,) = others
        notes.append(f"{table.name}: the documents are the texts of the column {text_name!r}.")
    elif text_name not in row:
        raise DataError(f"{place}: there is no column {text_name!r}, only {quoted(row)}.")
    prefix = "" if is_only else f"{Path(table.name).name}:"
    if id_name is None:
        notes.append(f"{table.name}: there is no column of ids; the id is the number of the row.")

    def rows() -> Iterator[tuple[str, Any]]:
        for number, (place, row) in enumerate(table.rows(), start=1):
            own = {"_id": f"{prefix}{number}" if id_name is None else row.get(id_name), "text": row.get(text_name)}
            others = {name: value for name, value in row.items() if name not in (id_name, text_name, "_id", "text")}
            yield place, {**others, **own}

    return Table(table.name, rows)


def _with_name(table: Table) -> Table:
    """A table with one column, which has no name: the texts."""
    return Table(table.name, lambda: ((place, {"text": row[0]}) for place, row in table.rows()))
