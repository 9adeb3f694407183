"""The folder of MS MARCO: texts and judgements in files without headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from negative_cache.workbench.data.files.opening import uncompressed_name
from negative_cache.workbench.data.files.reading import lines
from negative_cache.workbench.data.layouts.qrels import qrels_lines
from negative_cache.workbench.data.layouts.sources import Collection, Table, Triples, split_name
from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.data.retrieval_data import DataError


def is_msmarco(folder: Path) -> bool:
    """Whether a folder has MS MARCO's collection."""
    return bool(_files(folder, r"collection\.tsv"))


def find_msmarco(folder: Path, options: DataOptions) -> Collection:
    """The collection.tsv, queries.*.tsv, qrels.*.tsv and triples of a folder.

    Raises:
        DataError: There are no queries, or neither judgements nor triples, or two files of judgements of a split.
    """
    queries = _files(folder, r".*queries.*\.tsv")
    qrels = _files(folder, r".*qrels.*\.(tsv|txt)")
    by_ids = _files(folder, r"qidpidtriples.*\.tsv")
    triples = by_ids or _files(folder, r"triples.*\.tsv")
    if not queries:
        raise DataError(f"{folder} has a collection.tsv, but no queries; expected files such as queries.train.tsv.")
    if not qrels and not triples:
        raise DataError(f"{folder} has no judgements; expected qrels.train.tsv, qrels.dev.small.tsv or triples*.tsv.")
    notes: list[str] = []
    encoding = options.encoding
    splits: dict[str, list[Table]] = {}
    for path in qrels:
        if (split := _split(path)) in splits:
            raise DataError(f"{folder}: {splits[split][0].name} and {path} are of the same split. Remove one.")
        splits[split] = [Table(str(path), partial(qrels_lines, path, encoding, notes))]
    if "dev" not in splits and "dev.small" in splits:
        splits["dev"] = splits.pop("dev.small")
    return Collection(
        folder.resolve().name,
        "MS MARCO folder",
        {"collection": [_texts(path, encoding, notes) for path in _files(folder, r"collection\.tsv")]},
        {"queries": [_texts(path, encoding, notes) for path in queries]},
        splits,
        [Triples(Table(str(path), partial(_fields, path, encoding, notes, 3)), bool(by_ids)) for path in triples],
        notes=notes,
    )


def _files(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder whose name matches, without regard to compression; of two versions, the uncompressed one."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        name = uncompressed_name(path)
        if re.fullmatch(pattern, name) and path.is_file():
            found.setdefault(name, path)
    return list(found.values())


def _split(path: Path) -> str:
    """The split in the name of a file of judgements: "dev.small" of qrels.dev.small.tsv."""
    name = uncompressed_name(path).rpartition(".")[0]
    return split_name(name.replace("qrels", "").strip(".-_")) or "test"


def _texts(path: Path, encoding: str | None, notes: list[str]) -> Table:
    return Table(str(path), partial(_text_rows, path, encoding, notes))


def _text_rows(path: Path, encoding: str | None, notes: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    for place, (key, text) in _fields(path, encoding, notes, 2):
        yield place, {"_id": key, "text": text}


def _fields(path: Path, encoding: str | None, notes: list[str], width: int) -> Iterator[tuple[str, list[str]]]:
    """The values of each line, separated by tabs."""
    for place, line in lines(path, encoding, notes):
        fields = line.split("\t")
        if len(fields) != width:
            raise DataError(f"{place}: expected {width} columns, separated by tabs, got {len(fields)}: {line[:80]!r}.")
        yield place, fields
