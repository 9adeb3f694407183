"""Columns store and return one feature, as a plain dict of rows would."""

from __future__ import annotations

import io
import random

import pytest
import torch

from negative_cache.cache.columns import (
    FixedColumn,
    RaggedColumn,
    dequantize,
    make_column,
    make_columns,
    quantize,
    read_columns,
    write_columns,
)
from negative_cache.cache.specs import FeatureSpec, FixedLenFeature, QuantizedFeature, RaggedFeature
from negative_cache.cache.validation import RaggedRows

NUM_ROWS = 13


def ragged_rows(rows: list[list[int]]) -> RaggedRows:
    width = max((len(row) for row in rows), default=0)
    values = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int64).reshape(len(rows), width)
    return RaggedRows(values, torch.tensor([len(row) for row in rows], dtype=torch.int64))


def unpadded(column: RaggedColumn, row: int) -> list[int]:
    return column.read(torch.tensor([row])).values[0].tolist()


def assert_equals_model(column: RaggedColumn, model: dict[int, list[int]], rng: random.Random) -> None:
    rows = [rng.randrange(NUM_ROWS) for _ in range(5)]
    longest = max(len(model.get(row, [])) for row in rows)
    expected = [model.get(row, []) + [0] * (longest - len(model.get(row, []))) for row in rows]
    read = column.read(torch.tensor(rows))
    assert read.values.tolist() == expected
    assert read.lengths.tolist() == [len(model.get(row, [])) for row in rows]
    longest = max(map(len, model.values()), default=0)
    dense = [model.get(row, []) + [0] * (longest - len(model.get(row, []))) for row in range(NUM_ROWS)]
    assert column.dense().tolist() == dense


@pytest.mark.parametrize("max_length", [None, 4, 40])
@pytest.mark.parametrize("longest", [1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_ragged_rows_survive_many_compactions(max_length: int | None, longest: int, seed: int) -> None:
    rng = random.Random(seed)
    column = RaggedColumn(RaggedFeature(torch.int64, max_length), NUM_ROWS, torch.device("cpu"))
    model: dict[int, list[int]] = {}
    for step in range(60):
        chosen = rng.sample(range(NUM_ROWS), rng.randint(0, 6))
        values = [[rng.randint(1, 99) for _ in range(rng.randint(0, longest))] for _ in chosen]
        column.write(torch.tensor(chosen, dtype=torch.int64), ragged_rows(values))
        model.update(zip(chosen, values, strict=True))
        assert_equals_model(column, model, rng)
        if step % 20 == 19:
            column = reloaded(column)
            assert_equals_model(column, model, rng)


def reloaded(column: RaggedColumn) -> RaggedColumn:
    file = io.BytesIO()
    torch.save(column.state_dict(), file)
    file.seek(0)
    other = RaggedColumn(column.spec, len(column.offsets), torch.device("cpu"))
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def test_a_ragged_column_starts_with_empty_sequences() -> None:
    column = RaggedColumn(RaggedFeature(torch.int64), 3, torch.device("cpu"))
    assert column.read(torch.tensor([0, 2])).values.shape == (2, 0)
    assert column.dense().shape == (3, 0)
    assert column.read(torch.tensor([], dtype=torch.int64)).values.shape == (0, 0)


def test_long_sequences_turn_the_arena_into_slots() -> None:
    column = RaggedColumn(RaggedFeature(torch.int64, 4), NUM_ROWS, torch.device("cpu"))
    rows = torch.arange(NUM_ROWS)
    column.write(rows, ragged_rows([[row + 1] * 4 for row in range(NUM_ROWS)]))
    assert column.arena.numel() == NUM_ROWS * 4
    place = column.arena.data_ptr()
    for value in range(20):
        column.write(rows, ragged_rows([[value + row + 1] * (row % 5) for row in range(NUM_ROWS)]))
    assert column.arena.data_ptr() == place
    assert [unpadded(column, row) for row in range(NUM_ROWS)] == [[20 + row] * (row % 5) for row in range(NUM_ROWS)]
    assert [unpadded(reloaded(column), row) for row in range(NUM_ROWS)] == [
        [20 + row] * (row % 5) for row in range(NUM_ROWS)
    ]


def test_short_sequences_take_far_less_than_all_slots() -> None:
    rng = random.Random(0)
    num_rows, max_length, batch = 512, 256, 16
    column = RaggedColumn(RaggedFeature(torch.int64, max_length), num_rows, torch.device("cpu"))
    for start in range(0, 4 * num_rows, batch):
        rows = torch.arange(start, start + batch) % num_rows
        column.write(rows, ragged_rows([[1] * rng.randint(8, 24) for _ in range(batch)]))
        assert column.arena.numel() <= num_rows * max_length / 4
    assert int(column.lengths.sum()) >= num_rows * 8


def test_large_columns_are_compacted_in_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("negative_cache.cache.columns._ROWS_AT_ONCE", 5)
    test_ragged_rows_survive_many_compactions(max_length=40, longest=4, seed=0)


def test_the_saved_arena_has_no_unused_end() -> None:
    column = RaggedColumn(RaggedFeature(torch.int64), 100, torch.device("cpu"))
    column.write(torch.tensor([3]), ragged_rows([[1, 2, 3]]))
    assert column.state_dict()["arena"].tolist() == [1, 2, 3]
    assert column.arena.numel() > 3


def test_ragged_rows_are_padded_with_the_default_value() -> None:
    column = RaggedColumn(RaggedFeature(torch.int64, default_value=7), 2, torch.device("cpu"))
    column.write(torch.tensor([0, 1]), RaggedRows(torch.tensor([[1, 7], [2, 3]]), torch.tensor([1, 2])))
    assert column.read(torch.tensor([0, 1])).values.tolist() == [[1, 7], [2, 3]]


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_fixed_values_are_read_as_written(shape: tuple[int, ...]) -> None:
    column = make_column(FixedLenFeature(shape, torch.float32), NUM_ROWS, torch.device("cpu"))
    model = torch.zeros(NUM_ROWS, *shape)
    for _ in range(10):
        rows = torch.randperm(NUM_ROWS)[:4]
        values = torch.randn(4, *shape)
        column.write(rows, values)  # type: ignore[arg-type]
        model[rows] = values
    assert torch.equal(column.dense(), model)
    assert torch.equal(column.read(torch.tensor([5, 0, 5])), model[[5, 0, 5]])


def test_a_fixed_column_keeps_its_dtype_and_storage() -> None:
    values = torch.zeros(3, dtype=torch.float16)
    column = FixedColumn(values)
    column.write(torch.tensor([1]), torch.tensor([2.0]))
    assert values.tolist() == [0, 2, 0]
    assert column.dense().dtype == torch.float16


@pytest.mark.parametrize(
    "spec",
    [
        FixedLenFeature([2, 3], torch.int32),
        FixedLenFeature([2], torch.int64, 7),
        RaggedFeature(torch.int64, 9, 1),
        QuantizedFeature([3], 0.5),
    ],
)
def test_a_column_has_the_spec_of_which_it_was_made(spec: FeatureSpec) -> None:
    assert make_column(spec, 4, torch.device("cpu")).spec == spec


@pytest.mark.parametrize("spec", [FixedLenFeature([2], torch.float32), RaggedFeature(torch.float32)])
def test_only_a_pinned_column_stays_when_moved(spec: FeatureSpec) -> None:
    cpu = torch.device("cpu")
    assert make_column(spec, 3, cpu).to("meta").device.type == "meta"
    pinned = make_column(spec, 3, torch.device("meta"), cpu)
    assert pinned.device.type == "cpu"
    assert torch.nn.Sequential(pinned).to("meta")[0].device.type == "cpu"


SPECS: dict[str, FeatureSpec] = {
    "fixed": FixedLenFeature([2], torch.float32),
    "quantized": QuantizedFeature([3]),
    "short": RaggedFeature(torch.int64, max_length=3),
    "long": RaggedFeature(torch.int64),
}


def items(number: int) -> dict[str, torch.Tensor | RaggedRows]:
    """Values for rows 1 and 3."""
    return {
        "fixed": torch.full((2, 2), float(number)),
        "quantized": torch.full((2, 3), float(number)),
        "short": ragged_rows([[number, number], [number]]),
        "long": ragged_rows([[number] * 4, [number]]),
    }


@pytest.mark.parametrize("is_any", [False, True, None])
def test_columns_change_unless_there_is_nothing_to_write(is_any: bool | None) -> None:
    columns = make_columns(SPECS, 4, torch.device("cpu"))
    rows = torch.tensor([1, 3])
    for number in range(1, 4):  # the arenas are compacted on the way
        write_columns(columns, rows, items(number), None)
    before = {key: column.dense().clone() for key, column in columns.items()}
    write_columns(columns, rows, items(9), None if is_any is None else torch.tensor(is_any))
    expected = items(3) if is_any is False else items(9)
    for key, column in columns.items():
        value = expected[key]
        dense = value.values if isinstance(value, RaggedRows) else value
        torch.testing.assert_close(column.dense()[rows], dense)
        assert torch.equal(column.dense()[[0, 2]], before[key][[0, 2]])


def test_columns_are_read_in_the_order_of_the_keys() -> None:
    columns = make_columns(SPECS, 4, torch.device("cpu"))
    write_columns(columns, torch.tensor([1, 3]), items(5), None)
    read = read_columns(columns, torch.tensor([3, 1, 0]), ["long", "fixed", "short"])
    assert list(read) == ["long", "fixed", "short"]
    assert read["long"].values.tolist() == [[5, 0, 0, 0], [5] * 4, [0] * 4]
    assert read["short"].lengths.tolist() == [1, 2, 0]
    assert read["fixed"].tolist() == [[5, 5], [5, 5], [0, 0]]


def test_quantized_values_differ_by_at_most_half_a_level() -> None:
    values = torch.randn(7, 2, 5, generator=torch.Generator().manual_seed(0))
    values[3] = 0
    levels, scales = quantize(values)
    assert levels.dtype == torch.int8
    assert levels.flatten(1).abs().amax(dim=1).tolist() == [127] * 3 + [0] + [127] * 3
    error = (dequantize(levels, scales) - values).abs().flatten(1).amax(dim=1)
    assert bool((error <= scales / 2 * (1 + 1e-5)).all())
