"""`Row`: a query with its documents, which all forms of rows are converted to, and the dataset that rows make up."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pyarrow

from negative_cache.workbench.data.retrieval_data import SPLITS, DataError, RetrievalData, without_relevant
from negative_cache.workbench.data.splits import Groups, split_of
from negative_cache.workbench.data.texts import ArrowWriter, IdsByText, Texts

_BY_HASH = ""  # in place of a split
_NO_POSITIVE = "queries without a relevant document"
_OTHER_GRADE = "judgements of a document that has a higher grade in another row"


class Document(NamedTuple):
    """A document of a row.

    Attributes:
        text: The text, with its title; None for the document of a corpus that has the id.
        id: The id; None for one that is made of the text. If the rows refer to a corpus, the text is the id then.
        grade: How relevant it is, above 0, if it is a positive.
    """

    text: str | None
    id: str | None = None
    grade: float = 1.0


class Row(NamedTuple):
    """A query with its documents.

    Attributes:
        place: Where the row is, such as "FILE, line 3", for messages.
        query: The text of the query, with its prompt.
        positives: The relevant documents; none if the row has negatives alone, such as a pair with the label 0.
        negatives: Documents that are not relevant. Their number may differ from row to row.
        query_id: The id of the query; None for one that is made of the text.
    """

    place: str
    query: str
    positives: Sequence[Document]
    negatives: Sequence[Document] = ()
    query_id: str | None = None


class Collector:
    """Collects rows. Rows of the same query are one query with several documents.

    The corpus has the documents of all rows, negatives that are not kept included: how many are kept does not change
    what is searched.

    Args:
        corpus: The documents that rows refer to by id; None if the rows have their texts.
        most_negatives: Keep the first negatives of a query, at most this number; None to keep all.
    """

    def __init__(self, corpus: Texts | None = None, most_negatives: int | None = None) -> None:
        self._corpus = corpus
        self._most_negatives = most_negatives
        self._ids_by_text: IdsByText | None = None  # of the corpus
        self._num_by_text = 0
        self._queries = _Distinct("q")
        self._documents = _Distinct("d")
        self._positives: dict[str, dict[str, list[str]]] = {}
        self._grades: dict[str, dict[str, dict[str, float]]] = {}  # of queries with another grade than 1
        self._num_other_grades = 0
        self._negatives: dict[str, list[str]] = {}

    def add(self, row: Row, split: str | None = None) -> None:
        """Add a row to a split; with None, to the split that the hash of its documents falls into.

        Raises:
            DataError: An id has two texts, or an id or a text names no document of the corpus.
        """
        query = self._queries.add(row.query, row.query_id, row.place)
        split = split or _BY_HASH
        relevant = self._positives.setdefault(split, {}).setdefault(query, [])
        positives = [self._document(document, row.place) for document in row.positives]
        self._add_grades(split, query, positives, [document.grade for document in row.positives])
        relevant.extend(positives)
        if row.negatives:
            others = self._negatives.setdefault(query, [])
            others.extend(self._document(document, row.place) for document in row.negatives)

    def finish(
        self, name: str, form: str, notes: Sequence[str] = (), skipped: dict[str, int] | None = None
    ) -> RetrievalData:
        """The dataset of all rows.

        A document that is a positive of a query in any row is not a negative of it. A query without a positive in any
        row has neither judgements nor negatives, and is counted in `skipped`.
        """
        corpus = self._documents.texts() if self._corpus is None else self._corpus
        queries = self._queries.texts()
        qrels: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
        groups = Groups()
        skipped = dict(skipped or {})
        if self._num_other_grades:
            skipped[_OTHER_GRADE] = self._num_other_grades
        if self._num_by_text:
            notes = [*notes, f"{name}: documents that rows give by their text in the corpus: {self._num_by_text:,}."]
        if number := self._num_repeated():
            notes = [*notes, f"{name}: pairs that repeat an earlier one, and count once: {number:,}."]
        for by_query in (*self._positives.values(), self._negatives):
            for query, documents in by_query.items():
                by_query[query] = list(dict.fromkeys(documents))
        for positives in self._positives.values():
            for query in [query for query, documents in positives.items() if not documents]:
                del positives[query]
                skipped[_NO_POSITIVE] = skipped.get(_NO_POSITIVE, 0) + 1
        unassigned = self._positives.pop(_BY_HASH, {})
        for documents in unassigned.values():
            for document in documents[1:]:
                groups.join(documents[0], document)
        for query, documents in unassigned.items():
            qrels[split_of(corpus[groups.root(documents[0])])][query] = documents
        for split, positives in self._positives.items():
            qrels.setdefault(split, {}).update(positives)
        grades = self._grades_of(qrels)
        negatives = without_relevant(self._negatives, qrels.values())
        kept = {query: others[: self._most_negatives] for query, others in negatives.items()}
        if num_left_out := sum(len(others) - len(kept[query]) for query, others in negatives.items()):
            how = self._most_negatives or "ignore"
            notes = [*notes, f"{name}: negatives that are not used (--negatives {how}): {num_left_out:,}."]
        return RetrievalData(
            name, corpus, queries, qrels, tuple(notes), grades=grades,
            negatives={query: others for query, others in kept.items() if others}, form=form, skipped=skipped,
            splits_by_hash=bool(unassigned),
        )  # fmt: skip

    def _add_grades(self, split: str, query: str, documents: Sequence[str], grades: Sequence[float]) -> None:
        """Keep the grades of documents of a query, each the highest; none while all grades of the query are 1."""
        by_query = self._grades.setdefault(split, {})
        known = by_query.get(query)
        if known is None:
            if all(grade == 1 for grade in grades):
                return
            known = by_query[query] = dict.fromkeys(self._positives[split][query], 1.0)
        for document, grade in zip(documents, grades, strict=True):
            before = known.setdefault(document, grade)
            self._num_other_grades += before != grade
            known[document] = max(before, grade)

    def _grades_of(self, qrels: Mapping[str, Mapping[str, Sequence[str]]]) -> dict[str, dict[str, dict[str, float]]]:
        """Split -> query -> document -> grade, of queries that have another grade than 1."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for split, by_query in qrels.items():
            grades = self._grades.get(split, {}) | self._grades.get(_BY_HASH, {})
            graded = {query: grades[query] for query in by_query if query in grades}
            if graded:
                found[split] = graded
        return found

    def _num_repeated(self) -> int:
        """The number of pairs that repeat an earlier one, without those that have negatives and may differ in these."""
        return sum(
            len(documents) - len(set(documents))
            for positives in self._positives.values()
            for query, documents in positives.items()
            if query not in self._negatives
        )

    def _document(self, document: Document, place: str) -> str:
        if self._corpus is None and document.text is not None:
            return self._documents.add(document.text, document.id, place)
        if self._corpus is None:
            raise DataError(
                f"{place}: the document {document.id!r} is given by its id alone. Give the file or folder of the "
                "documents with --corpus."
            )
        key = document.text if document.id is None else document.id
        if key is not None and key in self._corpus:
            return key
        if self._ids_by_text is None:
            self._ids_by_text = IdsByText(self._corpus)
        text = document.id if document.text is None else document.text
        own = None if text is None else self._ids_by_text.find(text)
        if own is None:
            raise DataError(
                f"{place}: the corpus has no document with the id or the text {(key or '')[:60]!r}. Rows name "
                "documents by id if there is a corpus. Add the document to the corpus; or, if the rows have texts, "
                "leave out --corpus."
            )
        self._num_by_text += 1
        return own


def most_negatives(given: str) -> int | None:
    """The largest number of negatives of a query; None for all.

    Raises:
        DataError: It is not "all", not "ignore" and not a positive number.
    """
    if given == "all":
        return None
    if given == "ignore":
        return 0
    if not given.isdecimal() or int(given) == 0:
        raise DataError(f"--negatives is {given!r}; expected all, ignore or a number of at least 1.")
    return int(given)


class _Distinct:
    """Distinct texts, each with an id.

    A text without an id gets a prefix and a hash of the text. It has the same id in each file and in any order of the
    rows, so that results of one file can be compared with those of another.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._hashes: dict[str, bytes] = {}  # of the texts, by id
        self._writer = ArrowWriter({"id": pyarrow.string(), "text": pyarrow.string()})

    def add(self, text: str, key: str | None, place: str) -> str:
        """The id of a text, which is written if it is new.

        Raises:
            DataError: The id has another text.
        """
        found = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if key is None:
            key = f"{self._prefix}{found[:8].hex()}"
        saved = self._hashes.get(key)
        if saved is None:
            self._hashes[key] = found
            self._writer.add(key, text)
        elif saved != found:
            raise DataError(f"{place}: the id {key!r} has another text than before: {text[:60]!r}.")
        return key

    def texts(self) -> Texts:
        """All texts. No more can be added."""
        self._hashes = {}
        return Texts(self._writer.finish())
