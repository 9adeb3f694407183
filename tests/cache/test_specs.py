"""Specs of features: checks, inference, and JSON."""

from __future__ import annotations

import json

import pytest
import torch

from negative_cache.cache.specs import (
    FixedLenFeature,
    QuantizedFeature,
    RaggedFeature,
    check_specs,
    infer_specs,
    padding_value,
    spec_from_json,
    spec_to_json,
)


@pytest.mark.parametrize(
    ("specs", "error", "message"),
    [
        ({}, ValueError, "empty"),
        ({"x": RaggedFeature(torch.int64, 0)}, ValueError, "max_length 0"),
        ({"x": RaggedFeature(torch.int64, padding_side="both")}, ValueError, "padding_side 'both'; expected 'left' or"),
        ({"x": FixedLenFeature([2, -1], torch.int64)}, ValueError, "negative size"),
        ({"x": torch.int64}, TypeError, "expected FixedLenFeature, RaggedFeature or"),
        ({"x": FixedLenFeature([2], torch.int64, 0.5)}, ValueError, "default_value"),
        ({"x": RaggedFeature(torch.uint8, 4, 256)}, ValueError, "default_value"),
        ({"x": FixedLenFeature([2], torch.bool, 2)}, ValueError, "default_value"),
        ({"x": QuantizedFeature([2], torch.int8)}, TypeError, "default_value torch.int8"),
        ({"x": QuantizedFeature(16)}, TypeError, "shape 16"),
        ({"x": QuantizedFeature("a")}, TypeError, "shape 'a'"),
        ({"x": QuantizedFeature([2, 0])}, ValueError, "without any value to quantize"),
        ([("x", FixedLenFeature([2], torch.int64))], TypeError, "`specs` is list; expected a dict"),
        ({1: FixedLenFeature([2], torch.int64)}, TypeError, "feature name 1 is int"),
        ({"x": FixedLenFeature([2], "int64")}, TypeError, "dtype 'int64'; expected a torch.dtype"),
        ({"x": FixedLenFeature([2], torch.uint64)}, ValueError, "dtype torch.uint64, which the cache cannot store"),
        ({"x": RaggedFeature(torch.qint8)}, ValueError, "dtype torch.qint8, which the cache cannot store"),
        ({"x": FixedLenFeature([True], torch.int64)}, TypeError, r"shape \[True\]; expected a list of integers"),
        ({"x": RaggedFeature(torch.int64, 2.5)}, TypeError, "max_length 2.5; expected an integer or None"),
        ({"x": RaggedFeature(torch.int64, True)}, TypeError, "max_length True; expected an integer or None"),
        ({"x": RaggedFeature(torch.int64, 4, "0")}, TypeError, "default_value '0'; expected a number"),
        ({"x": FixedLenFeature([2], torch.int64, float("nan"))}, ValueError, "default_value nan"),
        ({"x": FixedLenFeature([2], torch.float32, float("inf"))}, ValueError, "default_value inf"),
    ],
)
def test_invalid_specs_are_refused(specs: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_specs(specs)


def test_valid_specs_are_accepted() -> None:
    check_specs(
        {
            "scalar": FixedLenFeature([], torch.int32, -1),
            "float": FixedLenFeature([2, 3], torch.float16, 0.1),
            "ragged": RaggedFeature(torch.uint8, None, 255),
            "flags": FixedLenFeature((2,), torch.bool, True),
            "complex": FixedLenFeature([], torch.complex64),
        }
    )


def test_the_padding_value_is_zero_unless_the_spec_has_another() -> None:
    assert padding_value(FixedLenFeature([1], torch.int64)) == 0
    assert padding_value(RaggedFeature(torch.int64, default_value=3)) == 3


def test_token_inputs_and_lists_are_inferred_as_ragged_and_the_rest_as_fixed() -> None:
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


@pytest.mark.parametrize(
    "spec",
    [
        FixedLenFeature([2, 3], torch.bfloat16, 0.5),
        FixedLenFeature([], torch.bool),
        RaggedFeature(torch.int32, 128, 1),
        RaggedFeature(torch.float64),
        RaggedFeature(torch.int32, padding_side="left"),
    ],
)
def test_specs_survive_json(spec: FixedLenFeature | RaggedFeature) -> None:
    again = spec_from_json(json.loads(json.dumps(spec_to_json(spec))))
    assert again == spec
    assert type(again) is type(spec)
