"""A run that is killed at any moment resumes, and ends like a run that was not killed."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

import resume_job
from negative_cache.integrations import hugging_face
from negative_cache.integrations.trainer import last_complete_checkpoint
from negative_cache.workbench.training import driver
from negative_cache.workbench.training.config import RunError
from negative_cache.workbench.training.driver import run
from negative_cache.workbench.training.record import RunRecord
from resume_job import STEPS, configuration, job, make_data, marker_of, read

KILLS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume")
    make_data(path)
    job(path, "whole")
    return path


def result(folder: Path, output: str) -> tuple[bytes, list[float]]:
    record = json.loads((folder / output / "run.json").read_text())
    losses = [entry["loss"] for entry in record["history"] if "loss" in entry]
    return (folder / output / "model.safetensors").read_bytes(), losses


def kill_at_random(process: BaseProcess, marker: Path, chance: random.Random) -> bool:
    """Kill a run at a random moment, mostly while it makes steps and writes checkpoints; False if it has ended."""
    is_early = chance.random() < 0.2
    while not is_early and not marker.exists() and process.is_alive():
        time.sleep(0.002)
    process.join(chance.uniform(0, 2.0 if is_early else 0.4))
    if not process.is_alive():
        return False
    process.kill()
    process.join()
    return True


def newest_is_torn(partial: Path) -> bool:
    """Whether the newest checkpoint was being written when the run was killed."""
    numbers = [int(path.name.split("-")[1]) for path in partial.glob("checkpoint-*")]
    return bool(numbers) and last_complete_checkpoint(partial) != str(partial / f"checkpoint-{max(numbers)}")


def test_a_run_killed_at_random_moments_equals_one_that_was_not(folder: Path):
    context = multiprocessing.get_context("forkserver")
    chance = random.Random(0)
    kills, interrupted, torn, runs = 0, 0, 0, 0
    while kills < KILLS or runs == 0:
        output = f"killed-{runs}"
        marker = marker_of(folder, output)
        marker.unlink(missing_ok=True)
        process = context.Process(target=job, args=(folder, output))
        process.start()
        if kills < KILLS and kill_at_random(process, marker, chance):
            kills += 1
            interrupted += last_complete_checkpoint(folder / f"{output}.partial") is not None
            torn += newest_is_torn(folder / f"{output}.partial")
            continue
        process.join(60)
        assert process.exitcode == 0
        assert result(folder, output) == result(folder, "whole")
        assert not (folder / f"{output}.partial").exists()
        runs += 1
    assert interrupted >= 6  # with a checkpoint to resume from
    assert torn >= 1  # while writing a checkpoint


def test_a_resumed_run_without_its_cache_differs(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The test above can fail: without the cache, the losses differ."""
    interrupt(folder, "forgetful", monkeypatch)
    monkeypatch.setattr(hugging_face, "load_checkpoint", lambda loss, path: None)
    job(folder, "forgetful")
    assert result(folder, "forgetful")[1] != result(folder, "whole")[1]


def interrupt(folder: Path, output: str, monkeypatch: pytest.MonkeyPatch, after: int = 20) -> None:
    """Run until an error in step `after`."""

    def stop(step: int, steps: int, logs: dict[str, float]) -> None:
        if step == after:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        run(configuration(folder, output), read(folder), on_step=stop)


def test_an_interrupted_run_says_how_to_continue(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    interrupt(folder, "stopped", monkeypatch)
    assert "--resume" in caplog.text
    with pytest.raises(RunError, match="unfinished run"):
        run(configuration(folder, "stopped"), read(folder))
    other = resume_job.RunConfig(**{**vars(configuration(folder, "stopped")), "batch_size": 4})
    with pytest.raises(RunError, match="--batch-size was 8, is 4"):
        run(other, read(folder), resume=True)
    data = read(folder)
    query, (document,) = next(iter(data.qrels["train"].items()))
    changed = replace(
        data, qrels={**data.qrels, "train": {**data.qrels["train"], query: [document, list(data.corpus)[-1]]}}
    )
    with pytest.raises(RunError, match="has changed since it began"):
        run(configuration(folder, "stopped"), changed, resume=True)
    record = run(configuration(folder, "stopped"), read(folder), resume=True)
    assert record is not None
    assert record.resumed_from_step == 18
    assert record.documents_encoded == RunRecord.read(folder / "whole").documents_encoded
    assert record.seconds >= max(row["seconds"] for row in record.history if "seconds" in row)
    assert result(folder, "stopped") == result(folder, "whole")


def test_an_incomplete_checkpoint_is_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch):
    interrupt(folder, "half", monkeypatch)
    partial = folder / "half.partial"
    newest = last_complete_checkpoint(partial)
    assert newest is not None
    state = Path(newest) / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    assert last_complete_checkpoint(partial) != newest
    job(folder, "half")
    assert result(folder, "half") == result(folder, "whole")


def test_only_the_last_checkpoints_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch):
    interrupt(folder, "kept", monkeypatch)
    checkpoints = sorted(path.name for path in (folder / "kept.partial").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-15", "checkpoint-18"]
    assert all(list((folder / "kept.partial" / name).glob("negative_cache/*/*.safetensors")) for name in checkpoints)


def test_a_run_without_checkpoints_leaves_nothing_behind(folder: Path):
    def stop(step: int, steps: int, logs: dict[str, float]) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        run(configuration(folder, "gone", None), read(folder), on_step=stop)
    assert not (folder / "gone.partial").exists()


def test_resuming_a_finished_run_returns_its_record(folder: Path):
    record = run(configuration(folder, "whole"), read(folder), resume=True)
    assert record == RunRecord.read(folder / "whole")
    other = resume_job.RunConfig(**{**vars(configuration(folder, "whole")), "seed": 5})
    with pytest.raises(RunError, match="--seed was 0, is 5"):
        run(other, read(folder), resume=True)
    longer = replace(configuration(folder, "whole"), max_steps=2 * STEPS)
    with pytest.raises(
        RunError, match=r"of another length: --max-steps was 40, is 80. It cannot be prolonged.* --model "
    ):
        run(longer, read(folder), resume=True)
    data = read(folder)
    with pytest.raises(RunError, match=r"has a finished run, and .* has changed since it began"):
        run(configuration(folder, "whole"), replace(data, negatives={next(iter(data.queries)): []}), resume=True)
    with pytest.raises(RunError, match="exists"):
        run(configuration(folder, "whole"), read(folder))


def test_a_run_stopped_after_its_last_step_is_not_trained_again(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(path: Path) -> None:
        raise RuntimeError("enough")

    with monkeypatch.context() as patched:
        patched.setattr(driver, "_clear", stop)
        with pytest.raises(RuntimeError, match="enough"):
            job(folder, "ended")
    record = RunRecord.read(folder / "ended.partial")
    monkeypatch.setattr(driver, "train_to_the_end", stop)
    assert run(configuration(folder, "ended"), read(folder), resume=True) == record
    assert result(folder, "ended") == result(folder, "whole")
    assert not list((folder / "ended").glob("checkpoint-*"))
