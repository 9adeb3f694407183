"""Validation of features and ids, and operations on validated items."""

from __future__ import annotations

import functools
import math
import numbers
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from negative_cache.cache import device_copies as placement
from negative_cache.cache.specs import (
    MASK,
    NO_ID,
    Features,
    FeatureSpec,
    FixedLenFeature,
    QuantizedFeature,
    RaggedFeature,
    Specs,
    can_hold,
    check_feature,
    kind_of,
    padding_value,
)

_P = ParamSpec("_P")

# Integers whose values all fit int64, in which ids are compared.
_ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class RaggedRows(NamedTuple):
    """Validated values of a ragged feature. Each item starts at column 0, with padding after its end.

    Attributes:
        values: `[n, width]`.
        lengths: int64 `[n]`.
        pads_left: Whether `pad_rows` moves the padding to the left; a bool scalar tensor if the host may not know it.
    """

    values: Tensor
    lengths: Tensor
    pads_left: Tensor | bool = False


# Validated items: per feature a tensor `[n, *shape]`, or ragged rows.
Items = Mapping[str, Tensor | RaggedRows]


def reads_without_sync(value: Tensor) -> bool:
    """Whether the host can read a tensor's values without synchronizing a device or breaking a compiled graph."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def all_finite(values: Tensor) -> bool:
    """Whether all values are finite; for tensors that the host can read without synchronizing the device."""
    # A finite sum has only finite terms, and takes one pass without a mask. Finite terms may overflow, so check again.
    if values.numel() == 0 or math.isfinite(float(values.sum())):
        return True
    return bool(values.isfinite().all())


def finite_entries(values: Tensor) -> Tensor:
    """Which of `values [n, ...]` are finite in all components: bool `[n]`."""
    # Zero times a finite value is zero, zero times NaN or infinity is NaN.
    return (values * 0).unsqueeze(-1).flatten(1).sum(dim=1) == 0


def check_keys(name: str, given: Collection[str], expected: Collection[str]) -> None:
    """Raise unless `given` has exactly the `expected` keys."""
    missing, extra = set(expected) - set(given), set(given) - set(expected)
    if missing or extra:
        raise ValueError(
            f"`{name}` must have the keys {sorted(expected)}, got {sorted(given)}"
            + (f"; missing {sorted(missing)}" if missing else "")
            + (f"; unknown {sorted(extra)}" if extra else "")
            + "."
        )


def check_integer(name: str, value: object, minimum: int, maximum: int | None = None) -> int:
    """Validate an integer setting and return it as int: `minimum` to `maximum`, None for no maximum.

    Raises:
        TypeError: The value is no number; True and False are none.
        ValueError: The value is not an integer, or out of range.
    """
    limits = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
    message = f"`{name}` is {value!r}; it must be an integer {limits}."
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(message)
    integer = int(value) if isinstance(value, numbers.Integral) else minimum - 1
    if integer < minimum or (maximum is not None and integer > maximum):
        raise ValueError(message)
    return integer


def check_number(name: str, value: object, hint: str = "") -> float:
    """Validate a finite number and return it as float.

    Raises:
        TypeError: The value is no number; True, False and tensors are none. The message ends with `hint`.
        ValueError: The value is not finite.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"`{name}` is {value!r}; it must be a finite number.{hint}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"`{name}` is {number}; it must be a finite number.")
    return number


_INSTEAD_OF = {
    "temperature": "Use its inverse: scale=1 / {given!r}.",
    "score_transform": ("The scores are dot products times `scale`: for `lambda score: 20.0 * score`, set scale=20.0."),
    "top_k": (
        "Documents are sampled from the softmax over all rows. Remove it, or use CacheClassificationLoss, which has it."
    ),
    "embedding_key": "The embeddings have no key. Remove it.",
    "data_keys": "All of `document_features` are stored. Remove it.",
    "reducer": "The loss is the mean over the queries. Remove it.",
    "filter_fn": "Documents with equal `document_ids`, by default a hash of integer features, have one row. Remove it.",
}
"""Options of other losses, and of the earlier implementations -> what takes their place."""


def refuse_other_options(init: Callable[_P, None]) -> Callable[_P, None]:
    """Decorate the constructor of a loss: a TypeError for options of other losses says what takes their place."""

    @functools.wraps(init)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> None:
        for name, advice in _INSTEAD_OF.items():
            if name in kwargs:
                raise TypeError(f"`{name}` is not an option. {advice.format(given=kwargs[name])}")
        init(*args, **kwargs)

    return checked


def check_ids(name: str, ids: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless `ids` are integers of this shape that fit int64, -1 (unknown) or larger."""
    if not isinstance(ids, Tensor) or ids.dtype not in _ID_DTYPES or ids.layout != torch.strided or ids.is_meta:
        got = ids.dtype if isinstance(ids, Tensor) and ids.dtype not in _ID_DTYPES else kind_of(ids)
        raise TypeError(
            f"`{name}` is {got}; expected a tensor of integers that fit int64. Convert ids to int64, from 0 to "
            "2**63 - 1, and unknown ones to -1."
        )
    if ids.shape != shape:
        raise ValueError(f"`{name}` has shape {list(ids.shape)}; expected {list(shape)}.")
    if reads_without_sync(ids) and ids.numel() and int(ids.min()) < NO_ID:
        raise ValueError(f"`{name}` has the value {int(ids.min())}; ids are 0 or larger, -1 means unknown.")


def check_mask(name: str, mask: Tensor | None, count: int, device: torch.device) -> Tensor | None:
    """Validate a mask of `count` items and return it as bool on a device; None without a mask or items."""
    if mask is None or count == 0:
        return None
    if mask.shape != (count,):
        raise ValueError(f"`{name}` has shape {list(mask.shape)}; expected [{count}].")
    return mask.to(device, torch.bool)


def check_finite(name: str, values: Tensor, is_embedding: bool = False) -> None:
    """Raise ValueError for NaN or infinity if the host can read the values without synchronizing the device.

    Otherwise, `update_rows` skips and counts such rows. With `is_embedding`, also raise for values whose dot products
    may overflow; if the host cannot read them, the loss is then infinite or NaN.
    """
    if not reads_without_sync(values):
        return
    values = values.detach()
    if not all_finite(values):
        raise ValueError(
            f"{name} has NaN or infinity. Nothing was written to the cache; look for a learning rate that is "
            "too high or an overflow in half precision."
        )
    if is_embedding and values.numel():
        dtype = torch.promote_types(values.dtype, torch.float32)  # in which scores are computed
        largest, limit = float(values.abs().amax()), 1e-4 * torch.finfo(dtype).max ** 0.5  # 1e8 for dim times scale
        if largest > limit:
            raise ValueError(
                f"{name} has values up to {largest:.1e}; dot products of values above {limit:.1e} may overflow "
                f"{dtype}. Nothing was written to the cache; normalize the embeddings."
            )


def check_finite_items(name: str, items: Items, mask: Tensor | None = None) -> None:
    """Raise ValueError for non-finite values that the host can read without synchronizing the device.

    Args:
        name: Name of the argument, for error messages.
        items: Validated items, `n` each.
        mask: bool `[n]`: False for items that are not checked; None to check all.
    """
    for key, value in items.items():
        if isinstance(value, RaggedRows) or not value.is_floating_point() or not reads_without_sync(value):
            continue
        if all_finite(value):
            continue
        finite = finite_entries(value)
        finite = finite if mask is None else finite | ~mask.to(finite.device)
        if not bool(finite.all()):
            raise ValueError(
                f"`{name}[{key!r}]`, stored as {value.dtype}, has NaN or infinity in {int((~finite).sum())} of "
                f"{len(finite)} rows. Nothing was written. Check for a learning rate that is too high, or for an "
                "overflow in half precision."
            )


def check_features(name: str, features: Features | Items, specs: Specs) -> dict[str, Tensor | RaggedRows]:
    """Validate items against their specs, pad them and cast them to the stored dtype.

    Args:
        name: Name of the argument, for error messages.
        features: One value per key: a tensor `[batch, ...]`, or a list of `batch` tensors `[length]`
            for a ragged feature. Keys must be among those of `specs`.
        specs: Spec per key.

    Returns:
        A tensor `[batch, *shape]` per fixed feature and `RaggedRows` per ragged one, without gradient. Ragged
        features of the same width, such as token ids and their mask, stay aligned.

    Raises:
        ValueError: Unknown key, wrong shape, value longer than the spec, different batch sizes, padding on both sides,
            or a value that the stored integer dtype cannot hold.
        TypeError: No dense tensors, or a floating point value for an integer feature, or vice versa.
    """
    unknown = set(features) - set(specs)
    if unknown:
        raise ValueError(f"`{name}` has the keys {sorted(unknown)}, but the cache's are {sorted(specs)}.")
    checked: dict[str, Tensor | RaggedRows] = {}
    sizes: dict[str, int] = {}
    ragged: dict[str, RaggedRows] = {}
    for key, value in features.items():
        where, spec = f"{name}[{key!r}]", specs[key]
        if isinstance(value, RaggedRows):
            pass  # already validated
        elif not isinstance(value, Tensor) or value.layout != torch.strided or value.is_nested or value.is_meta:
            check_feature(where, value)
        if isinstance(spec, RaggedFeature):
            checked[key] = ragged[key] = _check_ragged(where, value, spec)
            sizes[key] = len(ragged[key].values)
        else:
            fixed = checked[key] = _check_fixed(where, value, spec)
            sizes[key] = len(fixed)
            if key == MASK and isinstance(value, Tensor) and value.shape != fixed.shape:
                _check_right_padding(where, value)
    if len(set(sizes.values())) > 1:
        raise ValueError(f"The values of `{name}` have different batch sizes: {sizes}.")
    return {**checked, **_strip_padding(name, ragged, features, specs)} if ragged else checked


def _check_fixed(where: str, value: object, spec: FixedLenFeature | QuantizedFeature) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"`{where}` is {type(value).__name__}; expected a torch.Tensor.")
    if value.dim() == 0:
        raise ValueError(f"`{where}` is a scalar; the first dimension must be the batch.")
    given, shape = list(value.shape[1:]), list(spec.shape)
    if given == shape:
        return _cast(where, value, spec.dtype)
    if len(given) != len(shape) or any(got > size for got, size in zip(given, shape, strict=True)):
        raise ValueError(
            f"`{where}` has shape {list(value.shape)}; the spec says {['*', *shape]}. "
            "Truncate longer values, or correct the spec; shorter ones are padded. If the length varies, the spec must "
            f"be a RaggedFeature, such as RaggedFeature({spec.dtype})."
        )
    # `pad` takes pairs of (left, right), the last dimension first.
    pads = [n for size, got in zip(reversed(shape), reversed(given), strict=True) for n in (0, size - got)]
    return pad(_cast(where, value, spec.dtype), pads, value=padding_value(spec))


def _check_ragged(where: str, value: Tensor | Sequence[Tensor] | RaggedRows, spec: RaggedFeature) -> RaggedRows:
    if isinstance(value, RaggedRows):  # already validated
        return value._replace(values=_cast(where, value.values, spec.dtype))
    lengths = None
    if not isinstance(value, Tensor):
        if not value or any(not isinstance(row, Tensor) or row.dim() != 1 for row in value):
            raise ValueError(f"`{where}` must be a tensor [batch, length] or a list of tensors [length].")
        lengths = torch.tensor([len(row) for row in value], device=value[0].device)
        value = pad_sequence(list(value), batch_first=True, padding_value=padding_value(spec))
    if value.dim() != 2:
        raise ValueError(f"`{where}` has shape {list(value.shape)}; a ragged feature must be [batch, length].")
    value = _cast(where, value, spec.dtype)
    return RaggedRows(value, _unpadded_lengths(value, padding_value(spec)) if lengths is None else lengths)


def _unpadded_lengths(values: Tensor, padding: float) -> Tensor:
    """The length of each item up to its last value that is not padding: int64 `[n]`."""
    if values.shape[1] == 0:
        return torch.zeros(len(values), dtype=torch.int64, device=values.device)
    positions = torch.arange(1, values.shape[1] + 1, device=values.device)
    return ((values != padding) * positions).amax(dim=1)


def _strip_padding(
    name: str, ragged: Mapping[str, RaggedRows], given: Features | Items, specs: Specs
) -> dict[str, RaggedRows]:
    """Move all items to column 0. Features of equal width move alike and get the same lengths, so they stay aligned."""
    stripped: dict[str, RaggedRows] = {}
    for width in {rows.values.shape[1] for rows in ragged.values()}:
        group = {key: rows for key, rows in ragged.items() if rows.values.shape[1] == width}
        # Lists and validated rows already start at column 0.
        tensors = {key: rows.values for key, rows in group.items() if width and isinstance(given[key], Tensor)}
        starts = _starts(name, tensors, specs)
        lengths = functools.reduce(torch.maximum, [rows.lengths for rows in group.values()])
        pads_left = functools.reduce(operator.or_, [rows.pads_left for rows in group.values()])
        if starts is not None:
            ends = lengths if MASK in tensors else torch.full_like(lengths, width)
            others = [group[key].lengths for key in group if key not in tensors]
            lengths = functools.reduce(torch.maximum, [ends - starts, *others])
            pads_left = pads_left | (starts > 0).any()
        for key, rows in group.items():
            values = rows.values
            if starts is not None and key in tensors:
                is_padding = torch.arange(width, device=values.device) >= lengths[:, None]
                values = roll_rows(values, starts).masked_fill_(is_padding, padding_value(specs[key]))
            stripped[key] = _limit_length(f"{name}[{key!r}]", RaggedRows(values, lengths, pads_left), specs[key])
    return stripped


def _starts(name: str, tensors: Mapping[str, Tensor], specs: Specs) -> Tensor | None:
    """The column of the first value of each item of aligned features, int64 `[n]`; None if all items start at 0."""
    if MASK in tensors:
        is_padding = tensors[MASK] == 0
        starts = is_padding.cumprod(dim=1).sum(dim=1) % is_padding.shape[1]  # an item without any 1 starts at 0
        if reads_without_sync(starts):
            if not bool(starts.any()):
                return None
            if bool((is_padding[:, -1] & ~is_padding.all(dim=1)).any()):
                raise ValueError(
                    f"`{name}[{MASK!r}]` has zeros at the start of some texts and at the end of some; expected padding "
                    "on one side of all texts. Pad them with one tokenizer.padding_side."
                )
        return starts
    left = [
        (values == padding_value(spec)).cumprod(dim=1).sum(dim=1)
        for key, values in tensors.items()
        if isinstance(spec := specs[key], RaggedFeature) and spec.padding_side == "left"
    ]
    return functools.reduce(torch.minimum, left) if left else None


def _limit_length(where: str, rows: RaggedRows, spec: FeatureSpec) -> RaggedRows:
    """Raise for items longer than the spec's `max_length`; truncate them where the host cannot read their lengths."""
    limit = spec.max_length if isinstance(spec, RaggedFeature) else None
    if limit is None or rows.values.shape[1] <= limit:
        return rows
    if reads_without_sync(rows.lengths) and len(rows.lengths) and int(rows.lengths.amax()) > limit:
        raise ValueError(
            f"`{where}` has items of {int(rows.lengths.amax())} values; the spec's max_length is {limit}. "
            "Truncate them or raise max_length."
        )
    return rows._replace(values=rows.values[:, :limit], lengths=rows.lengths.clamp(max=limit))


def roll_rows(values: Tensor, shifts: Tensor) -> Tensor:
    """Rotate each row of `values [n, width]` to the left by its shift, int64 `[n]`."""
    width = values.shape[1]
    return values.gather(1, (torch.arange(width, device=values.device) + shifts[:, None]) % width)


def _check_right_padding(where: str, mask: Tensor) -> None:
    """Raise for left padding in a mask of a fixed shape that is narrower than its spec."""
    if mask.numel() and reads_without_sync(mask) and bool((mask.flatten(1)[:, 0] == 0).any()):
        raise ValueError(
            f"`{where}` has shape {list(mask.shape)} and starts with 0. It is narrower than its spec, and fixed shapes "
            "are padded on the right: the texts would have padding on both sides. Use RaggedFeature specs, or pad the "
            "texts to the full width."
        )


def _cast(where: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Detach, and cast from integer to integer or from floating point to floating point; raise for other casts."""
    if value.dtype == dtype:
        return value.detach()
    if value.is_floating_point() != dtype.is_floating_point or value.is_complex():
        raise TypeError(f"`{where}` is {value.dtype}; the spec says {dtype}. Convert it or change the spec.")
    if not dtype.is_floating_point and reads_without_sync(value) and value.numel():
        low, high = int(value.min()), int(value.max())
        if not (can_hold(dtype, low) and can_hold(dtype, high)):
            raise ValueError(
                f"`{where}` has values from {low} to {high}, which do not fit the spec's {dtype}. Use a wider dtype "
                "in the spec."
            )
    return value.detach().to(dtype)


def batch_size(items: Items) -> int:
    """Number of validated items; 0 without any feature."""
    if not items:
        return 0
    value = next(iter(items.values()))
    return len(value.values if isinstance(value, RaggedRows) else value)


def padded(items: Items) -> dict[str, Tensor]:
    """The values of validated items, `[n, ...]` each; those of ragged features with padding on their side."""
    return {key: pad_rows(value) if isinstance(value, RaggedRows) else value for key, value in items.items()}


def pad_rows(rows: RaggedRows) -> Tensor:
    """The values of ragged rows, `[n, width]`, with padding on the left if `pads_left`, else on the right."""
    values, lengths, pads_left = rows
    width = values.shape[1]
    if isinstance(pads_left, Tensor):
        pads_left = bool(pads_left) if reads_without_sync(pads_left) else pads_left.to(values.device)
    return values if width == 0 or pads_left is False else roll_rows(values, (lengths - width) * pads_left)


def copied(items: Items) -> dict[str, Tensor | RaggedRows]:
    """Copies of validated items."""
    copies: dict[str, Tensor | RaggedRows] = {}
    for key, value in items.items():
        if isinstance(value, RaggedRows):
            copies[key] = value._replace(values=value.values.clone())
        else:
            copies[key] = value.clone()
    return copies


def select(items: Items, index: Tensor) -> dict[str, Tensor | RaggedRows]:
    """The validated items at `index [n]`."""
    selected: dict[str, Tensor | RaggedRows] = {}
    for key, value in items.items():
        if isinstance(value, RaggedRows):
            at = index.to(value.values.device)
            selected[key] = RaggedRows(value.values[at], value.lengths[at], value.pads_left)
        else:
            selected[key] = value[index.to(value.device)]
    return selected


def to_device(value: Tensor | RaggedRows, device: torch.device) -> Tensor | RaggedRows:
    """Validated values on a device; see `placement.to_device`."""
    if isinstance(value, RaggedRows):
        values, lengths = placement.to_device(value.values, device), placement.to_device(value.lengths, device)
        return RaggedRows(values, lengths, value.pads_left)
    return placement.to_device(value, device)


def to_common_width(values: Sequence[Tensor], fill: float = 0) -> list[Tensor]:
    """Pad tensors `[n_i, width_i, ...]` on the right of the second dimension to the largest width."""
    width = max(value.shape[1] for value in values)
    return [
        value
        if value.shape[1] == width
        else pad(value, [0, 0] * (value.dim() - 2) + [0, width - value.shape[1]], value=fill)
        for value in values
    ]


def concatenate(batches: Mapping[str, Features], specs: Specs) -> dict[str, Any]:
    """Concatenate the items of two batches; features of different widths are padded to the wider one.

    Args:
        batches: Name of the argument, for error messages -> feature name -> tensor `[n, ...]` or list of `n` tensors.
            The result has the devices of the first batch.
        specs: Spec per feature. Ragged features are validated, because each batch may be padded on a side of its own.

    Returns:
        Feature name -> tensor; `RaggedRows` for ragged features.
    """
    first, second = batches.values()
    ragged = {key: spec for key, spec in specs.items() if isinstance(spec, RaggedFeature)}
    checked = [check_features(name, {key: batch[key] for key in ragged}, ragged) for name, batch in batches.items()]
    result: dict[str, Any] = {}
    for key, spec in specs.items():
        a, b = first[key], second[key]
        if key in ragged:
            result[key] = _concatenate_rows([rows[key] for rows in checked], padding_value(spec))
        elif isinstance(a, Tensor) and isinstance(b, Tensor):
            a, b = to_common_width([a, b], padding_value(spec)) if a.dim() > 1 else (a, b)
            result[key] = torch.cat([a, b.to(a.device, a.dtype)])
        else:
            result[key] = [*a, *b]  # refused later
    return result


def _concatenate_rows(parts: Sequence[Any], padding: float) -> RaggedRows:
    """Concatenate the ragged rows of two batches on the device of the first."""
    device = parts[0].values.device
    first, second = (to_device(rows, device) for rows in parts)
    assert isinstance(first, RaggedRows)
    assert isinstance(second, RaggedRows)
    return RaggedRows(
        torch.cat(to_common_width([first.values, second.values], padding)),
        torch.cat([first.lengths, second.lengths]),
        first.pads_left | second.pads_left,
    )
