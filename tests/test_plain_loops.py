"""Loops in plain PyTorch: compilation, mixed precision, GradScaler, accumulation, accelerate, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.tensorboard import SummaryWriter

from negative_cache import NegativeCacheLoss, metrics, tagged_metrics, write_metrics
from support import assert_same_state, needs_compiling_of_whole_steps, run_ranks, snapshot

EXAMPLES = Path(__file__).parents[1] / "examples"
BATCH = 16


class Loop:
    """A tower, its loss and its optimizer; documents are made per step."""

    def __init__(self, **settings: Any) -> None:
        torch.manual_seed(0)
        self.tower = nn.Sequential(nn.EmbeddingBag(200, 32), nn.Linear(32, 32))
        settings = {"num_samples": 1, "seed": 0, "learnable_scale": True, **settings}
        self.loss_fn = NegativeCacheLoss(self.encode, 96, **settings)
        self.optimizer = torch.optim.Adam([*self.tower.parameters(), *self.loss_fn.parameters()], lr=0.01)
        self.words = torch.randint(200, (40, BATCH, 8), generator=torch.Generator().manual_seed(1))

    def encode(self, features: dict[str, Tensor]) -> Tensor:
        return normalize(self.tower(features["words"]), dim=-1)

    def loss(self, words: Tensor, ids: Tensor) -> Tensor:
        features = {"words": words}
        queries = normalize(self.tower(words[:, :3]), dim=-1)
        loss: Tensor = self.loss_fn(queries, self.encode(features), features, document_ids=ids)
        return loss

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return self.words[step % len(self.words)], torch.arange(BATCH) + BATCH * (step % len(self.words))

    def train(self, steps: int, loss: Any = None) -> list[float]:
        losses = []
        for step in range(steps):
            value = (loss or self.loss)(*self.batch(step))
            value.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(value.item())
        return losses


def test_a_compiled_encoder_trains_like_the_plain_one():
    compiled = Loop()
    compiled.tower.compile(backend="aot_eager")
    torch.testing.assert_close(compiled.train(4), Loop().train(4), rtol=1e-4, atol=1e-4)


@needs_compiling_of_whole_steps
def test_a_compiled_step_trains():
    whole = Loop()
    first = whole.train(1)  # the first step makes the cache, and is not compiled
    step = torch.compile(whole.loss, backend="aot_eager")
    losses = whole.train(4, step)
    torch.testing.assert_close(first, Loop().train(1))
    assert whole.loss_fn.step_number() == 5
    assert 0 < losses[-1] < 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_with_a_scaler_trains(dtype: torch.dtype):
    """As well as plain training that makes the same updates: steps whose gradient overflows make none."""
    plain, half = Loop(), Loop()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, enabled=dtype == torch.float16)
    losses, expected, num_skipped = [], [], 0
    for step in range(40):
        before = scaler.get_scale()
        with torch.autocast("cpu", dtype):
            loss = half.loss(*half.batch(step))
        scaler.scale(loss).backward()
        assert all(0.1 < value < 10 for tag, value in tagged_metrics(half.loss_fn).items() if "gradient" in tag)
        scaler.step(half.optimizer)
        scaler.update()
        half.optimizer.zero_grad()
        losses.append(loss.item())
        is_skipped = scaler.get_scale() < before
        num_skipped += is_skipped
        value = plain.loss(*plain.batch(step))
        value.backward()
        if not is_skipped:
            plain.optimizer.step()
        plain.optimizer.zero_grad()
        expected.append(value.item())
    assert (num_skipped > 0) == (dtype == torch.float16)
    assert sum(losses[-10:]) == pytest.approx(sum(expected[-10:]), rel=0.1)


def test_steps_of_an_accumulated_gradient_equal_its_mean():
    by_hand, accumulated = Loop(), Loop()
    gradients = [torch.zeros_like(parameter) for parameter in by_hand.tower.parameters()]
    for step in range(3):
        found = torch.autograd.grad(by_hand.loss(*by_hand.batch(step)), list(by_hand.tower.parameters()))
        gradients = [total + part / 3 for total, part in zip(gradients, found, strict=True)]
    for step in range(3):
        (accumulated.loss(*accumulated.batch(step)) / 3).backward()
    for parameter, gradient in zip(accumulated.tower.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert_same_state(snapshot(by_hand.loss_fn), snapshot(accumulated.loss_fn))


def test_metrics_are_written_to_tensorboard_under_the_handlers_tags(tmp_path: Path):
    loop = Loop()
    loop.train(10)
    with SummaryWriter(tmp_path) as writer:
        write_metrics(writer, loop.loss_fn, 10)
    events = EventAccumulator(str(tmp_path)).Reload()
    expected = tagged_metrics(loop.loss_fn)
    assert {"cache/interpretable_prediction_loss", "cache/staleness", "cache/fill"} <= set(expected)
    assert set(events.Tags()["scalars"]) == set(expected)
    (staleness,) = events.Scalars("cache/staleness")
    assert (staleness.step, staleness.value) == (10, pytest.approx(expected["cache/staleness"]))
    two = nn.ModuleDict({"a": loop.loss_fn, "b": Loop().loss_fn})
    assert {"cache/a/fill", "cache/b/fill"} <= set(tagged_metrics(two))


def test_no_metrics_without_a_loss_are_explained_once(caplog: pytest.LogCaptureFixture):
    metrics._warn_of_no_loss.cache_clear()
    for _ in range(2):
        assert tagged_metrics(nn.Linear(1, 1)) == {}
    (record,) = caplog.records
    assert "there is no NegativeCacheLoss" in record.getMessage()


def test_accelerate_saves_and_resumes_a_registered_loss(tmp_path: Path):
    def start() -> tuple[Accelerator, Loop]:
        accelerator, loop = Accelerator(cpu=True), Loop()
        loop.tower, loop.optimizer = accelerator.prepare(loop.tower, loop.optimizer)
        accelerator.register_for_checkpointing(loop.loss_fn)
        return accelerator, loop

    accelerator, whole = start()
    whole.train(5)
    accelerator.save_state(str(tmp_path))
    expected = whole.train(5)
    again, resumed = start()
    again.load_state(str(tmp_path))
    assert resumed.train(5) == expected
    assert_same_state(snapshot(whole.loss_fn), snapshot(resumed.loss_fn))
    assert_same_state(snapshot(whole.tower), snapshot(resumed.tower))


def run_script(rank: int, world_size: int, folder: Path) -> None:
    """Run the script in `folder` with the options of the launcher, and write what it prints to a file per rank."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # the group exists already
    sys.argv = json.loads((folder / "options.json").read_text(encoding="utf-8"))
    with (folder / f"{rank}.txt").open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        runpy.run_path(sys.argv[0], run_name="__main__")
    os._exit(0)  # the script has destroyed the group, which `run_ranks` would use again


def test_accelerate_resumes_on_two_processes_and_then_on_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    text = (EXAMPLES / "with_accelerate.py").read_text(encoding="utf-8")
    assert "NUM_DOCUMENTS, LENGTH, BATCH = 1_000, 4_096," in text
    script = tmp_path / "with_accelerate.py"
    script.write_text(text.replace("4_096", "512").replace("2_048", "256"), encoding="utf-8")

    def options(folder: str, epochs: int) -> list[str]:
        return [str(script), "--cpu", "--folder", str(tmp_path / folder), "--epochs", str(epochs)]

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run([*launcher, *options("whole", 2)], check=True, text=True, capture_output=True, timeout=200)
    whole = [line for line in ended.stdout.splitlines() if "[Gloo]" not in line]  # where older torch logs
    assert [line[:7] for line in whole] == ["epoch 1", "epoch 2"]
    shutil.copytree(tmp_path / "whole" / "epoch-1", tmp_path / "stopped" / "epoch-1")
    (tmp_path / "options.json").write_text(json.dumps(options("stopped", 2)), encoding="utf-8")
    run_ranks(run_script, 2, tmp_path)
    assert (tmp_path / "0.txt").read_text(encoding="utf-8").splitlines() == whole[1:]
    monkeypatch.setattr(sys, "argv", options("stopped", 3))
    AcceleratorState._reset_state(reset_partial_state=True)
    runpy.run_path(str(script), run_name="__main__")
    assert [line[:7] for line in capsys.readouterr().out.splitlines()] == ["epoch 3"]
