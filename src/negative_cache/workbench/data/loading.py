"""The dataset that a name or path refers to."""

from __future__ import annotations

from pathlib import Path

from negative_cache.workbench.data import python_code
from negative_cache.workbench.data.beir import load_beir
from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.data.reading import file_rows, hub_rows
from negative_cache.workbench.data.retrieval_data import DataError, RetrievalData
from negative_cache.workbench.data.splits import from_pairs


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
    data = _load(source, options.query_column, options.positive_column)
    return data.ignoring_identical_ids() if options.ignore_identical_ids else data


def _load(source: str, query_column: str | None, positive_column: str | None) -> RetrievalData:
    if source.startswith("hf:"):
        return from_pairs(source, hub_rows(source[3:]), query_column, positive_column)
    path = Path(source)
    if path.is_dir() or source == python_code.NAME:
        for option, column in (("--query-column", query_column), ("--positive-column", positive_column)):
            if column is not None:
                raise DataError(f"{option} {column!r} is for files of pairs; {source!r} has no columns. Leave it out.")
    if source == python_code.NAME:
        return python_code.load()
    if path.is_dir():
        return load_beir(path)
    if path.is_file():
        return from_pairs(path.name.split(".")[0], file_rows(path), query_column, positive_column)
    raise DataError(
        f"{source!r} is not a file, not a directory and not 'python-code'. Give a folder in BEIR layout, a .jsonl, "
        ".csv, .tsv or .parquet file of pairs, hf:NAME, or python-code."
    )
