"""Specs, checks, padding and casting of items."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from negative_cache.cache.specs import (
    FixedLenFeature,
    QuantizedFeature,
    RaggedFeature,
    RaggedRows,
    batch_size,
    check_features,
    check_keys,
    check_specs,
    concatenate,
    infer_specs,
    padding_value,
    select,
    spec_from_json,
    spec_to_json,
)


def check_one(value: object, spec: FixedLenFeature | RaggedFeature) -> Tensor | RaggedRows:
    return check_features("items", {"x": value}, {"x": spec})["x"]  # type: ignore[dict-item]


def ragged(value: object, spec: RaggedFeature) -> list[list[float]]:
    checked = check_one(value, spec)
    assert isinstance(checked, RaggedRows)
    return [row[:n].tolist() for row, n in zip(checked.values, checked.lengths.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("specs", "error", "message"),
    [
        ({}, ValueError, "empty"),
        ({"x": RaggedFeature(torch.int64, 0)}, ValueError, "max_length 0"),
        ({"x": FixedLenFeature([2, -1], torch.int64)}, ValueError, "negative size"),
        ({"x": torch.int64}, TypeError, "expected FixedLenFeature, RaggedFeature or"),
        ({"x": FixedLenFeature([2], torch.int64, 0.5)}, ValueError, "default_value"),
        ({"x": RaggedFeature(torch.uint8, 4, 256)}, ValueError, "default_value"),
        ({"x": FixedLenFeature([2], torch.bool, 2)}, ValueError, "default_value"),
        ({"x": QuantizedFeature([2], torch.int8)}, TypeError, "default_value torch.int8"),
        ({"x": QuantizedFeature(16)}, TypeError, "shape 16"),
        ({"x": QuantizedFeature("a")}, TypeError, "shape 'a'"),
        ({"x": QuantizedFeature([2, 0])}, ValueError, "nothing to quantise"),
    ],
)
def test_wrong_specs_are_refused(specs: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_specs(specs)


def test_right_specs_are_accepted() -> None:
    check_specs(
        {
            "scalar": FixedLenFeature([], torch.int32, -1),
            "float": FixedLenFeature([2, 3], torch.float16, 0.1),
            "ragged": RaggedFeature(torch.uint8, None, 255),
        }
    )


def test_default_of_the_default_value_is_zero() -> None:
    assert padding_value(FixedLenFeature([1], torch.int64)) == 0
    assert padding_value(RaggedFeature(torch.int64, default_value=3)) == 3


@pytest.mark.parametrize(("default", "filler"), [(None, 0), (7, 7)])
def test_short_values_are_padded_on_the_right(default: int | None, filler: int) -> None:
    value = check_one(torch.tensor([[1, 2], [3, 4]]), FixedLenFeature([4], torch.int64, default))
    assert value.tolist() == [[1, 2, filler, filler], [3, 4, filler, filler]]


def test_padding_in_several_dimensions() -> None:
    value = check_one(torch.ones(2, 1, 2), FixedLenFeature([2, 3], torch.float32, -1.0))
    assert value.tolist() == [[[1, 1, -1], [-1, -1, -1]]] * 2


def test_full_size_values_are_kept_as_they_are() -> None:
    given = torch.randn(3, 2)
    assert torch.equal(check_one(given, FixedLenFeature([2], torch.float32)), given)


@pytest.mark.parametrize(
    ("shape", "spec_shape"),
    [((2, 5), [4]), ((2,), [4]), ((2, 4, 1), [4]), ((2, 1), []), ((2, 1, 4), [2, 3])],
)
def test_wrong_shapes_are_named(shape: tuple[int, ...], spec_shape: list[int]) -> None:
    with pytest.raises(ValueError, match=r"`items\['x'\]` has shape"):
        check_one(torch.zeros(shape), FixedLenFeature(spec_shape, torch.float32))


def test_what_is_no_batch_is_refused() -> None:
    with pytest.raises(TypeError, match="list"):
        check_one([1, 2], FixedLenFeature([], torch.int64))
    with pytest.raises(ValueError, match="scalar"):
        check_one(torch.tensor(1), FixedLenFeature([], torch.int64))


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (torch.int64, torch.int32),
        (torch.int32, torch.int64),
        (torch.bool, torch.int64),
        (torch.int64, torch.bool),
        (torch.float64, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
def test_casts_within_a_kind(given: torch.dtype, stored: torch.dtype) -> None:
    value = check_one(torch.tensor([0, 1, 1]).to(given), FixedLenFeature([], stored))
    assert isinstance(value, Tensor)
    assert value.dtype == stored
    assert value.tolist() == [0, 1, 1]


@pytest.mark.parametrize(("given", "stored"), [(torch.float32, torch.int64), (torch.int64, torch.float32)])
def test_casts_between_kinds_are_refused(given: torch.dtype, stored: torch.dtype) -> None:
    with pytest.raises(TypeError, match="the spec says"):
        check_one(torch.zeros(2, dtype=given), FixedLenFeature([], stored))
    with pytest.raises(TypeError, match="the spec says"):
        check_one(torch.zeros(2, 3, dtype=given), RaggedFeature(stored))


@pytest.mark.parametrize(
    ("value", "dtype"), [(256, torch.uint8), (-1, torch.uint8), (2**31, torch.int32), (2, torch.bool)]
)
def test_integers_that_do_not_fit_are_refused(value: int, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        check_one(torch.tensor([0, value]), FixedLenFeature([], dtype))


def test_checked_values_carry_no_gradient() -> None:
    value = check_one(torch.ones(2, 3, requires_grad=True), FixedLenFeature([3], torch.float32))
    assert isinstance(value, Tensor)
    assert not value.requires_grad


def test_unknown_keys_and_different_batch_sizes_are_refused() -> None:
    specs = {"x": FixedLenFeature([], torch.int64), "y": RaggedFeature(torch.int64)}
    with pytest.raises(ValueError, match=r"\['z'\]"):
        check_features("items", {"z": torch.zeros(1)}, specs)
    with pytest.raises(ValueError, match=r"different batch sizes: \{'x': 2, 'y': 3\}"):
        check_features("items", {"x": torch.tensor([1, 2]), "y": torch.ones(3, 1, dtype=torch.int64)}, specs)


def test_check_keys_names_missing_and_unknown() -> None:
    check_keys("specs", {"a": 1}, ["a"])
    with pytest.raises(ValueError, match=r"missing \['a'\]; unknown \['b'\]"):
        check_keys("specs", {"b": 1}, ["a"])


def test_ragged_tensor_drops_its_trailing_padding_only() -> None:
    value = torch.tensor([[5, 0, 6, 0], [0, 0, 0, 0], [1, 2, 3, 4]])
    assert ragged(value, RaggedFeature(torch.int64)) == [[5, 0, 6], [], [1, 2, 3, 4]]
    assert ragged(torch.tensor([[1, 9], [9, 9]]), RaggedFeature(torch.int64, default_value=9)) == [[1], []]


def test_ragged_list_keeps_exact_lengths() -> None:
    rows = [torch.tensor([1, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([3, 4, 5])]
    assert ragged(rows, RaggedFeature(torch.int64)) == [[1, 0], [], [3, 4, 5]]


def test_ragged_without_any_column() -> None:
    assert ragged(torch.zeros(2, 0, dtype=torch.int64), RaggedFeature(torch.int64)) == [[], []]


def test_too_long_sequences_are_refused_but_padding_is_not() -> None:
    spec = RaggedFeature(torch.int64, max_length=2)
    assert ragged(torch.tensor([[1, 2, 0, 0], [3, 0, 0, 0]]), spec) == [[1, 2], [3]]
    with pytest.raises(ValueError, match="items of 3 values; the spec's max_length is 2"):
        check_one(torch.tensor([[1, 2, 3, 0]]), spec)
    with pytest.raises(ValueError, match="items of 3 values"):
        check_one([torch.tensor([1, 2, 3])], spec)


@pytest.mark.parametrize("value", [torch.zeros(2), torch.zeros(2, 3, 4), [], [torch.zeros(2, 2)], [1, 2]])
def test_wrong_ragged_values_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"items\['x'\]"):
        check_one(value, RaggedFeature(torch.float32))


def test_aligned_ragged_features_share_their_lengths() -> None:
    specs = {"ids": RaggedFeature(torch.int64), "mask": RaggedFeature(torch.int64), "other": RaggedFeature(torch.int64)}
    items = {
        "ids": torch.tensor([[0, 5, 0], [7, 8, 9]]),
        "mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "other": torch.tensor([[1, 0], [0, 0]]),
    }
    items["ids"][0, 1] = 0  # a token that equals the padding
    checked = check_features("items", items, specs)
    assert {key: value.lengths.tolist() for key, value in checked.items()} == {
        "ids": [2, 3],
        "mask": [2, 3],
        "other": [1, 0],
    }


def test_select_and_batch_size() -> None:
    specs = {"x": FixedLenFeature([], torch.int64), "y": RaggedFeature(torch.int64)}
    checked = check_features("items", {"x": torch.tensor([1, 2, 3]), "y": torch.tensor([[1], [2], [0]])}, specs)
    assert batch_size(checked) == 3
    assert batch_size({}) == 0
    chosen = select(checked, torch.tensor([2, 0]))
    assert chosen["x"].tolist() == [3, 1]
    assert chosen["y"].values.tolist() == [[0], [1]]
    assert chosen["y"].lengths.tolist() == [0, 1]


def test_infer_specs() -> None:
    specs = infer_specs(
        {
            "input_ids": torch.zeros(2, 5, dtype=torch.int64),
            "attention_mask": torch.zeros(2, 5, dtype=torch.int32),
            "dense": torch.zeros(2, 3, 4),
            "label": torch.zeros(2, dtype=torch.int16),
            "list": [torch.zeros(3), torch.zeros(1)],
        }
    )
    assert specs == {
        "input_ids": RaggedFeature(torch.int64),
        "attention_mask": RaggedFeature(torch.int32),
        "dense": FixedLenFeature([3, 4], torch.float32),
        "label": FixedLenFeature([], torch.int16),
        "list": RaggedFeature(torch.float32),
    }
    with pytest.raises(ValueError, match="empty"):
        infer_specs({})


def test_concatenate_pads_to_the_wider_batch() -> None:
    specs = {"x": RaggedFeature(torch.int64, default_value=9), "y": FixedLenFeature([], torch.int64)}
    first = {"x": torch.tensor([[1, 2]]), "y": torch.tensor([1])}
    second = {"x": torch.tensor([[3]]), "y": torch.tensor([2])}
    joined = concatenate(first, second, specs)
    assert joined["x"].tolist() == [[1, 2], [3, 9]]
    assert joined["y"].tolist() == [1, 2]


def test_concatenate_of_a_list_and_a_tensor_is_a_list() -> None:
    specs = {"x": RaggedFeature(torch.int64)}
    joined = concatenate({"x": [torch.tensor([1, 2])]}, {"x": torch.tensor([[3], [4]])}, specs)
    assert [row.tolist() for row in joined["x"]] == [[1, 2], [3], [4]]


@pytest.mark.parametrize(
    "spec",
    [
        FixedLenFeature([2, 3], torch.bfloat16, 0.5),
        FixedLenFeature([], torch.bool),
        RaggedFeature(torch.int32, 128, 1),
        RaggedFeature(torch.float64),
    ],
)
def test_specs_survive_json(spec: FixedLenFeature | RaggedFeature) -> None:
    again = spec_from_json(json.loads(json.dumps(spec_to_json(spec))))
    assert again == spec
    assert type(again) is type(spec)
