"""`RetrievalData`: the corpus, queries and relevance judgements of a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from negative_cache.workbench.data.texts import Texts

SPLITS = ("train", "dev", "test")
NO_DOCUMENT = -1


class DataError(ValueError):
    """Data that cannot be used. The message names the file and the line, if there is one."""


@dataclass(frozen=True)
class RetrievalData:
    """A retrieval dataset.

    Attributes:
        name: Its name in messages and tables.
        corpus: Document id -> text; `Texts`, whatever mapping is given.
        queries: Query id -> text, of all splits; `Texts`, whatever mapping is given.
        qrels: Split -> query id -> ids of the relevant documents, which have a grade above 0, in the order of the file.
        notes: How the data was read and what is not used, one line each.
        ignores_identical_ids: Whether a document with the id of a query is neither a result nor a negative of it.
        grades: Split -> query id -> document id -> grade, for queries that have a judgement with a grade other than 1.
        negatives: Query id -> ids of documents that are given as negatives of it, the first of the file first.
        form: The form of the files, such as "BEIR folder".
        skipped: What was skipped -> how often.
        elsewhere: Split -> the dataset that has its queries and the documents they are searched in, for splits that
            are not searched in `corpus`.
        splits_by_hash: Whether the rows have no splits of their own and are split by a hash of the documents.
    """

    name: str
    corpus: Mapping[str, str]
    queries: Mapping[str, str]
    qrels: dict[str, dict[str, list[str]]]
    notes: tuple[str, ...] = ()
    ignores_identical_ids: bool = False
    grades: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    negatives: dict[str, list[str]] = field(default_factory=dict)
    form: str = ""
    skipped: dict[str, int] = field(default_factory=dict)
    elsewhere: dict[str, RetrievalData] = field(default_factory=dict)
    splits_by_hash: bool = False

    def __post_init__(self) -> None:
        for name in ("corpus", "queries"):
            object.__setattr__(self, name, Texts.of(getattr(self, name)))

    def part(self, split: str) -> RetrievalData:
        """The dataset that has the queries of a split and the documents they are searched in."""
        return self.elsewhere.get(split, self)

    def has(self, split: str) -> bool:
        """Whether a split has judgements."""
        return bool(self.part(split).qrels.get(split))

    def graded(self, split: str) -> dict[str, dict[str, float]]:
        """All judgements of a split, or of all splits for "all": query id -> document id -> grade.

        Raises:
            DataError: The split has no relevant document.
        """
        if split in self.elsewhere:
            return self.elsewhere[split].graded(split)
        judged = {query: dict.fromkeys(documents, 1.0) for query, documents in self.judged(split).items()}
        for name in self.grades if split == "all" else (split,):
            for query, grades in self.grades.get(name, {}).items():
                judged[query] = {**judged.get(query, {}), **grades}
        return judged

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
        if split in self.elsewhere:
            return self.elsewhere[split].judged(split)
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
