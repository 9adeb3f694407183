"""Validation of items against their specs: padding, casts, refusals; and operations on validated items."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from negative_cache.cache.specs import FixedLenFeature, RaggedFeature
from negative_cache.cache.validation import (
    RaggedRows,
    batch_size,
    check_features,
    check_ids,
    check_keys,
    concatenate,
    select,
    to_common_width,
)


def check_one(value: object, spec: FixedLenFeature | RaggedFeature) -> Tensor | RaggedRows:
    return check_features("items", {"x": value}, {"x": spec})["x"]  # type: ignore[dict-item]


def ragged(value: object, spec: RaggedFeature) -> list[list[float]]:
    checked = check_one(value, spec)
    assert isinstance(checked, RaggedRows)
    return [row[:n].tolist() for row, n in zip(checked.values, checked.lengths.tolist(), strict=True)]


@pytest.mark.parametrize(("default", "filler"), [(None, 0), (7, 7)])
def test_short_values_are_padded_on_the_right(default: int | None, filler: int) -> None:
    value = check_one(torch.tensor([[1, 2], [3, 4]]), FixedLenFeature([4], torch.int64, default))
    assert value.tolist() == [[1, 2, filler, filler], [3, 4, filler, filler]]


def test_short_values_are_padded_in_every_dimension() -> None:
    value = check_one(torch.ones(2, 1, 2), FixedLenFeature([2, 3], torch.float32, -1.0))
    assert value.tolist() == [[[1, 1, -1], [-1, -1, -1]]] * 2


def test_values_of_full_size_are_not_changed() -> None:
    given = torch.randn(3, 2)
    assert torch.equal(check_one(given, FixedLenFeature([2], torch.float32)), given)


@pytest.mark.parametrize(
    ("shape", "spec_shape"),
    [((2, 5), [4]), ((2,), [4]), ((2, 4, 1), [4]), ((2, 1), []), ((2, 1, 4), [2, 3])],
)
def test_wrong_shapes_are_named(shape: tuple[int, ...], spec_shape: list[int]) -> None:
    with pytest.raises(ValueError, match=r"`items\['x'\]` has shape"):
        check_one(torch.zeros(shape), FixedLenFeature(spec_shape, torch.float32))


def test_values_without_a_batch_dimension_are_refused() -> None:
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
def test_integers_and_floats_are_cast_to_the_stored_dtype(given: torch.dtype, stored: torch.dtype) -> None:
    value = check_one(torch.tensor([0, 1, 1]).to(given), FixedLenFeature([], stored))
    assert isinstance(value, Tensor)
    assert value.dtype == stored
    assert value.tolist() == [0, 1, 1]


@pytest.mark.parametrize(("given", "stored"), [(torch.float32, torch.int64), (torch.int64, torch.float32)])
def test_casts_between_integers_and_floats_are_refused(given: torch.dtype, stored: torch.dtype) -> None:
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


def test_a_ragged_value_may_have_no_column() -> None:
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
    with pytest.raises((ValueError, TypeError), match=r"items\['x'\]"):
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


def test_selected_items_keep_their_lengths() -> None:
    specs = {"x": FixedLenFeature([], torch.int64), "y": RaggedFeature(torch.int64)}
    checked = check_features("items", {"x": torch.tensor([1, 2, 3]), "y": torch.tensor([[1], [2], [0]])}, specs)
    assert batch_size(checked) == 3
    assert batch_size({}) == 0
    chosen = select(checked, torch.tensor([2, 0]))
    assert chosen["x"].tolist() == [3, 1]
    assert chosen["y"].values.tolist() == [[0], [1]]
    assert chosen["y"].lengths.tolist() == [0, 1]


def test_concatenate_pads_to_the_wider_batch() -> None:
    specs = {"x": RaggedFeature(torch.int64, default_value=9), "y": FixedLenFeature([], torch.int64)}
    first = {"x": torch.tensor([[1, 2]]), "y": torch.tensor([1])}
    second = {"x": torch.tensor([[3]]), "y": torch.tensor([2])}
    joined = concatenate({"first": first, "second": second}, specs)
    assert joined["x"].values.tolist() == [[1, 2], [3, 9]]
    assert joined["x"].lengths.tolist() == [2, 1]
    assert joined["y"].tolist() == [1, 2]


def test_concatenate_takes_a_list_and_a_tensor() -> None:
    specs = {"x": RaggedFeature(torch.int64)}
    joined = concatenate({"a": {"x": [torch.tensor([1, 2])]}, "b": {"x": torch.tensor([[3], [4]])}}, specs)
    assert joined["x"].values.tolist() == [[1, 2], [3, 0], [4, 0]]
    assert joined["x"].lengths.tolist() == [2, 1, 1]


def test_concatenate_names_the_batch_with_an_error() -> None:
    specs = {"x": RaggedFeature(torch.int64, 2)}
    with pytest.raises(ValueError, match=r"`b\['x'\]` has items of 3 values"):
        concatenate({"a": {"x": torch.ones(1, 2).long()}, "b": {"x": torch.ones(1, 3).long()}}, specs)


def test_common_width_is_that_of_the_widest():
    padded = to_common_width([torch.ones(1, 2, 2), torch.ones(2, 3, 2), torch.ones(1, 0, 2)], fill=7)
    assert [list(value.shape) for value in padded] == [[1, 3, 2], [2, 3, 2], [1, 3, 2]]
    assert padded[0].tolist() == [[[1, 1], [1, 1], [7, 7]]]
    assert padded[1].tolist() == [[[1, 1]] * 3] * 2
    assert padded[2].tolist() == [[[7, 7]] * 3]


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([1, 2], TypeError, "`ids` is list; expected a tensor of integers"),
        (torch.tensor([1.0, 2.0]), TypeError, r"`ids` is torch\.float32"),
        (torch.tensor([True, False]), TypeError, r"`ids` is torch\.bool"),
        (torch.tensor([1]), ValueError, r"has shape \[1\]; expected \[2\]"),
        (torch.tensor([0, -2]), ValueError, "the value -2; ids are 0 or larger, -1 means unknown"),
    ],
)
def test_wrong_ids_are_refused(ids: object, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        check_ids("ids", ids, (2,))  # type: ignore[arg-type]
    check_ids("ids", torch.tensor([-1, 5], dtype=torch.int32), (2,))
