"""What one cached item is made of: specs of its features, their checks and their padding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from negative_cache.cache import placement as transfer


class FixedLenFeature(NamedTuple):
    """A feature whose value has the same shape for every item.

    Attributes:
        shape: Shape of one item's value, `[]` for a scalar.
        dtype: dtype in which the value is stored.
        default_value: Value that fills up shorter inputs on the right; 0 if None.
    """

    shape: Sequence[int]
    dtype: torch.dtype
    default_value: float | None = None


class RaggedFeature(NamedTuple):
    """A sequence feature of varying length, such as token ids.

    Items are stored without their padding as long as that takes less memory than padding all of
    them, and are padded with `default_value` to the longest item that is read.

    Attributes:
        dtype: dtype in which the values are stored.
        max_length: Longest sequence that is accepted; None for any.
        default_value: The padding value; 0 if None. Padding at the end of an input is not stored.
    """

    dtype: torch.dtype
    max_length: int | None = None
    default_value: float | None = None


class QuantizedFeature(NamedTuple):
    """Floating point values of a fixed shape, stored as int8 with one float32 scale per item.

    An item is rounded to 255 steps between plus and minus its largest absolute value when it is written.

    Attributes:
        shape: Shape of one item's value.
        default_value: Value that fills up shorter inputs on the right; 0 if None.
    """

    shape: Sequence[int]
    default_value: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        """dtype in which values are written and read."""
        return torch.float32


FeatureSpec = FixedLenFeature | RaggedFeature | QuantizedFeature
Specs = Mapping[str, FeatureSpec]
Features = Mapping[str, Tensor | Sequence[Tensor]]


def check_embedding_dtype(dtype: torch.dtype) -> None:
    """Raise unless embeddings can be stored as `dtype`."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"`embedding_dtype` is {dtype!r}; expected a torch.dtype such as torch.int8.")
    if not (dtype.is_floating_point or dtype == torch.int8):
        raise ValueError(f"`embedding_dtype` is {dtype}; it must be a floating point dtype or int8.")


def embedding_spec(dim: int, dtype: torch.dtype) -> FixedLenFeature | QuantizedFeature:
    """The spec of embeddings `[dim]` that are stored as `dtype`."""
    return QuantizedFeature([dim]) if dtype == torch.int8 else FixedLenFeature([dim], dtype)


class RaggedRows(NamedTuple):
    """Checked values of a ragged feature: `values [batch, width]`, of which `lengths [batch]` count."""

    values: Tensor
    lengths: Tensor


def is_free_to_read(value: Tensor) -> bool:
    """Whether looking at a tensor's values makes nobody wait: on a GPU it would stall the device."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; for tensors that are free to read."""
    # A sum over NaN or infinity is not finite, so that one that is spares the longer look.
    if values.numel() == 0 or math.isfinite(float(values.sum())):
        return True
    return bool(values.isfinite().all())


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round each item to 255 steps between plus and minus its largest absolute value.

    Args:
        values: `[n, *shape]`, floating point.

    Returns:
        int8 `[n, *shape]` and float32 scales `[n]`; an item is about its int8 values times its scale.
    """
    flat = values.detach().float().reshape(len(values), -1)
    scales = flat.abs().amax(dim=1, keepdim=True) / 127
    steps = flat / torch.where(scales > 0, scales, 1)
    return steps.round_().to(torch.int8).view(values.shape), scales.squeeze(1)


def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """float32 `[n, *shape]` from what `quantize` gave."""
    return values.float() * scales.view(-1, *[1] * (values.dim() - 1))


def padding_value(spec: FeatureSpec) -> float:
    """The value with which items of this spec are filled up."""
    return 0 if spec.default_value is None else spec.default_value


def check_specs(specs: Specs) -> None:
    """Raise unless every spec has a sane shape or length and a default value that fits its dtype."""
    if not specs:
        raise ValueError("`specs` is empty: name at least the embedding's feature.")
    for key, spec in specs.items():
        if isinstance(spec, RaggedFeature):
            if spec.max_length is not None and spec.max_length < 1:
                raise ValueError(f"specs[{key!r}] has max_length {spec.max_length}; it must be at least 1.")
        elif isinstance(spec, FixedLenFeature | QuantizedFeature):
            if not isinstance(spec.shape, Sequence) or not all(hasattr(size, "__index__") for size in spec.shape):
                raise TypeError(f"specs[{key!r}] has the shape {spec.shape!r}; expected a list of integers.")
            if isinstance(spec.default_value, torch.dtype):
                raise TypeError(f"specs[{key!r}] has the default_value {spec.default_value}; expected a number.")
            if isinstance(spec, QuantizedFeature) and 0 in spec.shape:
                raise ValueError(f"specs[{key!r}] has the shape {list(spec.shape)}: there is nothing to quantise.")
            if any(size < 0 for size in spec.shape):
                raise ValueError(f"specs[{key!r}] has a negative size in its shape {list(spec.shape)}.")
        else:
            raise TypeError(
                f"specs[{key!r}] is {type(spec).__name__}; expected FixedLenFeature, RaggedFeature or QuantizedFeature."
            )
        if not _holds(spec.dtype, padding_value(spec)):
            raise ValueError(f"specs[{key!r}] has default_value {spec.default_value}, which {spec.dtype} cannot hold.")


def spec_to_json(spec: FeatureSpec) -> dict[str, Any]:
    """A spec as JSON; `spec_from_json` is the inverse."""
    size = {"max_length": spec.max_length} if isinstance(spec, RaggedFeature) else {"shape": list(spec.shape)}
    if isinstance(spec, QuantizedFeature):
        return {**size, "dtype": "int8 with scales", "default_value": spec.default_value}
    return {**size, "dtype": str(spec.dtype).removeprefix("torch."), "default_value": spec.default_value}


def spec_from_json(spec: Mapping[str, Any]) -> FeatureSpec:
    """The spec that `spec_to_json` wrote."""
    if spec["dtype"] == "int8 with scales":
        return QuantizedFeature(spec["shape"], spec["default_value"])
    dtype = getattr(torch, spec["dtype"])
    if "max_length" in spec:
        return RaggedFeature(dtype, spec["max_length"], spec["default_value"])
    return FixedLenFeature(spec["shape"], dtype, spec["default_value"])


def is_loadable(saved: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Whether values that were saved with one spec (as JSON) fit another, whatever their padding and longest length."""
    ignored = {"default_value": None, "max_length": None}
    return set(saved) == set(own) and {**saved, **ignored} == {**own, **ignored}


def check_keys(name: str, given: Mapping[str, object], expected: Sequence[str]) -> None:
    """Raise unless `given` has exactly the `expected` keys."""
    missing, extra = set(expected) - set(given), set(given) - set(expected)
    if missing or extra:
        raise ValueError(
            f"`{name}` must have the keys {sorted(expected)}, got {sorted(given)}"
            + (f"; missing {sorted(missing)}" if missing else "")
            + (f"; unknown {sorted(extra)}" if extra else "")
            + "."
        )


def check_features(name: str, features: Features, specs: Specs) -> dict[str, Tensor | RaggedRows]:
    """Check items against their specs, pad them and cast them to the stored dtype.

    Args:
        name: Name of the argument, for error messages.
        features: One value per key: a tensor `[batch, ...]`, or a list of `batch` tensors `[length]`
            for a ragged feature. Keys must be among those of `specs`.
        specs: Spec per key.

    Returns:
        A tensor `[batch, *shape]` per fixed feature and `RaggedRows` per ragged one. Ragged features
        that were given with the same width (token ids and their mask) share their lengths.

    Raises:
        ValueError: Unknown key, wrong rank or shape, longer than the spec, different batch sizes, a value
            that the stored integer dtype cannot hold.
        TypeError: A floating point value for an integer feature or the reverse.
    """
    unknown = set(features) - set(specs)
    if unknown:
        raise ValueError(f"`{name}` has the keys {sorted(unknown)}, but the cache's are {sorted(specs)}.")
    checked: dict[str, Tensor | RaggedRows] = {}
    for key, value in features.items():
        where, spec = f"{name}[{key!r}]", specs[key]
        if isinstance(spec, RaggedFeature):
            checked[key] = _check_ragged(where, value, spec)
        else:
            checked[key] = _check_fixed(where, value, spec)
    sizes = {key: (value.values if isinstance(value, RaggedRows) else value).shape[0] for key, value in checked.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"The values of `{name}` have different batch sizes: {sizes}.")
    return _share_lengths(checked)


def to_device(value: Tensor | RaggedRows, device: torch.device) -> Tensor | RaggedRows:
    """Checked values on a device."""
    if isinstance(value, RaggedRows):
        return RaggedRows(transfer.to_device(value.values, device), transfer.to_device(value.lengths, device))
    return transfer.to_device(value, device)


def padded(checked: Mapping[str, Tensor | RaggedRows]) -> dict[str, Tensor]:
    """The values alone, `[batch, ...]`; what lies behind a ragged item's length is padding already."""
    return {key: value.values if isinstance(value, RaggedRows) else value for key, value in checked.items()}


def batch_size(checked: Mapping[str, Tensor | RaggedRows]) -> int:
    """Number of items in checked features; 0 without any feature."""
    if not checked:
        return 0
    value = next(iter(checked.values()))
    return (value.values if isinstance(value, RaggedRows) else value).shape[0]


def concatenate(first: Features, second: Features, specs: Specs) -> dict[str, Tensor | list[Tensor]]:
    """The items of two batches, one after the other; padded where their widths differ."""
    result: dict[str, Tensor | list[Tensor]] = {}
    for key, spec in specs.items():
        a, b = first[key], second[key]
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            result[key] = [*a, *b]
            continue
        if a.dim() > 1 and a.shape[1] != b.shape[1]:
            width = max(a.shape[1], b.shape[1])
            pads = [[0, 0] * (value.dim() - 2) + [0, width - value.shape[1]] for value in (a, b)]
            a, b = (
                torch.nn.functional.pad(value, pad, value=padding_value(spec))
                for value, pad in zip((a, b), pads, strict=True)
            )
        result[key] = torch.cat([a, b.to(a.device, a.dtype)])
    return result


# Token inputs as transformers name them: their width differs from batch to batch.
_TOKEN_KEYS = ("input_ids", "attention_mask", "token_type_ids")


def infer_specs(features: Features) -> dict[str, FeatureSpec]:
    """Specs from a batch: ragged for a transformer's token inputs and for lists, the batch's own shape for the rest."""
    if not features:
        raise ValueError("`document_features` is empty; expected the inputs of the document encoder.")
    specs: dict[str, FeatureSpec] = {}
    for key, value in features.items():
        if isinstance(value, Tensor) and not (key in _TOKEN_KEYS and value.dim() == 2):
            specs[key] = FixedLenFeature(list(value.shape[1:]), value.dtype)
        else:
            specs[key] = RaggedFeature(value.dtype if isinstance(value, Tensor) else value[0].dtype)
    return specs


def select(checked: Mapping[str, Tensor | RaggedRows], index: Tensor) -> dict[str, Tensor | RaggedRows]:
    """The items at `index [n]` of checked features."""

    def take(value: Tensor | RaggedRows) -> Tensor | RaggedRows:
        if isinstance(value, RaggedRows):
            at = index.to(value.values.device)
            return RaggedRows(value.values[at], value.lengths[at])
        return value[index.to(value.device)]

    return {key: take(value) for key, value in checked.items()}


def _check_fixed(where: str, value: Tensor | Sequence[Tensor], spec: FixedLenFeature | QuantizedFeature) -> Tensor:
    value = _as_tensor(where, value)
    shape = list(spec.shape)
    if value.dim() != len(shape) + 1 or any(got > size for got, size in zip(value.shape[1:], shape, strict=True)):
        raise ValueError(
            f"`{where}` has shape {list(value.shape)}; the spec says {['*', *shape]}. "
            "Truncate longer values; shorter ones are padded."
        )
    value = _cast(where, value, spec.dtype)
    if list(value.shape[1:]) == shape:
        return value
    pad = [n for size, got in zip(reversed(shape), reversed(value.shape[1:]), strict=True) for n in (0, size - got)]
    return torch.nn.functional.pad(value, pad, value=padding_value(spec))


def _check_ragged(where: str, value: Tensor | Sequence[Tensor], spec: RaggedFeature) -> RaggedRows:
    if isinstance(value, RaggedRows) and value.values.dtype == spec.dtype:
        return value  # checked already
    lengths = None
    if not isinstance(value, Tensor):
        if not value or any(not isinstance(row, Tensor) or row.dim() != 1 for row in value):
            raise ValueError(f"`{where}` must be a tensor [batch, length] or a list of tensors [length].")
        lengths = torch.tensor([len(row) for row in value], device=value[0].device)
        value = pad_sequence(list(value), batch_first=True, padding_value=padding_value(spec))
    if value.dim() != 2:
        raise ValueError(f"`{where}` has shape {list(value.shape)}; a ragged feature must be [batch, length].")
    value = _cast(where, value, spec.dtype)
    if lengths is None:
        positions = torch.arange(1, value.shape[1] + 1, device=value.device)
        lengths = (
            ((value != padding_value(spec)) * positions).amax(dim=1)
            if value.shape[1]
            else positions.new_zeros(len(value))
        )
    if spec.max_length is not None and value.shape[1] > spec.max_length:
        longest = value.shape[1]
        if is_free_to_read(value):
            longest = int(lengths.amax()) if len(lengths) else 0
        if longest > spec.max_length:
            raise ValueError(
                f"`{where}` has items of {longest} values; the spec's max_length is {spec.max_length}. "
                "Truncate them or raise max_length."
            )
        value = value[:, : spec.max_length]
    return RaggedRows(value, lengths)


def _share_lengths(checked: dict[str, Tensor | RaggedRows]) -> dict[str, Tensor | RaggedRows]:
    """Give ragged features of equal width the same lengths, so that they stay aligned when read."""
    longest: dict[int, Tensor] = {}
    for value in checked.values():
        if isinstance(value, RaggedRows):
            width = value.values.shape[1]
            longest[width] = torch.maximum(longest[width], value.lengths) if width in longest else value.lengths
    return {
        key: RaggedRows(value.values, longest[value.values.shape[1]]) if isinstance(value, RaggedRows) else value
        for key, value in checked.items()
    }


def _holds(dtype: torch.dtype, value: float) -> bool:
    """Whether an integer dtype can hold the value; floating point dtypes hold all, rounded."""
    if dtype.is_floating_point or dtype.is_complex:
        return True
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return value == int(value) and low <= value <= high


def _as_tensor(where: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"`{where}` is {type(value).__name__}; expected a torch.Tensor.")
    if value.dim() == 0:
        raise ValueError(f"`{where}` is a scalar; the first dimension must be the batch.")
    return value


def _cast(where: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast within integers or within floating point; everything else is a mistake."""
    if value.dtype == dtype:
        return value.detach()
    if value.is_floating_point() != dtype.is_floating_point or value.is_complex():
        raise TypeError(f"`{where}` is {value.dtype}; the spec says {dtype}. Convert it or change the spec.")
    if not dtype.is_floating_point and is_free_to_read(value) and value.numel():
        is_held = _holds(dtype, int(value.min())) and _holds(dtype, int(value.max()))
        if not is_held:
            raise ValueError(
                f"`{where}` has values from {int(value.min())} to {int(value.max())}, which do not fit "
                f"the spec's {dtype}. Use a wider dtype in the spec."
            )
    return value.detach().to(dtype)
