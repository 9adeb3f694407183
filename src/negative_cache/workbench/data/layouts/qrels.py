"""Relevance judgements: lines of BEIR and TREC, and rows of tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from negative_cache.workbench.data.files import columns
from negative_cache.workbench.data.files.columns import quoted
from negative_cache.workbench.data.files.reading import lines
from negative_cache.workbench.data.files.skipping import Skipped
from negative_cache.workbench.data.layouts.sources import DOCUMENT_ID, GRADE, QUERY_ID, Table
from negative_cache.workbench.data.retrieval_data import DataError
from negative_cache.workbench.data.texts import Texts

_QUERY_IDS = (QUERY_ID, "query_id", "qid")
_DOCUMENT_IDS = (DOCUMENT_ID, "corpus_id", "document_id", "doc_id", "docid", "pid")
_GRADES = (GRADE, "grade", "relevance", "label")
_ITERATIONS = (["0"], ["Q0"])  # the second column of TREC files, which has no meaning


def read_qrels(
    tables: Sequence[Table], corpus: Texts, queries: Texts, skipped: Skipped
) -> tuple[dict[str, list[str]], dict[str, dict[str, float]]]:
    """The judgements of a split.

    Args:
        tables: Tables with a query id, a document id and a grade; without a grade, it is 1.
        corpus: The documents.
        queries: The queries.
        skipped: Judgements of unknown queries and documents are added to it.

    Returns:
        The relevant documents of each query, which have a grade above 0; and all grades of the queries that have a
        grade other than 1.

    Raises:
        DataError: A judgement cannot be read.
    """
    judged: dict[str, dict[str, float]] = {}
    for table in tables:
        for place, row in table.rows():
            query, document, grade = _judgement(row, place)
            reason = _reason_to_skip(query, document, corpus, queries)
            if reason is None:
                grades = judged.setdefault(query, {})
                if grades.setdefault(document, grade) != grade:
                    skipped.add("judgements of a document that has another grade in a later line", place)
                    grades[document] = grade
            elif grade > 0:
                skipped.add(reason, place)
    relevant = {query: [key for key, grade in grades.items() if grade > 0] for query, grades in judged.items()}
    return (
        {query: documents for query, documents in relevant.items() if documents},
        {query: grades for query, grades in judged.items() if any(grade != 1 for grade in grades.values())},
    )


def qrels_lines(path: Path, encoding: str | None, notes: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Place and judgement, from the lines of a file of BEIR (3 columns) or TREC (4 columns); see `encoding_of`.

    Raises:
        DataError: A line has another form.
    """
    delimiter, width = None, 0
    for number, (place, text) in enumerate(lines(path, encoding, notes)):
        if number == 0:
            delimiter = "\t" if "\t" in text else None  # None: any number of blanks
            width = len(text.split(delimiter))
        fields = [field.strip() for field in text.split(delimiter)]
        is_heading = number == 0 and (fields[0] in _QUERY_IDS or fields[-1] in _GRADES)
        is_trec = width == 4 and (is_heading or fields[1:2] in _ITERATIONS)
        is_wide = len(fields) == width and (width == 3 or is_trec)
        if is_wide and is_heading:
            continue
        if not is_wide or columns.number(fields[-1]) is None:
            raise DataError(
                f"{place}: expected 3 columns (query id, document id, grade) or 4 (TREC: query id, 0 or Q0, "
                "document id, grade), separated by tabs or blanks, the same number in every line, and a number as "
                f"grade; got {len(fields)}: {text!r}. The first column of a heading is {', '.join(_QUERY_IDS)}."
            )
        yield place, {QUERY_ID: fields[0], DOCUMENT_ID: fields[-2], GRADE: fields[-1]}


def _judgement(row: Any, place: str) -> tuple[str, str, float]:
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected the columns {QUERY_ID}, {DOCUMENT_ID} and {GRADE}, got {row!r}.")
    query, document = (_key(row, names, place) for names in (_QUERY_IDS, _DOCUMENT_IDS))
    name = next((name for name in _GRADES if name in row), None)
    grade = 1.0 if name is None else columns.number(row[name])
    if grade is None:
        raise DataError(f"{place}: {name!r} is {row[name or GRADE]!r}; expected a number.")
    return query, document, grade


def _key(row: Mapping[str, Any], names: Sequence[str], place: str) -> str:
    for name in names:
        value = row.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool):
            return str(value)
    raise DataError(f"{place}: no id in a column {' or '.join(names)}; the columns are {quoted(row)}.")


def _reason_to_skip(query: str, document: str, corpus: Texts, queries: Texts) -> str | None:
    if query not in queries:
        return "judgements of queries that have no text"
    return None if document in corpus else "judgements of documents that are not in the corpus"
