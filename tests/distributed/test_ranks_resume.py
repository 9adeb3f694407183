"""Several ranks: if one dies, the run ends on all of them, and a restart by torchrun resumes it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from negative_cache import NegativeCacheLoss
from negative_cache.integrations.trainer import last_complete_checkpoint
from support import needs_resuming_on_ranks_of_a_cpu, random_pairs, run_ranks

STEPS, SAVE_STEPS = 80, 10
KILLS = (60,)  # after this step, in the third epoch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from negative_cache.workbench.data import load_data
    from negative_cache.workbench.models import load_model

    path = tmp_path_factory.mktemp("ranks")
    random_pairs(path / "pairs.jsonl", 700)  # about 37 steps an epoch
    texts = load_data(str(path / "pairs.jsonl")).training_texts()
    load_model("static", texts, 0).save_pretrained(str(path / "model"))
    return path


def start(folder: Path, output: str, *launch: str) -> subprocess.Popen[bytes]:
    """`torchrun --nproc-per-node 2 ... train`, as a process that writes to OUTPUT.log."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *launch]
    command += [str(Path(__file__).parents[1].joinpath("ranks_job.py")), "train"]
    command += ["--data", str(folder / "pairs.jsonl"), "--model", str(folder / "model"), "--batch-size", "8"]
    command += ["--output", str(folder / output), "--max-steps", str(STEPS), "--save-steps", str(SAVE_STEPS)]
    command += ["--cache-size", "128", "--learning-rate", "0.05", "--num-samples", "1", "--resume"]
    log = (folder / f"{output}.log").open("wb")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def wait_for_checkpoint(process: subprocess.Popen[bytes], partial: Path, after: int) -> None:
    """Until there is a complete checkpoint of a step beyond `after`."""
    while process.poll() is None:
        newest = last_complete_checkpoint(partial)
        step = -1 if newest is None else int(newest.rsplit("-", 1)[1])
        if step > after:
            return
        time.sleep(0.01)
    raise AssertionError("The run ended too early.")


def kill_a_worker(process: subprocess.Popen[bytes], chance: random.Random) -> None:
    workers = [child for child in psutil.Process(process.pid).children() if "ranks_job.py" in " ".join(child.cmdline())]
    chance.choice(workers).send_signal(signal.SIGKILL)


def result(folder: Path, output: str) -> tuple[bytes, list[float], dict[str, torch.Tensor]]:
    record = json.loads((folder / output / "run.json").read_text())
    losses = [entry["loss"] for entry in record["history"] if "loss" in entry]
    assert record["ranks"] == 2
    files = sorted((folder / f"{output}.cache").rglob("*.safetensors"))
    assert len(files) == 2
    cache = {f"{number} {key}": value for number, file in enumerate(files) for key, value in load_file(file).items()}
    return (folder / output / "model.safetensors").read_bytes(), losses, cache


@needs_resuming_on_ranks_of_a_cpu
def test_a_run_whose_ranks_are_killed_equals_one_whose_were_not(folder: Path):
    assert start(folder, "whole").wait(120) == 0
    chance = random.Random(1)
    process = start(folder, "killed", "--max-restarts", str(len(KILLS)))
    try:
        for after in KILLS:
            wait_for_checkpoint(process, folder / "killed.partial", after)
            time.sleep(chance.uniform(0, 0.15))
            kill_a_worker(process, chance)
        assert process.wait(120) == 0, (folder / "killed.log").read_text()
    finally:
        process.kill()
    assert json.loads((folder / "killed" / "run.json").read_text())["resumed_from_step"] > 0
    (model, losses, cache), (whole_model, whole_losses, whole_cache) = (
        result(folder, output) for output in ("killed", "whole")
    )
    assert model == whole_model
    assert losses == whole_losses
    assert len(losses) == STEPS // 2 + 1  # every other step, and the last but one
    assert cache.keys() == whole_cache.keys()
    assert all(torch.equal(value, whole_cache[key]) for key, value in cache.items())


def test_a_rank_that_is_killed_ends_the_run_on_all(folder: Path):
    process = start(folder, "ended")
    try:
        wait_for_checkpoint(process, folder / "ended.partial", -1)
        children = psutil.Process(process.pid).children(recursive=True)
        kill_a_worker(process, random.Random(0))
        assert process.wait(30) != 0
    finally:
        process.kill()
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert last_complete_checkpoint(folder / "ended.partial") is not None
    alone = [sys.executable, *process.args[6:]]  # without torchrun
    ended = subprocess.run(alone, text=True, capture_output=True, timeout=100)
    assert ended.returncode == 2
    assert "unfinished run on 2 ranks, and this run has 1" in " ".join(ended.stderr.split())


def dies(rank: int, world_size: int, folder: Path) -> None:
    step = make_step(None)
    step()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # with which the test's launcher ends the others
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        step()
    (folder / "seconds").write_text(str(time.monotonic() - began))
    os._exit(0)  # the rest of the group cannot be destroyed in order


def sleeps(rank: int, world_size: int, folder: Path) -> None:
    step = make_step(dist.new_group(timeout=timedelta(seconds=3)))
    step()
    if rank == 1:
        while not (folder / "seconds").exists():
            time.sleep(0.1)
        os._exit(0)
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        step()
    (folder / "seconds").write_text(str(time.monotonic() - began))
    os._exit(0)


def make_step(group: dist.ProcessGroup | None):
    table = torch.nn.functional.normalize(torch.randn(8, 4), dim=1).requires_grad_()
    loss_fn = NegativeCacheLoss(lambda f: table[f["row"]], 16, num_samples=1, process_group=group or "world")
    rows = torch.arange(4)
    return lambda: loss_fn(table[rows], table[rows], {"row": rows}).backward()


def test_a_rank_that_dies_is_an_error_on_the_others(tmp_path: Path):
    with pytest.raises(Exception, match="SIGKILL"):
        run_ranks(dies, 2, tmp_path)
    assert float((tmp_path / "seconds").read_text()) < 20


def test_a_rank_that_hangs_is_an_error_after_the_groups_timeout(tmp_path: Path):
    run_ranks(sleeps, 2, tmp_path)
    assert 2 < float((tmp_path / "seconds").read_text()) < 10
