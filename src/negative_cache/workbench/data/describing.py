"""`describe`: what a dataset contains."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

from negative_cache.workbench.data import minhash
from negative_cache.workbench.data.retrieval_data import SPLITS, RetrievalData
from negative_cache.workbench.data.texts import Texts

PERCENTILES = (50, 90, 99)
MAX_SAMPLE = 20_000  # documents that are examined for near-duplicates
SAMPLE_CHARS = 2_000  # of each of them
NUM_EXAMPLES = 3
EXAMPLE_CHARS = 200
TEXTS_AT_ONCE = 4_096

# Standard deviation over queries of the difference in the reciprocal rank of two models. From 0.24 to 0.29 for models
# that differ in the seed or in the loss, on two data sets.
PAIRED_DEVIATION = 0.3

_CJK = re.compile("[\u3040-\u30ff\u3400-\u9fff]")

OnProgress = Callable[[int, int], None]
"""Called with (done, total)."""


class Measure(NamedTuple):
    """How the length of a text is measured.

    Attributes:
        unit: Such as "words".
        lengths: The length of each text.
        limit: The length after which models cut a text; None if they do not.
    """

    unit: str
    lengths: Callable[[Sequence[str]], Sequence[int]]
    limit: int | None


def count_words(texts: Sequence[str]) -> list[int]:
    """The number of words of texts, which blanks separate. A Chinese or Japanese character counts as a word."""
    return [len(text.split()) if text.isascii() else len(_CJK.sub(" x ", text).split()) for text in texts]


WORDS = Measure("words", count_words, 380)  # of English, that are about 512 tokens


def describe(data: RetrievalData, measure: Measure = WORDS, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """What a dataset contains.

    Texts are compared by 64-bit hashes. The memory in use is about 100 bytes per text, whatever its length.

    Args:
        data: The dataset.
        measure: How the length of a text is measured.
        on_progress: Called with the number of texts that have been read, and of all.

    Returns:
        name, form, skipped, ignores_identical_ids: As in the data.
        documents, queries: Their numbers.
        splits: Name -> numbers of queries, positives (judged pairs), negatives and documents (that are searched);
            grades: grade -> number of judgements; queries_with_several_positives; queries_that_share_a_positive, with
            another query of the split; queries_of_most_frequent_positive; most_frequent_positive, its text;
            positives_equal_to_query; and detectable_difference, see `detectable_difference`.
        lengths: For queries, documents and positives the percentiles 50, 90 and 99, and max; the unit, the limit, and
            positives_over_limit, the number of judged pairs whose document is longer.
        duplicates: Numbers of documents and queries whose text is equal to an earlier one.
        near_duplicates: Number of documents of a sample that resemble an earlier one of the sample, and its size.
        documents_without_query: Number of documents that are relevant to no query; only_negatives: those of them that
            are negatives of one.
        queries_equal_to_document: Number of queries with the text of a document.
        overlap: One entry for each two splits: first, second, queries of the second whose text is in the first,
            documents that are positives in both, and alike, the number of other positives of the second that resemble
            one of the first (None if they were not all examined).
        examples: Query, positive and negative, which are clipped; negative is None if there is none.
    """
    total = sum(len(part.queries) + len(part.corpus) for part in (data, *data.elsewhere.values()))
    progress = _Progress(total, on_progress)
    own = _Part(data, measure, progress)
    parts = {name: _Part(other, measure, progress) for name, other in data.elsewhere.items()}
    splits = {name: _Split(parts.get(name, own), name) for name in _names_of(data)}
    sample = _Sample(own)
    return {
        "name": data.name,
        "form": data.form,
        "skipped": data.skipped,
        "ignores_identical_ids": data.ignores_identical_ids,
        "documents": len(data.corpus),
        "queries": len(data.queries),
        "splits": {name: split.summary() for name, split in splits.items()},
        "lengths": _lengths([own, *parts.values()], list(splits.values()), measure),
        "duplicates": {
            "documents": _num_repeated(own.documents.hashes),
            "queries": _num_repeated(own.queries.hashes),
        },
        "near_duplicates": {"documents": sample.num_alike(), "sample": len(sample.hashes)},
        **_without_query(own, [split for name, split in splits.items() if name not in parts]),
        "identical_ids": any(query in data.corpus for query in data.queries),
        "queries_equal_to_document": int(_is_in(own.queries.hashes, own.documents.hashes).sum()),
        "overlap": list(_overlap(splits, sample)),
        "examples": _examples(data, next(iter(splits), "")),
    }


def detectable_difference(num_queries: int) -> float:
    """The difference in MRR@10 of two models that chance exceeds in 5 % of all cases, with the same queries.

    That is 1.96 standard errors of a mean of differences per query with `PAIRED_DEVIATION`. A paired test of the two
    models is more exact.
    """
    return 1.96 * PAIRED_DEVIATION / float(np.sqrt(num_queries))


class _Progress:
    """Counts texts that have been read."""

    def __init__(self, total: int, on_progress: OnProgress | None) -> None:
        self._done, self._total, self._on_progress = 0, total, on_progress

    def add(self, number: int) -> None:
        self._done += number
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)


class _Measured(NamedTuple):
    """Hashes and lengths of texts, int64 `[n]`."""

    hashes: np.ndarray
    lengths: np.ndarray


class _Part:
    """A corpus, with the queries that are searched in it."""

    def __init__(self, data: RetrievalData, measure: Measure, progress: _Progress) -> None:
        self.data = data
        self.corpus, self.query_texts = data.corpus, data.queries
        self.documents = _measure(self.corpus, measure, progress)
        self.queries = _measure(self.query_texts, measure, progress)


class _Split:
    """The judged pairs of a split.

    Attributes:
        queries: Hash of the text of each query, `[num_queries]`.
        rows: Number of the query of each pair, `[num_pairs]`.
        documents: Hash of the text of the positive of each pair, `[num_pairs]`.
        lengths: Length of the positive of each pair, `[num_pairs]`.
    """

    def __init__(self, part: _Part, name: str) -> None:
        self._data, self._name = part.data, name
        self._qrels = part.data.judged(name)
        positions = part.corpus.positions(chain.from_iterable(self._qrels.values()))
        self.queries = part.queries.hashes[part.query_texts.positions(self._qrels)]
        self.rows = np.repeat(np.arange(len(self._qrels)), [len(documents) for documents in self._qrels.values()])
        self.documents = part.documents.hashes[positions]
        self.lengths = part.documents.lengths[positions]

    def summary(self) -> dict[str, Any]:
        rows, documents = self._different_pairs()
        distinct, _, numbers = _groups(documents)
        num_queries = numbers[np.searchsorted(distinct, documents)]  # of the document of each pair
        first = int(np.flatnonzero(self.documents == documents[num_queries.argmax()])[0])
        frequent = next(islice(chain.from_iterable(self._qrels.values()), first, None))
        negatives = self._data.negatives
        return {
            "queries": len(self.queries),
            "positives": len(self.rows),
            "negatives": sum(len(negatives.get(query, ())) for query in self._qrels) if negatives else 0,
            "documents": len(self._data.corpus),
            "grades": self._grades(),
            "queries_with_several_positives": int((np.bincount(self.rows) > 1).sum()),
            "queries_that_share_a_positive": len(_groups(rows[num_queries > 1])[0]),
            "queries_of_most_frequent_positive": int(num_queries.max()),
            "most_frequent_positive": self._data.corpus[frequent],
            "positives_equal_to_query": int((self.queries[self.rows] == self.documents).sum()),
            "detectable_difference": detectable_difference(len(self.queries)),
        }

    def _different_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """`rows` and `documents` without pairs of a query with two equal documents."""
        order = np.lexsort((self.documents, self.rows))
        rows, documents = self.rows[order], self.documents[order]
        is_new = np.ones(len(rows), dtype=bool)
        is_new[1:] = (rows[1:] != rows[:-1]) | (documents[1:] != documents[:-1])
        return rows[is_new], documents[is_new]

    def _grades(self) -> dict[str, int]:
        """Grade -> number of judgements, the lowest grade first."""
        graded = self._data.grades.get(self._name, {})
        grades = Counter(chain.from_iterable(documents.values() for documents in graded.values()))
        grades[1.0] += sum(len(documents) for query, documents in self._qrels.items() if query not in graded)
        return {f"{grade:g}": number for grade, number in sorted(grades.items()) if number}


class _Sample:
    """Different documents of a corpus, by their hashes and by what they resemble; all if they are not too many.

    Attributes:
        hashes: Hash of the text of each, `[n]`.
        is_all: Whether these are all that differ.
    """

    def __init__(self, part: _Part) -> None:
        different = np.sort(_groups(part.documents.hashes)[1])
        size = min(len(different), MAX_SAMPLE)
        self.is_all = size == len(different)
        chosen = different[np.linspace(0, len(different) - 1, size).astype(np.int64)] if size else different
        self.hashes = part.documents.hashes[chosen]
        texts = (part.corpus[part.corpus.key(position)][:SAMPLE_CHARS] for position in chosen.tolist())
        self._signatures = minhash.signatures(texts)

    def num_alike(self) -> int:
        """How many resemble an earlier one."""
        return int(minhash.resembles_earlier(self._signatures, np.arange(len(self.hashes))).sum())

    def num_alike_across(self, first: np.ndarray, second: np.ndarray) -> int | None:
        """How many of the second documents, given by hashes, resemble one of the first, without those that are equal.

        None if this cannot be said, because the sample does not have all of them.
        """
        if not self.is_all or not (_is_in(first, self.hashes).all() and _is_in(second, self.hashes).all()):
            return None
        earlier = _is_in(self.hashes, first)
        later = _is_in(self.hashes, second) & ~earlier
        rows = np.concatenate([self._signatures[earlier], self._signatures[later]])
        groups = np.repeat([0, 1], [earlier.sum(), later.sum()])
        return int(minhash.resembles_earlier(rows, groups).sum())


def _measure(texts: Texts, measure: Measure, progress: _Progress) -> _Measured:
    hashes = np.empty(len(texts), dtype=np.int64)
    lengths = np.empty(len(texts), dtype=np.int64)
    values, start = iter(texts.values()), 0
    while batch := list(islice(values, TEXTS_AT_ONCE)):
        end = start + len(batch)
        hashes[start:end] = list(map(hash, batch))
        lengths[start:end] = measure.lengths(batch)
        progress.add(len(batch))
        start = end
    return _Measured(hashes, lengths)


def _names_of(data: RetrievalData) -> list[str]:
    """The splits with judgements: train, dev, test, then the others."""
    found = {name for name, qrels in data.qrels.items() if qrels} | data.elsewhere.keys()
    return [*(name for name in SPLITS if name in found), *sorted(found - set(SPLITS))]


def _lengths(parts: list[_Part], splits: list[_Split], measure: Measure) -> dict[str, Any]:
    positives = _joined(split.lengths for split in splits)
    return {
        "queries": _percentiles(_joined(part.queries.lengths for part in parts)),
        "documents": _percentiles(_joined(part.documents.lengths for part in parts)),
        "positives": _percentiles(positives),
        "unit": measure.unit,
        "limit": measure.limit,
        "positives_over_limit": 0 if measure.limit is None else int((positives > measure.limit).sum()),
    }


def _percentiles(lengths: np.ndarray) -> dict[str, int]:
    if not len(lengths):
        return {}
    found = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    return {
        **{str(name): int(value) for name, value in zip(PERCENTILES, found, strict=True)},
        "max": int(lengths.max()),
    }


def _joined(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=np.int64), *arrays])


def _num_repeated(hashes: np.ndarray) -> int:
    return len(hashes) - len(_groups(hashes)[0])


def _groups(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct values in order, the position of the first of each, and how many are equal to it.

    As np.unique, which takes ten times as long for a million hashes.
    """
    order = values.argsort(kind="stable")
    ordered = values[order]
    is_first = np.ones(len(values), dtype=bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    starts = np.flatnonzero(is_first)
    return ordered[starts], order[starts], np.diff(np.append(starts, len(values)))


def _is_in(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which values are among the others: bool `[n]`."""
    distinct, _, _ = _groups(others)
    at = np.searchsorted(distinct, values)
    result = at < len(distinct)
    result[result] = distinct[at[result]] == values[result]
    return result


def _without_query(part: _Part, splits: list[_Split]) -> dict[str, int]:
    positives = _joined(split.documents for split in splits)
    others = part.documents.hashes[~_is_in(part.documents.hashes, positives)]
    negatives = part.corpus.positions(chain.from_iterable(part.data.negatives.values()))
    only_negatives = int(_is_in(others, part.documents.hashes[negatives]).sum())
    return {"documents_without_query": len(others), "only_negatives": only_negatives}


def _overlap(splits: dict[str, _Split], sample: _Sample) -> Iterator[dict[str, Any]]:
    names = list(splits)
    for number, second in enumerate(names):
        for first in names[:number]:
            yield {
                "first": first,
                "second": second,
                "queries": int(_is_in(splits[second].queries, splits[first].queries).sum()),
                "documents": int(_is_in(_groups(splits[second].documents)[0], splits[first].documents).sum()),
                "alike": sample.num_alike_across(splits[first].documents, splits[second].documents),
            }


def _examples(data: RetrievalData, split: str) -> list[dict[str, str | None]]:
    """The first queries of a split, those with negatives first."""
    part = data.whole(split)
    qrels = part.qrels.get(split, {})
    in_order = chain((q for q in qrels if q in part.negatives), (q for q in qrels if q not in part.negatives))
    examples = []
    for query in islice(in_order, NUM_EXAMPLES):
        negatives = part.negatives.get(query)
        texts = (part.queries[query], part.corpus[qrels[query][0]], part.corpus[negatives[0]] if negatives else None)
        clipped = (None if text is None else _clip(text) for text in texts)
        examples.append(dict(zip(("query", "positive", "negative"), clipped, strict=True)))
    return examples


def _clip(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= EXAMPLE_CHARS else f"{text[: EXAMPLE_CHARS - 3]}..."
