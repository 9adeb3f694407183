"""What a source holds, as tables: a `Collection` with judgements, or `RowTables`. Local and hub data are both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Collection as Names
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from negative_cache.workbench.data.retrieval_data import DataError

CORPUS, QUERIES, QRELS = "corpus", "queries", "qrels"
QUERY_ID, DOCUMENT_ID, GRADE = "query-id", "corpus-id", "score"
"""Columns of judgements in BEIR."""

_T = TypeVar("_T")
_DEV_NAMES = ("validation", "valid", "val")


class Table(NamedTuple):
    """Rows that can be read several times.

    Attributes:
        name: The path of the file, or the name on the hub, for messages.
        rows: Opens the table: an iterator over pairs of a place and a row.
    """

    name: str
    rows: Callable[[], Iterator[tuple[str, Any]]]


class Triples(NamedTuple):
    """Table of a query, a positive and a negative, each by its id, or each by its text."""

    table: Table
    are_ids: bool


@dataclass(frozen=True)
class Collection:
    """Documents, queries and judgements in tables of their own.

    Attributes:
        name: Name of the dataset.
        form: The layout, such as "BEIR folder".
        corpus: Tables of documents by the name of their file or of their split on the hub.
        queries: The same of queries.
        qrels: Split -> tables of its judgements.
        triples: Triples of a query, a positive and a negative.
        notes: How the tables were chosen, and what is not read.
    """

    name: str
    form: str
    corpus: dict[str, list[Table]]
    queries: dict[str, list[Table]]
    qrels: dict[str, list[Table]]
    triples: list[Triples] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def part(self, split: str) -> Collection:
        """The collection of one split, in a collection whose splits have corpora of their own.

        Raises:
            DataError: There is no such split with a corpus.
        """
        own = self.splits_with_corpora()
        if split not in own:
            raise DataError(f"{self.name} has no part {split!r}; its parts are: {', '.join(own) or 'none'}.")
        queries = {split: self.queries[split]} if split in self.queries else self.queries
        return replace(self, corpus={split: self.corpus[split]}, queries=queries, qrels={split: self.qrels[split]})

    def splits_with_corpora(self) -> list[str]:
        """Splits with a corpus of their own; none if all are searched in one corpus."""
        return [split for split in self.qrels if split in self.corpus] if len(self.corpus) > 1 else []


@dataclass(frozen=True)
class RowTables:
    """Tables of rows, each a query with its documents.

    Attributes:
        name: Name of the dataset.
        tables: Split -> its tables; None for a table that is split by hash.
        corpus: Tables of the documents that the rows refer to by id; none if the rows have their texts.
        notes: How the tables were chosen, and what is not read.
    """

    name: str
    tables: dict[str | None, list[Table]]
    corpus: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def split_name(name: str) -> str:
    """The split that a file, or a split of the hub, is for: its name, or "dev" for the names that mean the same."""
    return "dev" if name.lower() in _DEV_NAMES else name


def by_split(found: Mapping[str, _T], source: str) -> dict[str, _T]:
    """What is found by the name of a file or a split of the hub, by the split instead.

    Raises:
        DataError: Two names are the same split.
    """
    splits: dict[str, str] = {}
    for name in found:
        if splits.setdefault(split_name(name), name) != name:
            raise DataError(f"{source}: {splits[split_name(name)]!r} and {name!r} are the same split. Remove one.")
    return {split: found[name] for split, name in splits.items()}


def parts_of(names: Names[str], source: str, chosen: str | None) -> dict[str, str] | None:
    """Which of the names of files, folders or configurations is the corpus, which the queries, and which the qrels.

    Args:
        names: The names, such as "corpus", or "de-corpus" in a source with several collections.
        source: Name of the source, for messages.
        chosen: The collection to take, such as "de", or a split, if there is only one collection; None to take all.

    Returns:
        `CORPUS`, `QUERIES` and `QRELS` -> name, without a part that is missing; None if there is no collection.

    Raises:
        DataError: There are several collections, and none is chosen.
    """
    prefixes = [name.removesuffix(CORPUS) for name in sorted(names) if name.endswith(CORPUS)]
    prefixes = [prefix for prefix in prefixes if prefix + QUERIES in names]
    for prefix in (f"{chosen}-", ""):
        if prefix in prefixes:
            prefixes = [prefix]
    if not prefixes:
        return None
    if len(prefixes) > 1:
        found = ", ".join(prefix.rstrip("-") for prefix in prefixes)
        example = f"hf:{source}:{prefixes[-1].rstrip('-')}"
        raise DataError(f"{source} has several collections: {found}. Choose one: {example}.")
    (prefix,) = prefixes
    usual = (prefix + QRELS, *(("default", "data") if not prefix else (prefix.rstrip("-"),)))
    qrels = [name for name in usual if name in names]
    parts = {CORPUS: prefix + CORPUS, QUERIES: prefix + QUERIES}
    return {**parts, QRELS: qrels[0]} if qrels else parts


def narrowed(found: Collection, parts: dict[str, str], chosen: str | None) -> Collection:
    """A collection, or what is chosen of it if `parts_of` has not chosen the collection already.

    Raises:
        DataError: What is chosen is not a split with a corpus of its own.
    """
    return found if chosen is None or parts[CORPUS].startswith(f"{chosen}-") else found.part(chosen)
