"""The cache of past documents: per row its features, embedding, age and id."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from negative_cache.cache.columns import Column, FixedColumn, QuantizedColumn, RaggedColumn, spec_of
from negative_cache.cache.index import RowsOfIds, oldest_rows
from negative_cache.cache.specs import (
    FeatureSpec,
    RaggedFeature,
    RaggedRows,
    Specs,
    batch_size,
    check_keys,
    is_free_to_read,
    is_loadable,
    padded,
    select,
    spec_to_json,
)
from negative_cache.cache.table import make_columns, read_columns, write_columns

if TYPE_CHECKING:
    from typing_extensions import Self

NO_ID = -1


class NegativeCache(nn.Module):
    """Rows of past documents: per row its features, its possibly stale embedding and its age.

    Everything is a buffer: `state_dict` holds it, `.to()` moves it. A cache made by hand from tensors
    counts all of its rows as filled; the one of `CacheManager.init_cache` starts with none.

    Args:
        data: Feature name -> tensor `[num_rows, *shape]`; kept, not copied.
        age: Update steps since each row was written, `[num_rows]`, a tensor or a list of integers.
    """

    filled: Tensor
    document_ids: Tensor
    written: Tensor
    step: Tensor
    num_rejected: Tensor

    def __init__(self, data: Mapping[str, Tensor], age: Tensor | Sequence[int]) -> None:
        super().__init__()
        if not data:
            raise ValueError("`data` is empty: a cache needs at least the embedding's tensor.")
        sizes = {key: len(value) for key, value in data.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"The tensors of `data` have different numbers of rows: {sizes}.")
        self._fill_in({key: FixedColumn(value) for key, value in data.items()}, next(iter(sizes.values())), True)
        ages = torch.as_tensor(age, device=self.device)
        self.written = -ages.to(torch.int64)

    @classmethod
    def empty(
        cls,
        specs: Specs,
        num_rows: int,
        device: torch.device | str = "cpu",
        feature_device: torch.device | str | None = None,
        scored_keys: Sequence[str] = (),
        feature_folder: str | Path | None = None,
    ) -> NegativeCache:
        """A cache of `num_rows` unfilled rows.

        Args:
            specs: Spec per feature.
            num_rows: Number of rows.
            device: Where the rows live.
            feature_device: Where all features but `scored_keys` live, whatever `.to()` says; None for `device`.
            scored_keys: The features that every step reads of all rows, and that stay on `device`.
            feature_folder: Folder in which all features but `scored_keys` live, in files without a name.

        Raises:
            ValueError: The folder does not exist, or a ragged feature has no max_length.
            OSError: The folder's disk has not enough room.
        """
        cache = cls.__new__(cls)
        nn.Module.__init__(cache)
        columns = make_columns(specs, num_rows, torch.device(device), scored_keys, feature_device, feature_folder)
        cache._fill_in(columns, num_rows, False, torch.device(device))
        return cache

    def _fill_in(
        self,
        columns: Mapping[str, Column],
        num_rows: int,
        is_filled: bool,
        device: torch.device | None = None,
    ) -> None:
        device = next(iter(columns.values())).device if device is None else device
        self._columns = dict(columns)
        for key, column in columns.items():
            self.add_module(module_name("feature", key), column)
        self._has_rows: bool | None = is_filled and num_rows > 0
        self.register_buffer("filled", torch.full((num_rows,), is_filled, device=device))
        self.register_buffer("document_ids", torch.full((num_rows,), NO_ID, dtype=torch.int64, device=device))
        self.register_buffer("written", torch.zeros(num_rows, dtype=torch.int64, device=device))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("num_rejected", torch.zeros((), dtype=torch.int64, device=device))
        self._rows_of_ids: RowsOfIds | None = None  # built when ids are looked up for the first time

    @property
    def data(self) -> dict[str, Tensor]:
        """Feature name -> `[num_rows, *shape]`; ragged features padded to their longest row (a copy)."""
        return {key: column.dense() for key, column in self._columns.items()}

    @property
    def age(self) -> Tensor:
        """Update steps since each row was written, int32 `[num_rows]`; 0 for the rows written last."""
        return (self.step - self.written).to(torch.int32)

    @property
    def num_rows(self) -> int:
        return self.filled.shape[0]

    @property
    def num_filled(self) -> Tensor:
        """Number of filled rows, an int64 scalar on the cache's device."""
        return self.filled.sum()

    @property
    def device(self) -> torch.device:
        """Where the bookkeeping (and the embeddings) live."""
        return self.filled.device

    @property
    def specs(self) -> dict[str, FeatureSpec]:
        """Spec per feature, as stored."""
        return {key: spec_of(column) for key, column in self._columns.items()}

    def __iter__(self) -> Iterator[Any]:
        return iter((self.data, self.age))

    def has_rows(self) -> bool:
        """Whether any row is filled. A device is waited for only after a state was loaded.

        On a GPU, True also where all that was ever written was masked there: nobody looked.
        """
        if self._has_rows is None or (not self._has_rows and is_free_to_read(self.filled)):
            self._has_rows = bool(self.filled.any())
        return self._has_rows

    def embeddings(self, key: str) -> Tensor:
        """All rows of a feature, `[num_rows, *shape]`: the storage itself for a `FixedLenFeature`, else a copy."""
        return self._columns[key].dense()

    def stored(self, key: str) -> tuple[Tensor, Tensor | None]:
        """The storage of a feature of fixed shape, `[num_rows, *shape]`, and the scales of a quantised one."""
        column = self._columns[key]
        assert not isinstance(column, RaggedColumn)
        return column.values, column.scales if isinstance(column, QuantizedColumn) else None

    def read(self, rows: Tensor, keys: Sequence[str]) -> dict[str, Tensor]:
        """Features of `rows [n]`: `[n, *shape]` each, ragged ones padded to the longest of these rows."""
        return padded(self.read_rows(rows, keys))

    def read_rows(self, rows: Tensor, keys: Sequence[str]) -> dict[str, Tensor | RaggedRows]:
        """Features of `rows [n]` as `write` takes them."""
        return read_columns(self._columns, rows, keys)

    def lengths(self, rows: Tensor, key: str) -> Tensor:
        """Lengths of a ragged feature of `rows [n]`: int64 `[n]`."""
        column = self._columns[key]
        assert isinstance(column, RaggedColumn)
        return column.lengths[rows.to(column.device)]

    def find(self, document_ids: Tensor) -> Tensor:
        """Row of each document.

        Args:
            document_ids: `[n]`, int64; negative entries are never found.

        Returns:
            int64 `[n]`: the row that holds the document, -1 where none does.
        """
        if document_ids.numel() == 0:
            return document_ids
        if self._rows_of_ids is None:
            self._rows_of_ids = RowsOfIds(self.document_ids)
        return self._rows_of_ids.find(self.document_ids, document_ids)

    def oldest(self, count: int) -> Tensor:
        """The `count` rows that were written longest ago, those first; of equal ones the lowest: int64 `[count]`."""
        return oldest_rows(self.written, count)

    def make_young(self, rows: Tensor, mask: Tensor) -> None:
        """Make `rows [n]` the youngest ones where `mask [n]` is True; rows that are not may be -1."""
        times = torch.where(mask, self.step, torch.iinfo(torch.int64).min)
        self.written.scatter_reduce_(0, rows.clamp(min=0), times, "amax")

    def write(
        self,
        rows: Tensor,
        items: Mapping[str, Tensor | RaggedRows],
        mask: Tensor | None = None,
        resets_age: bool = True,
        document_ids: Tensor | None = None,
    ) -> None:
        """Overwrite rows in place; of several entries for one row the last one counts.

        Args:
            rows: int64 `[m]`: where items go; entry i is item `i % n`.
            items: Checked values, `n` each. With every feature given, the rows become filled.
            mask: bool `[m]`; entries that are False change nothing.
            resets_age: Whether the written rows become the youngest.
            document_ids: int64 `[n]`, stored when every feature is given.
        """
        if rows.numel() == 0:
            return
        rows, entries, is_any = _last_entries(rows, mask)
        if rows.numel() == 0:
            return
        source = entries % batch_size(items)
        items = select(items, source)

        def put(stored: Tensor, new: Tensor) -> None:
            stored[rows] = new if is_any is None else torch.where(is_any, new, stored[rows])

        write_columns(self._columns, rows, items, is_any)
        if resets_age:
            put(self.written, self.step)
        if set(items) == set(self._columns):
            put(self.document_ids, torch.full_like(rows, NO_ID) if document_ids is None else document_ids[source])
            if self._rows_of_ids is not None:
                is_once = is_free_to_read(rows)
                is_repeated = None if is_once else entries != torch.arange(len(rows), device=rows.device)
                self._rows_of_ids.move(rows, self.document_ids[rows], is_repeated)
            self.filled[rows] |= True if is_any is None else is_any
            self._has_rows = True

    def get_extra_state(self) -> Tensor:
        """The specs as JSON in a uint8 tensor, so that a state dict holds tensors alone."""
        return _to_bytes({"num_rows": self.num_rows, "specs": {k: spec_to_json(s) for k, s in self.specs.items()}})

    def set_extra_state(self, state: Tensor) -> None:
        """Checked in `check_loadable`, before anything is copied."""

    def check_loadable(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Raise ValueError if the state is of a cache with other rows, keys, shapes or dtypes."""
        saved = state_of(state_dict, prefix)
        if saved["num_rows"] != self.num_rows:
            raise ValueError(
                f"The saved cache has {saved['num_rows']} rows, this one has {self.num_rows}. "
                "negative_cache.checkpoint loads into caches of another size, and into those of several ranks."
            )
        mine = {key: spec_to_json(spec) for key, spec in self.specs.items()}
        check_keys("state_dict", saved["specs"], list(mine))
        for key, spec in saved["specs"].items():
            if not is_loadable(spec, mine[key]):
                raise ValueError(f"The saved cache's feature {key!r} is {spec}, this one's is {mine[key]}.")
            self._check_lengths(key, state_dict.get(f"{prefix}{module_name('feature', key)}.lengths"))
        for name, buffer in self.named_buffers(prefix.removesuffix(".")):
            if name.startswith(f"{prefix}_rows_of_ids."):  # built anew from the rest
                continue
            value = state_dict.get(name)
            if value is None:
                raise ValueError(f"The state dict has no entry {name!r}.")
            has_own_size = name.endswith(".arena")
            if value.dtype != buffer.dtype or (value.shape != buffer.shape and not has_own_size):
                raise ValueError(
                    f"{name!r} is {value.dtype} {list(value.shape)} in the state dict, "
                    f"but {buffer.dtype} {list(buffer.shape)} here."
                )

    def _check_lengths(self, key: str, lengths: Tensor | None) -> None:
        """Raise if saved items of a ragged feature are longer than they may be here."""
        spec = self.specs[key]
        if not isinstance(spec, RaggedFeature) or spec.max_length is None or lengths is None or len(lengths) == 0:
            return
        if int(lengths.max()) > spec.max_length:
            raise ValueError(
                f"The saved cache has items of {int(lengths.max())} values in the feature {key!r}, this one's "
                f"max_length is {spec.max_length}."
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.check_loadable(state_dict, prefix)
        self._has_rows = None
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._rows_of_ids = None


class CacheHolder(nn.Module):
    """A module with caches that DDP does not see: it would overwrite every rank's rows with those of rank 0.

    They are no submodules, but `state_dict`, `load_state_dict` and `.to()` reach them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[str, NegativeCache] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for cache in self._held.values():
            cache._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, cache in self._held.items():
            cache.state_dict(destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = dict(state_dict)
        parts = {}
        for name, cache in self._held.items():  # all of them before anything is changed
            start = f"{prefix}{name}."
            cache.check_loadable(state_dict, start)
            parts[name] = {key[len(start) :]: own.pop(key) for key in state_dict if key.startswith(start)}
        for name, cache in self._held.items():
            cache.load_state_dict(parts[name])
        super()._load_from_state_dict(own, prefix, *args)


def state_of(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The size and specs (as JSON) of the cache saved under `prefix`."""
    state = state_dict.get(prefix + "_extra_state")
    if not isinstance(state, Tensor):
        raise ValueError(f"The state dict has no cache under {prefix!r}.")
    parsed: dict[str, Any] = json.loads(bytes(state.cpu().tolist()).decode())
    return parsed


def _last_entries(rows: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The entries to write, so that no row gets two different values.

    Returns:
        Rows, the entry whose value each of them gets, and, where the number of entries cannot be known
        without waiting for the device, whether there is any: then all slots are used, superfluous ones
        repeat another entry.
    """
    ordered, order = (rows if mask is None else torch.where(mask, rows, -1)).sort(stable=True)
    if mask is not None:  # what is masked repeats the entry of the highest row
        rows = torch.where(mask, rows, ordered[-1])
    entries = order[torch.searchsorted(ordered, rows, right=True) - 1]
    if is_free_to_read(rows):
        is_last = entries == torch.arange(len(rows), device=rows.device)
        entries = (is_last if mask is None else is_last & mask).nonzero().squeeze(1)
        return rows[entries], entries, None
    return rows.clamp(min=0), entries, None if mask is None else ordered[-1] >= 0


def module_name(prefix: str, key: str) -> str:
    """A module name for any key; different keys give different names, though a name may have no dot."""
    return f"{prefix}_" + key.replace("~", "~0").replace(".", "~1")


def _to_bytes(value: Any) -> Tensor:
    return torch.tensor(list(json.dumps(value, sort_keys=True).encode()), dtype=torch.uint8)
