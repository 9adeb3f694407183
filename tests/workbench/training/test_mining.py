"""Mined negatives: which documents they are, that their costs count, and that a resumed run keeps them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import invoke, write_beir
from negative_cache.workbench.compare.comparison import Comparison
from negative_cache.workbench.data import RetrievalData
from negative_cache.workbench.models import load_model
from negative_cache.workbench.training import mining, processes
from negative_cache.workbench.training.config import RunConfig, RunError
from negative_cache.workbench.training.driver import RunOptions, run
from negative_cache.workbench.training.mining import mine, mining_start
from negative_cache.workbench.training.record import RunRecord

WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "nrst"]


@pytest.fixture(scope="module")
def data() -> RetrievalData:
    """Queries with one to three relevant documents, equal texts under several ids, and a query that is a document."""
    rng = random.Random(0)
    corpus = {f"d{n}": " ".join(rng.sample(WORDS, 6)) for n in range(60)}
    corpus |= {f"copy{n}": corpus[f"d{n}"] for n in range(10)}
    queries, train = {}, {}
    for number in range(24):
        relevant = [f"d{number}", *(f"d{30 + number + other}" for other in range(number % 3))]
        queries[f"q{number}"] = " ".join(rng.sample(" ".join(corpus[key] for key in relevant).split(), 3))
        train[f"q{number}"] = relevant
    corpus["q23"] = queries["q23"]
    queries["other"], train["other"] = queries["q5"], ["d29"]  # an equal query with another document
    return RetrievalData("set", corpus, queries, {"train": train, "test": train}).ignoring_identical_ids()


@pytest.fixture(scope="module")
def path(data: RetrievalData, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("mining") / "model")
    load_model("static", data.training_texts(), 0).save_pretrained(folder)
    return folder


def configuration(model: str, output: object = "o", **options: Any) -> RunConfig:
    given = {"batch_size": 8, "epochs": 2, "learning_rate": 0.05, "save_steps": None, **options}
    return RunConfig(data="set", model=model, loss="mined", output=str(output), **given)


def by_brute_force(model: Any, data: RetrievalData, config: RunConfig) -> dict[str, list[str]]:
    """The texts of the negatives of each query. A document is one if no query of the same text has it as a positive,
    and its similarity is at most 1 - margin times that of the least similar positive."""
    margin = 0.05 if config.relative_margin is None else config.relative_margin
    texts = list(dict.fromkeys(data.corpus.values()))
    documents = dict(zip(texts, np.asarray(model.encode(texts, normalize_embeddings=True), np.float64), strict=True))
    found = {}
    for query in data.qrels["train"]:
        equal = [key for key in data.qrels["train"] if data.queries[key] == data.queries[query]]
        known = {data.corpus[d] for key in equal for d in data.never_negative(key, data.qrels["train"][key])}
        anchor = np.asarray(model.encode(data.queries[query], normalize_embeddings=True), np.float64)
        scores = {text: float(anchor @ documents[text]) for text in texts}
        lowest = min(scores[text] for text in known)
        ranked = sorted(set(texts) - known, key=lambda text: -scores[text])[: config.range_max]
        left = [text for text in ranked if scores[text] <= lowest - abs(lowest) * margin]
        found[query] = left[config.range_min :][: config.num_negatives]
    return found


@pytest.mark.parametrize(
    "options", [{}, {"num_negatives": 4}, {"num_negatives": 3, "range_min": 2}, {"relative_margin": 0.4}]
)
def test_mined_negatives_are_those_of_a_brute_force_search(data: RetrievalData, path: str, options: dict):
    model = load_model(path, (), 0)
    config = configuration(path, range_max=60, **options)
    done: list[tuple[int, int]] = []
    negatives, count = mine(model, data, config, lambda *at: done.append(at))
    texts = {query: [data.corpus[document] for document in found] for query, found in negatives.items()}
    assert texts == by_brute_force(model, data, config)
    assert any(texts.values())
    assert count == len(set(data.corpus.values())) + len(set(data.queries.values())) == 61 + 24
    assert done[-1] == (61, 61)


def test_a_random_choice_is_within_the_range_and_depends_only_on_the_seed(data: RetrievalData, path: str):
    model, state = load_model(path, (), 0), random.getstate()
    config = configuration(path, num_negatives=2, range_max=8, sampling_strategy="random")
    first, again, other = (mine(model, data, replace(config, seed=seed))[0] for seed in (0, 0, 1))
    widest = mine(model, data, configuration(path, num_negatives=8, range_max=8))[0]
    assert first == again != other
    assert random.getstate() == state
    assert all(set(found) <= set(widest[query]) for query, found in first.items())


def test_the_corpus_is_searched_block_by_block(data: RetrievalData, path: str, monkeypatch: pytest.MonkeyPatch):
    model, config = load_model(path, (), 0), configuration(path, num_negatives=3)
    whole = mine(model, data, config)
    monkeypatch.setattr(mining, "SCORES_PER_BLOCK", 150)  # two queries
    assert mine(model, data, config) == whole


def test_training_uses_the_mined_negatives_and_counts_their_costs(data: RetrievalData, path: str, tmp_path: Path):
    pairs, texts = 49, 61 + 24
    record = run(configuration(path, tmp_path / "out", num_negatives=2), data, RunOptions(curve=(0.5,)))
    assert record is not None
    negatives, _ = mine(load_model(path, (), 0), data, configuration(path, num_negatives=2))
    few = sum(len(data.qrels["train"][query]) for query, found in negatives.items() if len(found) < 2)
    (round_,) = record.mining
    assert (round_["step"], round_["texts_encoded"], round_["pairs_with_fewer"]) == (0, texts, few)
    assert record.training_pairs == pairs
    assert 2 * pairs + texts < record.documents_encoded <= 2 * 3 * pairs + texts
    assert record.curve[0]["documents_encoded"] > texts
    assert record.seconds > round_["seconds"] > 0
    note = f"set: mining after step 0 found fewer negatives than --num-negatives, 2, for {few} of {pairs} pairs. They"
    assert [found.startswith(note) for found in record.data_notes[len(data.notes) :]] == [True] * (few > 0)
    assert not list((tmp_path / "out").glob("mined-*"))


def test_given_negatives_are_used_with_the_mined_ones(data: RetrievalData, path: str, tmp_path: Path):
    config = configuration(path)
    rounds = mining.Mining(config, replace(data, negatives={"q0": ["d50", "d51"], "q1": ["d52"]}), tmp_path, None)
    mined = rounds.mine(load_model(path, (), 0), 0).negatives
    together = rounds.data_with_negatives(0).negatives
    assert together["q0"] == list(dict.fromkeys(["d50", "d51", *mined["q0"]]))
    assert together["q3"] == mined["q3"]
    assert rounds.data_with_negatives(0).training_set().num_rows == 49


def test_rounds_are_mined_evenly_and_models_from_scratch_begin_without():
    static = configuration("static")
    assert mining_start(static) == 0.5
    assert mining_start(replace(static, mining_rounds=2)) == pytest.approx(1 / 3)
    assert mining_start(replace(static, mining_start=0.0)) == 0
    assert mining_start(configuration("some/model")) == 0

    def steps(config: RunConfig) -> tuple[bool, set[int]]:
        rounds = mining.Mining(config, None, Path(), None)  # type: ignore[arg-type]
        return rounds.begins_before_training(), rounds.steps(30)

    assert steps(static) == (False, {15})
    assert steps(replace(static, mining_rounds=2)) == (False, {10, 20})
    assert steps(configuration("some/model", mining_rounds=3)) == (True, {10, 20})
    assert steps(replace(static, loss="in-batch")) == (False, set())
    comparison = Comparison("d", "static", ("mined", "mined:mining_rounds=3", "in-batch"), "out")
    starts = [comparison.run_config(spec, 0.1, 0).mining_start for spec in comparison.losses]
    assert starts == [0.5, 0.25, None]  # for the untrained model, which has a path


def final(folder: Path) -> tuple[bytes, list[float], int]:
    record = RunRecord.read(folder)
    losses = [entry["loss"] for entry in record.history if "loss" in entry]
    return (folder / "model.safetensors").read_bytes(), losses, record.documents_encoded


def test_mining_again_in_training_equals_itself_when_interrupted(
    data: RetrievalData, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = {"epochs": 5, "mining_rounds": 2, "save_steps": 4}
    whole = run(configuration(path, tmp_path / "whole", **options), data)
    assert whole is not None
    assert [found["step"] for found in whole.mining] == [0, 18]
    assert whole.steps == 35
    assert whole.documents_encoded > 5 * 49 + 2 * (61 + 24)
    assert [entry["step"] for entry in whole.history if "loss" in entry] == list(range(1, 36))

    num_rounds, mine_once = 0, mining.mine

    def count(*args: Any) -> Any:
        nonlocal num_rounds
        num_rounds += 1
        return mine_once(*args)

    monkeypatch.setattr(mining, "mine", count)
    for after in (6, 18, 20, 26):

        def stop(step: int, steps: int, logs: dict[str, float], after: int = after) -> None:
            if step == after:
                raise RuntimeError("enough")

        with pytest.raises(RuntimeError, match="enough"):
            run(configuration(path, tmp_path / "parts", **options), data, resume=True, on_step=stop)
    resumed = run(configuration(path, tmp_path / "parts", **options), data, resume=True)
    assert resumed is not None
    assert num_rounds == 2
    assert resumed.mining[0]["texts_encoded"] == 85
    assert final(tmp_path / "parts") == final(tmp_path / "whole")


def test_the_second_half_of_a_model_from_scratch_has_negatives(tmp_path: Path):
    write_beir(tmp_path / "set")
    given = ["--data", tmp_path / "set", "--batch-size", 8, "--epochs", 2, "--loss", "mined", "--num-negatives", 2]
    ended = invoke("train", *given, "--negatives", "ignore", "--output", tmp_path / "out", "--json")
    assert ended.exit_code == 0, ended.output
    record = json.loads(ended.stdout)
    assert [found["step"] for found in record["mining"]] == [8]
    epoch, texts = 61, 80 + 60
    assert epoch + texts < record["documents_encoded"] - epoch <= 3 * epoch + texts
    assert "MRR@10" in record["after"]


def test_too_few_steps_for_a_round_are_noted(data: RetrievalData, tmp_path: Path):
    record = run(replace(configuration("static", tmp_path / "out"), max_steps=1), data)
    assert record is not None
    assert record.mining == []
    assert record.data_notes[-1] == "Negatives were mined 0 times instead of 1: training has too few steps."


def test_several_ranks_are_refused(data: RetrievalData, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(RunError, match="--loss mined runs in one process only"):
        run(configuration(path, tmp_path / "out"), data)
