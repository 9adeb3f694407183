"""`--eval-documents`: all commands that evaluate search the same sample of the corpus."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from command_line import DOCUMENTS, invoke, write_beir
from negative_cache.workbench.data import load_data
from negative_cache.workbench.evaluation import DEFAULT_MEASURES, judge_split, parse_measures
from negative_cache.workbench.evaluation.bm25 import bm25_run

OPTIONS = ("--cache-size", 32, "--batch-size", 8, "--max-steps", 6, "--model", "static", "--report-to", "none")


def run(*args: object) -> Any:
    ended = invoke(*args)
    assert ended.exit_code == 0, ended.output
    return ended


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data in set, a model that was trained with it in model, and in sampled what its evaluations search."""
    folder = tmp_path_factory.mktemp("eval-documents")
    write_beir(folder / "set")
    queries = [{"_id": f"q{key}", "text": " ".join(text.split()[3:5])} for key, text in DOCUMENTS.items()]
    (folder / "set" / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    for split, judged in (("dev", list(DOCUMENTS)[60:70]), ("test", list(DOCUMENTS)[70:])):
        others = sorted(set(DOCUMENTS) - set(judged), key=lambda key: hashlib.sha256(key.encode()).digest()[:8])
        rows = [{"_id": key, "title": "A title", "text": DOCUMENTS[key]} for key in (*judged, *others[:15])]
        sample = folder / "sampled" / split
        (sample / "qrels").mkdir(parents=True)
        (sample / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (sample / "queries.jsonl").write_bytes((folder / "set" / "queries.jsonl").read_bytes())
        (sample / "qrels" / "test.tsv").write_bytes((folder / "set" / "qrels" / f"{split}.tsv").read_bytes())
    options = [*OPTIONS, "--eval-documents", 25, "--eval-steps", 6, "--fill-from-corpus", "--cache-size", 80]
    run("train", "--data", folder / "set", "--output", folder / "model", *options)
    return folder


def test_train_and_evaluate_measure_what_is_measured_on_a_corpus_of_the_sample_alone(place: Path):
    record = json.loads((place / "model" / "run.json").read_text())
    evaluated = ["evaluate", "--model", place / "model", "--json"]
    alone = json.loads(run(*evaluated, "--data", place / "sampled" / "test").stdout)
    assert record["after"] == alone
    assert alone["num_documents"] == 25
    same = run(*evaluated, "--data", place / "set", "--eval-documents", 25)
    assert json.loads(same.stdout) == alone
    assert "do not compare" not in same.stderr
    other = run(*evaluated, "--data", place / "set")
    assert "with --eval-documents 25, and this is with all documents: do not compare the two" in other.stderr
    whole = json.loads(other.stdout)
    assert whole["num_documents"] == 80
    assert whole["MRR@10"] < alone["MRR@10"]
    assert record["before"]["num_documents"] == 25
    samples = json.loads((place / "model" / "samples.json").read_text())
    searched = {json.loads(line)["_id"] for line in (place / "sampled" / "test" / "corpus.jsonl").open()}
    assert {
        hit["document"] for when in ("before", "after") for row in samples[when] for hit in row["found"]
    } <= searched
    assert any("and others up to 25 of the 80," in note for note in record["data_notes"])


def test_the_dev_split_is_searched_in_its_own_sample_during_training(place: Path):
    history = json.loads((place / "model" / "run.json").read_text())["history"]
    (logged,) = [row for row in history if any(key.startswith("eval_dev_") for key in row)]
    evaluated = ["evaluate", "--model", place / "model", "--json", "--metrics", "MRR@10 R@10"]
    alone = json.loads(run(*evaluated, "--data", place / "sampled" / "dev").stdout)
    own = json.loads(run(*evaluated, "--data", place / "set", "--split", "dev", "--eval-documents", 25).stdout)
    assert own == alone
    assert logged["eval_dev_cosine_mrr@10"] == pytest.approx(alone["MRR@10"])
    assert logged["eval_dev_cosine_recall@10"] == pytest.approx(alone["R@10"])


def test_values_on_a_sample_and_on_all_documents_are_not_compared(place: Path, tmp_path: Path):
    for name, options in (("whole", ()), ("sample", ("--eval-documents", 25)), ("other", ("--eval-documents", 26))):
        run("evaluate", "--model", place / "model", "--data", place / "set", "--per-query", tmp_path / name, *options)
    run("significance", place / "model", tmp_path / "sample")
    for name, size in (("whole", 80), ("other", 26)):
        ended = invoke("significance", place / "model", tmp_path / name)
        assert ended.exit_code == 2
        assert f"is of a corpus of 25 documents, {tmp_path / name} of another one of {size}" in ended.stderr


def test_the_run_of_a_search_in_all_documents_is_judged_on_the_sample(place: Path, tmp_path: Path):
    shared = ["--data", place / "set", "--json"]
    run("evaluate", "--model", place / "model", *shared, "--run-out", tmp_path / "whole.run")
    expected = json.loads(run("evaluate", "--model", place / "model", *shared, "--eval-documents", 25).stdout)
    ended = run("evaluate", "--run", tmp_path / "whole.run", *shared, "--eval-documents", 25)
    assert json.loads(ended.stdout) == expected
    assert "Documents of the run outside the sample: 55 of 80" in ended.stderr


def test_all_rows_of_a_file_are_searched_in_all_their_documents_with_a_note(place: Path):
    rows = [json.dumps({"query": f"query {key}", "positive": text}) for key, text in DOCUMENTS.items()]
    (place / "pairs.jsonl").write_text("\n".join(rows))
    ended = run(
        "evaluate", "--model", place / "model", "--data", place / "pairs.jsonl", "--eval-documents", 25, "--json"
    )
    assert json.loads(ended.stdout)["num_documents"] == 80
    assert "all splits together have 80 judged documents, more than --eval-documents 25. All of them" in ended.stderr


def test_a_run_is_not_continued_with_another_sample(place: Path):
    given = ["train", "--data", place / "set", "--output", place / "model", *OPTIONS, "--resume"]
    given += ["--eval-steps", 6, "--fill-from-corpus", "--cache-size", 80]
    run(*given, "--eval-documents", 25)
    ended = invoke(*given)
    assert ended.exit_code == 2
    assert "another configuration: --eval-documents was 25, is not given." in ended.stderr


def test_compare_searches_the_sample_with_models_and_bm25(place: Path, tmp_path: Path):
    losses = ["--losses", "bm25,zero-shot,in-batch", "--seeds", 1, "--learning-rates", 0.05, "--max-steps", 6]
    given = ["compare", "--output", tmp_path / "comparison", *losses, "--batch-size", 8]
    ended = run(*given, "--data", place / "set", "--eval-documents", 25)
    assert "and others up to 25 of the 80," in ended.stderr
    result = json.loads((tmp_path / "comparison" / "compare.json").read_text())
    assert result["data"]["documents"] == 25
    for loss in result["losses"].values():
        (run_folder,) = [tmp_path / "comparison" / "runs" / found["folder"] for found in loss["runs"]]
        assert json.loads((run_folder / "queries.json").read_text())["corpus"]["num_documents"] == 25
    (found,) = result["losses"]["in-batch"]["runs"]
    assert (found["dev"]["num_documents"], found["after"]["num_documents"]) == (25, 25)
    assert all(point["test"]["num_documents"] == 25 for point in result["losses"]["in-batch"]["curve"])
    alone = load_data(str(place / "sampled" / "test"))
    measures = parse_measures(DEFAULT_MEASURES)
    expected = judge_split(alone, "test", bm25_run(alone, "test", 100), measures)
    assert json.loads((run_folder.parent / "bm25" / "queries.json").read_text())["after"] == expected.per_query
    ended = invoke(*given, "--data", place / "set")
    assert ended.exit_code == 2
    assert "another comparison: --eval-documents was 25, is not given." in ended.stderr
