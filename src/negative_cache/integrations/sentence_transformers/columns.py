"""Checks of the columns of a dataset: all but the labels have texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow
import pyarrow.compute
from datasets import Dataset
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

MOST_ROWS = 100_000  # whose texts are compared; all texts of a large dataset may not fit into memory
LABEL_SUFFIX = "_label"  # of the column with the ids of the negatives
_DATASET_NAME = "dataset_name"  # a column that the trainer adds


def check_dataset(dataset: Any, name: str) -> None:
    """Raise ValueError unless the columns of a dataset, or of a dict of datasets, have texts or labels.

    `RetrievalData` is a TypeError.

    The texts of a streamed dataset, or of one with a transform, are not read.

    Args:
        dataset: The dataset; None for none.
        name: Its name in error messages.
    """
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_dataset(part, f"{name}[{key!r}]")
        return
    if hasattr(dataset, "training_set"):
        raise TypeError(f"{name} is {type(dataset).__name__}; expected a dataset. Give its training_set().")
    if getattr(dataset, "features", None) is None or getattr(dataset, "format", {}).get("type") == "custom":
        return
    schema, lists = dataset.features.arrow_schema, list_columns(dataset)
    for position, column in enumerate(text_columns(dataset.column_names)):
        kind = schema.field(column).type
        if column in lists:
            continue
        if pyarrow.types.is_boolean(kind) or pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind):
            raise _not_texts(column, f"values of type {kind}", pyarrow.types.is_integer(kind))
        if _has_lists_of_texts(schema.field(column)):
            raise _lists_of_texts(column, position)
        if _is_text(kind) and isinstance(dataset, Dataset):
            _check_texts(dataset, column, name)


def anchors_with_several_positives(dataset: Any) -> int:
    """Number of anchors that have different positives in different ones of the first `MOST_ROWS` rows.

    0 if the dataset has labels, is streamed, or has a transform or columns that are no texts.
    """
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return 0
    schema, texts = dataset.features.arrow_schema, text_columns(dataset.column_names)
    has_labels = bool(set(dataset.column_names) - {*texts, _DATASET_NAME})
    names = [name for name in texts[:2] if _is_text(schema.field(name).type)]
    if has_labels or len(names) < 2:
        return 0
    rows = dataset.data.table.select(names)
    if dataset._indices is not None:  # the dataset is a selection of the rows of its table
        rows = rows.take(dataset._indices.column(0).slice(0, MOST_ROWS))
    rows = rows.slice(0, MOST_ROWS)
    counts = rows.group_by(names[0]).aggregate([(names[1], "count_distinct")]).column(f"{names[1]}_count_distinct")
    return pyarrow.compute.sum(pyarrow.compute.greater(counts, 1)).as_py() or 0


def check_row(row: dict[str, Any], names: Sequence[str]) -> None:
    """Raise ValueError unless the columns of a row have texts, or something that the model may take as well.

    Args:
        row: Column -> value.
        names: The columns of the anchor, the positive, and any further texts.
    """
    for position, name in enumerate(names):
        value = row[name]
        if value is None or value == "":
            raise ValueError(f"The column {name!r} has the value {value!r}; expected a text. {_without(name)}")
        if isinstance(value, bool | int | float):
            raise _not_texts(name, f"the value {value!r}", isinstance(value, int))
        if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
            raise _lists_of_texts(name, position)


def text_columns(names: Sequence[str], labels: Sequence[str] | None = None) -> list[str]:
    """The columns that sentence-transformers takes for texts: all but the first with the name of a label.

    Args:
        names: The columns of a dataset.
        labels: The names of labels; None for the usual ones.
    """
    if labels is None:
        labels = SentenceTransformerDataCollator(preprocess_fn=len).valid_label_columns
    label = next((name for name in labels if name in names), None)
    return [name for name in names if name not in (label, _DATASET_NAME)]


def list_columns(dataset: Any) -> list[str]:
    """Names of the columns of negatives of a dataset that are lists, and of those with their ids."""
    schema = dataset.features.arrow_schema
    names = {field.name for field in schema if _has_lists_of_texts(field)} - set(dataset.column_names[:2])
    return [name for name in dataset.column_names if name in names or name.removesuffix(LABEL_SUFFIX) in names]


def _is_text(kind: Any) -> bool:
    """Whether an Arrow type is that of texts; polars and pandas write large ones."""
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def _has_lists_of_texts(field: Any) -> bool:
    of = getattr(field.type, "value_type", None)
    return of is not None and _is_text(of)


def _check_texts(dataset: Dataset, column: str, name: str) -> None:
    """Raise ValueError for the first row without a text."""
    texts = dataset.data.column(column)
    is_empty = pyarrow.compute.equal(pyarrow.compute.binary_length(texts), 0).fill_null(True)
    if not pyarrow.compute.any(is_empty).as_py():
        return
    if dataset._indices is not None:  # the dataset is a selection of the rows of its table
        is_empty = is_empty.take(dataset._indices.column(0))
    row = pyarrow.compute.index(is_empty, True).as_py()
    if row >= 0:
        raise ValueError(f"{name}[{row}][{column!r}] is {dataset[row][column]!r}; expected a text. {_without(column)}")


def _without(column: str) -> str:
    return f"Remove such rows: dataset.filter(lambda row: row[{column!r}])."


def _not_texts(column: str, what: str, may_be_ids: bool) -> ValueError:
    advice = f"Remove it: dataset.remove_columns({column!r})."
    if may_be_ids:
        advice = (
            f'If these are ids of the positives, rename it: dataset.rename_column({column!r}, "label"). Otherwise, '
            f"remove it: dataset.remove_columns({column!r})."
        )
    return ValueError(f"The column {column!r} has {what}; expected texts. {advice}")


def _lists_of_texts(column: str, position: int) -> ValueError:
    if position > 1:
        return ValueError(
            f"The column {column!r} has a list of texts, but not in all rows of a batch. Give each row a list."
        )
    advice = "Make one row per text, and name the others in a list of ids in the column `label`."
    return ValueError(
        f"The column {column!r} has lists of texts, which the model would encode as one text each; expected one text. "
        f"{advice if position else 'Make one row per text.'} Only the negatives of a row may be a list, in a column "
        "after the anchor and the positive."
    )
