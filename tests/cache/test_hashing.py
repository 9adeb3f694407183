"""Hashes of documents: equal for equal features, whatever the padding, and different otherwise."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from negative_cache.cache.hashing import MAX_VALUES, features_without_hash, hash_items, mix
from negative_cache.cache.specs import FeatureSpec, FixedLenFeature, RaggedFeature
from negative_cache.cache.validation import check_features

CPU = torch.device("cpu")
SPECS: dict[str, FeatureSpec] = {
    "input_ids": RaggedFeature(torch.int64),
    "attention_mask": RaggedFeature(torch.int64),
    "token_type_ids": RaggedFeature(torch.int64),
}
TEXTS = [[5, 7, 9], [5, 7], [7, 5, 9], [5, 7, 9, 9], [0, 5, 7], [5]]


def hashes(features: dict[str, Tensor], specs: dict[str, FeatureSpec] | None = None) -> list[int]:
    found: list[int] = hash_items(check_features("features", features, specs or SPECS), CPU).tolist()
    return found


def tokenized(texts: list[list[int]], side: str, width: int, pad: int) -> dict[str, Tensor]:
    rows: dict[str, list[list[int]]] = {key: [] for key in SPECS}
    for text in texts:
        for key, values, padding in (
            ("input_ids", text, pad),
            ("attention_mask", [1] * len(text), 0),
            ("token_type_ids", [0] * len(text), 0),
        ):
            filling = [padding] * (width - len(text))
            rows[key].append([*filling, *values] if side == "left" else [*values, *filling])
    return {key: torch.tensor(value) for key, value in rows.items()}


@pytest.mark.parametrize("pad", [0, 1])
def test_padding_does_not_matter(pad: int):
    """Its side, its width, and the id of the padding token, which also occurs in texts."""
    found = [
        hashes(tokenized(TEXTS, side, width, pad)) for side, width in itertools.product(("left", "right"), (4, 5, 11))
    ]
    assert all(each == found[0] for each in found)
    assert len(set(found[0])) == len(TEXTS)
    assert hashes(tokenized(TEXTS[:1], "right", 3, pad)) == found[0][:1]


def test_order_position_and_feature_matter():
    values = torch.tensor([[1, 2, 0], [2, 1, 0], [0, 1, 2], [1, 0, 2], [1, 2, 3]])
    specs: dict[str, FeatureSpec] = {"a": FixedLenFeature([3], torch.int64)}
    found = hashes({"a": values}, specs)
    assert len(set(found)) == len(values)
    two: dict[str, FeatureSpec] = {**specs, "b": FixedLenFeature([3], torch.int64)}
    assert hashes({"a": values, "b": values.flip(0)}, two) != hashes({"a": values.flip(0), "b": values}, two)


def test_hashes_are_ids_without_collisions():
    """62 bits, from 0; among 200,000 consecutive integers, and as many near the limits of int64, none collide."""
    specs: dict[str, FeatureSpec] = {"id": FixedLenFeature([], torch.int64)}
    numbers = torch.cat([torch.arange(100_000), 2**63 - 1 - torch.arange(50_000), -(2**63) + torch.arange(50_000)])
    found = torch.tensor(hashes({"id": numbers}, specs))
    assert len(found.unique()) == len(numbers)
    assert 0 <= int(found.min()) < 2**58
    assert 2**61 < int(found.max()) < 2**62
    assert abs(float((found >= 2**61).double().mean()) - 0.5) < 0.005  # 4.5 standard deviations


def test_the_mix_is_that_of_the_published_constants():
    """Against Python's integers of any size."""

    def mixed(value: int) -> int:
        bits = 2**64 - 1
        value = ((value ^ (value >> 31)) * 0x7FB5D329728EA185) & bits
        value = value - 2**64 if value >= 2**63 else value  # shifts keep the sign
        value = ((value ^ (value >> 27)) * 0x81DADEF4BC2DD44D) & bits
        value = value - 2**64 if value >= 2**63 else value
        return value ^ (value >> 33)

    numbers = [0, 1, 2, 12345, 2**40 + 17, 2**62, 2**63 - 1]
    assert mix(torch.tensor(numbers)).tolist() == [mixed(number) for number in numbers]


def test_floats_and_large_features_have_no_hash():
    items = {
        "ids": torch.zeros(2, 5, dtype=torch.int32),
        "weights": torch.zeros(2, 5),
        "image": torch.zeros(2, MAX_VALUES + 1, dtype=torch.uint8),
        "flags": torch.zeros(2, dtype=torch.bool),
    }
    assert features_without_hash(items) == ["weights", "image"]


def test_compiled_hashes_are_those_of_eager_mode():
    numbers = torch.randint(-(2**62), 2**62, (8, 6))
    compiled = torch.compile(lambda values: hash_items({"a": values}, CPU))
    assert torch.equal(compiled(numbers), hash_items({"a": numbers}, CPU))
