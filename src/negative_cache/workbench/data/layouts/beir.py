"""Datasets with a corpus, queries and judgements in tables of their own, as in the BEIR benchmark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from negative_cache.workbench.data.files.columns import quoted
from negative_cache.workbench.data.files.reading import text_in
from negative_cache.workbench.data.files.skipping import Skipped
from negative_cache.workbench.data.forms.documents import id_in, is_missing, with_marker
from negative_cache.workbench.data.layouts.qrels import read_qrels
from negative_cache.workbench.data.layouts.sources import Collection, Table
from negative_cache.workbench.data.layouts.triples import read_triples
from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.data.retrieval_data import SPLITS, DataError, RetrievalData, without_relevant
from negative_cache.workbench.data.texts import RepeatedIdError, Texts

_IDS = ("_id", "id", "docid", "doc_id", "pid", "query_id", "qid")
_TEXTS = ("text", "contents", "query")
_KEYS = {*_IDS, *_TEXTS, "title", "metadata"}  # BEIR has metadata that no command uses


def read_collection(found: Collection, options: DataOptions) -> RetrievalData:
    """Read a collection. If splits have corpora of their own, one is the dataset, and the others are `elsewhere`.

    Raises:
        DataError: A table cannot be used, or there are no judgements.
    """
    own = found.splits_with_corpora()
    if not own:
        return _read(found, options)
    parts = {split: _read(found.part(split), options) for split in own}
    first = "train" if "train" in parts else own[0]
    others = {split: part for split, part in parts.items() if split != first}
    note = f"{found.name}: each of these splits is searched in a corpus of its own: {quoted(own)}."
    notes = dict.fromkeys([note, *(note for part in parts.values() for note in part.notes)])
    return replace(parts[first], notes=tuple(notes), elsewhere=others)


def read_texts(tables: Sequence[Table], what: str, options: DataOptions, notes: list[str], skipped: Skipped) -> Texts:
    """Read the texts of documents or queries, each of which begins with its title if it has one.

    Args:
        tables: Tables with an id, such as _id or docid, a text and maybe a title; without names of columns, with an id
            and a text.
        what: "documents" or "queries", for messages.
        options: With `strict`, an empty text is an error.
        notes: A note of unused columns is added to it.
        skipped: Entries without a text are added to it.

    Raises:
        DataError: An entry cannot be used, or an id occurs twice.
    """
    unused: set[str] = set()

    def entries() -> Iterator[tuple[str, str, str]]:
        for table in tables:
            for place, row in table.rows():
                if isinstance(row, list) and len(row) == 2:
                    row = {"_id": row[0], "text": row[1]}
                if not isinstance(row, dict):
                    raise DataError(f"{place}: expected the columns _id, title and text, got {str(row)[:60]!r}.")
                unused.update(row.keys() - _KEYS)
                key, text = _id(row, place), _text(row, place, options.strict)
                if text is None:
                    skipped.add(with_marker(f"{what} without a text", row.get(_text_name(row))), place)
                else:
                    yield place, key, text

    distinct = entries if len(tables) == 1 or what != "queries" else lambda: _distinct(entries())
    try:
        texts = Texts.of((key, text) for _, key, text in distinct())
    except RepeatedIdError as error:
        first, second = (next(islice(distinct(), at, None))[0] for at in (error.first, error.second))
        raise DataError(
            f"{second}: the id {error.key!r} occurs twice, first in {first}. Remove one, or give each an id of its "
            f"own: for passages of one document, for example {error.key}-1 and {error.key}-2."
        ) from None
    if unused:
        others = f" and {len(tables) - 1:,} more" if len(tables) > 1 else ""
        notes.append(f"{tables[0].name}{others}: columns that are not used: {quoted(unused)}.")
    return texts


def _read(found: Collection, options: DataOptions) -> RetrievalData:
    notes: list[str] = []
    skipped = Skipped()
    corpus, queries = (
        read_texts([table for tables in part.values() for table in tables], what, options, notes, skipped)
        for what, part in (("documents", found.corpus), ("queries", found.queries))
    )
    qrels: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
    grades: dict[str, dict[str, dict[str, float]]] = {}
    for split, tables in found.qrels.items():
        qrels[split], graded = read_qrels(tables, corpus, queries, skipped)
        if graded:
            grades[split] = graded
    negatives: dict[str, list[str]] = {}
    if found.triples and (options.negatives != "ignore" or not qrels["train"]):
        positives, negatives = read_triples(found.triples, corpus, queries, options, skipped)
        if not qrels["train"]:
            qrels["train"] = positives
            notes.append(f"{found.name}: the training split has no judgements; its positives are those of the triples.")
        negatives = without_relevant(negatives, [positives, *qrels.values()])
    notes = list(dict.fromkeys([*found.notes, *notes, *skipped.notes(found.name)]))
    if not any(qrels.values()):
        raise DataError(" ".join([f"{found.name} has no judgements of a relevant document.", *notes]))
    return RetrievalData(
        found.name, corpus, queries, qrels, tuple(notes),
        grades=grades, negatives=negatives, form=found.form, skipped=skipped.counts,
    )  # fmt: skip


def _distinct(entries: Iterator[tuple[str, str, str]]) -> Iterator[tuple[str, str, str]]:
    """Without entries that repeat the id and the text of an earlier one: a query may be in the files of two splits."""
    saved: dict[str, int] = {}
    for place, key, text in entries:
        known = saved.get(key)
        if known is None:
            saved[key] = hash(text)
            yield place, key, text
        elif known != hash(text):
            raise DataError(f"{place}: the id {key!r} has another text than before: {text[:60]!r}.")


def _id(row: dict[str, Any], place: str) -> str:
    name = next((name for name in _IDS if name in row), None)
    return text_in(row, _IDS[0], place) if name is None else id_in(row[name], name, place)


def _text_name(row: dict[str, Any]) -> str:
    return next((name for name in _TEXTS if name in row), _TEXTS[0])


def _text(row: dict[str, Any], place: str, is_strict: bool) -> str | None:
    """The title, if there is one, and the text, which may be empty if there is a title; None if both are empty."""
    name = _text_name(row)
    title = None if is_missing(row.get("title")) else text_in(row, "title", place)
    if is_missing(row.get(name)) and (title is not None or (name in row and not is_strict)):
        return title
    text = text_in(row, name, place)
    return text if title is None else f"{title}\n{text}"
