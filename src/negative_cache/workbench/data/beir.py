"""Datasets in the layout of the BEIR benchmark."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from negative_cache.workbench.data.reading import json_rows, lines
from negative_cache.workbench.data.retrieval_data import SPLITS, DataError, RetrievalData

_HEADINGS = ("query-id", "query_id", "qid")  # of the first column


def load_beir(folder: Path) -> RetrievalData:
    """Load corpus.jsonl, queries.jsonl and qrels/*.tsv from a folder."""
    corpus = dict(_texts(_existing(folder, "corpus.jsonl")))
    queries = dict(_texts(_existing(folder, "queries.jsonl")))
    qrels = {}
    for split in SPLITS:
        path = folder / "qrels" / f"{split}.tsv"
        qrels[split] = _load_qrels(path, corpus, queries) if path.exists() else {}
    if not any(qrels.values()):
        raise DataError(f"{folder / 'qrels'} has no judgements in train.tsv, dev.tsv or test.tsv.")
    return RetrievalData(folder.resolve().name, corpus, queries, qrels)


def _existing(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise DataError(f"{folder} has no {name} or {name}.gz; expected corpus.jsonl, queries.jsonl and qrels/*.tsv.")


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """Pairs of an id and a text, which begins with the title."""
    seen = set()
    for place, row in json_rows(path):
        key, text = row.get("_id", row.get("id")), row.get("text")
        if not isinstance(key, str | int) or not isinstance(text, str):
            raise DataError(f"{place}: expected the keys 'id' (or '_id') and 'text', got {sorted(row)}.")
        key = str(key)
        if key in seen:
            raise DataError(f"{place}: the id {key!r} occurs twice.")
        seen.add(key)
        title = row.get("title") or ""
        yield key, f"{title}\n{text}" if title else text


def _load_qrels(path: Path, corpus: dict[str, str], queries: dict[str, str]) -> dict[str, list[str]]:
    qrels: dict[str, list[str]] = {}
    for number, (place, text) in enumerate(lines(path)):
        fields = text.split("\t")
        if number == 0 and fields[0] in _HEADINGS:
            continue
        if len(fields) < 2 or (len(fields) > 2 and not re.fullmatch(r"-?\d+", fields[2].strip())):
            raise DataError(
                f"{place}: expected query id, document id and integer score, separated by tabs, got {text!r}."
            )
        query, document = fields[0], fields[1]
        for key, known, name in ((query, queries, "queries"), (document, corpus, "the corpus")):
            if key not in known:
                raise DataError(f"{place}: the id {key!r} is not in {name}.")
        if len(fields) > 2 and int(fields[2]) <= 0:
            continue
        if document not in qrels.setdefault(query, []):
            qrels[query].append(document)
    return {query: documents for query, documents in qrels.items() if documents}
