"""`NegativeCache`, the rows of a cache with their bookkeeping, and `CacheHolder`, a module that owns caches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from negative_cache.cache.columns import (
    Column,
    FixedColumn,
    QuantizedColumn,
    RaggedColumn,
    Rows,
    copy_saved,
    make_columns,
    put,
    read_columns,
    write_columns,
)
from negative_cache.cache.index import RowsOfIds
from negative_cache.cache.specs import NO_ID, FeatureSpec, RaggedFeature, Specs, is_loadable, spec_to_json
from negative_cache.cache.validation import (
    Items,
    RaggedRows,
    batch_size,
    check_keys,
    padded,
    reads_without_sync,
    select,
)

if TYPE_CHECKING:
    from typing_extensions import Self


def _set_hf_initialized(module: NegativeCache | CacheHolder, value: bool) -> None:
    module.__dict__["_is_hf_initialized"] = value
    module._after_from_pretrained()


# The attribute that transformers sets on each module after `from_pretrained`.
_IS_HF_INITIALIZED = property(lambda module: module.__dict__.get("_is_hf_initialized", False), _set_hf_initialized)


class NegativeCache(Rows):
    """Rows of past documents. A row has features with a possibly stale embedding, an age and a document id.

    All tensors are buffers: `state_dict` contains them, and `.to()` moves them. All rows of a cache that is constructed
    from tensors count as filled; a cache from `CacheManager.init_cache` starts without filled rows.

    Args:
        data: Feature name -> tensor `[num_rows, *shape]`; not copied.
        age: Update steps since each row was written, `[num_rows]`, a tensor or a list of integers.

    Attributes:
        filled: bool `[num_rows]`: whether each row holds a document.
        document_ids: int64 `[num_rows]`: the id of each row's document, -1 for unknown; or `[num_rows, k]`: its k ids.
        written: int64 `[num_rows]`: the step in which each row was written. Its age is `step - written`.
        step: int64 scalar: the number of update steps.
        num_rejected: int64 scalar: the number of rows that were not written because of non-finite values.
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
        columns = {key: FixedColumn(value) for key, value in data.items()}
        device = next(iter(columns.values())).device
        self._register(columns, next(iter(sizes.values())), device, is_filled=True)
        ages = torch.as_tensor(age, device=device)
        self.written = -ages.to(torch.int64)

    @classmethod
    @torch.inference_mode(False)  # a later step changes the buffers in place
    def empty(
        cls,
        specs: Specs,
        num_rows: int,
        device: torch.device | str = "cpu",
        feature_device: torch.device | str | None = None,
        scored_keys: Sequence[str] = (),
        *,
        num_ids: int = 1,
    ) -> NegativeCache:
        """A cache of `num_rows` unfilled rows.

        Args:
            specs: Spec per feature.
            num_rows: Number of rows.
            device: Device of the rows.
            feature_device: Device of all features except `scored_keys`. They stay there when the cache is moved. None
                for `device`.
            scored_keys: Features that every step reads for all rows. They are on `device`.
            num_ids: Number of ids per document, see `document_ids`.
        """
        cache = cls.__new__(cls)
        nn.Module.__init__(cache)
        columns = make_columns(specs, num_rows, torch.device(device), scored_keys, feature_device)
        cache._register(columns, num_rows, torch.device(device), is_filled=False, num_ids=num_ids)
        return cache

    def _register(
        self, columns: Mapping[str, Column], num_rows: int, device: torch.device, is_filled: bool, num_ids: int = 1
    ) -> None:
        id_shape = (num_rows,) if num_ids == 1 else (num_rows, num_ids)
        self._columns = dict(columns)
        for key, column in columns.items():
            self.add_module(module_name("feature", key), column)
        self._has_rows: bool | None = is_filled and num_rows > 0  # None: read `filled`
        self.register_buffer("filled", torch.full((num_rows,), is_filled, device=device))
        self.register_buffer("document_ids", torch.full(id_shape, NO_ID, dtype=torch.int64, device=device))
        self.register_buffer("written", torch.zeros(num_rows, dtype=torch.int64, device=device))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("num_rejected", torch.zeros((), dtype=torch.int64, device=device))
        self._rows_of_ids: RowsOfIds | None = None  # built at the first lookup of ids

    @property
    def data(self) -> dict[str, Tensor]:
        """Feature name -> `[num_rows, *shape]`; ragged features are padded to their longest row (a copy)."""
        return {key: column.dense() for key, column in self._columns.items()}

    @property
    def age(self) -> Tensor:
        """Update steps since each row was written, int32 `[num_rows]`; 0 for the rows written last."""
        return (self.step - self.written).to(torch.int32)

    @property
    def num_rows(self) -> int:
        """Number of rows, filled or not."""
        return self.filled.shape[0]

    @property
    def num_ids(self) -> int:
        """Number of ids per document."""
        return 1 if self.document_ids.dim() == 1 else self.document_ids.shape[1]

    @property
    def num_filled(self) -> Tensor:
        """Number of filled rows, an int64 scalar on the cache's device."""
        return self.filled.sum()

    @property
    def device(self) -> torch.device:
        """Device of the bookkeeping and the embeddings."""
        return self.filled.device

    @property
    def specs(self) -> dict[str, FeatureSpec]:
        """Spec per feature, as stored."""
        return {key: column.spec for key, column in self._columns.items()}

    def __iter__(self) -> Iterator[Any]:
        return iter((self.data, self.age))

    def has_rows(self) -> bool:
        """Whether any row is filled. Synchronizes the device only after a state was loaded.

        On a GPU, this is also True if all written rows were masked, because the mask is not read.
        """
        if self._has_rows is None or (not self._has_rows and reads_without_sync(self.filled)):
            self._has_rows = bool(self.filled.any())
        return self._has_rows

    def embeddings(self, key: str) -> Tensor:
        """All rows of a feature, `[num_rows, *shape]`: the storage itself for a `FixedLenFeature`, else a copy."""
        return self._columns[key].dense()

    def stored(self, key: str) -> tuple[Tensor, Tensor | None]:
        """The storage of a fixed-shape feature, `[num_rows, *shape]`, and its scales if it is quantized, else None."""
        column = self._columns[key]
        assert not isinstance(column, RaggedColumn)
        return column.values, column.scales if isinstance(column, QuantizedColumn) else None

    def read(self, rows: Tensor, keys: Sequence[str]) -> dict[str, Tensor]:
        """Features of `rows [n]`: `[n, *shape]` each; ragged ones are padded to the longest of these rows."""
        return padded(self.read_rows(rows, keys))

    def pads_left(self, key: str) -> Tensor:
        """Whether a ragged feature is padded on the left when it is read: bool scalar on the cache's device."""
        column = self._columns[key]
        assert isinstance(column, RaggedColumn)
        return column.pads_left

    def note_side(self, key: str, pads_left: Tensor | bool) -> None:
        """Pad a ragged feature on the left from now on if `pads_left` is True; does not synchronize the device."""
        column = self._columns[key]
        assert isinstance(column, RaggedColumn)
        column.note_side(pads_left)

    def read_rows(self, rows: Tensor, keys: Sequence[str]) -> dict[str, Tensor | RaggedRows]:
        """Features of `rows [n]` in the form that `write` accepts, each on its own device."""
        return read_columns(self._columns, rows, keys)

    def lengths(self, rows: Tensor, key: str) -> Tensor:
        """Lengths of a ragged feature of `rows [n]`: int64 `[n]`."""
        column = self._columns[key]
        assert isinstance(column, RaggedColumn)
        return column.lengths[rows.to(column.device)]

    def find(self, document_ids: Tensor) -> Tensor:
        """The row of each document.

        Args:
            document_ids: `[n]`, int64; negative entries are never found.

        Returns:
            int64 `[n]`: the row of the document with this id, as any of its ids; -1 where there is none.
        """
        if document_ids.numel() == 0:
            return document_ids
        ids = self.document_ids.flatten()
        if self._rows_of_ids is None:
            self._rows_of_ids = RowsOfIds(ids)
        places = self._rows_of_ids.find(ids, document_ids)
        return places if self.document_ids.dim() == 1 else places // self.document_ids.shape[1]

    def add_ids(self, rows: Tensor, document_ids: Tensor) -> None:
        """Give the documents of `rows [n]`, each once, the ids `[n, k]` where these are known (not -1)."""
        if self.document_ids.dim() == 1 or len(rows) == 0:
            return
        self.document_ids[rows] = torch.where(document_ids < 0, self.document_ids[rows], document_ids)
        if self._rows_of_ids is not None:
            self._rows_of_ids.move(self._places_of_ids(rows), self.document_ids[rows].flatten())

    def _places_of_ids(self, rows: Tensor) -> Tensor:
        """The places of the k ids of `rows [n]` among the flattened ids: int64 `[n * k]`."""
        return (rows[:, None] * self.num_ids + torch.arange(self.num_ids, device=rows.device)).flatten()

    def write(
        self,
        rows: Tensor,
        items: Items,
        mask: Tensor | None = None,
        resets_age: bool = True,
        document_ids: Tensor | None = None,
    ) -> None:
        """Overwrite rows in place. If several entries have the same row, the last one is written.

        Args:
            rows: int64 `[m]`: the rows to write. Entry i writes item `i % n`.
            items: `n` validated values per feature. If every feature is given, the rows become filled.
            mask: bool `[m]`; False entries are not written.
            resets_age: Whether to set the age of the written rows to 0.
            document_ids: int64 `[m]`, or `[m, k]` for k ids per document, stored if every feature is given.
        """
        if rows.numel() == 0:
            return
        rows, entries, is_any = _last_entries(rows, mask)
        if rows.numel() == 0:
            return
        source = entries % batch_size(items)
        write_columns(self._columns, rows, select(items, source), is_any)
        if resets_age:
            put(self.written, rows, self.step, is_any)
        if len(items) < len(self._columns):
            return
        no_ids = torch.full_like(self.document_ids[:1], NO_ID)
        put(self.document_ids, rows, no_ids if document_ids is None else document_ids[entries], is_any)
        if self._rows_of_ids is not None:
            is_once = reads_without_sync(rows)
            is_repeated = None if is_once else entries != torch.arange(len(rows), device=rows.device)
            places = rows
            if self.document_ids.dim() > 1:
                places = self._places_of_ids(rows)
                is_repeated = None if is_repeated is None else is_repeated.repeat_interleave(self.num_ids)
            self._rows_of_ids.move(places, self.document_ids[rows].flatten(), is_repeated)
        self.filled[rows] |= True if is_any is None else is_any
        self._has_rows = True

    def reset_parameters(self) -> None:
        """Remove all rows: no row is filled, and `step` is 0. `to_empty` does the same."""
        super().reset_parameters()
        for column in self._columns.values():
            column.reset_parameters()
        self.document_ids.fill_(NO_ID)
        self._has_rows, self._rows_of_ids = False, None

    _is_hf_initialized = _IS_HF_INITIALIZED

    def _after_from_pretrained(self) -> None:
        """Called by transformers when `from_pretrained` has set all tensors; those it did not load are undefined."""
        if self.__dict__.pop("_extra_state", None) is not None:  # set if the checkpoint does not have the cache
            self.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._rows_of_ids = None  # built again at the next lookup
        return super()._apply(fn, recurse)

    def get_extra_state(self) -> Tensor:
        """The size and specs as JSON in a uint8 tensor, so that all values of a state dict are tensors."""
        state = {"num_rows": self.num_rows, "specs": {key: spec_to_json(spec) for key, spec in self.specs.items()}}
        return torch.tensor(list(json.dumps(state, sort_keys=True).encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Forget what is known of the old rows. `check_loadable` checks the specs before anything is copied."""
        self._has_rows = self._rows_of_ids = None

    def check_loadable(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Raise ValueError if the saved number of rows, keys, shapes or dtypes differ from those of this cache."""
        saved = state_of(state_dict, prefix)
        if saved["num_rows"] != self.num_rows:
            raise ValueError(
                f"The saved cache has {saved['num_rows']} rows, this one has {self.num_rows}. Use the same cache_size. "
                "For NegativeCacheLoss, negative_cache.checkpoint loads into another size or number of ranks."
            )
        mine = {key: spec_to_json(spec) for key, spec in self.specs.items()}
        check_keys("state_dict", saved["specs"], list(mine))
        for key, spec in saved["specs"].items():
            if not is_loadable(spec, mine[key]):
                raise ValueError(f"The saved cache's feature {key!r} is {spec}, this one's is {mine[key]}.")
            self._check_lengths(key, state_dict.get(f"{prefix}{module_name('feature', key)}.lengths"))
        for name, buffer in self.named_buffers(prefix.removesuffix(".")):
            if name.startswith(f"{prefix}_rows_of_ids."):  # not saved, but rebuilt
                continue
            value = state_dict.get(name)
            if value is None and name.endswith(".pads_left"):  # earlier versions saved none
                continue
            if value is None:
                raise ValueError(f"The state dict has no entry {name!r}.")
            has_own_size = name.endswith(".arena")
            if value.dtype != buffer.dtype or (value.shape != buffer.shape and not has_own_size):
                raise ValueError(
                    f"{name!r} is {value.dtype} {list(value.shape)} in the state dict, "
                    f"but {buffer.dtype} {list(buffer.shape)} here."
                )

    def _check_lengths(self, key: str, lengths: Tensor | None) -> None:
        """Raise if saved items of a ragged feature are longer than this cache's max_length."""
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
        self._has_rows = self._rows_of_ids = None
        super()._load_from_state_dict(state_dict, prefix, *args)


class CacheHolder(nn.Module):
    """A module that hides its caches from DDP, which would overwrite the rows on all ranks with those of rank 0.

    The caches are not submodules, but `state_dict`, `load_state_dict` and `.to()` include them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[str, NegativeCache] = {}

    def __getattr__(self, name: str) -> Any:
        """A cache by its name in state dicts, for `get_submodule`."""
        held = self.__dict__.get("_held", {})
        return held[name] if name in held else super().__getattr__(name)

    _is_hf_initialized = _IS_HF_INITIALIZED

    def _after_from_pretrained(self) -> None:
        """See `NegativeCache`."""
        for cache in self._held.values():
            cache._after_from_pretrained()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for cache in self._held.values() if recurse else ():
            cache._apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            copy_saved(self, destination, prefix)
        for name, cache in self._held.items():
            cache.state_dict(destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        own, assign = dict(state_dict), local_metadata.get("assign_to_params_buffers", False)
        parts = {}
        for name, cache in self._held.items():  # all caches are checked before any is changed
            start = f"{prefix}{name}."
            cache.check_loadable(state_dict, start)
            parts[name] = {key[len(start) :]: own.pop(key) for key in state_dict if key.startswith(start)}
        for name, cache in self._held.items():
            cache.load_state_dict(parts[name], assign=assign)
        super()._load_from_state_dict(own, prefix, local_metadata, *args)


def state_of(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The size and specs (as JSON) of the cache saved under `prefix`."""
    state = state_dict.get(prefix + "_extra_state")
    if not isinstance(state, Tensor):
        raise ValueError(f"The state dict has no cache under {prefix!r}.")
    parsed: dict[str, Any] = json.loads(bytes(state.cpu().tolist()).decode())
    return parsed


def module_name(prefix: str, key: str) -> str:
    """A valid module name (without dots) for any key. Different keys have different names."""
    return f"{prefix}_" + key.replace("~", "~0").replace(".", "~1")


def _last_entries(rows: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Select the entries to write, so that no row gets two different values.

    On a CPU, entries that are masked or overwritten by a later entry are removed. On other devices, counting them would
    synchronize the device, so all entries stay: a repeated row gets the value of its last entry each time, and a masked
    entry repeats the entry of the highest row.

    Returns:
        Rows, the entry whose value each row gets, and a bool scalar: whether to write at all; None means True.
    """
    # Entries sorted by row, masked ones (-1) first. The sort is stable, so a row's last entry is the end of its run.
    ordered, order = (rows if mask is None else torch.where(mask, rows, -1)).sort(stable=True)
    if mask is not None:
        rows = torch.where(mask, rows, ordered[-1])
    entries = order[torch.searchsorted(ordered, rows, right=True) - 1]
    if reads_without_sync(rows):
        is_last = entries == torch.arange(len(rows), device=rows.device)
        entries = (is_last if mask is None else is_last & mask).nonzero().squeeze(1)
        return rows[entries], entries, None
    return rows.clamp(min=0), entries, None if mask is None else ordered[-1] >= 0
