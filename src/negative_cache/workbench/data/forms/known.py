"""Forms of rows, and what the columns of a row stand for in each of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from negative_cache.workbench.data.files import columns
from negative_cache.workbench.data.files.columns import quoted
from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.data.retrieval_data import DataError
from negative_cache.workbench.suggestions import DOCUMENTS_ALONE, similar


class Form(NamedTuple):
    """A form of rows.

    Attributes:
        name: The project or dataset that defines it; empty if columns may have any names.
        query: Names of the column of the query, the most usual first.
        positive: Name of the column of the relevant documents, by which the form is recognised; empty if there is none.
        negatives: Names of the columns of the negatives.
        query_id: Name of the column of the id of the query; None if there is none.
        prompt: Name of the column of the text before the query; None if there is none.
        has_ids: Whether a text in the columns of documents is the id of a document.
    """

    name: str
    query: tuple[str, ...] = ()
    positive: str = ""
    negatives: tuple[str, ...] = ()
    query_id: str | None = None
    prompt: str | None = None
    has_ids: bool = False


class Columns(NamedTuple):
    """The columns of a row.

    Attributes:
        query: Column of the query.
        positives: Columns of the relevant documents, at least one.
        negatives: Columns of the negatives.
        by_order: Those of them that were taken by their order, because their names are not known.
    """

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    by_order: tuple[str, ...] = ()


FORMS = (
    Form("Tevatron", ("query", "query_text"), "positive_passages", ("negative_passages",), query_id="query_id"),
    Form(
        "Tevatron with document ids", ("query_text", "query"), "positive_document_ids", ("negative_document_ids",),
        query_id="query_id", has_ids=True,
    ),
    Form("DPR", ("question",), "positive_ctxs", ("hard_negative_ctxs", "negative_ctxs")),
    Form("NeMo", ("question", "query"), "pos_doc", ("neg_doc",), query_id="question_id"),
    Form("ms-swift", ("messages",), "positive_messages", ("negative_messages",)),
    Form("FlagEmbedding", ("query",), "pos", ("neg",), prompt="prompt"),
)  # fmt: skip
LISTS = Form("lists")
SETS = Form("embedding-training-data sets")
LABELLED_LISTS = Form("sentence-transformers lists")
ANY_NAMES = Form("")

_DOCUMENTS = ("docs", "documents", "passages")  # of labelled lists
_POSITIVE, _NEGATIVE = "positive", "negative"


def form_of(row: object, place: str, options: DataOptions) -> Form:
    """The form of a row: one of `FORMS`, or `LISTS`, `SETS`, `LABELLED_LISTS` or `ANY_NAMES`.

    Raises:
        DataError: The row is not a list and not an object.
    """
    if isinstance(row, list):
        return LISTS
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected a JSON object or a list of texts, got {type(row).__name__}.")
    asked = options.positive_column
    for form in FORMS:
        has_query = options.query_column is not None or any(name in row for name in form.query)
        if form.positive in row and has_query and asked in (None, form.positive):
            return form
    if isinstance(row.get("set"), list):
        return SETS
    return LABELLED_LISTS if asked is None and _labelled(row) is not None else ANY_NAMES


def with_names(form: Form, row: Any, place: str) -> dict[str, Any]:
    """A row as column -> value; a list, a set and a labelled list get the columns query, positive and negative.

    Raises:
        DataError: The row is not of the form.
    """
    if form == LISTS:
        if not isinstance(row, list) or len(row) < 2:
            advice = f" {DOCUMENTS_ALONE}" if isinstance(row, list) and len(row) == 1 else ""
            raise DataError(
                f"{place}: expected a list of a query, a positive and any negatives, got {str(row)[:60]!r}.{advice}"
            )
        names = itertools.chain(("query", _POSITIVE), (f"{_NEGATIVE}_{number}" for number in itertools.count(1)))
        return dict(zip(names, row, strict=False))
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected a JSON object as in the first row, got {type(row).__name__}.")
    if form == SETS:
        texts = row.get("set")
        if not isinstance(texts, list) or len(texts) < 2:
            raise DataError(f"{place}: 'set' is {str(texts)[:60]}; expected a list of two or more texts.")
        return {"query": texts[0], _POSITIVE: texts[1:]}
    if form == LABELLED_LISTS:
        return _divided(row, place)
    return row


def columns_of(row: dict[str, Any], form: Form, place: str, options: DataOptions) -> Columns:
    """The columns of the query and the documents of a row that has names.

    Raises:
        DataError: There are none.
    """
    _check_asked(row, place, options)
    if form.positive:
        query = options.query_column or next((name for name in form.query if name in row), form.query[0])
        return Columns(query, (form.positive,), _negatives(row, form.negatives, options))
    query_column = options.query_column or columns.first_of(columns.QUERY, row)
    positives = columns.positives_in(row) if options.positive_column is None else (options.positive_column,)
    if query_column is None and not positives:
        return _by_order(row, place, options)
    if query_column is None:
        other = _only_other("query", positives, row, place, options)
        return Columns(other, positives, _negatives(row, (), options), by_order=(other,))
    if options.positive_column == query_column:
        other = next((name for name in row if columns.has_text(name) and name != query_column), "NAME")
        raise DataError(
            f"{place}: {query_column!r} is the column of the queries and, by --positive-column, of the documents. Name "
            f"another one, for example: --positive-column {columns.typed(other)}."
        )
    positives = tuple(name for name in positives if name != query_column)
    if not positives:
        other = _only_other("positive", (query_column,), row, place, options)
        return Columns(query_column, (other,), _negatives(row, (), options), by_order=(other,))
    used = (query_column, *positives, options.label_column)
    usual = tuple(name for name in columns.negatives_in(row, query_column) if name not in used)
    return Columns(query_column, positives, _negatives(row, usual, options))


def _by_order(row: dict[str, Any], place: str, options: DataOptions) -> Columns:
    asked = (options.negative_column, options.label_column)
    names = [
        name for name, value in row.items()
        if columns.has_text(name) and name not in asked and not isinstance(value, dict | bytes)
    ]  # fmt: skip
    if len(names) == 1 and asked == (None, None) and isinstance(row[names[0]], str):
        raise _no_pairs(row, place)
    if len(names) < 2:
        forms = ", ".join(form.name for form in FORMS)
        raise DataError(
            f"{place}: rows of an unknown form, with the columns {quoted(row)}. Name the columns of the query and of "
            f"the relevant documents with --query-column and --positive-column. Known forms: pairs, triplets, {forms}."
        )
    is_labelled = options.label_column is not None or columns.first_of(columns.LABELS, row) is not None
    negatives = _negatives(row, () if is_labelled else names[2:], options)
    unnamed = (*names[:2], *(negatives if options.negative_column is None else ()))
    return Columns(names[0], (names[1],), negatives, by_order=unnamed)


def _only_other(option: str, known: Sequence[str], row: dict[str, Any], place: str, options: DataOptions) -> str:
    """The column of the query or the positive, as the only one that may have texts besides a known one.

    Raises:
        DataError: There are none or several.
    """
    used = (*known, options.negative_column, options.label_column)
    free = [name for name in row if columns.has_text(name) and name not in used]
    if len(free) == len(known) == 1 and isinstance(row[free[0]], str):
        return free[0]
    usual = columns.QUERY if option == "query" else columns.POSITIVE
    raise _no_column(option, usual, row, place, known[0])


def _negatives(row: dict[str, Any], usual: Sequence[str], options: DataOptions) -> tuple[str, ...]:
    if options.negative_column is not None:
        return (options.negative_column,)
    return tuple(name for name in usual if name in row)


_NAMED = ("query", "positive", "negative", "label")


def _check_asked(row: Iterable[str], place: str, options: DataOptions) -> None:
    """Raise DataError if columns that are asked for are not there; one error names all of them."""
    asked = {f"--{name}-column": getattr(options, f"{name}_column") for name in _NAMED}
    missing = {flag: name for flag, name in asked.items() if name is not None and name not in row}
    if not missing:
        return
    known = {columns.normal(other): other for other in row}
    near = {flag: known.get(columns.normal(name)) or similar(name, row) for flag, name in missing.items()}
    meant = [f"{flag} {columns.typed(name)}" for flag, name in near.items() if name is not None]
    advice = (
        f"Did you mean {' '.join(meant)}?"
        if meant
        else "The first line of a .csv or .tsv file has the names of the columns."
    )
    found = ", and ".join(f"no column {name!r}, which {flag} names" for flag, name in missing.items())
    raise DataError(f"{place}: there is {found}; the columns are {quoted(row)}. {advice}")


def _may_be_text(value: object) -> bool:
    return isinstance(value, str) and columns.number(value) is None


def _no_column(option: str, usual: Sequence[str], row: dict[str, Any], place: str, used: str | None) -> DataError:
    texts = [name for name in row if columns.has_text(name)]
    if len(texts) == 1:
        return _no_pairs(row, place)
    free = [name for name in texts if not columns.is_known(name) and name != used and _may_be_text(row[name])]
    example = columns.typed(free[0]) if free else "NAME"
    return DataError(
        f"{place}: no column {' or '.join(usual[:4])}, only {quoted(row)}. Name the column, for example: "
        f"--{option}-column {example}. The first line of a .csv or .tsv file has the names of the columns."
    )


def _no_pairs(row: Iterable[str], place: str) -> DataError:
    return DataError(f"{place}: only one column may have texts; the columns are {quoted(row)}. {DOCUMENTS_ALONE}")


def _labelled(row: dict[str, Any]) -> tuple[str, list[Any], str, list[Any]] | None:
    """Columns and values of the documents and of their labels, in a row with lists of both; None in another row."""
    passages = row.get("passages")
    if isinstance(passages, dict) and {"is_selected", "passage_text"} <= passages.keys():  # MS MARCO on the hub
        return "passages", passages["passage_text"], "passages", passages["is_selected"]
    documents, label = columns.first_of(_DOCUMENTS, row), columns.first_of(columns.LABELS, row)
    if documents is None or label is None or not isinstance(row[documents], list) or not isinstance(row[label], list):
        return None
    return documents, row[documents], label, row[label]


def _divided(row: dict[str, Any], place: str) -> dict[str, Any]:
    """A row with a list of documents and a list of labels, which has the columns positive and negative instead."""
    found = _labelled(row)
    if found is None:
        raise DataError(f"{place}: expected lists of documents and of labels as in the first row; got {quoted(row)}.")
    documents_name, documents, label_name, labels = found
    relevant = [columns.binary(label) for label in labels]
    if len(documents) != len(labels) or None in relevant:
        raise DataError(
            f"{place}: {label_name!r} is {str(labels)[:60]} for {len(documents)} documents; expected 0 or 1 for each, "
            "which says whether the document is relevant."
        )
    rest = {name: value for name, value in row.items() if name not in (documents_name, label_name)}
    for name, wanted in ((_POSITIVE, True), (_NEGATIVE, False)):
        rest[name] = [document for document, label in zip(documents, relevant, strict=True) if label is wanted]
    return rest
