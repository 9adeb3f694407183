"""Storage of one feature, against a plain dict."""

from __future__ import annotations

import io
import random

import pytest
import torch

from negative_cache.cache.columns import FixedColumn, RaggedColumn, make_column, spec_of
from negative_cache.cache.specs import FixedLenFeature, RaggedFeature, RaggedRows

NUM_ROWS = 13


def ragged_rows(rows: list[list[int]]) -> RaggedRows:
    width = max((len(row) for row in rows), default=0)
    values = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int64).reshape(len(rows), width)
    return RaggedRows(values, torch.tensor([len(row) for row in rows], dtype=torch.int64))


def unpadded(column: RaggedColumn, row: int) -> list[int]:
    return column.read(torch.tensor([row]))[0].tolist()


def assert_equals_model(column: RaggedColumn, model: dict[int, list[int]], rng: random.Random) -> None:
    rows = [rng.randrange(NUM_ROWS) for _ in range(5)]
    longest = max(len(model.get(row, [])) for row in rows)
    expected = [model.get(row, []) + [0] * (longest - len(model.get(row, []))) for row in rows]
    assert column.read(torch.tensor(rows)).tolist() == expected
    again = column.read_rows(torch.tensor(rows))
    assert again.lengths.tolist() == [len(model.get(row, [])) for row in rows]
    longest = max(map(len, model.values()), default=0)
    dense = [model.get(row, []) + [0] * (longest - len(model.get(row, []))) for row in range(NUM_ROWS)]
    assert column.dense().tolist() == dense


@pytest.mark.parametrize("max_length", [None, 4, 40])
@pytest.mark.parametrize("longest", [1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_ragged_column_rewritten_many_times(max_length: int | None, longest: int, seed: int) -> None:
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


def test_ragged_column_starts_with_empty_sequences() -> None:
    column = RaggedColumn(RaggedFeature(torch.int64), 3, torch.device("cpu"))
    assert column.read(torch.tensor([0, 2])).shape == (2, 0)
    assert column.dense().shape == (3, 0)
    assert column.read(torch.tensor([], dtype=torch.int64)).shape == (0, 0)


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


def test_saved_arena_has_no_unused_end() -> None:
    column = RaggedColumn(RaggedFeature(torch.int64), 100, torch.device("cpu"))
    column.write(torch.tensor([3]), ragged_rows([[1, 2, 3]]))
    assert column.state_dict()["arena"].tolist() == [1, 2, 3]
    assert column.arena.numel() > 3


def test_ragged_column_pads_with_the_default_value() -> None:
    column = RaggedColumn(RaggedFeature(torch.int64, default_value=7), 2, torch.device("cpu"))
    column.write(torch.tensor([0, 1]), RaggedRows(torch.tensor([[1, 7], [2, 3]]), torch.tensor([1, 2])))
    assert column.read(torch.tensor([0, 1])).tolist() == [[1, 7], [2, 3]]


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_fixed_column_write_and_read(shape: tuple[int, ...]) -> None:
    column = make_column(FixedLenFeature(shape, torch.float32), NUM_ROWS, torch.device("cpu"))
    model = torch.zeros(NUM_ROWS, *shape)
    for _ in range(10):
        rows = torch.randperm(NUM_ROWS)[:4]
        values = torch.randn(4, *shape)
        column.write(rows, values)  # type: ignore[arg-type]
        model[rows] = values
    assert torch.equal(column.dense(), model)
    assert torch.equal(column.read(torch.tensor([5, 0, 5])), model[[5, 0, 5]])


def test_fixed_column_keeps_its_dtype_and_storage() -> None:
    values = torch.zeros(3, dtype=torch.float16)
    column = FixedColumn(values)
    column.write(torch.tensor([1]), torch.tensor([2.0]))
    assert values.tolist() == [0, 2, 0]
    assert column.dense().dtype == torch.float16


@pytest.mark.parametrize(
    "spec",
    [FixedLenFeature([2, 3], torch.int32), FixedLenFeature([2], torch.int64, 7), RaggedFeature(torch.int64, 9, 1)],
)
def test_spec_of_a_column(spec: FixedLenFeature | RaggedFeature) -> None:
    assert spec_of(make_column(spec, 4, torch.device("cpu"))) == spec


@pytest.mark.parametrize("spec", [FixedLenFeature([2], torch.float32), RaggedFeature(torch.float32)])
def test_only_a_pinned_column_stays_when_moved(spec: FixedLenFeature | RaggedFeature) -> None:
    cpu = torch.device("cpu")
    assert make_column(spec, 3, cpu).to("meta").device.type == "meta"
    pinned = make_column(spec, 3, torch.device("meta"), cpu)
    assert pinned.device.type == "cpu"
    assert torch.nn.Sequential(pinned).to("meta")[0].device.type == "cpu"
