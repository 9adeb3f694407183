"""What a comparison says it will cost, against what its runs cost."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from command_line import invoke
from negative_cache.workbench.compare.comparison import Comparison
from negative_cache.workbench.compare.estimate import Estimate, Predictor, RunCost, TimeLeft, duration
from negative_cache.workbench.compare.probe import Costs, TrainingCost, note_on_other_programs
from negative_cache.workbench.data import load_data
from negative_cache.workbench.training.config import num_steps

NUM_ROWS = 120


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    words = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in "nrst"]
    rows = [rng.sample(words, 12) for _ in range(NUM_ROWS)]
    lines = [json.dumps({"query": " ".join(row[:2]), "positive": " ".join(row)}) for row in rows]
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("\n".join(lines))
    return path


LOSSES = (
    "in-batch",
    "in-batch:epochs=3",
    "gradcache",
    "memory-bank",
    "mined:num_negatives=2",
    "negative-cache:num_samples=1",
)
COSTS = Costs(
    start=2.0, tokens=0.001, document=0.01, query=0.005, score=1e-5, judgement=0.1,
    training={spec: TrainingCost(0.5, 1.0, 1.0) for spec in LOSSES},
)  # fmt: skip


def comparison_of(data: Path, output: Path, **options: object) -> Comparison:
    given = {"batch_size": 8, "epochs": 2, "cache_size": 64, "seeds": 1, "gradcache_factor": 2, **options}
    return Comparison(str(data), "static", LOSSES, str(output), learning_rates=(0.05,), **given)


def given_to(comparison: Comparison, *losses: str) -> list[str]:
    options = ["--data", comparison.data, "--losses", ",".join(losses or comparison.losses), "--learning-rates", "0.05"]
    options += ["--output", comparison.output, "--batch-size", "8", "--epochs", "2", "--cache-size", "64"]
    return ["compare", *options, "--gradcache-factor", "2"]


def test_the_steps_and_documents_are_those_of_the_runs(data: Path, tmp_path: Path):
    comparison = comparison_of(data, tmp_path / "out")
    ended = invoke(*given_to(comparison), "--seeds", "1", "--json")
    assert ended.exit_code == 0, ended.output
    result = json.loads(ended.stdout)
    said = " ".join(ended.stderr.split())
    runs = {spec: result["losses"][spec]["runs"][0] for spec in LOSSES}
    for spec, run in runs.items():
        assert num_steps(comparison.config(spec), result["data"]["pairs"]) == run["steps"]
        assert f"{spec} {run['steps']}" in said
    assert "6 training runs. Steps of a run: in-batch" in said
    (found,) = [part.split(".")[0] for part in said.split("Documents encoded in training: ")[1:]]
    assert int(found.replace(",", "")) == pytest.approx(
        sum(run["documents_encoded"] for run in runs.values()), rel=0.05
    )
    assert "for evaluation. It is extrapolated from a few steps and texts on this machine." in said
    (shorter,) = [part.split(".")[0] for part in said.split("To make it shorter: ")[1:]]
    assert shorter.removeprefix("--eval-documents, ") == "--max-train-pairs"  # one seed and rate; a loss has own epochs

    again = invoke(*given_to(comparison, *LOSSES, "in-batch:scale=10"), "--seeds", "2")
    assert again.exit_code == 0, again.output
    assert "8 training runs." in " ".join(again.stderr.split())  # the second seed, and both of the new loss
    done = invoke(*given_to(comparison, *LOSSES, "in-batch:scale=10"), "--seeds", "2")
    assert "training runs" not in done.output


def test_nothing_is_estimated_without_a_reader_or_without_training(data: Path, tmp_path: Path):
    quiet = invoke(*given_to(comparison_of(data, tmp_path / "quiet"), "in-batch"), "--seeds", "1", "--quiet")
    assert quiet.exit_code == 0, quiet.output
    assert quiet.output == ""
    ended = invoke(*given_to(comparison_of(data, tmp_path / "none"), "bm25,zero-shot"), "--seeds", "1")
    assert ended.exit_code == 0, ended.output
    assert "Estimated" not in ended.output


def test_a_comparison_goes_on_if_its_time_cannot_be_estimated(data: Path, tmp_path: Path):
    comparison = comparison_of(data, tmp_path / "out")
    options = [option.replace("0.05", "1e38") for option in given_to(comparison, "negative-cache")]
    ended = invoke(*options, "--seeds", "1")
    assert ended.exit_code == 1
    said = " ".join(ended.stderr.split())
    assert "The time cannot be estimated. The run estimate failed: Training failed after step" in said
    assert "negative-cache, rate 1e+38, seed 0: failed" in said


def test_the_time_of_a_run_is_that_of_its_queries_steps_and_evaluations(data: Path, tmp_path: Path):
    comparison = comparison_of(data, tmp_path / "out")
    loaded = load_data(str(data)).with_dev()
    pairs, corpus = len(loaded.judged("train")), NUM_ROWS
    dev, test = len(loaded.judged("dev")), len(loaded.judged("test"))
    predictor = Predictor(comparison, loaded, COSTS)
    steps = 2 * -(-pairs // 8)
    of_test = corpus * 0.01 + test * (0.005 + 0.1 + corpus * 1e-5)
    of_dev = corpus * 0.01 + dev * (0.005 + 0.1 + corpus * 1e-5)
    start = 2 + 0.001 * 2 * corpus
    plain = predictor.run("in-batch", has_curve=False)
    assert (plain.steps, plain.documents, plain.training) == (steps, 2 * pairs, pytest.approx(pairs + steps))
    assert plain.evaluation == pytest.approx(start + of_dev + of_test - corpus * 0.01)  # the corpus is encoded once
    assert predictor.run("in-batch", has_curve=True).evaluation == pytest.approx(plain.evaluation + 5 * of_test)
    mined = predictor.run("mined:num_negatives=2", has_curve=False)
    assert mined.training == pytest.approx(plain.training + corpus * 0.01 + pairs * 0.005)
    assert mined.documents == plain.documents + corpus + pairs
    assert predictor.zero_shot().seconds == pytest.approx(2 + of_test)

    few = replace(comparison, losses=LOSSES[:1], max_steps=3, gradient_accumulation_steps=2, eval_steps=1)
    short = Predictor(few, loaded, COSTS).run("in-batch", has_curve=False)
    assert (short.steps, short.documents, short.training) == (3, 48, pytest.approx(24 + 3))
    assert short.evaluation == pytest.approx(plain.evaluation + 3 * of_dev)


def test_the_estimate_says_how_many_runs_and_what_shortens_them():
    comparison = Comparison("d", "static", ("in-batch", "gradcache"), "o", seeds=2, early_stopping_patience=3,
                            eval_steps=1, load_best_model_at_end=True)  # fmt: skip
    cost = RunCost(1200, 1000.0, 60.0, 20.0)
    runs = {spec: [replace(cost, steps=steps)] * 4 for spec, steps in (("in-batch", 1200), ("gradcache", 75))}
    estimate = Estimate(comparison, runs, {"in-batch": [cost] * 2})
    first, second, third = estimate.lines()
    assert first == (
        "8 training runs, and up to 2 more if the best learning rates are the lowest or highest ones. Steps of a run: "
        "in-batch 1,200, gradcache 75. Documents encoded in training: 8,000."
    )
    assert second.startswith("Estimated time: 11 min, 25 % of it for evaluation; up to 13 min")
    assert "without early stopping" in second
    assert third == "To make it shorter: --seeds 1, one rate as --learning-rates, --max-train-pairs, --max-steps."
    assert estimate.seconds_per_run() == {"in-batch": 80, "gradcache": 80}
    slow = replace(cost, evaluation=90.0)
    assert "--learning-rates, --eval-documents, --max" in Estimate(comparison, {"in-batch": [slow]}, {}).lines()[2]


def test_the_time_that_is_left_is_that_of_the_runs_that_have_ended():
    left = TimeLeft({"a": 10.0, "b": 20.0})
    assert left.seconds({"a": 2, "b": 1, "bm25": 1}) == 40
    left.add("a", 30.0)
    assert left.seconds({"a": 1, "b": 1}) == 30 + 60  # three times as slow as predicted
    left.add("b", 10.0)
    assert left.seconds({"a": 0, "b": 3}) == 30
    assert TimeLeft({}).seconds({"a": 1}) is None
    assert TimeLeft({}).seconds({"bm25": 1}) == 0


def test_durations_are_in_words():
    assert [duration(seconds) for seconds in (0.2, 61, 100, 5500)] == ["1 s", "61 s", "2 min", "1.5 h"]


def test_other_programs_on_the_processors_are_named_if_they_take_much_of_them():
    assert note_on_other_programs(0.97) is None
    assert note_on_other_programs(0.48) == (
        "Other programs use the processors: this one gets 48 % of their time. Without them, the comparison takes a "
        "fraction of the estimate."
    )
