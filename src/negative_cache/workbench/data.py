"""Retrieval data: from a name, a folder in BEIR layout or a file of pairs to corpus, queries and judgements."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from negative_cache.workbench import python_code

SPLITS = ("train", "dev", "test")
QUERY_COLUMNS = ("query", "anchor", "question")
POSITIVE_COLUMNS = ("positive", "document", "answer", "passage")


class DataError(ValueError):
    """Data that cannot be used, with the file and line where there is one."""


@dataclass(frozen=True)
class RetrievalData:
    """A retrieval set.

    Attributes:
        name: What to call it.
        corpus: Document id -> text.
        queries: Query id -> text, of all splits.
        qrels: Split -> query id -> ids of its relevant documents, in the order of the file.
    """

    name: str
    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, list[str]]]

    def judged(self, split: str) -> dict[str, list[str]]:
        """Judgements of a split, or of "all" of them together; `DataError` if there are none."""
        if split == "all":
            together: dict[str, list[str]] = {}
            for qrels in self.qrels.values():
                for query, documents in qrels.items():
                    together[query] = list(dict.fromkeys([*together.get(query, []), *documents]))
            return together
        if not self.qrels.get(split):
            have = [name for name, qrels in self.qrels.items() if qrels]
            raise DataError(
                f"{self.name} has no queries in the split {split!r}; it has {have}. A file of pairs is split "
                "by document, 85 : 5 : 10, and needs some 50 of them. A BEIR folder needs the file of the split in "
                "qrels. train and compare measure on the split test; evaluate takes --split."
            )
        return self.qrels[split]

    def training_columns(self) -> dict[str, list[Any]]:
        """Columns anchor, positive and label, one row per judged pair of the training split.

        A label is the list of the numbers of all relevant documents of the query, the row's own document first,
        filled up with -1.
        """
        numbers = {document: number for number, document in enumerate(self.corpus)}
        train = self.judged("train")
        width = max(len(documents) for documents in train.values())
        columns: dict[str, list[Any]] = {"anchor": [], "positive": [], "label": []}
        for query, documents in train.items():
            for document in documents:
                others = [numbers[other] for other in documents if other != document]
                columns["anchor"].append(self.queries[query])
                columns["positive"].append(self.corpus[document])
                columns["label"].append([numbers[document], *others, *[-1] * (width - 1 - len(others))])
        return columns


def load_data(source: str, query_column: str | None = None, positive_column: str | None = None) -> RetrievalData:
    """Load a retrieval set.

    Args:
        source: `python-code`; a folder in BEIR layout; a .jsonl, .csv, .tsv or .parquet file of pairs (also .gz
            for the first three); or `hf:NAME`, a data set of pairs that the datasets library finds.
        query_column: Column of the queries in pairs; by default query, anchor or question.
        positive_column: Column of the documents; by default positive, document, answer or passage.

    Raises:
        DataError: What is wrong, with file and line.
    """
    if source.startswith("hf:"):
        return _from_rows(source, _hub_rows(source[3:]), query_column, positive_column)
    path = Path(source)
    if path.is_dir() or source == "python-code":
        for option, column in (("--query-column", query_column), ("--positive-column", positive_column)):
            if column is not None:
                raise DataError(f"{option} {column!r} is for files of pairs; {source!r} has no columns. Leave it out.")
    if source == "python-code":
        return _load_python_code()
    if path.is_dir():
        return _load_beir(path)
    if path.is_file():
        return _from_rows(path.name.split(".")[0], _file_rows(path), query_column, positive_column)
    raise DataError(
        f"{source!r} is no file, no folder and not 'python-code'. Give a folder in BEIR layout, a .jsonl, .csv, "
        ".tsv or .parquet file of pairs, hf:NAME, or python-code."
    )


def _load_python_code() -> RetrievalData:
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "negative-cache"
    path = folder / f"python-code-{python_code.fingerprint()}.json"
    if not path.exists():
        splits = {split: [list(pair) for pair in pairs] for split, pairs in python_code.build().items()}
        folder.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text(json.dumps(splits), encoding="utf-8")
        beside.replace(path)
    splits = json.loads(path.read_text(encoding="utf-8"))
    return RetrievalData(
        name="python-code",
        corpus={name: document for pairs in splits.values() for name, _, document in pairs},
        queries={name: query for pairs in splits.values() for name, query, _ in pairs},
        qrels={split: {name: [name] for name, _, _ in pairs} for split, pairs in splits.items()},
    )


def _load_beir(folder: Path) -> RetrievalData:
    corpus = dict(_texts(_existing(folder, "corpus.jsonl")))
    queries = dict(_texts(_existing(folder, "queries.jsonl")))
    qrels = {}
    for split in SPLITS:
        path = folder / "qrels" / f"{split}.tsv"
        qrels[split] = _load_qrels(path, corpus, queries) if path.exists() else {}
    if not any(qrels.values()):
        raise DataError(f"{folder / 'qrels'} has none of train.tsv, dev.tsv and test.tsv with judgements.")
    return RetrievalData(folder.resolve().name, corpus, queries, qrels)


def _existing(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise DataError(f"{folder} has no {name} or {name}.gz; expected corpus.jsonl, queries.jsonl and qrels/*.tsv.")


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """(id, title and text) per line."""
    seen = set()
    for line, row in _json_rows(path):
        key, text = row.get("_id", row.get("id")), row.get("text")
        if not isinstance(key, str | int) or not isinstance(text, str):
            raise DataError(f"{path}, line {line}: expected the keys 'id' (or '_id') and 'text', got {sorted(row)}.")
        key = str(key)
        if key in seen:
            raise DataError(f"{path}, line {line}: the id {key!r} occurs twice.")
        seen.add(key)
        title = row.get("title") or ""
        yield key, f"{title}\n{text}" if title else text


def _load_qrels(path: Path, corpus: dict[str, str], queries: dict[str, str]) -> dict[str, list[str]]:
    qrels: dict[str, list[str]] = {}
    for line, text in _lines(path):
        fields = text.split("\t")
        if line == 1 and fields[0] in ("query-id", "query_id", "qid"):
            continue
        if len(fields) < 2 or (len(fields) > 2 and not re.fullmatch(r"-?\d+", fields[2].strip())):
            raise DataError(
                f"{path}, line {line}: expected query id, document id and integer score between tabs, got {text!r}."
            )
        query, document = fields[0], fields[1]
        for key, known, name in ((query, queries, "queries"), (document, corpus, "the corpus")):
            if key not in known:
                raise DataError(f"{path}, line {line}: the id {key!r} is not in {name}.")
        if len(fields) > 2 and int(fields[2]) <= 0:
            continue
        if document not in qrels.setdefault(query, []):
            qrels[query].append(document)
    return {query: documents for query, documents in qrels.items() if documents}


def _from_rows(
    name: str, rows: Iterator[tuple[str, dict[str, Any]]], query_column: str | None, positive_column: str | None
) -> RetrievalData:
    """Pairs with equal queries have several positives; documents (with their queries) are held out together."""
    documents: dict[str, str] = {}
    positives: dict[str, list[str]] = {}
    for where, row in rows:
        query = _field(row, where, query_column, QUERY_COLUMNS, "--query-column")
        positive = _field(row, where, positive_column, POSITIVE_COLUMNS, "--positive-column")
        document = documents.setdefault(positive, f"d{len(documents)}")
        relevant = positives.setdefault(query, [])
        if document not in relevant:
            relevant.append(document)
    if not documents:
        raise DataError(f"{name} has no pairs.")
    texts = {document: text for text, document in documents.items()}
    queries = {f"q{number}": query for number, query in enumerate(positives)}
    qrels: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
    groups = _Groups()
    for relevant in positives.values():
        for document in relevant:
            groups.join(relevant[0], document)
    for key, query in queries.items():
        relevant = positives[query]
        qrels[_split_of(texts[groups.root(relevant[0])])][key] = relevant
    return RetrievalData(name, texts, queries, qrels)


def _field(row: dict[str, Any], where: str, given: str | None, usual: tuple[str, ...], flag: str) -> str:
    for column in (given,) if given else usual:
        value = row.get(column)
        if isinstance(value, str) and value.strip():
            return value
        if column in row:
            raise DataError(f"{where}: the column {column!r} is empty or no text.")
    raise DataError(
        f"{where}: no column {given or ' or '.join(usual)}, only {sorted(map(str, row))}. Name it with {flag}."
    )


class _Groups:
    """Documents that share a query, so that no document is in two splits."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def root(self, key: str) -> str:
        while (parent := self._parent.get(key, key)) != key:
            self._parent[key] = self._parent.get(parent, parent)
            key = parent
        return key

    def join(self, a: str, b: str) -> None:
        a, b = self.root(a), self.root(b)
        self._parent[max(a, b)] = min(a, b)


def _split_of(text: str) -> str:
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    return "test" if share < 10 else "dev" if share < 15 else "train"


def _file_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    kind = path.name.lower().removesuffix(".gz").rsplit(".", 1)[-1]
    if kind in ("jsonl", "json"):
        for line, row in _json_rows(path):
            yield f"{path}, line {line}", row
    elif kind in ("csv", "tsv"):
        yield from _table_rows(path, "," if kind == "csv" else "\t")
    elif kind == "parquet":
        yield from _parquet_rows(path)
    else:
        raise DataError(f"{path}: unknown kind of file; expected .jsonl, .csv, .tsv or .parquet.")


def _table_rows(path: Path, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(2**30)
    with _open(path) as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{where}: expected {len(reader.fieldnames or [])} columns as in the first line.")
                yield where, row
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 ({error}). Save it as UTF-8.") from error
        except (csv.Error, OSError, EOFError) as error:
            raise DataError(f"{path}, after line {reader.line_num}: {error}.") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except Exception as error:
        raise DataError(f"{path}: not readable as parquet: {error}") from error
    for number, row in enumerate(rows):
        yield f"{path}, row {number}", row


def _hub_rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, split="train")
    except Exception as error:
        raise DataError(f"The datasets library cannot load {name!r}: {error}") from error
    for number, row in enumerate(loaded):
        yield f"{name}, row {number}", row


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in _lines(path):
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {line}: not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {line}: expected a JSON object, got {type(row).__name__}.")
        yield line, row


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank."""
    with _open(path) as file:
        number = 0
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 ({error}). Save it as UTF-8.") from error
        except (OSError, EOFError) as error:
            raise DataError(f"{path}, after line {number}: not readable: {error}.") from error


def _open(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")
