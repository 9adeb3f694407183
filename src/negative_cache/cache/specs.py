"""Feature specs: the shape, dtype and padding value of each feature of a cached document."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

NO_ID = -1  # the id of a document whose id is unknown
MASK = "attention_mask"  # the ragged feature whose zeros are the padding of the texts


class FixedLenFeature(NamedTuple):
    """A feature whose value has the same shape for every item.

    Attributes:
        shape: Shape of one item's value, `[]` for a scalar.
        dtype: dtype in which the value is stored.
        default_value: Value with which shorter inputs are padded on the right; 0 if None.
    """

    shape: Sequence[int]
    dtype: torch.dtype
    default_value: float | None = None


class RaggedFeature(NamedTuple):
    """A sequence feature of varying length, such as token ids.

    Items are stored without padding, unless one slot of `max_length` values per row takes less memory. When they are
    read, they are padded with `default_value` to the longest of the items read.

    Ragged features of equal width in a batch, such as token ids and their mask, are stored aligned. Values equal to
    `default_value` at the end of an item are padding. If one of these features is named `attention_mask`, its zeros at
    the start of an item are padding in all of them, whatever the other values. After the first such batch, these
    features are read with the padding on the left, including items of other batches. A batch whose masks have zeros at
    both ends raises an error on the CPU.

    Attributes:
        dtype: dtype in which the values are stored.
        max_length: Maximum length of a sequence; None for no limit. Longer items raise an error on the CPU; on a GPU,
            they are truncated.
        default_value: The padding value; 0 if None. Set it to the tokenizer's padding id if the encoder reads that id.
        padding_side: The side on which items are padded until a mask shows padding on the left. Set it to "left" if
            batches have no padding, or no `attention_mask`; without a mask, values equal to `default_value` at the
            start are then the padding, and those at the end are not.
    """

    dtype: torch.dtype
    max_length: int | None = None
    default_value: float | None = None
    padding_side: Literal["left", "right"] = "right"


class QuantizedFeature(NamedTuple):
    """Floating point values of a fixed shape, stored as int8 with one float32 scale per item.

    When an item is written, its values are rounded to 255 levels between plus and minus its largest absolute value.

    Attributes:
        shape: Shape of one item's value.
        default_value: Value with which shorter inputs are padded on the right; 0 if None.
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

# Others, such as uint16 or float8, cannot be indexed, compared or summed on every device.
_STORABLE = {
    torch.bool,
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.complex128),
}

# Inputs of transformers whose width differs from batch to batch.
TOKEN_KEYS = ("input_ids", MASK, "token_type_ids")


def embedding_spec(dim: int, dtype: torch.dtype) -> FixedLenFeature | QuantizedFeature:
    """The spec of embeddings `[dim]` that are stored as `dtype`."""
    return QuantizedFeature([dim]) if dtype == torch.int8 else FixedLenFeature([dim], dtype)


def infer_specs(features: Features) -> dict[str, FeatureSpec]:
    """Infer the specs from a batch of document features.

    Lists of tensors and the token inputs of transformers (`input_ids`, `attention_mask` and `token_type_ids` of shape
    `[batch, length]`) become a `RaggedFeature` without a `max_length`. Any other tensor becomes a `FixedLenFeature` of
    its shape in the batch.

    Args:
        features: Feature name -> tensor `[batch, ...]`, or list of `batch` tensors `[length]`.

    Returns:
        Spec per feature, with the dtype of the batch.

    Raises:
        ValueError: `features` is empty.
        TypeError: A value is no tensor with a batch dimension and no list of tensors.
    """
    if not features:
        raise ValueError("`document_features` is empty; expected the inputs of the document encoder.")
    specs: dict[str, FeatureSpec] = {}
    for key, value in features.items():
        check_feature(f"document_features[{key!r}]", value)
        if isinstance(value, Tensor) and not (key in TOKEN_KEYS and value.dim() == 2):
            specs[key] = FixedLenFeature(list(value.shape[1:]), value.dtype)
        else:
            specs[key] = RaggedFeature(value.dtype if isinstance(value, Tensor) else value[0].dtype)
    return specs


def check_feature(where: str, value: object) -> None:
    """Raise TypeError unless a value is a dense tensor with a batch dimension, or a list of dense tensors.

    Args:
        where: Name of the value, for the error message.
        value: The value of a feature.
    """
    if isinstance(value, list | tuple):
        is_usable = len(value) > 0 and all(isinstance(row, Tensor) and is_dense(row) for row in value)
        kinds = ", ".join(sorted({kind_of(row) for row in value}))
        got = f"{type(value).__name__} of {kinds}" if value else f"an empty {type(value).__name__}"
    else:
        is_usable, got = isinstance(value, Tensor) and is_dense(value) and value.dim() > 0, kind_of(value)
    if not is_usable:
        advice = "Convert values to dense tensors, one per key. Keep constants in the encoder."
        if isinstance(value, list | tuple) and value and all(isinstance(row, str) for row in value):
            advice = "Tokenize the texts first, and pass the tensors of the tokenizer."
        raise TypeError(f"`{where}` is {got}; expected a tensor [batch, ...] or a list of tensors [length]. {advice}")


def is_dense(value: Tensor) -> bool:
    """Whether a tensor has values in the usual layout: not sparse, not nested, not on the meta device."""
    return value.layout == torch.strided and not value.is_nested and not value.is_meta


def kind_of(value: object) -> str:
    """The type of a value, for error messages."""
    if not isinstance(value, Tensor):
        return "None" if value is None else type(value).__name__
    if value.is_nested:
        return "a nested tensor"
    if value.layout != torch.strided:
        return f"a {str(value.layout).removeprefix('torch.')} tensor"
    what = "a tensor on the meta device" if value.is_meta else "a tensor"
    return what if value.dim() else f"{what} without dimensions"


def padding_value(spec: FeatureSpec) -> float:
    """The value that pads items of this spec."""
    return 0 if spec.default_value is None else spec.default_value


def can_hold(dtype: torch.dtype, value: float) -> bool:
    """Whether a dtype can hold the value: integer dtypes exactly, floating point dtypes rounded."""
    if dtype.is_floating_point or dtype.is_complex:
        return True
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return value == int(value) and low <= value <= high


def check_embedding_dtype(dtype: torch.dtype) -> None:
    """Raise unless embeddings can be stored as `dtype`."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"`embedding_dtype` is {dtype!r}; expected a torch.dtype such as torch.int8.")
    if dtype not in _STORABLE or not (dtype.is_floating_point or dtype == torch.int8):
        raise ValueError(
            f"`embedding_dtype` is {dtype}; it must be a floating point dtype or int8. float8 is not supported."
        )


def check_specs(specs: Specs) -> None:
    """Raise unless every spec has a storable dtype, a valid shape or length, and a default value that its dtype holds.

    Raises:
        ValueError: A size, a dtype or a default value is out of range, or there are no specs.
        TypeError: Something else than specs by feature name, integers, dtypes and numbers.
    """
    if not isinstance(specs, Mapping):
        raise TypeError(
            f"`specs` is {type(specs).__name__}; expected a dict of feature name -> FixedLenFeature, RaggedFeature or "
            "QuantizedFeature."
        )
    if not specs:
        raise ValueError("`specs` is empty; expected a spec for each feature.")
    for key, spec in specs.items():
        if not isinstance(key, str):
            raise TypeError(f"The feature name {key!r} is {type(key).__name__}; expected str. Rename the feature.")
        if isinstance(spec, RaggedFeature):
            _check_max_length(key, spec.max_length)
            if spec.padding_side not in ("left", "right"):
                raise ValueError(f"specs[{key!r}] has padding_side {spec.padding_side!r}; expected 'left' or 'right'.")
        elif isinstance(spec, FixedLenFeature | QuantizedFeature):
            _check_shape(key, spec)
        else:
            raise TypeError(
                f"specs[{key!r}] is {type(spec).__name__}; expected FixedLenFeature, RaggedFeature or QuantizedFeature."
            )
        _check_values(key, spec)


def _check_values(key: str, spec: FeatureSpec) -> None:
    if not isinstance(spec.dtype, torch.dtype):
        raise TypeError(f"specs[{key!r}] has the dtype {spec.dtype!r}; expected a torch.dtype such as torch.int64.")
    if spec.dtype not in _STORABLE:
        raise ValueError(
            f"specs[{key!r}] has the dtype {spec.dtype}, which the cache cannot store. Convert the feature to int64, "
            "float32 or another common dtype."
        )
    value = padding_value(spec)
    if not isinstance(value, numbers.Real):
        raise TypeError(f"specs[{key!r}] has the default_value {value!r}; expected a number.")
    if not math.isfinite(value) or not can_hold(spec.dtype, value):
        raise ValueError(f"specs[{key!r}] has default_value {value}, which {spec.dtype} cannot hold as a finite value.")


def _check_max_length(key: str, length: object) -> None:
    if length is None:
        return
    if not isinstance(length, numbers.Integral) or isinstance(length, bool):
        raise TypeError(f"specs[{key!r}] has the max_length {length!r}; expected an integer or None.")
    if length < 1:
        raise ValueError(f"specs[{key!r}] has max_length {length}; it must be at least 1.")


def _check_shape(key: str, spec: FixedLenFeature | QuantizedFeature) -> None:
    is_list = isinstance(spec.shape, Sequence)
    if not is_list or any(isinstance(size, bool) or not hasattr(size, "__index__") for size in spec.shape):
        raise TypeError(f"specs[{key!r}] has the shape {spec.shape!r}; expected a list of integers.")
    if isinstance(spec, QuantizedFeature) and 0 in spec.shape:
        raise ValueError(
            f"specs[{key!r}] has the shape {list(spec.shape)}, without any value to quantize. Use a FixedLenFeature."
        )
    if any(size < 0 for size in spec.shape):
        raise ValueError(f"specs[{key!r}] has a negative size in its shape {list(spec.shape)}.")


def spec_to_json(spec: FeatureSpec) -> dict[str, Any]:
    """A spec as JSON; `spec_from_json` is the inverse."""
    dtype = "int8 with scales" if isinstance(spec, QuantizedFeature) else str(spec.dtype).removeprefix("torch.")
    common = {"dtype": dtype, "default_value": spec.default_value}
    if isinstance(spec, RaggedFeature):
        return {"max_length": spec.max_length, "padding_side": spec.padding_side, **common}
    return {"shape": list(spec.shape), **common}


def spec_from_json(spec: Mapping[str, Any]) -> FeatureSpec:
    """The spec that `spec_to_json` wrote."""
    if spec["dtype"] == "int8 with scales":
        return QuantizedFeature(spec["shape"], spec["default_value"])
    dtype = getattr(torch, spec["dtype"])
    if "max_length" in spec:
        side = spec.get("padding_side", "right")  # earlier versions saved none
        return RaggedFeature(dtype, spec["max_length"], spec["default_value"], side)
    return FixedLenFeature(spec["shape"], dtype, spec["default_value"])


def is_loadable(saved: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Whether values saved with one spec fit another (both as JSON); padding and `max_length` may differ."""
    ignored = {"default_value": None, "max_length": None, "padding_side": None}
    return {**saved, **ignored} == {**own, **ignored}
