"""`Labels`: what a column says about the relevance of the document of a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from negative_cache.workbench.data.files import columns
from negative_cache.workbench.data.forms.documents import is_missing
from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.data.retrieval_data import DataError


class Labels:
    """The labels of rows, each of a query and a document.

    The name of the column and the first rows decide their meaning. Values that are all 0 or 1 are relevance. In a
    column of grades, or one that the user names, a number is a grade. Other numbers in a column of scores are not used.

    Args:
        column: The column.
        rows: The first rows with their places.
        options: `label_column` is the column if the user names it.

    Attributes:
        column: The column.
        is_used: Whether the labels are relevance or grades.

    Raises:
        DataError: A label is none of these.
    """

    def __init__(self, column: str, rows: Sequence[tuple[str, Any]], options: DataOptions) -> None:
        self.column = column
        self._num_rows = len(rows)
        found = [(place, row.get(column)) for place, row in rows if isinstance(row, dict)]
        self._known = [(place, value) for place, value in found if not is_missing(value)]
        name = columns.normal(column)
        self._are_grades = options.label_column == column or name in columns.GRADES
        other = next(((place, value) for place, value in self._known if columns.binary(value) is None), None)
        self._are_scores = name in columns.SCORES and not self._are_grades and other is not None
        self.is_used = bool(self._known) and not self._are_scores
        if other is not None and name in columns.RELEVANCE and not self._are_grades:
            raise self._no_relevance(*other)
        for place, value in self._known:
            if self._are_scores and not isinstance(value, list) and columns.number(value) is None:
                raise self._no_relevance(place, value)
            if self._are_grades:
                self._grade(value, place)

    def grade(self, row: dict[str, Any], place: str) -> float | None:
        """The grade of a row, which is 0 for a negative; None if it is missing.

        Raises:
            DataError: The value is no label.
        """
        value = row.get(self.column)
        if is_missing(value):
            return None
        if self._are_grades:
            return self._grade(value, place)
        relevance = columns.binary(value)
        if relevance is None:
            raise DataError(
                f"{place}: {self.column!r} is {value!r}, but the first {self._num_rows:,} rows have only 0 and 1, which"
                " say whether a document is relevant. Correct the value, or rename the column if it has no relevance."
            )
        return float(relevance)

    def notes(self, name: str) -> list[str]:
        """How the labels of the dataset of this name are read."""
        if not self._known:
            return []
        place, value = self._known[0]
        if self._are_scores:
            return [
                f"Warning: {name}: {self.column!r} has values other than 0 and 1, such as {value!r} ({place}). It is "
                "not used: the document of every row counts as relevant. Remove the rows that are not relevant; or, if "
                "0 is a negative and every other value a grade of relevance, use "
                f"--label-column {columns.typed(self.column)}."
            ]
        if not self._are_grades:
            return [f"{name}: {self.column!r} is 1 for a relevant document and 0 for a negative."]
        found = [f"{name}: {self.column!r} is 0 for a negative, and a grade above 0 for a relevant document."]
        if all(self._grade(value, place) for place, value in self._known):
            found.append(
                f"Warning: {name}: no {self.column!r} of the first {self._num_rows:,} rows is 0, so that all their "
                f"documents count as relevant, such as one with {value!r} ({place}). Set those to 0 that are not, or "
                "rename the column if it has no grades of relevance."
            )
        return found

    def _grade(self, value: object, place: str) -> float:
        relevance = columns.binary(value)
        grade = columns.number(value) if relevance is None else float(relevance)
        if grade is None or grade < 0:
            raise DataError(
                f"{place}: {self.column!r} is {value!r}; expected a grade: 0 for a negative, a higher number for a "
                "relevant document. Correct the value, or rename the column if it has no relevance."
            )
        return grade

    def _no_relevance(self, place: str, value: object) -> DataError:
        return DataError(
            f"{place}: {self.column!r} is {value!r}; expected 1 for a relevant document, or 0 for a negative. If the "
            "column says which documents are relevant, keep the rows that are, and remove the column. If it has grades "
            f"of relevance from 0, use --label-column {columns.typed(self.column)}. Otherwise, rename it."
        )


def label_of(row: dict[str, Any], options: DataOptions) -> str | None:
    """The column of the labels of a row; None if there is none."""
    return options.label_column or columns.first_of(columns.LABELS, row)
