"""`RetrievalData`: the corpus, queries and relevance judgements of a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

SPLITS = ("train", "dev", "test")
NO_DOCUMENT = -1


class DataError(ValueError):
    """Data that cannot be used. The message names the file and the line, if there is one."""


@dataclass(frozen=True)
class RetrievalData:
    """A retrieval dataset.

    Attributes:
        name: Its name in messages and tables.
        corpus: Document id -> text.
        queries: Query id -> text, of all splits.
        qrels: Split -> query id -> ids of the relevant documents, in the order of the file.
        notes: What was skipped or is not used, one line each.
        ignores_identical_ids: Whether a document with the id of a query is neither a result nor a negative of it.
    """

    name: str
    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, list[str]]]
    notes: tuple[str, ...] = ()
    ignores_identical_ids: bool = False

    def ignoring_identical_ids(self) -> RetrievalData:
        """The same data with `ignores_identical_ids`, and without judgements of a document with the id of its query.

        Raises:
            DataError: No query has the id of a document, or all judgements are of such documents.
        """
        if self.ignores_identical_ids:
            return self
        identical = self.queries.keys() & self.corpus.keys()
        if not identical:
            raise DataError(
                f"--ignore-identical-ids has no effect on {self.name}: no query has the id of a document. Queries have "
                f"ids such as {next(iter(self.queries), None)!r}, documents {next(iter(self.corpus), None)!r}. Leave "
                "it out."
            )
        kept = {
            split: {query: others for query, documents in qrels.items() if (others := _without(query, documents))}
            for split, qrels in self.qrels.items()
        }
        num_removed = sum(query in documents for qrels in self.qrels.values() for query, documents in qrels.items())
        if not any(kept.values()):
            raise DataError(
                f"--ignore-identical-ids leaves no judgement of {self.name}: each relevant document has the id of its "
                "query. Leave it out."
            )
        note = (
            f"{self.name}: for {len(identical):,} of {len(self.queries):,} queries, the document with the same id is "
        )
        note += "ignored" + (f"; skipped judgements of such documents: {num_removed:,}." if num_removed else ".")
        return replace(self, qrels=kept, notes=(*self.notes, note), ignores_identical_ids=True)

    def ignored(self, query: str) -> str | None:
        """The document that is neither a result nor a negative of a query because it has its id; None if none is."""
        return query if self.ignores_identical_ids and query in self.corpus else None

    def never_negative(self, query: str, relevant: list[str]) -> list[str]:
        """Documents that are never negatives of a query: the relevant ones, then the ignored one, if there is one."""
        ignored = self.ignored(query)
        return relevant if ignored is None else [*relevant, ignored]

    def judged(self, split: str) -> dict[str, list[str]]:
        """Judgements of a split, or of all splits together for "all".

        Raises:
            DataError: The split has no judgements.
        """
        if split == "all":
            together: dict[str, list[str]] = {}
            for qrels in self.qrels.values():
                for query, documents in qrels.items():
                    together[query] = list(dict.fromkeys([*together.get(query, []), *documents]))
            return together
        if not self.qrels.get(split):
            available = [name for name, qrels in self.qrels.items() if qrels]
            raise DataError(
                f"{self.name} has no queries in the split {split!r}; it has {available}. A file of pairs is split "
                "by document, 85 : 5 : 10, and needs about 50 documents. A BEIR folder needs a file for the split in "
                "qrels. train and compare measure on the test split; evaluate has the option --split."
            )
        return self.qrels[split]

    def labels(self) -> dict[str, int]:
        """Document id -> its position in the corpus; for equal texts, that of the first of them."""
        first: dict[str, int] = {}
        return {name: first.setdefault(text, position) for position, (name, text) in enumerate(self.corpus.items())}

    def training_columns(self) -> dict[str, list[Any]]:
        """Columns anchor, positive and label, with one row per judged pair of the training split.

        A label lists the `labels` of the documents that are not negatives of the query, the positive of the row first,
        padded with -1.
        """
        positions = self.labels()
        columns: dict[str, list[Any]] = {"anchor": [], "positive": [], "label": []}
        for query, documents in self.judged("train").items():
            known = self.never_negative(query, documents)
            for document in documents:
                others = [positions[other] for other in _without(document, known)]
                columns["anchor"].append(self.queries[query])
                columns["positive"].append(self.corpus[document])
                columns["label"].append([positions[document], *others])
        columns["label"] = padded(columns["label"])
        return columns


def padded(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Pad rows with -1 to the same length."""
    width = max(map(len, rows))
    return [[*row, *[NO_DOCUMENT] * (width - len(row))] for row in rows]


def _without(left_out: str, documents: list[str]) -> list[str]:
    return [document for document in documents if document != left_out]
