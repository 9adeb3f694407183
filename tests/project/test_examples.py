"""The examples run as their first lines say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_several_ranks_resume_with_another_number_of_them(tmp_path: Path):
    def run(ranks: int, steps: int) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += [str(EXAMPLES / "several_ranks.py"), "--folder", str(tmp_path / "run")]
        command += ["--steps", str(steps), "--save-steps", "10"]
        return subprocess.run(command, check=True, text=True, capture_output=True, timeout=100).stdout

    assert "step 20: loss" in run(2, 20)
    assert "step 10" not in (second := run(1, 30))
    assert "step 30: loss" in second


def test_a_large_cache_takes_the_memory_that_was_predicted():
    command = [sys.executable, str(EXAMPLES / "large_cache.py"), "--cache-size", "2048", "--batch-size", "256"]
    said = subprocess.run(command, check=True, text=True, capture_output=True, timeout=100)
    lines = said.stdout.splitlines()
    predicted = sum(
        float(line.split()[2]) for line in lines if line.startswith(("predicted e", "predicted f", "predicted b"))
    )
    (found,) = (float(line.split()[3]) for line in lines if line.startswith("the cache takes"))
    assert 0.8 < found / predicted < 1.2  # the room for new tokens depends on the last compaction
    assert "fill 1.00" in said.stdout


def test_a_recommender_is_better_with_corrected_popularity():
    command = [sys.executable, str(EXAMPLES / "recommender.py")]
    said = subprocess.run(command, check=True, text=True, capture_output=True, timeout=200).stdout
    rates = {
        line.split("  hit")[0].strip(): float(line.split()[-1]) for line in said.splitlines() if "hit rate" in line
    }
    # 4,000 pairs: a standard error of a rate is at most 0.008
    assert rates["corrected by log_q"] > rates["ten most popular items"] + 0.1
    assert rates["ten most popular items"] > rates["uncorrected"]


def test_a_sentence_transformers_model_learns_to_find_functions(tmp_path: Path):
    command = [sys.executable, str(EXAMPLES / "sentence_transformers_training.py"), "--epochs", "1"]
    said = subprocess.run(command, cwd=tmp_path, check=True, text=True, capture_output=True, timeout=250).stdout
    (line,) = (line for line in said.splitlines() if line.startswith("MRR@10"))
    before, after = (float(part.split()[-2]) for part in line.split(":")[1].split(","))
    assert after > before + 0.1  # 590 queries: a standard error of at most 0.02
    assert "'fill': 1.0" in said


def run_example(name: str, *options: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *options]
    return subprocess.run(command, check=True, text=True, capture_output=True, timeout=200).stdout


@pytest.mark.gpu
def test_a_plain_loop_learns(tmp_path: Path):
    pytest.importorskip("tensorboard")
    said = run_example("plain_loop.py", "--log-dir", str(tmp_path)).splitlines()
    before, after = (float(line.split()[-1].rstrip("%")) for line in (said[0], said[-1]))
    assert before < 2
    assert after > 70
    assert list(tmp_path.glob("events*"))


@pytest.mark.gpu
def test_two_towers_in_lightning_learn_and_resume(tmp_path: Path):
    pytest.importorskip("lightning")
    options = ("--folder", str(tmp_path), "--epochs")
    first, second = (run_example("lightning_towers.py", *options, epochs) for epochs in ("1", "2"))
    losses = [float(said.split("val_loss ")[1].split()[0]) for said in (first, second)]
    assert losses[1] < losses[0] - 0.3
    assert "cache 100% full" in second


@pytest.mark.gpu
def test_two_towers_in_hugging_faces_trainer_learn(tmp_path: Path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    said = run_example("hugging_face_towers.py", "--folder", str(tmp_path)).splitlines()[-1]
    before, after = (float(part.split()[-2]) for part in said.split(",")[:2])
    assert after < 0.5 * before
    assert (tmp_path / "checkpoint-100" / "negative_cache" / "loss_fn" / "negative_cache.json").is_file()
