"""Which split a text belongs to, and the splits of a file of pairs."""

from __future__ import annotations

import hashlib
from typing import Any

from negative_cache.workbench.data.reading import Rows, quoted, text_in
from negative_cache.workbench.data.retrieval_data import SPLITS, DataError, RetrievalData

QUERY_COLUMNS = ("query", "anchor", "question")
POSITIVE_COLUMNS = ("positive", "document", "answer", "passage")
TEST_PERCENT, DEV_PERCENT = 10, 5


def hash_of(text: str) -> int:
    """A number from 0 to 2**64 - 1 that is the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_of(text: str, dev_percent: int = DEV_PERCENT) -> str:
    """The split that the hash of a text falls into."""
    percentile = hash_of(text) % 100
    return "test" if percentile < TEST_PERCENT else "dev" if percentile < TEST_PERCENT + dev_percent else "train"


def from_pairs(name: str, rows: Rows, query_column: str | None, positive_column: str | None) -> RetrievalData:
    """A dataset from pairs of a query and a relevant document.

    Pairs with the same query are one query with several positives. Documents that share a query are in the same split.
    """
    documents: dict[str, str] = {}
    positives: dict[str, list[str]] = {}
    used: set[str] = set()
    found: set[str] = set()
    for place, row in rows:
        columns = (
            _column(row, place, query_column, QUERY_COLUMNS, "--query-column"),
            _column(row, place, positive_column, POSITIVE_COLUMNS, "--positive-column"),
        )
        used.update(columns)
        found |= row.keys()
        query, positive = (text_in(row, column, place) for column in columns)
        document = documents.setdefault(positive, f"d{len(documents)}")
        relevant = positives.setdefault(query, [])
        if document not in relevant:
            relevant.append(document)
    if not documents:
        raise DataError(f"{name} has no pairs.")
    groups = Groups()
    for relevant in positives.values():
        for document in relevant:
            groups.join(relevant[0], document)
    corpus = {document: text for text, document in documents.items()}
    queries = {f"q{number}": query for number, query in enumerate(positives)}
    qrels: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
    for key, relevant in zip(queries, positives.values(), strict=True):
        qrels[split_of(corpus[groups.root(relevant[0])])][key] = relevant
    return RetrievalData(name, corpus, queries, qrels, _notes(name, used, found - used), splits_by_hash=True)


def _column(row: dict[str, Any], place: str, given: str | None, usual: tuple[str, ...], option: str) -> str:
    """The column that a text is read from: the one that an option names, or the first of the usual ones."""
    for column in (given,) if given else usual:
        if column in row:
            return column
    raise DataError(
        f"{place}: no column {given or ' or '.join(usual)}, only {quoted(row)}. Name the column with {option}. The "
        "first line of a .csv or .tsv file has the names of the columns."
    )


def _notes(name: str, used: set[str], unused: set[str]) -> tuple[str, ...]:
    if not unused:
        return ()
    note = f"{name}: columns that are read: {quoted(used)}; not used: {quoted(unused)}."
    if any("negative" in str(column).lower() for column in unused):
        note += (
            " No command trains with negatives from a file; NegativeCacheRankingLoss does, with the columns (anchor, "
            "positive, negative, ...)."
        )
    return (note,)


class Groups:
    """Disjoint sets of documents."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def root(self, key: str) -> str:
        """The smallest id in the set of a document."""
        while (parent := self._parent.get(key, key)) != key:
            self._parent[key] = self._parent.get(parent, parent)
            key = parent
        return key

    def join(self, a: str, b: str) -> None:
        """Unite the sets of two documents."""
        a, b = self.root(a), self.root(b)
        self._parent[max(a, b)] = min(a, b)
