"""`RowReader`: rows of any form as `Row`."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

from negative_cache.workbench.data.files import columns
from negative_cache.workbench.data.files.columns import quoted
from negative_cache.workbench.data.files.reading import RawRows, checked_text
from negative_cache.workbench.data.forms.by_order import check_are_texts
from negative_cache.workbench.data.forms.documents import (
    contents,
    documents_in,
    id_in,
    is_conversation,
    is_missing,
    with_marker,
)
from negative_cache.workbench.data.forms.known import (
    ANY_NAMES,
    LABELLED_LISTS,
    LISTS,
    SETS,
    Columns,
    columns_of,
    form_of,
    with_names,
)
from negative_cache.workbench.data.forms.labels import Labels, label_of
from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.data.retrieval_data import DataError
from negative_cache.workbench.data.rows import Document, Row

FIRST_ROWS = 1000


class RowReader:
    """Reads the rows of one file or dataset as `Row`. They can be read once.

    The first row decides the form. The first `FIRST_ROWS` rows decide what labels are, and whether columns that have no
    known names are texts.

    Args:
        name: The name of the file or dataset, for messages.
        rows: Its rows; see `file_rows`.
        options: How they are read.
        has_ids: Whether a text in the columns of documents is the id of a document, whatever the form.

    Attributes:
        form: The form, such as "pairs", "triplets" or "DPR".
        skipped: What was skipped -> how often; complete after all rows were read.
        corpus_paths: The files of the documents that the rows refer to, relative to the folder of the file.

    Raises:
        DataError: There are no rows, the form is unknown, or an option has a wrong value; while rows are read: a row
            cannot be used.
    """

    def __init__(self, name: str, rows: RawRows, options: DataOptions, has_ids: bool = False) -> None:
        self._name, self._options = name, options
        self.skipped: dict[str, int] = {}
        first = next(rows, None)
        self.corpus_paths: list[str] = []
        if first is not None and isinstance(first[1], dict) and list(first[1]) == ["corpus"]:
            self.corpus_paths = first[1]["corpus"]
            first = next(rows, None)
        if first is None:
            raise DataError(f"{name} has no pairs: it has no rows.")
        place, row = first
        self._form = form_of(row, place, options)
        named = with_names(self._form, row, place)
        self._has_ids = has_ids or self._form.has_ids or bool(self.corpus_paths)
        self._names, self._first = tuple(named), columns_of(named, self._form, place, options)
        self._columns: dict[tuple[str, ...], Columns] = {}
        self._read_names: set[str] = set()
        self._unused: set[str] = set()
        self._counts = {"prompt": 0, "system message": 0, "list": 0}
        label = self._label_of(named, place)
        is_by_order = self._form == LISTS or bool(self._first.by_order)
        seen = [first, *itertools.islice(rows, FIRST_ROWS - 1 if is_by_order or label is not None else 0)]
        self._rows = itertools.chain(seen, rows)
        if is_by_order:
            given = [(at, with_names(self._form, each, at)) for at, each in seen]
            unnamed = self._first if options.negative_column is None else self._first._replace(negatives=())
            check_are_texts(unnamed, given, self._has_ids)
        self._labels = None if label is None else Labels(label, seen, options)
        self.form = self._form_name(named)

    def __iter__(self) -> Iterator[Row]:
        for place, raw in self._rows:
            row = self._read(with_names(self._form, raw, place), place)
            if row is not None:
                yield row

    @property
    def notes(self) -> list[str]:
        """How the rows were read and what is not used; complete after all rows were read."""
        found = list(self._notes_of_columns())
        if count := self._counts["prompt"]:
            found.append(f"the prompt is put before the query; rows with a prompt: {count:,}.")
        if count := self._counts["system message"]:
            found.append(f"the system message is put before the query, with a line break; rows with one: {count:,}.")
        if count := self._counts["list"]:
            found.append(f"values that are lists, each text of which is a document: {count:,}.")
        of_labels = [] if self._labels is None else self._labels.notes(self._name)
        return [*(f"{self._name}: {note}" for note in found), *of_labels]

    def _read(self, row: dict[str, Any], place: str) -> Row | None:
        """A row; None if it is skipped."""
        names = self._columns_of(row, place)
        query = self._query(row, names.query, place)
        if query is None:
            self._skip("rows with an empty query", row, names.query, place)
            return None
        positives = self._documents(row, names.positives[0], "empty positives", place, is_needed=True)
        for name in names.positives[1:]:
            positives += self._documents(row, name, "empty positives", place)
        if not positives:
            self._skip("rows without a relevant document", row, names.positives[0], place)
            return None
        negatives: list[Document] = []
        for name in names.negatives:
            negatives += self._documents(row, name, "empty negatives", place)
        if self._labels is not None and self._labels.is_used:
            grade = self._labels.grade(row, place)
            if grade is None:
                self._skip("rows without a label", row, self._labels.column, place)
                return None
            if grade == 0:
                positives, negatives = [], positives
            else:
                positives = [document._replace(grade=grade) for document in positives]
        if not positives and not negatives:
            return None
        return Row(place, query, positives, negatives, self._query_id(row, place))

    def _columns_of(self, row: dict[str, Any], place: str) -> Columns:
        names = tuple(row)
        found = self._columns.get(names)
        if found is None:
            found = self._first if names == self._names else self._other_columns(row, place)
            self._columns[names] = found
            read: set[str | None] = {found.query, *found.positives, *found.negatives}
            read |= {self._form.query_id, self._form.prompt}
            read |= {self._labels.column} if self._labels is not None and self._labels.is_used else set()
            self._read_names |= row.keys() & read
            self._unused |= row.keys() - read
        return found

    def _other_columns(self, row: dict[str, Any], place: str) -> Columns:
        """The columns of a row with other names than the first row; those of the first row if a column is missing."""
        first = self._first
        with contextlib.suppress(DataError):
            found = columns_of(row, self._form, place, self._options)
            if not found.by_order:
                return found
        if first.query in row or row.keys() & set(first.positives):
            return first
        raise DataError(f"{place}: no column {first.query!r} and no column {first.positives[0]!r}, only {quoted(row)}.")

    def _query(self, row: dict[str, Any], name: str, place: str) -> str | None:
        """The query, after its prompt; None if it is missing."""
        value = row.get(name)
        if is_conversation(value):
            before, texts = (contents(value, name, place, role) for role in ("system", "user"))
            self._counts["system message"] += bool(before)
            return "\n".join([*before, *texts]) if texts else None
        if is_missing(value):
            return None
        query = checked_text(value, name, place)
        prompt = None if self._form.prompt is None else row.get(self._form.prompt)
        if is_missing(prompt):
            return query
        self._counts["prompt"] += 1
        return checked_text(prompt, "prompt", place) + query

    def _query_id(self, row: dict[str, Any], place: str) -> str | None:
        name = self._form.query_id
        return None if name is None or is_missing(row.get(name)) else id_in(row[name], name, place)

    def _documents(
        self, row: dict[str, Any], name: str, empty: str, place: str, is_needed: bool = False
    ) -> list[Document]:
        """The documents of a column; missing ones are skipped and counted, unless all are and one is needed."""
        if name not in row and not is_needed:
            return []
        value = row.get(name)
        if type(value) is str and value.startswith("[") and (cells := columns.list_in(name, value)) is not None:
            self._counts["list"] += 1
            value = cells
        if type(value) is str and not self._has_ids and value.strip():
            return [Document(checked_text(value, name, place))]
        found = list(documents_in(value, name, place, self._has_ids))
        documents = [document for document in found if document is not None]
        if len(documents) < len(found) and (documents or not is_needed):
            for _ in range(len(found) - len(documents)):
                self._skip(empty, row, name, place)
        return documents

    def _skip(self, reason: str, row: dict[str, Any], name: str, place: str) -> None:
        if self._options.strict:
            found = "null" if row.get(name, "") is None else "empty" if name in row else "missing"
            found = with_marker(found, row.get(name))
            raise DataError(
                f"{place}: {name!r} is {found}; expected a text. Fill it in, or leave out --strict to skip it."
            )
        reason = with_marker(reason, row.get(name))
        self.skipped[reason] = self.skipped.get(reason, 0) + 1

    def _label_of(self, row: dict[str, Any], place: str) -> str | None:
        """The column of the labels, by the first row; None if there is none."""
        if self._form == ANY_NAMES and not self._first.negatives:
            return label_of(row, self._options)
        if self._options.label_column is not None:
            raise DataError(
                f"{place}: --label-column is for rows of a query and a document; these have negatives or lists of "
                "documents. Leave it out."
            )
        return None

    def _form_name(self, row: dict[str, Any]) -> str:
        if self._form not in (ANY_NAMES, LISTS):
            return self._form.name
        if self._labels is not None and self._labels.is_used:
            return "labelled pairs"
        negatives = self._first.negatives
        if not negatives:
            return "pairs"
        return "triplets" if len(negatives) == 1 and isinstance(row[negatives[0]], str) else "n-tuples"

    def _notes_of_columns(self) -> Iterator[str]:
        query, positives, negatives, by_order = self._first
        if by_order:
            yield (
                f"no known name of a column: {quoted(by_order)}. The columns are taken by order: query {query!r}, "
                f"positive {positives[0]!r}, negatives {quoted(negatives) or 'none'}. Name others with "
                "--query-column, --positive-column and --negative-column."
            )
        if self._form == LISTS:
            rest = ", negatives" if negatives else ""
            yield f"the values of a row are taken by order: query, positive{rest}."
        if self._form == SETS:
            yield "the first text of a set is the query, the others are its relevant documents."
        if self._unused:
            read = (
                "" if self._form in (SETS, LABELLED_LISTS) else f"columns that are read: {quoted(self._read_names)}; "
            )
            yield f"{read}not used: {quoted(self._unused)}."
