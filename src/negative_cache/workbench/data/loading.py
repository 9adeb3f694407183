"""The dataset that a name or path refers to."""

from __future__ import annotations

from pathlib import Path

from negative_cache.workbench.data import python_code
from negative_cache.workbench.data.beir import load_beir
from negative_cache.workbench.data.forms import RowReader
from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.data.reading import RawRows, file_rows, hub_rows
from negative_cache.workbench.data.retrieval_data import DataError, RetrievalData
from negative_cache.workbench.data.rows import Collector


def load_data(source: str, options: DataOptions | None = None) -> RetrievalData:
    """Load a retrieval dataset.

    Args:
        source: `python-code`; a folder in BEIR layout; a .jsonl, .csv, .tsv or .parquet file of pairs (the first three
            also as .gz); or `hf:NAME`, a dataset of pairs that the datasets library can load.
        options: How to read it; None for the defaults.

    Returns:
        The dataset. Its `notes` say what was skipped or is not used.

    Raises:
        DataError: The data cannot be used; the message names the file and the line.
    """
    options = options or DataOptions()
    data = _load(source, options)
    return data.ignoring_identical_ids() if options.ignore_identical_ids else data


def _load(source: str, options: DataOptions) -> RetrievalData:
    if source.startswith("hf:"):
        return _of_rows(source, hub_rows(source[3:]), options, [])
    path = Path(source)
    if path.is_dir() or source == python_code.NAME:
        for option, column in (
            ("--query-column", options.query_column),
            ("--positive-column", options.positive_column),
        ):
            if column is not None:
                raise DataError(f"{option} {column!r} is for files of pairs; {source!r} has no columns. Leave it out.")
    if source == python_code.NAME:
        return python_code.load()
    if path.is_dir():
        return load_beir(path)
    if path.is_file():
        notes: list[str] = []
        asked = [name for name in (options.query_column, options.positive_column, options.negative_column) if name]
        rows = file_rows(path, options.encoding, notes, asked)
        return _of_rows(path.name.split(".")[0], rows, options, notes)
    raise DataError(
        f"{source!r} is not a file, not a directory and not 'python-code'. Give a folder in BEIR layout, a .jsonl, "
        ".csv, .tsv or .parquet file of pairs, hf:NAME, or python-code."
    )


def _of_rows(name: str, rows: RawRows, options: DataOptions, notes: list[str]) -> RetrievalData:
    """A dataset of rows, which is split by the hashes of its documents."""
    reader, collector = RowReader(name, rows, options), Collector()
    for row in reader:
        collector.add(row)
    data = collector.finish(name, reader.form, [*notes, *reader.notes], reader.skipped)
    if not any(data.qrels.values()):
        raise DataError(f"{name} has no pairs.")
    return data
