"""What `train` and `evaluate` say before they start is what they do."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from command_line import DOCUMENTS, invoke
from negative_cache.workbench.cli import plan
from negative_cache.workbench.cli.plan import advice_on_data, plan_of_training
from negative_cache.workbench.data import DataOptions, load_data
from negative_cache.workbench.data.advice import shared_positives
from negative_cache.workbench.evaluation import encoding, searching
from negative_cache.workbench.training.config import RunConfig, num_steps


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The number of documents of each call that encodes a corpus; the quality before training is measured, too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    numbers: list[int] = []
    documents = encoding.Encoder.documents
    monkeypatch.setattr(
        encoding.Encoder,
        "documents",
        lambda self, texts, *args, **options: numbers.append(len(texts)) or documents(self, texts, *args, **options),
    )
    assert searching.Encoder is encoding.Encoder
    return numbers


def train(beir: Path, *options: object) -> str:
    """What training says."""
    output = beir.parent / "out"
    ended = invoke("train", "--data", beir, "--output", output, "--batch-size", 8, "--cache-size", 64, *options)
    assert ended.exit_code == 0, ended.output
    return ended.stderr


@pytest.mark.parametrize("options", [["--epochs", 2], ["--epochs", 3, "--eval-steps", 7], ["--eval-documents", 20]])
def test_the_plan_of_training_has_the_steps_and_documents_of_the_run(
    beir: Path, options: list[object], encoded: list[int]
):
    said = train(beir, *options)
    steps, number = re.search(
        r"Training takes (\d+) steps of 8 queries\. Documents to encode besides: (\d+) for evaluation", said
    ).groups()
    record = json.loads((beir.parent / "out" / "run.json").read_text())
    assert int(steps) == record["steps"]
    of_evaluator = sum(1 for entry in record["history"] if any("eval" in key for key in entry))
    assert int(number) == sum(encoded) + of_evaluator * len(DOCUMENTS)
    is_long = int(number) > 8 * int(steps)
    assert ("--no-eval leaves" in said) == is_long
    assert ("--eval-documents N" in said) == (is_long and "--eval-documents" not in options)


def test_the_plan_names_mining_and_the_cache_and_no_evaluation_that_is_left_out(beir: Path):
    data = load_data(str(beir))
    mined = RunConfig(str(beir), "static", "mined", "out", mining_rounds=2, batch_size=8, epochs=1)
    filled = RunConfig(str(beir), "static", "negative-cache", "out", fill_from_corpus=True, max_steps=3)
    assert plan_of_training(mined, data, measures=False) == (
        "Training takes 8 steps of 8 queries. Documents to encode besides: 160 to mine negatives."
    )
    assert plan_of_training(filled, data, measures=True).startswith(
        "Training takes 3 steps of 61 queries. Documents to encode besides: 160 for evaluation, 80 to fill the cache."
    )
    bare = RunConfig(str(beir), "static", "in-batch", "out", max_steps=3)
    assert plan_of_training(bare, data, measures=False) == "Training takes 3 steps of 61 queries."


def test_the_plan_names_only_options_that_shorten_it_further(beir: Path):
    config = RunConfig(str(beir), "static", "in-batch", "out", max_steps=1, batch_size=8, eval_steps=1)
    sampled = replace(config, data_options=DataOptions(eval_documents=20))
    said = {
        (one.data_options.eval_documents, measures): plan_of_training(
            one, load_data(str(beir), one.data_options), measures
        ).partition(" for evaluation. ")[2]
        for one in (config, sampled)
        for measures in (True, False)
    }
    assert said == {
        (None, True): "--eval-documents N makes the evaluation shorter, --no-eval leaves it out.",
        (None, False): "--eval-documents N makes the evaluation shorter.",
        (20, True): "--no-eval leaves the evaluation out.",
        (20, False): "",
    }


def test_ranks_share_the_queries_of_a_step():
    config = RunConfig("data", "static", "in-batch", "out", batch_size=8, epochs=2)
    assert [num_steps(config, 100, ranks) for ranks in (1, 2, 4, 100)] == [26, 12, 6, 2]


def test_evaluate_says_how_many_texts_it_encodes(beir: Path):
    train(beir, "--max-steps", 1)
    ended = invoke("evaluate", "--data", beir, "--model", beir.parent / "out")
    assert "Texts to encode: 80 documents and 10 queries." in ended.stderr
    assert "Texts" not in invoke("evaluate", "--data", beir, "--model", beir.parent / "out", "--quiet").output


def test_on_a_gpu_the_plan_advises_one_document_per_query(beir: Path, monkeypatch: pytest.MonkeyPatch):
    data, config = load_data(str(beir)), RunConfig(str(beir), "static", "negative-cache", "out", max_steps=3)
    assert "--num-samples" not in plan_of_training(config, data, measures=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "--num-samples 1" in plan_of_training(config, data, measures=False)
    in_batch = RunConfig(str(beir), "static", "in-batch", "out", max_steps=3)
    for other in (in_batch, replace(config, num_samples=2)):
        assert "--num-samples" not in plan_of_training(other, data, measures=False)


@pytest.mark.parametrize("model", ["static", "tiny", "static:all-MiniLM-L6-v2"])
def test_random_weights_and_few_pairs_for_them_are_named(beir: Path, model: str, monkeypatch: pytest.MonkeyPatch):
    data, config = load_data(str(beir)), RunConfig(str(beir), model, "in-batch", "out")
    monkeypatch.setattr(plan, "TOO_FEW_PAIRS", data.num_pairs("train"))
    found = advice_on_data(config, data, measures=False)
    assert len(found) == (":" not in model)
    few = f", for which {data.num_pairs('train')} pairs are few"
    assert all(line.startswith(f"--model {model} begins with random weights{few}. A pretrained") for line in found)
    monkeypatch.setattr(plan, "FEW_PAIRS", data.num_pairs("train"))
    assert advice_on_data(config, data, measures=False) == [line.replace(few, "") for line in found]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("number", [4, 40])
def test_a_positive_of_many_queries_is_quoted(number: int, split: str, tmp_path: Path):
    rows = [{"query": f"question {n}", "positive": f"answer {n}"} for n in range(200)]
    rows += [{"query": f"another {n}", "positive": "The standard answer."} for n in range(number)]
    others = [{"query": f"other {n}", "positive": f"other answer {n}"} for n in range(200)]
    for name, content in ((split, rows), ({"train": "test", "test": "train"}[split], others)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    data = load_data(str(tmp_path))
    lines = advice_on_data(RunConfig("d", "some/model", "in-batch", "out"), data, measures=True)
    found = [line for line in lines if f"{split} queries, {number}, have the same positive: 'The standard answ" in line]
    assert len(found) == (number == 40)
    assert found == shared_positives(data, ["train", "test"])
    assert all(("Metrics of test depend on it." in line) == (split == "test") for line in found)


@pytest.mark.parametrize("split", ["test", "dev"])
def test_few_queries_are_named_where_they_are_measured(split: str, beir: Path, monkeypatch: pytest.MonkeyPatch):
    if split == "dev":
        (beir / "qrels" / "test.tsv").unlink()
    data, config = load_data(str(beir)), RunConfig(str(beir), "some/model", "in-batch", "out")
    number = len(data.judged(split))
    few, pairs = f"{number} {split} queries are few: the result says little", data.num_pairs("train")
    said = advice_on_data(config, data, measures=True)
    assert [few in line for line in said] == [False, True]
    assert said[0].startswith(f"Warning: only {pairs} training pairs: a gain is not to be expected")
    assert advice_on_data(config, data, measures=False) == said[:1]
    monkeypatch.setattr(plan, "FEW_TEST_QUERIES", number)
    monkeypatch.setattr(plan, "TOO_FEW_PAIRS", pairs)
    assert advice_on_data(config, data, measures=True) == []
