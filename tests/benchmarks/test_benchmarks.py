"""The benchmarks run, measure nothing if an operation is wrong, and compare with the right algorithms."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.__main__ import COMMANDS, main
from benchmarks.dense_baseline import DenseCache, best_of_groups, write_one_by_one
from benchmarks.peak import peak_bytes
from benchmarks.scale import fit_line
from benchmarks.sizes import SETS, Size
from benchmarks.timing import median_ms
from benchmarks.workload import EMBEDDING, TopKLoss, make_features, unit_rows
from torch import Tensor

from benchmarks import budget, checks, child, peers
from negative_cache import NegativeCache
from negative_cache.retrieval import Retrieved, Search
from negative_cache.sampling import draw

CPU = torch.device("cpu")
TINY = SETS["tiny"]
SHAPES = list(dict.fromkeys(replace(size, rows=1021, target=None) for size in (*TINY.step, *SETS["full"].step)))

COLUMNS = {
    "step": {"dtype", "mode", "batch", "rows", "dim", "step_ms", "dense_ms", "ratio", "product_ms", "float32_ms"},
    "peers": {"method", "negatives", "batch", "step_ms", "query_ms", "peak_mb", "note"},
    "scale": {"dtype", "mode", "rows", "step_ms", "pass_ms", "blocks_ms", "product_ms"},
    "memory": {"dtype", "mode", "rows", "extra_mb", "kept_mb"},
    "end-to-end": {"model", "loss", "batch", "rows", "step_ms", "ratio"},
    "budget": {"model", "budget", "batch", "rows", "documents", "step_ms", "ratio", "peak_mb"},
    "variance": {"stage", "batch", "rows", "estimator", "variance", "bias", "documents", "cost_ratio", "step_ms"},
    "data": {"stage", "form", "documents", "seconds", "peak_mb"},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_prints_a_table_and_writes_a_csv_file_and_a_plot(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([command, "--sizes", "tiny", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "torch: " in shown
    assert "threads: 1" in shown
    with (tmp_path / f"{command}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert COLUMNS[command] | {"cpu", "torch", "device"} <= set(rows[0])
    assert len(rows) == len({tuple(row.values()) for row in rows})
    assert (tmp_path / f"{command}.png").read_bytes().startswith(b"\x89PNG")
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".png"}
    for row in rows:
        if row.get("where") != "tried":  # those are not written for speed
            assert all(float(row[key]) > 0 for key in row if key.endswith("_ms")), row
        assert not row.get("note"), row


def test_the_budget_is_what_a_step_encodes():
    rows = {str(row["budget"]): row for row in budget.run(TINY, CPU).tables[0].rows}
    assert {name: row["documents"] for name, row in rows.items()} == {
        "in-batch": 0, "auto, waiting": 0, "auto, counting": 0.25, "1/8": 0.125, "1/4": 0.25, "1/2": 0.5, "1": 1,
    }  # fmt: skip
    assert rows["in-batch"]["ratio"] == 1
    assert not any(row["met"] for row in rows.values())  # tiny sizes are not judged


@pytest.mark.parametrize("size", SHAPES, ids=lambda size: f"{size.batch}x{size.dim}-{size.dtype}-{size.mode}")
def test_operations_of_the_measured_shapes_pass_the_checks(size: Size):
    assert checks.failures([size], CPU) == []


def break_retrieve(change: Callable[[Retrieved], Retrieved], monkeypatch: pytest.MonkeyPatch) -> None:
    original = draw.retrieve

    def broken(search: Search, generator: torch.Generator) -> Retrieved:
        return change(original(search, generator))

    for module in (checks, draw):
        monkeypatch.setattr(module, "retrieve", broken)


BREAKAGES = {
    "lse": lambda got: got._replace(lse=got.lse + 0.05),
    "no number": lambda got: got._replace(lse=got.lse * float("nan")),
    "always the first row": lambda got: got._replace(rows=torch.zeros_like(got.rows)),
    "the row before": lambda got: got._replace(rows=(got.rows - 1).clamp(min=0)),
    "wrong best rows": lambda got: got._replace(best_rows=got.best_rows.flip(1)),
}


@pytest.mark.parametrize("top_k", [16, None])
@pytest.mark.parametrize("name", BREAKAGES)
def test_checks_see_a_broken_pass(name: str, top_k: int | None, monkeypatch: pytest.MonkeyPatch):
    break_retrieve(BREAKAGES[name], monkeypatch)
    assert checks.failures([replace(TINY.step[0], top_k=top_k)], CPU)


def test_checks_see_a_broken_write(monkeypatch: pytest.MonkeyPatch):
    original = NegativeCache.write

    def write(self: NegativeCache, rows: Tensor, *args: object, **kwargs: object) -> None:
        original(self, (rows + 1) % self.num_rows, *args, **kwargs)

    monkeypatch.setattr(NegativeCache, "write", write)
    found = checks.failures([TINY.step[0]], CPU)
    assert len(found) == 1
    assert found[0].startswith("step of B=32 D=64 float32")


@pytest.mark.parametrize("command", ["step", "memory"])
def test_nothing_is_printed_if_a_check_fails(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    break_retrieve(BREAKAGES["lse"], monkeypatch)
    assert main([command, "--sizes", "tiny", "--output", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "lse: error 0.05" in captured.err
    assert not list(tmp_path.iterdir())


def same_caches(num_rows: int = 64, dim: int = 16) -> tuple[TopKLoss, DenseCache]:
    """The library's and the dense cache with the same rows, which all have different ages."""
    torch.manual_seed(0)
    table = unit_rows(2 * num_rows, dim, CPU)
    order = torch.randperm(2 * num_rows)

    def encode(features: dict[str, Tensor]) -> Tensor:
        return table[order[features["first"][:, 0].long()]]

    loss_fn = TopKLoss(encode, num_rows, in_batch=False, shared=False, seed=0)
    items = make_features(0, num_rows, 4, CPU)
    loss_fn(torch.zeros(1, dim, requires_grad=True), table[:1], {key: value[:1] for key, value in items.items()})
    cache = loss_fn.cache
    assert cache is not None
    cache.write(torch.arange(num_rows), {EMBEDDING: table[:num_rows], **items})
    cache.written.copy_(torch.arange(num_rows) - num_rows + cache.step)
    assert cache.age.unique().numel() == num_rows
    copies = {key: value.clone() for key, value in cache.data.items()}
    return loss_fn, DenseCache(copies.pop(EMBEDDING), copies, cache.age.clone(), encode)


@pytest.mark.parametrize("top_k", [None, 16])
def test_the_dense_step_has_the_loss_of_the_library(top_k: int | None):
    loss_fn, dense = same_caches()
    loss_fn.top_k = top_k
    queries, documents = unit_rows(8, 16, CPU).requires_grad_(), unit_rows(8, 16, CPU)
    features = make_features(64, 8, 4, CPU)
    expected = dense.step(queries, documents, features, top_k).interpretable_loss.mean()
    assert loss_fn(queries, documents, features).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("top_k", [None, 16])
def test_the_dense_step_leaves_the_rows_of_the_library(top_k: int | None):
    loss_fn, dense = same_caches()
    loss_fn.top_k = top_k
    assert loss_fn.cache is not None
    wanted = torch.tensor([0, 3, 9, 17, 33, 50, 57, 63])  # some of them among the oldest
    queries = (50 * dense.embeddings[wanted]).requires_grad_()  # so that each query draws its own
    documents, features = unit_rows(8, 16, CPU), make_features(64, 8, 4, CPU)
    loss_fn(queries, documents, features)
    done = dense.step(queries, documents, features, top_k)
    assert torch.equal(done.drawn, wanted)
    assert done.replaced.tolist() == [1, 2, 4, 5, 6, 7, 8, 10]
    assert torch.equal(loss_fn.cache.age, dense.age)
    for key, value in {EMBEDDING: dense.embeddings, **dense.features}.items():
        assert torch.equal(loss_fn.cache.data[key], value), key


def test_the_dense_step_draws_from_the_softmax():
    _, dense = same_caches()
    query = unit_rows(1, 16, CPU)
    scores, drawn = dense._draw(query.expand(5000, -1), None)
    expected = 5000 * scores[0].softmax(0)
    counts = drawn.bincount(minlength=64)
    assert ((counts - expected).abs() <= 5 * (expected + 1).sqrt()).all()


def test_the_dense_step_groups_and_writes_rows():
    values, rows = best_of_groups(torch.tensor([[1.0, 5, 2, 0, -1, -2], [0, 1, 2, 3, 4, 5]]), 2)
    assert values.tolist() == [[5, 0], [2, 5]]
    assert rows.tolist() == [[1, 3], [2, 5]]
    column = torch.zeros(4, 3)
    write_one_by_one(column, torch.tensor([2, 0]), torch.tensor([[1.0, 2], [3, 4]]))
    assert column.tolist() == [[3, 4, 0], [0, 0, 0], [1, 2, 0], [0, 0, 0]]


def test_calls_take_turns():
    calls: list[str] = []
    times = median_ms({name: lambda name=name: calls.append(name) for name in "ab"}, 3, CPU, "")
    assert "".join(calls) == "ab" * 4
    assert set(times) == {"a", "b"}


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux counts")
def test_peak_memory_is_that_of_the_call():
    peak = peak_bytes(lambda: torch.ones(16_000_000), CPU)
    assert peak is not None
    assert 60e6 < peak < 72e6


def test_a_measurement_ends_at_its_limits():
    with pytest.raises(child.LimitError, match=r"more than 0\.5 s"):
        child.run(time.sleep, 100, seconds=0.5)
    with pytest.raises(RuntimeError, match="ValueError: sleep length must be non-negative"):
        child.run(time.sleep, -1)
    with pytest.raises(RuntimeError, match="the process ended with 3"):
        child.run(os._exit, 3)
    if sys.platform == "linux":
        with pytest.raises(child.LimitError, match=r"more than 4\.0 GB"):
            child.run(torch.zeros, 10**10, num_bytes=4e9)


def test_sizes_that_cannot_fit_are_skipped():
    last = {"negatives": 100, "batch": 100, "peak_mb": 50.0, "step_ms": 2000.0}
    sizes = replace(TINY.peers, seconds=60)
    assert peers._too_much(sizes, 1000, None, 1e8) is None
    assert peers._too_much(sizes, 1000, last, 1e9) is None
    assert peers._too_much(sizes, 8000, last, 1e9) == "not run: would need at least 4 GB"
    assert peers._too_much(sizes, 8000, last, 1e12) == "not run: would need at least 160 s a step"
    assert peers._too_much(sizes, 8000, {**last, "batch": 8}, 1e12) is None


def test_lines_are_least_squares_fits():
    slope, explained = fit_line([1, 2, 4], [12.0, 14, 18])
    assert (slope, explained) == (pytest.approx(2), pytest.approx(1))
    assert fit_line([1, 2, 3], [1.0, -1, 1])[1] == pytest.approx(0)


def test_ranks_count_the_bytes_that_they_send():
    command = [sys.executable, "-m", "benchmarks.ranks", "--ranks", "1", "2", "--batch-size", "4"]
    command += ["--cache-size", "256", "--dim", "16", "--length", "8", "--repeats", "2"]
    folder = Path(__file__).parents[2]
    ended = subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=100, check=True)
    rows = [line.split() for line in ended.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert [row[:2] for row in rows] == [["1", "4"], ["1", "8"], ["2", "4"]]
    integers, documents, queries = (float(number) for number in rows[2][3:6])
    # 20 integers and 4 ids; 4 documents of 16 floats, twice; 4 queries of 16 floats with 9 uniforms and 2 scores each
    assert (integers, documents, queries) == (0.2, 0.5, 0.6)
