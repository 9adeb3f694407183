"""Dev and test splits from a source of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from negative_cache.workbench.data.files.skipping import Skipped
from negative_cache.workbench.data.retrieval_data import DataError, RetrievalData, without_relevant
from negative_cache.workbench.data.texts import IdsByText, Texts


def with_rows(data: RetrievalData, split: str, rows: RetrievalData) -> RetrievalData:
    """A dataset whose split is that of other rows. Their documents and queries join those of the dataset.

    A text that the dataset has gets its id there. A new text has its own id, with the split before it if another text
    has the id.

    Args:
        data: The dataset.
        split: The split.
        rows: The other rows, which have this split alone.
    """
    documents, corpus = (None, data.corpus) if rows.corpus is data.corpus else _joined(data.corpus, rows.corpus, split)
    queries, all_queries = _joined(data.queries, rows.queries, split)

    def renamed(found: Iterable[str]) -> list[str]:
        return list(found) if documents is None else [documents[document] for document in found]

    positives: dict[str, list[str]] = {}
    for query, found in rows.qrels[split].items():
        known = positives.get(queries[query], [])
        positives[queries[query]] = list(dict.fromkeys([*known, *renamed(found)]))
    qrels = {**data.qrels, split: positives}
    grades: dict[str, dict[str, float]] = {}
    for query, of_query in rows.grades.get(split, {}).items():
        own = grades.setdefault(queries[query], {})
        for document, grade in zip(renamed(of_query), of_query.values(), strict=True):
            own[document] = max(own.get(document, grade), grade)
    others = {name: found for name, found in data.grades.items() if name != split}
    negatives = {queries[query]: renamed(others) for query, others in rows.negatives.items()} | data.negatives
    return replace(
        data,
        corpus=corpus,
        queries=all_queries,
        qrels=qrels,
        grades={**others, split: grades} if grades else others,
        negatives=without_relevant(negatives, qrels.values()),
        notes=tuple(dict.fromkeys([*data.notes, *rows.notes])),
        skipped=_added(data, rows),
        elsewhere={name: part for name, part in data.elsewhere.items() if name != split},
    )


def with_own_corpus(data: RetrievalData, split: str, other: RetrievalData) -> RetrievalData:
    """A dataset whose split is that of another dataset, and is searched in the corpus of that one.

    Args:
        data: The dataset.
        split: The split.
        other: The other dataset, with a split of this name, or one split of any name.

    Raises:
        DataError: The other dataset has several splits, none of them of this name.
    """
    available = {name for name, qrels in other.qrels.items() if qrels} | other.elsewhere.keys()
    name = only_split(available, split, other.name)
    part = other.part(name)
    part = replace(
        part,
        qrels={split: part.qrels[name]},
        grades={split: part.grades[name]} if name in part.grades else {},
        elsewhere={},
    )
    note = (
        f"The {split} split is that of {other.name}{'' if name == split else f' ({name})'}; it is searched in its own "
        f"corpus of {len(part.corpus):,} documents."
    )
    return replace(
        data,
        qrels={**data.qrels, split: {}},
        grades={name: grades for name, grades in data.grades.items() if name != split},
        notes=tuple(dict.fromkeys([*data.notes, *other.notes, note])),
        skipped=_added(data, other),
        elsewhere={**data.elsewhere, split: part},
    )


def only_split(names: Iterable[str], split: str, source: str) -> str:
    """The split of this name, or the only one of any name.

    Raises:
        DataError: There are several others.
    """
    found = sorted(names)
    if split in found:
        return split
    if len(found) != 1:
        raise DataError(f"--{split} {source} has several splits, and none of the name {split!r}: {', '.join(found)}.")
    return found[0]


def _joined(first: Mapping[str, str], others: Mapping[str, str], prefix: str) -> tuple[dict[str, str], Texts]:
    """The new id of each of the other texts, and all texts."""
    texts = Texts.of(first)
    known = IdsByText(texts)
    ids: dict[str, str] = {}
    new: dict[str, str] = {}  # new id -> id in `others`
    for key, text in others.items():
        own = known.find(text)
        if own is None:
            own = key
            while own in texts or own in new:
                own = f"{prefix}-{own}"
            new[own] = key
        ids[key] = own
    return ids, texts.followed_by((key, others[other]) for key, other in new.items())


def _added(data: RetrievalData, other: RetrievalData) -> dict[str, int]:
    skipped = Skipped()
    for counts in (data.skipped, other.skipped):
        skipped.add_counts(counts)
    return skipped.counts
