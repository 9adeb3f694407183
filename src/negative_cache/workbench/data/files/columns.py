"""Names of columns and keys, and what they stand for."""

from __future__ import annotations

import ast
import json
import math
import re
import shlex
from collections.abc import Iterable, Sequence

from negative_cache.workbench.data.retrieval_data import DataError

QUERY = ("query", "anchor", "question", "query_text", "sentence1", "question1", "text1", "query1", "sentence_a")
POSITIVE = (
    "positive", "document", "answer", "passage", "pos", "positives", "positive_passage", "positive_document",
    "positive_doc", "doc", "response", "context", "sentence2", "question2", "text2", "query2", "sentence_b",
)  # fmt: skip
RELEVANCE = (
    "label", "labels", "gold_label", "relevant", "is_relevant", "is_duplicate", "duplicate",
)  # fmt: skip
GRADES = ("relevance", "relevance_grade", "grade", "judgement", "judgment", "rating")
SCORES = ("score", "scores", "similarity", "similarity_score")
LABELS = RELEVANCE + GRADES + SCORES
_POSITIVE = re.compile(r"(pos|positive(_(passage|document|doc))?)_?\d+")
_NEGATIVE = re.compile(r"(hard_?)?neg(ative)?s?(_?(passage|document|doc)s?)?(_?\d+)?|rejected(_response)?")
_LISTS = ("positives", "negatives", "hard_negatives", "pos", "neg")  # names of columns with several documents
_ID = re.compile(r"|(.*_)?id(_?\d+)?|idx|index|[qp]id(_?\d+)?|docid|unnamed:_\d+")
_BINARY = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
_MOST_CHARS, _MOST_WORDS = 30, 3  # of a name
_FEWEST_ROWS = 3  # that show what a row looks like
_MOST_NAMES = 20  # in a message


def normal(name: str) -> str:
    """A name in lower case, with underscores for blanks and hyphens."""
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def is_negative(name: str) -> bool:
    """Whether a column of this name has negatives."""
    return _NEGATIVE.fullmatch(normal(name)) is not None


def has_text(name: str) -> bool:
    """Whether a column of an unknown name may have texts: it is neither an id nor a label."""
    return normal(name) not in LABELS and _ID.fullmatch(normal(name)) is None


def is_known(name: str) -> bool:
    """Whether a column of this name has queries, relevant documents or negatives."""
    return normal(name) in QUERY + POSITIVE or _POSITIVE.fullmatch(normal(name)) is not None or is_negative(name)


def binary(value: object) -> bool | None:
    """Whether a label is 1, or 0, which may be a text, a boolean or a float; None if it is another value."""
    return _BINARY.get(str(value).strip().lower())


def list_in(name: str, value: str) -> list[str] | None:
    """The texts of a list in a value of a table, in the syntax of JSON or of Python.

    None if it is another text, or the column has one document.
    """
    if normal(name) not in _LISTS:
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            texts = parse(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            return texts
    return None


def number(value: object) -> float | None:
    """A value that is a finite number, also as a text; None if it is another value."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def is_number(text: str) -> bool:
    """Whether a text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def is_heading(values: Sequence[str], asked: Iterable[str], rows: Sequence[Sequence[str]] = ()) -> bool:
    """Whether the values of the first line of a table are names of columns.

    They are if one of them is a known name or one that the user asks for; or if all of them look like names: short, no
    numbers, and without blanks, or of few words without digits such as "Search query", where one is a known name or
    no row looks like that.

    Args:
        values: The first line.
        asked: Names that the user asks for.
        rows: Some lines after it.
    """
    asked = set(asked)
    if any(value in asked or is_known(value) for value in values):
        return True
    if _look_like_names(values, most_words=1):
        return True
    is_unlike_rows = len(rows) >= _FEWEST_ROWS and not any(_are_wordy_names(row) for row in rows)
    has_known_word = any(is_known(word) for value in values for word in value.split())
    return _are_wordy_names(values) and (has_known_word or is_unlike_rows)


def _are_wordy_names(values: Sequence[str]) -> bool:
    return _look_like_names(values, _MOST_WORDS) and not re.search(r"\d", "".join(values))


def _look_like_names(values: Sequence[str], most_words: int) -> bool:
    if len(values) > 2 and not values[0]:  # the index that pandas writes
        values = values[1:]
    return all(
        0 < len(value.split()) <= most_words and len(value) <= _MOST_CHARS and not is_number(value) for value in values
    )


def is_sure_heading(values: Iterable[str], asked: Iterable[str]) -> bool:
    """Whether a heading has a name of a query, a document, a text, a title, an id or a label, or that is asked for."""
    return any(
        value in asked
        or any(is_known(name) or name.lower() in ("text", "title") for name in [value, *value.split()])
        or (value and not has_text(value))
        for value in values
    )


def first_of(names: tuple[str, ...], columns: Iterable[str]) -> str | None:
    """The column that has the first of these names; None if none has."""
    known = {normal(column): column for column in columns}
    return next((known[name] for name in names if name in known), None)


def positives_in(columns: Iterable[str]) -> tuple[str, ...]:
    """The columns of the relevant documents: the one with the most usual name, and numbered ones."""
    numbered = tuple(column for column in columns if _POSITIVE.fullmatch(normal(column)))
    first = first_of(POSITIVE, columns)
    if first is None or (numbered and not normal(first).startswith("pos")):
        return numbered
    return (first, *numbered)


def negatives_in(columns: Iterable[str], query: str) -> tuple[str, ...]:
    """The columns of the negatives: by their names, or by the numbers after sentence1 and sentence2."""
    stem = normal(query).removesuffix("1")
    later = re.compile(rf"{re.escape(stem)}([3-9]|[1-9]\d+)") if stem != normal(query) else None
    return tuple(
        column for column in columns
        if is_negative(column) or (later is not None and later.fullmatch(normal(column)))
    )  # fmt: skip


def check_differ(names: list[str], place: str) -> list[str]:
    """The names of the columns of a table.

    Raises:
        DataError: A name occurs twice.
    """
    if repeated := {name for name in names if names.count(name) > 1}:
        raise DataError(f"{place}: several columns have the name {quoted(repeated)}. Rename or remove all but one.")
    return names


def quoted(names: Iterable[object]) -> str:
    """Names in sorted order for messages: all, or the first `_MOST_NAMES` and how many more there are."""
    found = sorted(repr(str(name)) for name in names)
    rest = f" and {len(found) - _MOST_NAMES:,} more" if len(found) > _MOST_NAMES else ""
    return ", ".join(found[:_MOST_NAMES]) + rest


def typed(name: str) -> str:
    """A name as it is typed in a shell."""
    return shlex.quote(name)
