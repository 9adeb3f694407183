"""Datasets in the layout of the BEIR benchmark."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from negative_cache.workbench.data.columns import quoted
from negative_cache.workbench.data.reading import json_rows, lines, text_in
from negative_cache.workbench.data.retrieval_data import SPLITS, DataError, RetrievalData

_KEYS = {"_id", "id", "title", "text", "metadata"}  # BEIR has metadata that no command uses
_HEADINGS = ("query-id", "query_id", "qid")  # of the first column
_ITERATIONS = (["0"], ["Q0"])  # the second column of TREC files, which has no meaning


def load_beir(folder: Path) -> RetrievalData:
    """Load corpus.jsonl, queries.jsonl and qrels/*.tsv from a folder."""
    corpus, unused_in_corpus = _texts(_existing(folder, "corpus.jsonl"))
    queries, unused_in_queries = _texts(_existing(folder, "queries.jsonl"))
    skipped: dict[str, list[str]] = {}
    qrels = {}
    for split in SPLITS:
        path = folder / "qrels" / f"{split}.tsv"
        qrels[split] = _load_qrels(path, corpus, queries, skipped) if path.exists() else {}
    notes = [*unused_in_corpus, *unused_in_queries, *_unread(folder / "qrels"), *_skipped(folder, skipped)]
    if not any(qrels.values()):
        reason = " ".join(["has no judgements in train.tsv, dev.tsv or test.tsv.", *notes])
        raise DataError(f"{folder / 'qrels'} {reason}")
    return RetrievalData(folder.resolve().name, corpus, queries, qrels, tuple(notes))


def _existing(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise DataError(f"{folder} has no {name} or {name}.gz; expected corpus.jsonl, queries.jsonl and qrels/*.tsv.")


def _texts(path: Path) -> tuple[dict[str, str], list[str]]:
    """Id -> text, which begins with the title; and a note if there are keys that are not used."""
    texts: dict[str, str] = {}
    unused: set[str] = set()
    for place, row in json_rows(path):
        key = _id(row, place)
        if key in texts:
            raise DataError(f"{place}: the id {key!r} occurs twice.")
        texts[key] = _text(row, place)
        unused |= row.keys() - _KEYS
    return texts, [f"{path}: keys that are not used: {quoted(unused)}."] if unused else []


def _id(row: dict[str, Any], place: str) -> str:
    name = "_id" if "_id" in row or "id" not in row else "id"
    value = row.get(name)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else text_in(row, name, place)


def _text(row: dict[str, Any], place: str) -> str:
    """The title, if there is one, and the text, which may be empty if there is a title."""
    if row.get("title") is None or _is_blank(row["title"]):
        return text_in(row, "text", place)
    title = text_in(row, "title", place)
    return title if _is_blank(row.get("text")) else f"{title}\n{text_in(row, 'text', place)}"


def _is_blank(value: object) -> bool:
    return isinstance(value, str) and not value.strip()


def _load_qrels(
    path: Path, corpus: dict[str, str], queries: dict[str, str], skipped: dict[str, list[str]]
) -> dict[str, list[str]]:
    """Query id -> ids of the relevant documents. Adds the places of skipped judgements, by reason, to `skipped`."""
    qrels: dict[str, list[str]] = {}
    for place, query, document, grade in _judgements(path):
        if grade <= 0:
            continue
        if query not in queries:
            skipped.setdefault("queries that are not in queries.jsonl", []).append(place)
        elif document not in corpus:
            skipped.setdefault("documents that are not in the corpus", []).append(place)
        elif document not in qrels.setdefault(query, []):
            qrels[query].append(document)
    return qrels


def _judgements(path: Path) -> Iterator[tuple[str, str, str, int]]:
    """Place, query id, document id and grade, from lines of BEIR (3 columns) or TREC (4 columns)."""
    delimiter, width = None, 0
    for number, (place, text) in enumerate(lines(path)):
        if number == 0:
            delimiter = "\t" if "\t" in text else None  # None: any number of blanks
            width = len(text.split(delimiter))
        fields = text.split(delimiter)
        is_heading = number == 0 and fields[0] in _HEADINGS
        is_trec = width == 4 and (is_heading or fields[1:2] in _ITERATIONS)
        is_wide = len(fields) == width and (width == 3 or is_trec)
        if is_wide and is_heading:
            continue
        if not is_wide or not re.fullmatch(r"-?\d+", fields[-1].strip()):
            raise DataError(
                f"{place}: expected 3 columns (query id, document id, integer score) or 4 (TREC: query id, 0 or Q0, "
                "document id, integer grade), separated by tabs or blanks, the same number in every line; got "
                f"{len(fields)}: {text!r}. The first column of a heading is {', '.join(_HEADINGS)}."
            )
        yield place, fields[0], fields[-2], int(fields[-1])


def _unread(folder: Path) -> list[str]:
    """A note if a folder of judgements has files that are not read."""
    read = {f"{split}.tsv" for split in SPLITS}
    names = {path.name for path in folder.glob("*") if not path.name.startswith(".")} - read
    if not names:
        return []
    return [f"{folder}: files other than train.tsv, dev.tsv and test.tsv are not read: {quoted(names)}."]


def _skipped(folder: Path, skipped: dict[str, list[str]]) -> list[str]:
    """A note of the judgements that were skipped, if there are any."""
    if not skipped:
        return []
    parts = [f"{len(places):,} of {what} (first: {places[0]})" for what, places in sorted(skipped.items())]
    return [f"{folder}: skipped judgements: {', '.join(parts)}."]
