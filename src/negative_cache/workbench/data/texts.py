"""`Texts`: a read-only mapping from ids to texts in a memory-mapped Arrow file."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import ItemsView, Iterable, Iterator, Mapping, Sequence, ValuesView
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute

ROWS_PER_BATCH = 8192


class RepeatedIdError(ValueError):
    """An id was added twice.

    Args:
        key: The id.
        first: Position of the text that was added first.
        second: Position of the other one.
    """

    def __init__(self, key: str, first: int, second: int) -> None:
        super().__init__(f"the id {key!r} occurs twice, in the entries {first + 1:,} and {second + 1:,}")
        self.key, self.first, self.second = key, first, second


class Texts(Mapping[str, str]):
    """Texts by id, in the order in which they were added.

    The texts stay on disk, and are read when they are asked for. An entry takes 16 bytes of memory.

    Args:
        table: Columns id and text.

    Raises:
        RepeatedIdError: An id occurs twice.
    """

    def __init__(self, table: pyarrow.Table) -> None:
        self._ids, self._texts = table.column("id"), table.column("text")
        self._index = _Index(self, len(self._ids))
        for first, second in self._index.collisions():
            if self.key(first) == self.key(second):
                raise RepeatedIdError(self.key(first), first, second)

    @classmethod
    def of(cls, texts: Mapping[str, str] | Iterable[tuple[str, str]]) -> Texts:
        """Write the texts of a mapping, or of pairs of an id and a text, to a temporary file."""
        if isinstance(texts, Texts):
            return texts
        writer = ArrowWriter({"id": pyarrow.string(), "text": pyarrow.string()})
        for key, text in texts.items() if isinstance(texts, Mapping) else texts:
            writer.add(key, text)
        return cls(writer.finish())

    def __reduce__(self) -> tuple[type[Texts], tuple[pyarrow.Table]]:
        """Pickle the table alone, because hashes differ from process to process."""
        return Texts, (pyarrow.table({"id": self._ids, "text": self._texts}),)

    def __getitem__(self, key: str) -> str:
        return self.text(self.position(key))

    def __contains__(self, key: object) -> bool:
        try:
            self.position(key)
        except KeyError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return _values_of(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def items(self) -> ItemsView[str, str]:
        """Pairs of an id and its text, read batch by batch."""
        return _Items(self)

    def values(self) -> ValuesView[str]:
        """The texts, read batch by batch."""
        return _Values(self)

    def position(self, key: object) -> int:
        """The position of an id; raises KeyError if there is no such id."""
        for position in self._index.candidates(key):
            if self._ids[position].as_py() == key:
                return position
        raise KeyError(key)

    def positions(self, keys: Iterable[str]) -> np.ndarray:
        """The positions of many ids, which are compared by 64-bit hashes: int64 `[n]`.

        Raises:
            KeyError: There is no such id.
        """
        return self._index.first_candidates(keys)

    def key(self, position: int) -> str:
        """The id at a position."""
        key: str = self._ids[position].as_py()
        return key

    def text(self, position: int) -> str:
        """The text at a position."""
        text: str = self._texts[position].as_py()
        return text

    def places_of_ids(self) -> np.ndarray:
        """For each text, the place of its id when ids are sorted by their bytes, the last one first: int64 `[n]`."""
        order = pyarrow.compute.sort_indices(self._ids, sort_keys=[("id", "descending")]).to_numpy()
        places = np.empty(len(order), dtype=np.int64)
        places[order] = np.arange(len(order))
        return places

    def first_of_equal(self) -> np.ndarray:
        """For each text, the position of the first text that is equal to it: int64 `[n]`.

        Texts are compared by 64-bit hashes. All calls return the same array, which must not be changed.
        """
        return self._first_of_equal

    @functools.cached_property
    def _first_of_equal(self) -> np.ndarray:
        hashes = np.fromiter(map(hash, self.values()), dtype=np.int64, count=len(self))
        _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
        positions: np.ndarray = first[group].astype(np.int64)
        return positions

    def at(self, positions: Iterable[int]) -> Texts:
        """A copy of the texts at these positions, in this order."""
        return Texts.of((self.key(position), self.text(position)) for position in positions)

    def followed_by(self, others: Iterable[tuple[str, str]]) -> Texts:
        """These texts and others, without a copy of these; raises RepeatedIdError if an id occurs twice."""
        added = Texts.of(others)
        columns = [(self._ids, self._texts), (added._ids, added._texts)]
        tables = [pyarrow.table({"id": ids, "text": texts}) for ids, texts in columns]
        return Texts(pyarrow.concat_tables(tables)) if len(added) else self


class IdsByText:
    """Finds the id of a text. An entry takes 16 bytes of memory."""

    def __init__(self, texts: Texts) -> None:
        self._texts = texts
        self._index = _Index(texts.values(), len(texts))

    def find(self, text: str) -> str | None:
        """The id of the first text that is equal, or None."""
        for position in self._index.candidates(text):
            if self._texts.text(position) == text:
                return self._texts.key(position)
        return None


class _Index:
    """Finds the positions of values by their 64-bit hashes. A value takes 16 bytes of memory.

    Args:
        values: The values, in the order of their positions.
        count: Their number.
    """

    def __init__(self, values: Iterable[str], count: int) -> None:
        hashes = np.fromiter(map(hash, values), dtype=np.int64, count=count)
        self._order = hashes.argsort(kind="stable")
        self._hashes = hashes[self._order]

    def candidates(self, value: object) -> Iterator[int]:
        """Positions of the values with the hash of this one, the first one first."""
        wanted = hash(value)
        at = int(np.searchsorted(self._hashes, wanted))
        while at < len(self._hashes) and self._hashes[at] == wanted:
            yield int(self._order[at])
            at += 1

    def first_candidates(self, values: Iterable[str]) -> np.ndarray:
        """For each of these values, the first position of a value with its hash: int64 `[n]`.

        Raises:
            KeyError: There is no such value.
        """
        wanted = np.fromiter(map(hash, values), dtype=np.int64)
        at = np.searchsorted(self._hashes, wanted)
        is_missing = at == len(self._hashes)
        is_missing[~is_missing] = self._hashes[at[~is_missing]] != wanted[~is_missing]
        if is_missing.any():
            raise KeyError(f"there is no text for id number {int(is_missing.argmax()) + 1:,}")
        positions: np.ndarray = self._order[at]
        return positions

    def collisions(self) -> Iterator[tuple[int, int]]:
        """Positions of values with equal hashes, two by two."""
        for at in np.nonzero(self._hashes[1:] == self._hashes[:-1])[0].tolist():
            yield int(self._order[at]), int(self._order[at + 1])  # in order, because the sort is stable


class ArrowWriter:
    """Writes rows to a temporary Arrow file, and reads them back memory-mapped.

    Args:
        columns: Arrow type of each column.
    """

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self._schema = pyarrow.schema(list(columns.items()))
        self._rows: list[Sequence[Any]] = []
        handle, name = tempfile.mkstemp(prefix="negative-cache-", suffix=".arrow")
        os.close(handle)
        self._path = Path(name)
        self._writer = pyarrow.ipc.new_file(name, self._schema)

    def add(self, *row: Any) -> None:
        """Add a row: its values, in the order of the columns."""
        self._rows.append(row)
        if len(self._rows) == ROWS_PER_BATCH:
            self._flush()

    def finish(self) -> pyarrow.Table:
        """The rows as a table. The file is removed as soon as nothing uses the table, or the process ends."""
        self._flush()
        self._writer.close()
        table = pyarrow.ipc.open_file(pyarrow.memory_map(str(self._path))).read_all()
        with contextlib.suppress(PermissionError):  # Windows does not remove files that are open
            self._path.unlink()
        return table

    def _flush(self) -> None:
        if self._rows:
            columns = [
                pyarrow.array(values, type=field.type)
                for values, field in zip(zip(*self._rows, strict=True), self._schema, strict=True)
            ]
            self._writer.write_batch(pyarrow.record_batch(columns, schema=self._schema))
            self._rows.clear()


class _Items(ItemsView[str, str]):
    _mapping: Texts

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return zip(_values_of(self._mapping._ids), _values_of(self._mapping._texts), strict=True)


class _Values(ValuesView[str]):
    _mapping: Texts

    def __iter__(self) -> Iterator[str]:
        return _values_of(self._mapping._texts)


def _values_of(column: pyarrow.ChunkedArray) -> Iterator[str]:
    for chunk in column.chunks:
        yield from chunk.to_pylist()
