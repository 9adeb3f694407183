"""Several caches searched as one, for losses over several named caches. All other code uses one `NegativeCache`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from negative_cache.cache.columns import dequantize
from negative_cache.cache.rows import NegativeCache
from negative_cache.cache.specs import FeatureSpec, FixedLenFeature, RaggedFeature, padding_value
from negative_cache.cache.validation import RaggedRows, to_common_width, to_device


class PooledCaches:
    """Read-only view of the rows of several caches, numbered consecutively.

    Embeddings are concatenated, and so copied, each time they are read. Other features are read by row.

    Args:
        caches: The caches, in the order of their row numbers.
        keys: The features in use.

    Raises:
        ValueError: A feature has different numbers of dimensions, or is ragged in only some of the caches.
    """

    def __init__(self, caches: Sequence[NegativeCache], keys: Sequence[str]) -> None:
        self.caches = caches
        self.specs: dict[str, FeatureSpec] = {key: _common_spec(key, [c.specs[key] for c in caches]) for key in keys}
        sizes = [cache.num_rows for cache in caches]
        self._parts = [(cache, sum(sizes[:i]), sum(sizes[: i + 1])) for i, cache in enumerate(caches)]
        self.num_rows = sum(sizes)

    @property
    def filled(self) -> Tensor:
        return torch.cat([cache.filled for cache in self.caches])

    @property
    def num_filled(self) -> Tensor:
        return self.filled.sum()

    def has_rows(self) -> bool:
        return any(cache.has_rows() for cache in self.caches)

    def stored(self, key: str) -> tuple[Tensor, Tensor | None]:
        """All rows of a fixed-shape feature; with scales if all caches store int8, else dequantized."""
        stored = [cache.stored(key) for cache in self.caches]
        scales = [scale for _, scale in stored if scale is not None]
        if len(scales) == len(stored):
            return torch.cat([values for values, _ in stored]), torch.cat(scales)
        floats = [values if scale is None else dequantize(values, scale) for values, scale in stored]
        dtype = functools.reduce(torch.promote_types, [values.dtype for values in floats])
        return torch.cat([values.to(dtype) for values in floats]), None

    def find(self, document_ids: Tensor) -> Tensor:
        """The row of each document, int64 `[n]`, in the first cache that holds it; -1 for none."""
        result = torch.full_like(document_ids, -1)
        for cache, start, _ in reversed(self._parts):
            found = cache.find(document_ids)
            result = torch.where(found >= 0, found + start, result)
        return result

    def lengths(self, rows: Tensor, key: str) -> Tensor:
        """Lengths of a ragged feature of `rows [n]`: int64 `[n]`."""
        result = torch.zeros_like(rows)
        for cache, start, stop in self._parts:
            inside = (rows >= start) & (rows < stop)
            lengths = cache.lengths(torch.where(inside, rows - start, 0), key).to(rows.device)
            result = torch.where(inside, lengths, result)
        return result

    def pads_left(self, key: str) -> Tensor:
        """Whether a ragged feature of any cache is padded on the left when it is read: bool scalar."""
        return torch.stack([cache.pads_left(key) for cache in self.caches]).any()

    def note_side(self, key: str, pads_left: Tensor | bool) -> None:
        """Pad a ragged feature of all caches on the left from now on if `pads_left` is True."""
        for cache in self.caches:
            cache.note_side(key, pads_left)

    def read_rows(self, rows: Tensor, keys: Sequence[str]) -> dict[str, Tensor | RaggedRows]:
        """Features of `rows [n]` on the device of `rows`: `[n, ...]` each, or ragged."""
        result: dict[str, Tensor | RaggedRows] = {}
        for cache, start, stop in self._parts:
            inside = (rows >= start) & (rows < stop)
            read: Mapping[str, Tensor | RaggedRows] = cache.read_rows(torch.where(inside, rows - start, 0), keys)
            for key, value in read.items():
                here = to_device(value, rows.device)
                result[key] = (
                    _where(inside, here, result[key], padding_value(self.specs[key])) if key in result else here
                )
        return result


def _common_spec(key: str, specs: Sequence[FeatureSpec]) -> FeatureSpec:
    """The spec of a feature in several caches: the widest shape, and the dtype that holds all values."""
    dtype = functools.reduce(torch.promote_types, [spec.dtype for spec in specs])
    shapes = [list(spec.shape) for spec in specs if not isinstance(spec, RaggedFeature)]
    if not shapes:
        return RaggedFeature(dtype, None, specs[0].default_value)
    if len(shapes) < len(specs) or len({len(shape) for shape in shapes}) > 1:
        raise ValueError(
            f"The caches' features {key!r} do not fit together: {list(specs)}. Give them specs with the same number of "
            "dimensions, all ragged or all fixed."
        )
    return FixedLenFeature([max(sizes) for sizes in zip(*shapes, strict=True)], dtype, specs[0].default_value)


def _where(
    condition: Tensor, new: Tensor | RaggedRows, old: Tensor | RaggedRows, padding: float
) -> Tensor | RaggedRows:
    """`torch.where` over the first dimension; narrower values are padded."""
    if isinstance(new, RaggedRows) and isinstance(old, RaggedRows):
        values = _where(condition, new.values, old.values, padding)
        assert isinstance(values, Tensor)
        return RaggedRows(values, torch.where(condition, new.lengths, old.lengths), new.pads_left | old.pads_left)
    assert isinstance(new, Tensor)
    assert isinstance(old, Tensor)
    if new.dim() > 1:
        new, old = to_common_width([new, old], padding)
    return torch.where(condition.reshape(-1, *[1] * (new.dim() - 1)), new, old)
