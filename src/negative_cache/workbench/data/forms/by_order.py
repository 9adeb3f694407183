"""Columns that are taken by their order, because no name is known: whether their values are texts."""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from negative_cache.workbench.data.files import columns
from negative_cache.workbench.data.files.columns import quoted
from negative_cache.workbench.data.forms.documents import is_missing
from negative_cache.workbench.data.forms.known import Columns
from negative_cache.workbench.data.retrieval_data import DataError

_MOST = 0.9  # of the values, from which a column is of a kind
_MOST_CHARS, _MOST_WORDS = 30, 3  # of the name of a category
_FEWEST = 4  # values, from which they may be categories
_REPEATS = 5  # of a category, on average
_MANY_QUERIES, _MANY = 3, 0.1  # with the same negative, and their share
_MONTH = r"(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_DATE = re.compile(
    r"\d{4}-?\d\d-?\d\d([t ]\d\d:?\d\d.*)?|\d{1,2}[./-]\d{1,2}[./-]\d{2,4}( \d.*)?|\d{1,2}:\d\d(:\d\d.*)?( ?[ap]m)?|"
    rf"([a-z]{{3,9}},? )?(\d{{1,2}}\.?[ -]{_MONTH}|{_MONTH} \d{{1,2}}),?[ -]\d{{2,4}}.*"
)
_NUMBER = re.compile(r"[^\w\s]*\d[\d.,' ]*(e[-+]?\d+)?\s?([%$€£¥]|[a-z]{3})?")
_ADDRESS = re.compile(r"(https?://|www\.)\S+")
_ID = re.compile(r"[!-~]*\d[!-~]*")


def check_are_texts(found: Columns, rows: Sequence[tuple[str, Any]], has_ids: bool) -> None:
    """Refuse columns by order whose values are not texts, or that are many and different.

    Args:
        found: The columns, or "query", "positive" and "negative_1", ... of rows without names.
        rows: The first rows as column -> value, with their places.
        has_ids: Whether the documents are ids.

    Raises:
        DataError: They are not texts.
    """
    named = (found.query, *found.positives, *found.negatives)
    problems = {name: _problem(name, found, rows, has_ids) for name in found.by_order or named}
    wrong = next((name for name, problem in problems.items() if problem is not None), None)
    place = rows[0][0]
    if wrong is not None:
        why = problems[wrong]
    elif found.by_order and len({_stem(name) for name in found.negatives}) > 1:
        wrong, why = found.negatives[0], f"may be no negatives, and neither may those of {quoted(found.negatives[1:])}"
    else:
        return
    if not found.by_order:
        number = named.index(wrong) + 1
        raise DataError(
            f"{place}: value {number} of a row is not a text: such values {why}. Without names of columns, the values "
            "are a query, a positive and any negatives. Remove the others, or name the columns: in a first line of a "
            ".csv or .tsv file, in objects of a .jsonl file."
        )
    texts = [columns.typed(name) for name in named if problems.get(name) is None]
    query, positive = [*texts, "NAME", "NAME"][:2]
    raise DataError(
        f"{place}: {wrong!r} is no known name of a column, and its values {why}. Name the columns, for example: "
        f"--query-column {query} --positive-column {positive}. Name a column of negatives with --negative-column."
    )


def _problem(name: str, found: Columns, rows: Sequence[tuple[str, Any]], has_ids: bool) -> str | None:
    """What the values of a column are, with an example, if they are not texts; None if they are."""
    present = [(row.get(found.query), value) for _, row in rows if not is_missing(value := row.get(name))]
    values = [value for _, value in present if not isinstance(value, list)]
    if not values:
        return None
    is_query = name == found.query
    if is_query or not has_ids:
        kinds = [(kind, value) for value in values if (kind := _kind(value)) is not None]
        if len(kinds) >= _MOST * len(values):
            kind, first = kinds[0]
            return f"are {kind}, such as {str(first)[:60]!r}"
        if name not in found.negatives and _are_categories(list(map(str, values))):
            return f"are few and short, such as {str(values[0])!r}"
    if name in found.negatives:
        of_queries = Counter(value for _, value in {(str(query), str(value)) for query, value in present})
        shared, number = of_queries.most_common(1)[0]
        if number >= max(_MANY_QUERIES, _MANY * len({str(query) for query, _ in present})):
            return f"are shared by queries, such as {shared[:60]!r} by {number:,} of them"
    return None


def _kind(value: object) -> str | None:
    """What a value is, in the plural; None if it may be a text."""
    if isinstance(value, datetime.date | datetime.time):
        return "dates or times"
    if not isinstance(value, str):
        return "numbers"
    text = value.strip().lower()
    if _DATE.fullmatch(text):
        return "dates or times"
    if _NUMBER.fullmatch(text):
        return "numbers"
    if _ADDRESS.fullmatch(text):
        return "addresses of web pages"
    return "ids" if _ID.fullmatch(text) else None


def _are_categories(values: list[str]) -> bool:
    if len(values) < _FEWEST or len(set(values)) > max(2, len(values) // _REPEATS):
        return False
    return all(len(value) <= _MOST_CHARS and len(value.split()) <= _MOST_WORDS for value in set(values))


def _stem(name: str) -> str:
    """A name without the number at its end."""
    return re.sub(r"[\d_]+$", "", columns.normal(name))
