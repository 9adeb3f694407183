"""What a local folder holds."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from negative_cache.workbench.counting import counted
from negative_cache.workbench.data.files.columns import quoted
from negative_cache.workbench.data.files.opening import uncompressed_name
from negative_cache.workbench.data.files.reading import file_rows
from negative_cache.workbench.data.layouts.msmarco import find_msmarco, is_msmarco
from negative_cache.workbench.data.layouts.qrels import qrels_lines
from negative_cache.workbench.data.layouts.sources import (
    CORPUS,
    QRELS,
    QUERIES,
    Collection,
    RowTables,
    Table,
    by_split,
    narrowed,
    parts_of,
    split_name,
)
from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.data.retrieval_data import SPLITS, DataError
from negative_cache.workbench.suggestions import NEEDS_PAIRS, SEARCH, did_you_mean_path

_KINDS = ("jsonl", "json", "ndjson", "csv", "tsv", "parquet", "arrow")
_TEXT_QRELS = ("tsv", "txt", "trec")
TEXT_FILES = (".txt", ".md")  # each of which may be a document
_ONLY_SPLIT = "test"  # of judgements in a file without the name of a split
_SHARD = re.compile(r"-\d+-of-\d+$")
LAYOUTS = (
    "a BEIR folder (corpus.jsonl, queries.jsonl and qrels/*.tsv, or the same as parquet), an MS MARCO folder "
    "(collection.tsv, queries.*.tsv and qrels.*.tsv), or a folder with files of rows (train.*, dev.* and test.*, for "
    "example .jsonl)"
)


def find_in_folder(folder: Path, options: DataOptions, chosen: str | None = None) -> Collection | RowTables:
    """What a folder holds: a collection in the layout of BEIR, MS MARCO or the hub, or files of rows for each split.

    Args:
        folder: The folder.
        options: How text files are read.
        chosen: Which collection, if there are several.

    Raises:
        DataError: It holds none of these.
    """
    if is_msmarco(folder):
        return find_msmarco(folder, options)
    entries = _entries(folder)
    if parts := parts_of(entries, str(folder), chosen):
        found = _collection(folder, {part: entries[name] for part, name in parts.items()}, options)
        return narrowed(found, parts, chosen)
    files = _rows_by_split(entries, folder)
    if not files:
        raise DataError(_advice(folder, entries))
    if QUERIES in entries:
        raise DataError(f"{folder} has queries, but no {CORPUS}.jsonl. Expected {LAYOUTS}.")
    for paths in files.values():
        if other := next((path for path in paths if _kind(path) != _kind(paths[0])), None):
            raise DataError(f"{paths[0]} and {other} are of the same split, in two formats. Remove one.")
    notes: list[str] = []
    tables: dict[str | None, list[Table]] = {split: _tables(paths, options, notes) for split, paths in files.items()}
    used = {path for paths in [*files.values(), entries.get(CORPUS, [])] for path in paths}
    notes += _unread(folder, (path for paths in entries.values() for path in paths if path not in used))
    return RowTables(folder.resolve().name, tables, _tables(entries.get(CORPUS, []), options, notes), notes)


def check_is_no_part(path: Path) -> None:
    """Refuse the corpus, the queries or the judgements of a collection, whose folder should be given instead.

    Raises:
        DataError: The file or folder is one of these.
    """
    path = path.resolve()
    beside = {_stem(other) for other in path.parent.iterdir()}
    if _stem(path) in (CORPUS, QUERIES, QRELS) and beside >= {CORPUS, QUERIES}:
        raise DataError(f"{path} is a part of a dataset. Give its folder: {path.parent}.")


def find_documents(path: Path, options: DataOptions, notes: list[str]) -> list[Table]:
    """Tables of documents: a file, or the files of a folder, of which corpus.* or corpus/ is preferred.

    Raises:
        DataError: There are none.
    """
    if path.is_file():
        return _tables([path], options, notes)
    if not path.is_dir():
        raise DataError(f"The corpus {str(path)!r} is not a file or folder.{did_you_mean_path(str(path))}")
    entries = _entries(path)
    rows = _files_of_rows(entries)
    paths = entries.get(CORPUS) or [file for file in rows if not file.stem.endswith("metadata")]  # as NeMo writes it
    if not paths:
        raise DataError(f"The corpus {str(path)!r} has no files of documents, such as corpus.jsonl.")
    return _tables(paths, options, notes)


def find_text_files(folder: Path) -> list[Path]:
    """The .txt and .md files of a folder and its subfolders, without hidden ones."""
    found = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in TEXT_FILES and path.is_file())
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def has_rows(folder: Path) -> bool:
    """Whether a folder has files of rows."""
    return bool(_files_of_rows(_entries(folder)))


def _files_of_rows(entries: dict[str, list[Path]]) -> list[Path]:
    return [path for paths in entries.values() for path in paths if _kind(path) in _KINDS]


def _stem(path: Path) -> str:
    """The name of a file without its type, its compression and the number of its shard."""
    name, _, kind = path.name[: len(uncompressed_name(path))].rpartition(".")
    return _SHARD.sub("", name or kind)


def _kind(path: Path) -> str:
    return uncompressed_name(path).rpartition(".")[2]


def _entries(folder: Path) -> dict[str, list[Path]]:
    """Name -> files: each file by its stem, and all files in a subfolder by the name of the subfolder."""
    entries: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            found = sorted([*path.glob("*"), *path.glob("*/*")])
            inside = [file for file in found if file.is_file() and not file.name.startswith(".")]
            if inside and path.name not in entries:
                entries[path.name] = _uncompressed_first(inside)
        else:
            entries.setdefault(_stem(path), []).append(path)
    return {name: _uncompressed_first(paths) for name, paths in entries.items()}


def _uncompressed_first(paths: list[Path]) -> list[Path]:
    """Without compressed files that are there without compression too."""
    return [path for path in paths if _kind(path) == path.suffix[1:].lower() or path.with_suffix("") not in paths]


def _collection(folder: Path, parts: dict[str, list[Path]], options: DataOptions) -> Collection:
    notes: list[str] = []
    judged = [path for path in parts.get(QRELS, []) if _kind(path) in (*_KINDS, *_TEXT_QRELS)]
    if not judged:
        raise DataError(f"{folder} has no judgements. Expected files such as qrels/train.tsv and qrels/test.tsv.")
    notes += _unread(folder, set(parts[QRELS]) - set(judged))
    if whole := [path.name for path in judged if _stem(path) == QRELS]:
        notes.append(f"{folder}: the judgements of {quoted(whole)} are taken for the split {_ONLY_SPLIT!r}.")
    qrels = {
        split: [_qrels_table(path, options, notes) for path in paths]
        for split, paths in by_split(_by_name(judged, f"{QRELS}."), str(folder)).items()
    }
    corpus, queries = (
        {split: _tables(paths, options, notes) for split, paths in by_split(_by_name(parts[part]), str(folder)).items()}
        for part in (CORPUS, QUERIES)
    )
    return Collection(folder.resolve().name, "BEIR folder", corpus, queries, qrels, notes=notes)


def _by_name(paths: Iterable[Path], prefix: str = "") -> dict[str, list[Path]]:
    """Name of a split -> its files. Shards whose names are numbers have the name of their folder."""
    found: dict[str, list[Path]] = {}
    for path in paths:
        name = _stem(path).removeprefix(prefix)
        name = path.parent.name if name.isdecimal() else _ONLY_SPLIT if name == QRELS else name
        found.setdefault(name, []).append(path)
    return found


def _rows_by_split(entries: dict[str, list[Path]], folder: Path) -> dict[str, list[Path]]:
    """Split -> files of rows, for the splits that the names of files say; they may be in the folder "data"."""
    found = dict(entries)
    if not any(split_name(name) in SPLITS for name in entries):
        found = _by_name(path for name in ("data", "default") for path in entries.get(name, []))
    rows = {
        name: [path for path in paths if _kind(path) in _KINDS]
        for name, paths in found.items()
        if split_name(name) in SPLITS
    }
    return by_split({name: paths for name, paths in rows.items() if paths}, str(folder))


def _tables(paths: Iterable[Path], options: DataOptions, notes: list[str]) -> list[Table]:
    asked = options.columns()
    return [Table(str(path), partial(file_rows, path, options.encoding, notes, asked)) for path in paths]


def _qrels_table(path: Path, options: DataOptions, notes: list[str]) -> Table:
    if _kind(path) in _TEXT_QRELS:
        return Table(str(path), partial(qrels_lines, path, options.encoding, notes))
    return _tables([path], options, notes)[0]


def _unread(folder: Path, paths: Iterable[Path]) -> list[str]:
    """A note if files of a folder are not read, other than the ones that describe it."""
    names = {str(path.relative_to(folder)) for path in paths if path.suffix.lower() not in (".md", ".txt", ".py")}
    return [f"{folder}: files that are not read: {quoted(names)}."] if names else []


def _advice(folder: Path, entries: dict[str, list[Path]]) -> str:
    """Why a folder has nothing to read, and what to give instead."""
    below = [path for path in sorted(folder.iterdir()) if path.is_dir() and _is_readable(path)]
    rows = [path for path in _files_of_rows(entries) if path.parent == folder]
    advice = f"{folder} holds no dataset. Expected {LAYOUTS}. It has: {quoted(entries) or 'nothing'}."
    if below:
        return f"{advice} Did you mean {below[0]}?"
    if rows:
        return f"{advice} Give one of the files: {rows[0]}."
    if texts := find_text_files(folder):
        search = f"{SEARCH} {shlex.quote(str(folder))}"
        return f"{folder} has {counted(len(texts), 'text file')} and no dataset. {NEEDS_PAIRS}{search}"
    return advice


def _is_readable(folder: Path) -> bool:
    entries = _entries(folder)
    return is_msmarco(folder) or bool({CORPUS, QUERIES} <= entries.keys() or _rows_by_split(entries, folder))
