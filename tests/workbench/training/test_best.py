"""The best model on the dev split is kept, training stops early, and both survive an interruption."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator

from command_line import DOCUMENTS, invoke
from negative_cache.workbench.data import RetrievalData
from negative_cache.workbench.evaluation import evaluate
from negative_cache.workbench.models import load_model
from negative_cache.workbench.training import driver
from negative_cache.workbench.training.config import RunConfig, RunError
from negative_cache.workbench.training.driver import run
from negative_cache.workbench.training.record import RunRecord

QUERIES = {f"q{key}": " ".join(text.split()[1:5]) for key, text in DOCUMENTS.items()}
KEYS = list(DOCUMENTS)
QRELS = {
    "train": {f"q{key}": [KEYS[at - 7]] for at, key in enumerate(KEYS)},  # wrong, so that the dev split gets worse
    "dev": {f"q{key}": [key] for key in KEYS},
    "test": {f"q{key}": [key] for key in KEYS[:40]},
}
DATA = RetrievalData("set", DOCUMENTS, QUERIES, QRELS)
EVAL_STEPS = 2


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("best")
    load_model("static", DOCUMENTS.values(), 0).save_pretrained(str(folder / "model"), create_model_card=False)
    return RunConfig(
        data="set", model=str(folder / "model"), loss="negative-cache", output=str(folder / "last"), batch_size=8,
        cache_size=64, max_steps=13, learning_rate=0.5, eval_steps=EVAL_STEPS, save_steps=3,
    )  # fmt: skip


def at(config: RunConfig, tmp_path: Path, **options: Any) -> RunConfig:
    return replace(config, output=str(tmp_path / "out"), load_best_model_at_end=True, **options)


def scores(record: RunRecord) -> dict[int, float]:
    return {row["step"]: row[key] for row in record.history for key in row if key == "eval_dev_cosine_mrr@10"}


def weights(folder: Path | str) -> torch.Tensor:
    (parameter,) = SentenceTransformer(str(folder)).parameters()
    return parameter.detach()


def test_the_best_model_is_kept_evaluated_and_saved(config: RunConfig, tmp_path: Path):
    last, best = run(config, DATA), run(at(config, tmp_path), DATA)
    assert last is not None
    assert best is not None
    found = scores(best)
    assert list(found) == [2, 4, 6, 8, 10, 12, 13]  # the last step, too
    assert (last.best_step, best.best_step) == (None, max(found, key=found.get))
    assert best.best_step == 2
    assert best.steps == 13
    model = SentenceTransformer(str(tmp_path / "out"))
    quality = evaluate(model, DATA, ("dev", "test"))
    assert quality["test"].metrics() == best.after
    assert quality["dev"].metrics()["MRR@10"] == pytest.approx(found[2])
    assert best.after["MRR@10"] > last.after["MRR@10"]
    assert not torch.equal(weights(tmp_path / "out"), weights(config.output))
    assert not (tmp_path / "out" / "best").exists()


def test_training_stops_after_evaluations_without_a_better_one(config: RunConfig, tmp_path: Path):
    record = run(at(config, tmp_path, early_stopping_patience=2), DATA)
    assert record is not None
    assert (record.best_step, record.steps, list(scores(record))) == (2, 6, [2, 4, 6])


@pytest.mark.parametrize(("values", "kept"), [([1, 3, 2, 3, 1, 0, 1], 4), ([1, 2, 3, 4, 5, 6, 7], 13)])
@pytest.mark.parametrize("stop", [5, 8, 12])
def test_an_interrupted_run_keeps_the_same_model(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[int], kept: int, stop: int
):
    class Scripted(SentenceEvaluator):
        def __call__(self, model: Any, *args: Any, steps: int, **kwargs: Any) -> dict[str, float]:
            return {"dev_cosine_mrr@10": float(values[(steps - 1) // EVAL_STEPS])}

    monkeypatch.setattr(driver, "make_evaluator", lambda *_: Scripted())
    whole = replace(at(config, tmp_path), output=str(tmp_path / "whole"))
    record = run(whole, DATA)
    assert record is not None
    assert record.best_step == kept

    def interrupt(step: int, steps: int, logs: dict[str, float]) -> None:
        if step == stop:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        run(at(config, tmp_path), DATA, on_step=interrupt)
    resumed = run(at(config, tmp_path), DATA, resume=True)
    assert resumed is not None
    assert resumed.resumed_from_step == stop // 3 * 3 - (3 if stop % 3 == 0 else 0)
    assert (resumed.best_step, scores(resumed)) == (kept, scores(record))
    assert torch.equal(weights(tmp_path / "out"), weights(tmp_path / "whole"))


def test_a_run_that_was_interrupted_after_it_stopped_does_not_train_on(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = at(config, tmp_path, early_stopping_patience=2)

    def stop(*_: Any) -> None:
        raise RuntimeError("enough")

    with monkeypatch.context() as patched:
        patched.setattr(driver._Run, "_finish", stop)
        with pytest.raises(RuntimeError, match="enough"):
            run(config, DATA)
    record = run(config, DATA, resume=True)
    assert record is not None
    assert (record.resumed_from_step, record.steps, record.best_step) == (6, 6, 2)


def test_options_of_the_best_model_that_lack_another_one_are_refused(config: RunConfig):
    with pytest.raises(RunError, match="--load-best-model-at-end needs --eval-steps"):
        replace(config, load_best_model_at_end=True, eval_steps=None)
    with pytest.raises(RunError, match="--early-stopping-patience needs --load-best-model-at-end"):
        replace(config, early_stopping_patience=2)
    with pytest.raises(RunError, match="--early-stopping-patience is 0; it must be positive"):
        replace(config, load_best_model_at_end=True, early_stopping_patience=0)


def test_the_command_says_which_model_was_kept(beir: Path, tmp_path: Path):
    given = ["--data", beir, "--output", tmp_path / "out", "--batch-size", 8, "--max-steps", 6, "--cache-size", 64]
    ended = invoke("train", *given, "--eval-steps", 2, "--load-best-model-at-end", "--early-stopping-patience", 3)
    assert ended.exit_code == 0, ended.output
    step = json.loads((tmp_path / "out" / "run.json").read_text())["best_step"]
    assert f"The model is that of step {step}, the best on the dev split." in " ".join(ended.stdout.split())
