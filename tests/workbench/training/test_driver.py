"""Training runs through the command line, on small data."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from command_line import DOCUMENTS, invoke
from negative_cache.workbench.data import load_data
from negative_cache.workbench.models import load_model
from negative_cache.workbench.training import driver
from negative_cache.workbench.training.config import RunConfig

# What `NegativeCacheLoss.metrics` has without margins, under the tags of the contract where those differ.
CACHE_METRICS = (
    "interpretable_prediction_loss", "positive_probability", "cache_share", "fill", "staleness", "staleness_youngest",
    "staleness_oldest", "age", "effective_negatives", "near_duplicates", "gradient_norm_ratio",
    "documents_per_query", "in_batch_noise", "sampling_noise",
)  # fmt: skip


def test_train_evaluate_and_search_from_the_command_line(beir: Path, tmp_path: Path):
    output = tmp_path / "model"
    options = ["--cache-size", 64, "--batch-size", 8, "--epochs", 8, "--learning-rate", 0.05]
    options += ["--eval-steps", 20, "--num-samples", 2]
    result = invoke("train", "--data", beir, "--output", output, *options)
    assert result.exit_code == 0, result.output
    assert "after" in result.output
    record = json.loads((output / "run.json").read_text())
    assert record["configuration"]["loss"] == "negative-cache"
    assert record["after"]["num_documents"] == 80
    assert record["after"]["MRR@10"] >= record["before"]["MRR@10"]
    assert record["peak_memory_bytes"] > 0
    steps = [row["step"] for row in record["history"] if "loss" in row]
    assert len(steps) >= 30
    assert steps[-1] == record["steps"]
    assert any("dev_cosine_mrr@10" in key for row in record["history"] for key in row)
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    staleness = [event.value for event in events.Scalars("train/cache/staleness")]
    assert staleness[-1] > 0
    assert events.Scalars("train/cache/fill")[-1].value > 0.5
    logged = {key: value for row in record["history"] for key, value in row.items() if key.startswith("cache/")}
    assert {f"cache/{name}" for name in CACHE_METRICS} == set(logged)
    for name, last in logged.items():
        assert events.Scalars(f"train/{name}")[-1].value == pytest.approx(last, rel=1e-5), name
    assert record["documents_encoded"] > 8 * 61  # those of the batches, and re-encoded ones
    assert (record["dev"], record["curve"], record["failed"]) == (None, [], None)
    assert not list(tmp_path.glob("*.partial*"))
    card = (output / "README.md").read_text()
    assert "training samples" in card
    assert not [text for text in DOCUMENTS.values() if text in card]  # the data may be private

    trained = ["--model", output, "--data", beir]
    result = invoke("evaluate", *trained, "--split", "test", "--json")
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout)
    names = {"MRR@10", "nDCG@10", "AP@100", "R@1", "R@10", "R@100"}
    assert set(metrics) == {*names, "num_queries", "num_documents"}
    assert metrics["MRR@10"] == pytest.approx(record["after"]["MRR@10"], abs=1e-6)

    result = invoke("search", *trained, "-n", 2, DOCUMENTS["d5"])
    assert result.exit_code == 0, result.output
    assert "d5" in result.output
    assert SentenceTransformer(str(output)).encode("a text").shape == (256,)


def test_identical_ids_are_ignored_and_what_is_not_used_is_said_and_recorded(beir: Path, tmp_path: Path):
    queries = [json.loads(line) for line in (beir / "queries.jsonl").read_text().splitlines()]
    with (beir / "corpus.jsonl").open("a") as corpus:  # each query is a document, too
        corpus.writelines(json.dumps({**query, "url": "x"}) + "\n" for query in queries)
    with (beir / "qrels" / "test.tsv").open("a") as qrels:
        qrels.write("qd70\tnowhere\t1\n")
    output = tmp_path / "model"
    given = ["--data", beir, "--batch-size", 8, "--max-steps", 4, "--eval-steps", 4, "--ignore-identical-ids"]
    trained = invoke("train", *given, "--output", output, "--cache-size", 64)
    assert trained.exit_code == 0, trained.output
    notes = [
        f"{beir / 'corpus.jsonl'}: columns that are not used: 'url'.",
        "set: skipped judgements of documents that are not in the corpus: 1 (first: "
        f"{beir / 'qrels' / 'test.tsv'}, line 12).",
        "set: for 80 of 80 queries, the document with the same id is ignored.",
    ]
    record = json.loads((output / "run.json").read_text())
    assert record["data_notes"] == notes
    assert record["configuration"]["data_options"]["ignore_identical_ids"] is True
    for note in notes:
        assert trained.stderr.count(f"Note: {note}") == 1
    (dev,) = [row["eval_dev_cosine_mrr@10"] for row in record["history"] if "eval_dev_cosine_mrr@10" in row]

    def evaluate(*more: str) -> float:
        ended = invoke("evaluate", "--model", output, "--data", beir, "--json", "--quiet", *more)
        assert (ended.exit_code, ended.stderr) == (0, ""), ended.output
        return json.loads(ended.stdout)["MRR@10"]

    assert evaluate("--ignore-identical-ids") == pytest.approx(record["after"]["MRR@10"])
    assert evaluate("--ignore-identical-ids", "--split", "dev") == pytest.approx(dev)
    assert evaluate() < record["after"]["MRR@10"]  # a query's own text is always the first
    assert evaluate("--split", "dev") < dev


def test_seconds_exclude_evaluation(beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Slow(SentenceEvaluator):
        def __call__(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            time.sleep(2)
            return {}

    monkeypatch.setattr(driver, "make_evaluator", lambda *_: Slow())
    given = ["--data", beir, "--output", tmp_path / "model", "--batch-size", 8, "--cache-size", 64, "--max-steps", 4]
    assert invoke("train", *given, "--eval-steps", 3).exit_code == 0
    record = json.loads((tmp_path / "model" / "run.json").read_text())
    seconds = [row["seconds"] for row in record["history"] if "loss" in row]
    assert len(seconds) == 4
    assert max(later - earlier for earlier, later in pairwise([*seconds, record["seconds"]])) < 2


def test_options_of_the_cache_reach_the_run(beir: Path, tmp_path: Path):
    options = ["--data", beir, "--cache-size", 64, "--batch-size", 8, "--max-steps", 3]
    options += ["--embedding-dtype", "int8", "--no-use-lru"]
    result = invoke("train", "--output", tmp_path / "model", *options)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "model" / "run.json").read_text())
    assert record["configuration"]["embedding_dtype"] == "int8"
    assert record["configuration"]["use_lru"] is False


@pytest.mark.parametrize("loss", ["in-batch", "gradcache"])
def test_the_tiny_transformer_trains_with_the_other_losses(beir: Path, tmp_path: Path, loss: str):
    output = tmp_path / "model"
    options = ["--model", "tiny", "--loss", loss, "--max-steps", 2]
    result = invoke("train", "--data", beir, "--output", output, *options)
    assert result.exit_code == 0, result.output
    assert json.loads((output / "run.json").read_text())["steps"] == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--loss", "triplet"], "expected one of"),
        (["--loss", "inbatch"], "Did you mean in-batch?"),
        (["--batch-size", "0"], "must be positive"),
        (["--epochs", "nan"], "must be positive"),
        (["--scale", "-5"], "must be positive"),
        (["--seed", "-1"], "must be from 0"),
        (["--batch-size", "64", "--cache-size", "32"], "larger than --cache-size"),
        (["--data", "nowhere"], "is not a file"),
        (["--model", "no/such/model"], "Cannot load the model"),
        (["--model", "no-such/model"], "does not have it or cannot be reached"),
    ],
)
def test_invalid_options_give_one_message_and_write_nothing(beir: Path, tmp_path: Path, args: list[str], message: str):
    given = ["--data", str(beir), *args] if "--data" not in args else args
    result = invoke("train", "--output", tmp_path / "out", *given)
    assert result.exit_code == 2
    assert message in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


def test_an_existing_output_folder_is_not_touched(beir: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    result = invoke("train", "--data", beir, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "exists and is not empty" in result.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_an_empty_output_folder_is_used(beir: Path, tmp_path: Path, resume: list[str]):
    (tmp_path / "out").mkdir()
    given = ["--data", beir, "--output", tmp_path / "out", "--max-steps", 1, "--batch-size", 8, "--no-eval", *resume]
    assert invoke("train", *given).exit_code == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["steps"] == 1


@pytest.mark.parametrize("has_dev", [True, False])
def test_a_run_needs_no_test_split(beir: Path, tmp_path: Path, has_dev: bool):
    (beir / "qrels" / "test.tsv").unlink()
    if not has_dev:
        (beir / "qrels" / "dev.tsv").unlink()
    output = tmp_path / "model"
    given = ["--data", beir, "--output", output, "--batch-size", 8, "--cache-size", 64, "--max-steps", 4]
    trained = invoke("train", *given)
    assert trained.exit_code == 0, trained.output
    record = json.loads((output / "run.json").read_text())
    assert (record["before"], record["after"]) == (None, None)
    assert (record["dev"] is not None) == has_dev
    assert ("Dev split: 10 queries, 80 documents" in trained.stdout) == has_dev
    assert not (output / "queries.json").exists()
    assert SentenceTransformer(str(output)).encode("a text").shape == (256,)
    reported = invoke("report", output)
    assert reported.exit_code == 0, reported.output


def test_the_whole_corpus_is_in_the_cache_from_the_first_step(beir: Path, tmp_path: Path):
    given = ["--data", beir, "--fill-from-corpus", "--batch-size", 8, "--max-steps", 4, "--num-samples", 1]
    refused = invoke("train", "--output", tmp_path / "small", "--cache-size", 79, *given)
    assert refused.exit_code == 2
    assert "Set --cache-size 80." in " ".join(refused.stderr.split())
    assert not list(tmp_path.glob("small*"))
    hard = tmp_path / "hard.jsonl"
    records = {}
    for name, options in (("filled", given), ("empty", [option for option in given if option != "--fill-from-corpus"])):
        export = ["--export-negatives", hard] if name == "filled" else []
        ended = invoke("train", "--output", tmp_path / name, "--cache-size", 80, *options, *export)
        assert ended.exit_code == 0, ended.output
        records[name] = json.loads((tmp_path / name / "run.json").read_text())
    fills = {
        name: [row["cache/fill"] for row in found["history"] if "cache/fill" in row] for name, found in records.items()
    }
    assert set(fills["filled"]) == {1.0}
    assert len(hard.read_text().splitlines()) == records["filled"]["training_pairs"]
    assert "negative_5" in json.loads(hard.read_text().splitlines()[0])
    assert fills["empty"][0] < 0.2
    difference = records["filled"]["documents_encoded"] - records["empty"]["documents_encoded"]
    assert 80 <= difference <= 80 + 4 * 8  # an emptier cache gives at most as many documents per step


def test_the_metrics_of_each_query_are_written(beir: Path, tmp_path: Path):
    output = tmp_path / "model"
    given = ["--data", beir, "--output", output, "--batch-size", 8, "--cache-size", 64, "--max-steps", 4]
    assert invoke("train", *given).exit_code == 0
    record, queries = (json.loads((output / name).read_text()) for name in ("run.json", "queries.json"))
    assert queries.pop("corpus")["num_documents"] == 80
    assert list(queries) == ["before", "after"]
    for when, values in queries.items():
        assert all(len(of_query) == 10 for of_query in values.values())
        means = {name: sum(of_query.values()) / 10 for name, of_query in values.items()}
        assert {name: record[when][name] for name in means} == pytest.approx(means)
        assert len(means) == 6


def test_the_folder_of_a_run_is_a_model_that_keeps_its_prompts_and_similarity(beir: Path, tmp_path: Path):
    """Programs that load a model by its path, such as mteb, need nothing else."""
    start = load_model("static", DOCUMENTS.values(), seed=0)
    start.prompts, start.similarity_fn_name = {"query": "query: ", "document": "passage: "}, "dot"
    start.save_pretrained(str(tmp_path / "start"))
    given = ["--data", beir, "--batch-size", 8, "--cache-size", 64, "--max-steps", 4]
    trained = invoke("train", "--model", tmp_path / "start", "--output", tmp_path / "model", *given)
    assert trained.exit_code == 0, trained.output
    model = SentenceTransformer(str(tmp_path / "model"))
    assert (model.prompts, model.similarity_fn_name) == (start.prompts, "dot")


@pytest.mark.parametrize("has_test", [True, False])
def test_without_evaluation_no_corpus_is_encoded(beir: Path, tmp_path: Path, has_test: bool):
    if not has_test:
        (beir / "qrels" / "test.tsv").unlink()
    output = tmp_path / "model"
    given = ["--data", beir, "--output", output, "--batch-size", 8, "--cache-size", 64, "--max-steps", 4, "--no-eval"]
    trained = invoke("train", *given)
    assert trained.exit_code == 0, trained.output
    assert "split" not in trained.stdout
    record = json.loads((output / "run.json").read_text())
    assert (record["before"], record["after"], record["dev"], record["steps"]) == (None, None, None, 4)
    assert not (output / "queries.json").exists()
    assert json.loads((output / "samples.json").read_text())["after"] == []
    assert invoke("report", output).exit_code == 0
    assert SentenceTransformer(str(output)).encode("a text").shape == (256,)


def test_the_last_reported_loss_is_that_of_the_last_step(beir: Path, tmp_path: Path):
    config = RunConfig(str(beir), "static", "in-batch", str(tmp_path / "out"), batch_size=8, max_steps=45)
    reported: list[tuple[int, float | None]] = []
    record = driver.run(
        config,
        load_data(str(beir)),
        driver.RunOptions(measure_before=False, measure_after=False, keep_model=False),
        on_step=lambda step, _, logs: reported.append((step, logs.get("loss"))),
    )
    logged = [(row["step"], row["loss"]) for row in record.history if "loss" in row]
    assert reported[-1] == logged[-1]
    assert reported[-1][0] == 45
    assert {step for step, _ in reported} == set(range(1, 46))
