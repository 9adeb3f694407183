"""Datasets of rows, each a query with its documents."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

from negative_cache.workbench.data.files.skipping import Skipped
from negative_cache.workbench.data.forms.reader import RowReader
from negative_cache.workbench.data.layouts.beir import read_texts
from negative_cache.workbench.data.layouts.folder import find_documents
from negative_cache.workbench.data.layouts.sources import RowTables
from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.data.retrieval_data import DataError, RetrievalData
from negative_cache.workbench.data.rows import Collector, Row, most_negatives
from negative_cache.workbench.data.texts import Texts


def read_rows(found: RowTables, options: DataOptions, corpus: Texts | None = None) -> RetrievalData:
    """Read tables of rows.

    Args:
        found: The tables.
        options: How they are read.
        corpus: The documents that rows refer to by id. Without `options.corpus`, a corpus of `found` or of the rows
            themselves takes its place, and rows that have texts do not use it.

    Raises:
        DataError: A row cannot be used, or there are none.
    """
    notes: list[str] = []
    skipped = Skipped()
    readers: list[tuple[str | None, RowReader]] = []
    paths: dict[Path, None] = {}
    has_one = sum(map(len, found.tables.values())) == 1
    has_ids = bool(found.corpus) or options.corpus is not None
    for split, tables in found.tables.items():
        for table in tables:
            reader = RowReader(found.name if has_one else table.name, table.rows(), options, has_ids)
            readers.append((split, reader))
            paths.update((Path(table.name).parent / path, None) for path in reader.corpus_paths)
    is_given = corpus is not None and options.corpus is not None
    if is_given and (found.corpus or paths):
        notes.append(f"{found.name}: its own corpus is not read, because --corpus names another one.")
    elif documents := found.corpus or [table for path in paths for table in find_documents(path, options, notes)]:
        corpus = read_texts(documents, "documents", options, notes, skipped)
        has_ids = True
    rows = ((row, split) for split, reader in readers for row in reader)
    first = next(rows, None)
    has_ids = has_ids or (first is not None and _is_by_id(first[0]))
    collector = Collector(corpus if has_ids else None, most_negatives(options.negatives))
    for row, split in rows if first is None else itertools.chain([first], rows):
        collector.add(row, split)
    for _, reader in readers:
        skipped.add_counts(reader.skipped)
    form = " and ".join(dict.fromkeys(reader.form for _, reader in readers))
    data = collector.finish(found.name, form, skipped=skipped.counts)
    skipped.counts = data.skipped
    notes += [note for _, reader in readers for note in reader.notes] + skipped.notes(found.name)
    notes = list(dict.fromkeys([*found.notes, *notes, *data.notes]))
    if not any(data.qrels.values()):
        raise DataError(" ".join([f"{found.name} has no pairs.", *notes]))
    return replace(data, notes=tuple(notes))


def _is_by_id(row: Row) -> bool:
    return any(document.text is None for document in (*row.positives, *row.negatives))
