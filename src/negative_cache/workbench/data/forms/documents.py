"""Values of a row as texts and documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from negative_cache.workbench.data.files.columns import quoted
from negative_cache.workbench.data.files.reading import checked_text
from negative_cache.workbench.data.files.tables import MissingCell
from negative_cache.workbench.data.retrieval_data import DataError
from negative_cache.workbench.data.rows import Document

_TEXT = ("text", "passage", "contents", "content")
_ID = ("docid", "passage_id", "psg_id", "doc_id", "id", "_id", "pid")


def is_missing(value: object) -> bool:
    """Whether there is no text: null, blank, a NaN of pandas, or a cell that stands for a missing value."""
    if isinstance(value, str):
        return isinstance(value, MissingCell) or not value.strip()
    return value is None or value != value


def with_marker(reason: str, value: object) -> str:
    """Why something is skipped, with the cell that stands for the missing value if there is one."""
    return f"{reason} (the cell is {str(value)!r})" if isinstance(value, MissingCell) else reason


def documents_in(value: object, key: str, place: str, by_id: bool = False) -> Iterator[Document | None]:
    """The documents of a value; None for each one that is missing.

    Args:
        value: A text; an object with a title, a text and an id; a conversation, a list of objects with a role and a
            content; or a list of these.
        key: Name of the column, for messages.
        place: Place of the row, for messages.
        by_id: Whether a text is the id of a document.

    Raises:
        DataError: The value is something else.
    """
    if is_missing(value):
        yield None
    elif is_conversation(value):
        text = "\n".join(contents(value, key, place, None))
        yield Document(text) if text else None
    elif isinstance(value, list):
        for part in value:
            yield from documents_in(part, key, place, by_id)
    elif isinstance(value, dict):
        yield _of_fields(value, key, place)
    elif by_id:
        yield Document(None, id_in(value, key, place))
    else:
        yield Document(checked_text(value, key, place))


def id_in(value: object, key: str, place: str) -> str:
    """A value that is an id: a text, or an integer, which is converted to a text."""
    is_id = isinstance(value, int | MissingCell) and not isinstance(value, bool)  # an id may be "NA"
    return str(value) if is_id else checked_text(value, key, place)


def is_conversation(value: object) -> bool:
    """Whether a value is a list of messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def contents(messages: Any, key: str, place: str, role: str | None) -> list[str]:
    """The contents of the messages of a role, or of all messages for None; without empty ones."""
    found = []
    for message in messages:
        if not isinstance(message, dict) or "content" not in message:
            raise DataError(
                f"{place}: {key!r} has a message without a content; expected objects with role and content."
            )
        if role in (None, message.get("role")) and not is_missing(message["content"]):
            found.append(checked_text(message["content"], f"{key}, content", place))
    return found


def _of_fields(fields: dict[str, Any], key: str, place: str) -> Document | None:
    """A document from its title, text and id. It has its id alone if there is neither a title nor a text."""
    text_key, id_key = _first(fields, _TEXT), _first(fields, _ID)
    if text_key is None and id_key is None:
        raise DataError(
            f"{place}: {key!r} has an object without a text and without an id: only {quoted(fields)}; expected one of "
            f"{quoted(_TEXT)} or of {quoted(_ID)}."
        )
    parts = [
        checked_text(fields[name], f"{key}, {name}", place)
        for name in ("title", text_key)
        if name is not None and not is_missing(fields.get(name))
    ]
    own_id = None if id_key is None or fields[id_key] is None else id_in(fields[id_key], f"{key}, {id_key}", place)
    if parts:
        return Document("\n".join(parts), own_id)
    return Document(None, own_id) if text_key is None and own_id is not None else None


def _first(fields: dict[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in fields), None)
