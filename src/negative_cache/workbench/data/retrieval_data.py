"""`RetrievalData`: the corpus, queries and relevance judgements of a dataset."""

from __future__ import annotations

import itertools
import logging
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pyarrow

from negative_cache.workbench.counting import counted
from negative_cache.workbench.data.splits import DEV_PERCENT, hash_of
from negative_cache.workbench.data.texts import ArrowWriter, Texts

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "dev", "test")
MAX_LABELS = 1_000  # ids of relevant documents in a row of the training set
MAX_TRAINING_TEXTS = 400_000  # of a tokenizer, up to which all are used
_T = TypeVar("_T")

logger = logging.getLogger("negative_cache")


class DataError(ValueError):
    """Data that cannot be used. The message names the file and the line, if there is one."""


@dataclass(frozen=True, repr=False)
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
        eval_documents: Number of documents that the queries of a split are searched in, see `part`; None for all.
    """

    name: str
    corpus: Texts
    queries: Texts
    qrels: dict[str, dict[str, list[str]]]
    notes: tuple[str, ...] = ()
    ignores_identical_ids: bool = False
    grades: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    negatives: dict[str, list[str]] = field(default_factory=dict)
    form: str = ""
    skipped: dict[str, int] = field(default_factory=dict)
    elsewhere: dict[str, RetrievalData] = field(default_factory=dict)
    splits_by_hash: bool = False
    eval_documents: int | None = None
    _parts: dict[str, RetrievalData] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("corpus", "queries"):
            object.__setattr__(self, name, Texts.of(getattr(self, name)))

    def __repr__(self) -> str:
        """The sizes, in one line."""
        queries = ", ".join(f"{split} {len(qrels):,}" for split, qrels in self.qrels.items())
        return f"<RetrievalData {self.name!r}: {len(self.corpus):,} documents; queries: {queries or 'none'}>"

    def part(self, split: str) -> RetrievalData:
        """The dataset that has the queries of a split and the documents they are searched in.

        With `eval_documents`, these are the judged documents of the split, and the others with the lowest hashes of
        their ids, in the order of the corpus. Then the dataset has the judgements of the split alone.

        Raises:
            DataError: The split has no judgements, and there are `eval_documents`.
        """
        part = self.whole(split)
        if self.eval_documents is None or self.eval_documents >= len(part.corpus):
            return part
        if split not in self._parts:
            self._parts[split] = replace(
                part,
                corpus=_sample(part.corpus, part.judged_documents(split), self.eval_documents),
                qrels={split: part.judged(split)},
                grades={split: _with_other_grades(part.graded(split))},
                negatives={},
                elsewhere={},
                eval_documents=None,
            )
        return self._parts[split]

    def whole(self, split: str) -> RetrievalData:
        """The dataset of which `part` searches a sample."""
        return self.elsewhere.get(split, self)

    def has(self, split: str) -> bool:
        """Whether a split has judgements."""
        return bool(self.whole(split).qrels.get(split))

    def num_pairs(self, split: str) -> int:
        """The number of pairs of a query and a relevant document in a split, or in all splits for "all"."""
        return sum(map(len, self.judged(split).values()))

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
        elsewhere = {
            split: part.ignoring_identical_ids() if part.queries.keys() & part.corpus.keys() else part
            for split, part in self.elsewhere.items()
        }
        if not identical and elsewhere == self.elsewhere:
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
        if not any(kept.values()) and not elsewhere:
            raise DataError(
                f"--ignore-identical-ids leaves no judgement of {self.name}: each relevant document has the id of its "
                "query. Leave it out."
            )
        grades = {
            split: {
                query: kept_grades
                for query, found in of.items()
                if (kept_grades := {key: grade for key, grade in found.items() if key != query})
            }
            for split, of in self.grades.items()
        }
        note = (
            f"{self.name}: for {len(identical):,} of {len(self.queries):,} queries, the document with the same id is "
        )
        note += "ignored" + (f"; skipped judgements of such documents: {num_removed:,}." if num_removed else ".")
        return replace(
            self, qrels=kept, grades=grades, notes=(*self.notes, note), ignores_identical_ids=True, elsewhere=elsewhere
        )

    def with_dev(self) -> RetrievalData:
        """The same data with a dev split: its own, or 5 % of the training queries, chosen by the hash of their ids.

        Data with fewer than two training queries stays as it is.
        """
        train = self.qrels.get("train", {})
        if self.qrels.get("dev") or "dev" in self.elsewhere or len(train) < 2:
            return self
        number = max(len(train) * DEV_PERCENT // 100, 1)
        dev = set(sorted(train, key=hash_of)[:number])
        note = (
            f"{self.name} has no dev split: {number:,} of its {len(train):,} training queries are held out as one, "
            "chosen by the hash of their ids."
        )
        found = replace(
            self,
            qrels={**self.qrels, "train": _parted(train, dev, False), "dev": _parted(train, dev, True)},
            grades={
                **self.grades,
                **{
                    split: _parted(self.grades["train"], dev, split == "dev")
                    for split in ("train", "dev")
                    if "train" in self.grades
                },
            },
        )
        return replace(found, notes=(*self.notes, note, *notes_on_judged(found, "dev")))

    def with_train_pairs(self, number: int) -> RetrievalData:
        """The same data with at most this number of judged pairs in the training split.

        Queries are taken in the order of the hash of their ids, each with all its pairs, if these still fit.

        Raises:
            DataError: There is no training split, or no query has as few pairs.
        """
        train = self.judged("train")
        available = sum(map(len, train.values()))
        taken, left = set(), number
        for query in sorted(train, key=hash_of):
            if len(train[query]) <= left:
                taken.add(query)
                left -= len(train[query])
        if not taken:
            raise DataError(
                f"--max-train-pairs is {number:,}, but each training query of {self.name} has more pairs. Give "
                f"{min(map(len, train.values())):,} or more."
            )
        if len(taken) == len(train):
            return self
        qrels = {**self.qrels, "train": _parted(train, taken, True)}
        kept = {query for found in qrels.values() for query in found}
        note = (
            f"{self.name}: the training split has {number - left:,} of its {available:,} pairs, chosen by the hash of "
            "the query ids. The corpus has all documents."
        )
        grades = {"train": _parted(self.grades["train"], taken, True)} if "train" in self.grades else {}
        return replace(
            self,
            qrels=qrels,
            grades={**self.grades, **grades},
            negatives={query: others for query, others in self.negatives.items() if query in kept},
            notes=(*self.notes, note),
        )

    def with_eval_documents(self, number: int) -> RetrievalData:
        """The same data with `eval_documents`, and notes on what is searched."""
        found = replace(self, eval_documents=number)
        notes = [
            f"{part.name}: evaluations search the documents that are judged for a query of the split, such as its "
            f"positives, and others up to {number:,} of the {len(part.corpus):,}, chosen by the hash of their ids. The "
            "quality is higher than in all documents."
            for part in (self, *self.elsewhere.values())
            if number < len(part.corpus)
        ]
        if not notes:
            notes.append(f"--eval-documents {number:,} has no effect: {self.name} has {len(self.corpus):,} documents.")
        more = [note for split in ("dev", "test") if self.has(split) for note in notes_on_judged(found, split)]
        return replace(found, notes=(*self.notes, *notes, *more))

    def judged_documents(self, split: str) -> set[str]:
        """The ids of the documents with a judgement in a split, whatever the grade.

        Raises:
            DataError: The split has no judgements.
        """
        return {document for grades in self.graded(split).values() for document in grades}

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
            DataError: The split has no judgements; or for "all", a split has a corpus of its own.
        """
        if split in self.elsewhere:
            return self.elsewhere[split].judged(split)
        if split == "all":
            if self.elsewhere:
                raise DataError(
                    f"{self.name} has splits with a corpus of their own: {', '.join(self.elsewhere)}. They cannot be "
                    "searched together. Name one split instead of 'all'."
                )
            together: dict[str, list[str]] = {}
            for qrels in self.qrels.values():
                for query, documents in qrels.items():
                    together[query] = list(dict.fromkeys([*together.get(query, []), *documents]))
            return together
        if not self.qrels.get(split):
            if split == "train" and self.splits_by_hash:
                raise DataError(
                    f"{self.name} has {counted(self.num_pairs('all'), 'pair')}, and its division into splits by "
                    "document has left none to train on. Give more pairs; with --test, all are for training."
                )
            available = ", ".join([*(name for name, qrels in self.qrels.items() if qrels), *self.elsewhere]) or "none"
            advice = {
                "train": "Give data with training pairs, such as qrels/train.tsv; evaluate and search need none",
                "dev": "Name one, or give it with --dev",
                "test": "Name one, or give it with --test",
            }.get(split, "Name one")
            raise DataError(f"{self.name} has no queries in the split {split!r}; it has {available}. {advice}.")
        return self.qrels[split]

    def labels(self) -> np.ndarray:
        """For each document, the position in the corpus of the first one with the same text: int64 `[documents]`."""
        return self.corpus.first_of_equal()

    def training_set(self) -> Dataset:
        """A memory-mapped dataset with one row per judged pair of the training split.

        The columns are anchor and positive, and label: the `labels` of the documents that are not negatives of the
        query, the positive of the row first. If a query of the split has negatives, there are also negative, a list of
        texts, and negative_label, a list of their `labels`. Lists have different lengths: `RaggedNegativesCollator`,
        which `NegativeCacheTrainer` uses, pads them batch by batch. A label has at most `MAX_LABELS` ids, so that a
        query with n documents does not take n^2 of them; a warning says for how many queries this matters.

        Raises:
            DataError: There is no training split.
        """
        import datasets  # takes seconds to import

        documents, labels, train = self.corpus, self.labels(), self.judged("train")
        has_negatives = any(query in train for query in self.negatives)
        columns = {"anchor": pyarrow.string(), "positive": pyarrow.string(), "label": pyarrow.list_(pyarrow.int64())}
        if has_negatives:
            columns |= {"negative": pyarrow.list_(pyarrow.string()), "negative_label": pyarrow.list_(pyarrow.int64())}
        writer, num_cut = ArrowWriter(columns), 0
        for query, relevant in train.items():
            num_cut += len(relevant) > MAX_LABELS
            given = [documents.position(other) for other in self.negatives.get(query, ())]
            negatives = [documents.text(other) for other in given], labels[given].tolist()
            known = [documents.position(other) for other in self.never_negative(query, relevant)]
            of_known, anchor = labels[known].tolist(), self.queries[query]
            of_relevant, of_ignored = of_known[: len(relevant)], of_known[len(relevant) :]
            for at in range(len(relevant)):
                others = of_relevant if len(relevant) <= MAX_LABELS else _window(of_relevant, at, MAX_LABELS)
                ids = list(dict.fromkeys([of_relevant[at], *others, *of_ignored]))
                writer.add(anchor, documents.text(known[at]), ids, *(negatives if has_negatives else ()))
        if num_cut:
            logger.warning(
                f"{self.name}: {num_cut:,} training queries have more than {MAX_LABELS:,} relevant documents. Each of "
                f"these names {MAX_LABELS - 1:,} others; the rest may be negatives of their own query."
            )
        return datasets.Dataset(writer.finish(), fingerprint=uuid.uuid4().hex)  # otherwise, all texts are hashed

    def training_texts(self) -> Iterable[str]:
        """The queries of the training split, then their documents, each once, for training a tokenizer.

        Of each kind, these are all texts, or at least `MAX_TRAINING_TEXTS / 2` that are evenly spaced. Each
        iteration over the result reads them again.
        """
        train = self.judged("train")
        documents = dict.fromkeys(document for relevant in train.values() for document in relevant)
        chosen = []
        for texts, keys in ((self.queries, train), (self.corpus, documents)):
            step = max(1, len(keys) // (MAX_TRAINING_TEXTS // 2))
            chosen.append((texts, list(itertools.islice(keys, 0, None, step))))
        return _ChosenTexts(chosen)


@dataclass(frozen=True)
class _ChosenTexts:
    """Texts of collections by their keys, in order."""

    parts: Sequence[tuple[Mapping[str, str], Sequence[str]]]

    def __iter__(self) -> Iterator[str]:
        for texts, keys in self.parts:
            yield from (texts[key] for key in keys)


def notes_on_judged(data: RetrievalData, split: str) -> list[str]:
    """A note if a split, or "all", has more judged documents than `eval_documents`."""
    limit = data.eval_documents
    judged = 0 if limit is None else len(data.judged_documents(split))
    if limit is None or judged <= limit:
        return []
    subject = "all splits together have" if split == "all" else f"the {split} split has"
    return [
        f"{data.name}: {subject} {judged:,} judged documents, more than --eval-documents {limit:,}. All of them are "
        "searched, and no others."
    ]


def _window(values: list[int], start: int, count: int) -> list[int]:
    """`count` values from `start` on; after the last value, the first one follows."""
    return values[start : start + count] + values[: max(0, start + count - len(values))]


def without_relevant(
    negatives: Mapping[str, Sequence[str]], qrels: Iterable[Mapping[str, Sequence[str]]]
) -> dict[str, list[str]]:
    """Negatives of each query that has a relevant document, without those that are relevant to it in any split."""
    splits, kept = list(qrels), {}
    for query, others in negatives.items():
        known = {document for split in splits for document in split.get(query, ())}
        if known and (left := [document for document in others if document not in known]):
            kept[query] = left
    return kept


def _sample(corpus: Texts, judged: set[str], number: int) -> Texts:
    """The judged texts, and others up to a number in all: those with the lowest hashes of their ids."""
    hashes = np.fromiter(map(hash_of, corpus), dtype=np.uint64, count=len(corpus))
    is_chosen = np.zeros(len(corpus), dtype=bool)
    is_chosen[[corpus.position(document) for document in judged]] = True
    others = np.flatnonzero(~is_chosen)
    in_order = others[hashes[others].argsort(kind="stable")]
    is_chosen[in_order[: max(0, number - len(judged))]] = True
    return corpus.at(np.flatnonzero(is_chosen).tolist())


def _with_other_grades(graded: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The grades of the queries that have one other than 1."""
    return {query: grades for query, grades in graded.items() if set(grades.values()) != {1.0}}


def _parted(by_query: Mapping[str, _T], queries: set[str], is_in: bool) -> dict[str, _T]:
    """The entries whose query is in a set, or those whose query is not."""
    return {query: value for query, value in by_query.items() if (query in queries) == is_in}


def _without(left_out: str, documents: list[str]) -> list[str]:
    return [document for document in documents if document != left_out]
