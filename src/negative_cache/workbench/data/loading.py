"""The dataset that a name or path refers to."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from negative_cache.workbench.data import python_code
from negative_cache.workbench.data.files.reading import ROW_FILES, file_rows
from negative_cache.workbench.data.layouts.beir import read_collection
from negative_cache.workbench.data.layouts.folder import LAYOUTS, check_is_no_part, find_in_folder
from negative_cache.workbench.data.layouts.hub import find_on_hub, find_saved, is_saved
from negative_cache.workbench.data.layouts.plain import read_documents
from negative_cache.workbench.data.layouts.sources import Collection, RowTables, Table
from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.data.own_splits import only_split, with_own_corpus, with_rows
from negative_cache.workbench.data.retrieval_data import DataError, RetrievalData
from negative_cache.workbench.data.row_tables import read_rows
from negative_cache.workbench.data.rows import most_negatives
from negative_cache.workbench.data.texts import Texts
from negative_cache.workbench.suggestions import did_you_mean_path

FEWEST_NAMES, MOST_NAMES = 2, 1000  # documents or queries that are looked at
_NUMBER = re.compile(r"\d+", re.ASCII)
_NAME = re.compile(r"\S*\w[.\d]\S*|\d+", re.ASCII)

_FOR_ROWS = ("corpus", "query_column", "positive_column", "negative_column", "label_column")


def load_data(source: str, options: DataOptions | None = None) -> RetrievalData:
    """As `negative_cache.data.load_data`, with messages for the command line alone."""
    options = options or DataOptions()
    for name in ("max_train_pairs", "eval_documents"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise DataError(f"--{name.replace('_', '-')} is {number}; it must be at least 1.")
    most_negatives(options.negatives)  # raises an error before anything is read
    own = {split: given for split, given in (("dev", options.dev), ("test", options.test)) if given is not None}
    main, *others = found = [_find(given, options) for given in (source, *own.values())]
    _check_options(source, found, options)
    notes = [*_same_files({"data": source, **own})]
    corpus = None
    if options.corpus is not None:
        corpus = read_documents(options.corpus, replace(options, positive_column=None), notes)
    if own:
        main = _as_training_split(main)
    elif isinstance(main, RowTables) and None in main.tables and not Path(source).is_file():
        notes.append(f"{source} has one split. It is divided by document, 85 : 5 : 10, into train, dev and test.")
    data = _read(main, options, corpus)
    for (split, given), other in zip(own.items(), others, strict=True):
        data = _with_split(data, split, given, other, options)
    if options.max_train_pairs is not None:
        data = data.with_train_pairs(options.max_train_pairs)
    if corpus is None and isinstance(main, RowTables) and not main.corpus:
        notes += _about_names(data)
    data = replace(data, notes=(*notes, *data.notes))
    if options.ignore_identical_ids:
        data = data.ignoring_identical_ids()
    return data if options.eval_documents is None else data.with_eval_documents(options.eval_documents)


def load_documents(source: str, options: DataOptions | None = None) -> tuple[Texts, list[str]]:
    """Load documents to search in, without queries and judgements; see `read_documents`.

    Returns:
        The documents, and notes on how they were read and what was skipped.

    Raises:
        DataError: The documents cannot be read; the message names the file and the line.
    """
    notes: list[str] = []
    corpus = read_documents(source, options or DataOptions(), notes)
    return corpus, list(dict.fromkeys(notes))


def _about_names(data: RetrievalData) -> Iterator[str]:
    """A warning if the first documents look like the names of documents: each is a number, or a word with a digit or a
    dot in it; and one if the first queries are numbers."""
    if (name := _first_if_all(_NAME, data.corpus)) is not None:
        yield (
            f"Warning: each document is one word, such as {name!r}. If these are ids or files of documents, give the "
            "documents with --corpus; otherwise, check --positive-column."
        )
    if (number := _first_if_all(_NUMBER, data.queries)) is not None:
        yield f"Warning: each query is a number, such as {number!r}. Check --query-column."


def _first_if_all(pattern: re.Pattern[str], texts: Mapping[str, str]) -> str | None:
    """The first of the texts if all that are looked at, and not too few, match a pattern."""
    first = [text.strip() for text in itertools.islice(texts.values(), MOST_NAMES)]
    is_all = len(first) >= FEWEST_NAMES and all(pattern.fullmatch(text) for text in first)
    return first[0] if is_all else None


def _find(source: str, options: DataOptions) -> Collection | RowTables | None:
    """What a source holds; None for python-code."""
    path = Path(source)
    if source == python_code.NAME:
        return None
    if source.startswith("hf:"):
        return find_on_hub(source[3:], options)
    if path.exists():
        check_is_no_part(path)
    if path.is_dir():
        return find_saved(path) if is_saved(path) else find_in_folder(path, options)
    if path.is_file():
        notes: list[str] = []
        table = Table(source, partial(file_rows, path, options.encoding, notes, options.columns()))
        return RowTables(path.name.split(".")[0], {None: [table]}, notes=notes)
    raise DataError(
        f"{source!r} is not a file, not a folder and not 'python-code'.{did_you_mean_path(source, python_code.NAME)} "
        f"Give a file of rows ({ROW_FILES}), {LAYOUTS}, hf:NAME or hf:NAME:CONFIGURATION for a dataset on the Hugging "
        "Face hub, or python-code."
    )


def _check_options(source: str, found: list[Collection | RowTables | None], options: DataOptions) -> None:
    """Refuse options of rows if there are none."""
    if any(isinstance(each, RowTables) for each in found):
        return
    for name in _FOR_ROWS:
        if (value := getattr(options, name)) is not None:
            raise DataError(
                f"--{name.replace('_', '-')} {value!r} is for files of rows; {source!r} has none. Leave one of "
                "them out."
            )


def _same_files(given: Mapping[str, str]) -> Iterator[str]:
    """A note for each two options with the same file."""
    for (name, source), (other, another) in itertools.combinations(given.items(), 2):
        if Path(source).is_file() and Path(another).is_file() and Path(source).samefile(another):
            yield f"--{name} and --{other} are the same file, {another}: the quality measured on it is too high."


def _read(found: Collection | RowTables | None, options: DataOptions, corpus: Texts | None) -> RetrievalData:
    if found is None:
        return python_code.load()
    return read_collection(found, options) if isinstance(found, Collection) else read_rows(found, options, corpus)


def _as_training_split(found: Collection | RowTables | None) -> Collection | RowTables | None:
    """Without a division by hash, since other splits are given."""
    if isinstance(found, RowTables) and None in found.tables:
        return replace(found, tables={"train": found.tables[None]})
    return found


def _with_split(
    data: RetrievalData, split: str, source: str, found: Collection | RowTables | None, options: DataOptions
) -> RetrievalData:
    """The dataset with a split from another source."""
    if not isinstance(found, RowTables) or found.corpus:
        return with_own_corpus(data, split, _read(found, options, None))
    name = None if None in found.tables else only_split([name for name in found.tables if name], split, source)
    rows = read_rows(replace(found, tables={split: found.tables[name]}), options, data.corpus)
    return with_rows(data, split, rows)
