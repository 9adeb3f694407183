"""Datasets of rows, each a query with its documents."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

from negative_cache.workbench.data.files.skipping import Skipped
from negative_cache.workbench.data.forms.reader import RowReader, most_negatives
from negative_cache.workbench.data.layouts.beir import read_texts
from negative_cache.workbench.data.layouts.folder import find_documents
from negative_cache.workbench.data.layouts.sources import RowTables
from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.data.retrieval_data import DataError, RetrievalData
from negative_cache.workbench.data.rows import Collector, Row
from negative_cache.workbench.data.texts import Texts


def read_rows(found: RowTables, options: DataOptions, corpus: Texts | None = None) -> RetrievalData:
    """Read tables of rows.

    Args:
        found: The tables.
        options: How they are read.
        corpus: The documents that rows refer to by id, unless `found` or the rows name a corpus of their own. Without
            `options.corpus`, rows that have texts do not use it.

    Raises:
        DataError: A row cannot be used, or there are none.
    """
    notes: list[str] = []
    skipped = Skipped()
    readers: list[tuple[str | None, RowReader]] = []
    paths: dict[Path, None] = {}
    has_one = sum(map(len, found.tables.values())) == 1
    for split, tables in found.tables.items():
        for table in tables:
            reader = RowReader(found.name if has_one else table.name, table.rows(), options)
            readers.append((split, reader))
            paths.update((Path(table.name).parent / path, None) for path in reader.corpus_paths)
    if documents := found.corpus or [table for path in paths for table in find_documents(path, options, notes)]:
        corpus = read_texts(documents, "documents", options, notes, skipped)
    rows = ((row, split) for split, reader in readers for row in reader)
    first = next(rows, None)
    is_by_id = bool(documents) or options.corpus is not None or (first is not None and _is_by_id(first[0]))
    collector = Collector(corpus if is_by_id else None, most_negatives(options.negatives))
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
