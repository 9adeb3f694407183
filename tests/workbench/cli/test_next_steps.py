"""The commands that a command names at its end: they run as they stand, on stderr only, and not with --quiet."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result

from command_line import invoke
from negative_cache.workbench.cli import next_steps
from negative_cache.workbench.data import load_data
from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.training.config import RunConfig
from negative_cache.workbench.training.record import RunRecord
from support import random_pairs


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with pairs in columns of unusual names, which are enough for a training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(next_steps, "TOO_FEW_PAIRS", 50)
    random_pairs(tmp_path / "pairs.jsonl", 120)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    renamed = ({"My question": row["query"], "reply": row["positive"]} for row in rows)
    (tmp_path / "my pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in renamed))
    return tmp_path


COLUMNS = ["--query-column", "My question", "--positive-column", "reply"]
SMALL = ["--batch-size", "8", "--cache-size", "64", "--max-steps", "3"]


def succeed(*words: str) -> Result:
    ended = invoke(*words)
    assert ended.exit_code == 0, ended.output
    return ended


def suggested(ended: Result) -> dict[str, list[str]]:
    """The words of each command that is named on stderr, by its name."""
    lines = re.findall(r"^To .*?\b(negative-cache .*)$", ended.stderr, re.MULTILINE)
    return {shlex.split(line)[1]: shlex.split(line)[1:] for line in lines}


def test_every_command_names_commands_that_run(place: Path):
    after_data = suggested(succeed("data", "my pairs.jsonl", *COLUMNS))
    from_the_hub = ["--model", "all-MiniLM-L6-v2"]  # the pairs are few
    assert after_data["train"][-4:-2] == from_the_hub
    measured = succeed(*(word for word in after_data["compare"] if word not in from_the_hub), "--model", "static")
    ended = succeed(
        *(word for word in after_data["train"] if word not in from_the_hub), *SMALL, "--relative-margin", "0.05"
    )
    assert "before: random weights (--model static)" in ended.stdout
    assert f"SentenceTransformer({next_steps.NEW_MODEL!r})" in ended.stderr
    after_train = suggested(ended)
    assert set(after_train) == {"significance", "evaluate", "compare", "report", "search"}
    assert after_train["evaluate"][1:3] == from_the_hub
    compared = json.loads(succeed(*after_train["compare"], "--json").stdout)
    assert list(compared["losses"]) == ["bm25", "zero-shot", "in-batch", "negative-cache:relative_margin=0.05"]
    used = json.loads(Path(after_train["significance"][1], "run.json").read_text())["configuration"]
    assert compared["learning_rates"] == [0.02, 0.05, 0.125]  # a static model trains in minutes
    assert compared["configuration"]["batch_size"] == used["batch_size"] == 8
    assert "negative-cache" not in ended.stdout
    succeed(*after_train["report"])
    shorter = ["--truncate-dim", "8", "--query-prompt", "find: "]
    after_search = suggested(succeed(*after_train["search"], *shorter))
    assert set(shorter) <= set(after_search["evaluate"])
    after_evaluate = suggested(succeed(*after_search["evaluate"]))
    assert set(shorter) <= set(after_evaluate["search"])
    succeed(*after_evaluate["search"])
    ended = succeed(*after_train["significance"])
    assert "before: random weights (--model static)" in ended.stdout
    after_significance = suggested(ended)
    ended = succeed(*after_significance["report"])
    address = re.search(r"python -m webbrowser file://(\S+)$", ended.stderr, re.MULTILINE)
    assert Path(address[1]).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert suggested(measured)["train"] == [word.replace("all-MiniLM-L6-v2", "static") for word in after_data["train"]]
    test_it = re.search(r"^And then to test whether it is: negative-cache (.*)$", measured.stderr, re.MULTILINE)
    ended = succeed(*shlex.split(test_it[1]))
    assert "p is corrected for the number of pairs, 3 (Holm)" in ended.stdout
    assert suggested(ended)["report"] == after_train["report"]


def test_a_distilled_model_is_compared_with_the_one_it_is_made_from(place: Path):
    data = ["train", "--data", "pairs.jsonl", *SMALL]
    succeed(*data, "--model", "tiny", "--output", "base")
    ended = succeed(*data, "--model", "static:base", "--output", "model")
    assert "before: the static model made from base, not base itself" in ended.stdout
    assert "To compare with base as it is: " in ended.stderr
    after = suggested(succeed(*suggested(ended)["evaluate"]))
    assert after["significance"] == ["significance", "base.json", "OTHER.json"]
    succeed("significance", "model", "base.json")


def test_a_model_is_evaluated_after_a_search_as_train_has_measured_it(place: Path):
    succeed(
        "train", "--data", "pairs.jsonl", "--model", "static", *SMALL, "--eval-documents", "50", "--output", "model"
    )
    for data, sample in (("pairs.jsonl", ["--eval-documents", "50"]), ("my pairs.jsonl", [])):
        options = [*COLUMNS] if " " in data else []
        after = suggested(succeed("search", "a query", "--model", "model", "--data", data, *options))
        assert after["evaluate"] == ["evaluate", "--model", "model", "--data", data, *options, *sample]


def test_an_encoder_is_trained_once_more_without_the_cache(place: Path):
    options = [*SMALL, "--learning-rate", "0.003", "--max-seq-length", "16", "--no-shared", "--save-steps", "2"]
    train = ["train", "--data", "my pairs.jsonl", *COLUMNS, "--model", "tiny", *options, "--output", "model/"]
    ended = succeed(*train)
    again = suggested(ended)["train"]
    assert "compare" not in suggested(ended)
    succeed(*again)
    first, second = (json.loads(Path(name, "run.json").read_text()) for name in ("model", "model-in-batch"))
    different = {name for name, value in first["configuration"].items() if value != second["configuration"][name]}
    assert different == {"loss", "output", "shared", "cache_size"}
    assert second["before"] == first["before"]
    both = re.search(r"^And then compare both: (negative-cache .*)$", ended.stderr, re.MULTILINE)
    succeed(*shlex.split(both[1])[1:])


@pytest.mark.parametrize(
    ("num_pairs", "names", "model"),
    [
        (20, ["search", "train"], "all-MiniLM-L6-v2"),
        (500, ["compare", "train"], "all-MiniLM-L6-v2"),
        (1600, ["compare", "train"], "static:all-MiniLM-L6-v2"),
    ],
)
def test_data_proposes_what_suits_the_number_of_pairs(num_pairs: int, names: list[str], model: str, tmp_path: Path):
    random_pairs(tmp_path / "pairs.jsonl", num_pairs)
    ended = succeed("data", str(tmp_path / "pairs.jsonl"))
    first, train = suggested(ended).values()
    assert list(suggested(ended)) == names
    assert train[train.index("--model") + 1] == model
    assert first[first.index("--model") + 1] == "all-MiniLM-L6-v2"
    assert ("worse than the encoder" in ended.stderr) == model.startswith("static:")
    assert ("all the same" in ended.stderr) == ("search" in names)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [(1.0, 1.0, "MRR@10 was 1 before"), (0.5, 0.5, "such as 0.02 instead of 0.05, "), (0.5, 0.6, "To test whether")],
)
def test_a_run_that_did_not_help_says_why(place: Path, before: float, after: float, said: str):
    succeed("train", "--data", "pairs.jsonl", "--output", "model", *SMALL)
    config, record = RunConfig("pairs.jsonl", "static", "in-batch", "model"), RunRecord.read(Path("model"))
    record = replace(record, before={"MRR@10": before}, after={"MRR@10": after})
    assert said in next(next_steps.after_train(config, record, load_data("pairs.jsonl"), ()))


def test_a_cache_that_never_counted_is_named(place: Path):
    train = ["train", "--data", "pairs.jsonl", "--model", "static", *SMALL]
    compare = ["compare", "--data", "pairs.jsonl", *SMALL, "--learning-rates", "0.01", "--seeds", "1"]
    for samples, waited in (("auto", True), ("1", False)):
        ended = succeed(*train, "--num-samples", samples, "--output", f"model-{samples}")
        assert ("The cache did not count" in ended.stderr) == waited
        losses = f"in-batch,negative-cache:num_samples={samples}"
        ended = succeed(*compare, "--losses", losses, "--output", f"comparison-{samples}")
        assert ("The cache did not count" in ended.stderr) == waited
    in_batch = ["--loss", "in-batch", "--max-steps", "3", "--output", "in-batch"]
    assert "did not count" not in succeed("train", "--data", "pairs.jsonl", *in_batch).stderr


def test_search_results_and_values_are_compared_next(place: Path):
    train = ["train", "--data", "pairs.jsonl", "--output", "model", *SMALL, "--no-eval"]
    after_train = suggested(succeed(*train))
    assert set(after_train) == {"evaluate", "report", "search"}
    evaluate = ["evaluate", "--model", "model", "--data", "pairs.jsonl", "--split", "test"]
    after = suggested(succeed(*evaluate, "--per-query", "values.json", "--run-out", "results.run"))
    succeed("evaluate", *after_train["evaluate"][1:], "--split", "test", "--per-query", "OTHER.json")
    seeds = suggested(succeed(*after["significance"]))["significance"]
    for name in ("values", "OTHER"):
        Path(f"{name}-seed-1.json").write_bytes(Path(f"{name}.json").read_bytes())
    assert not suggested(succeed(*seeds))
    after = suggested(succeed("evaluate", "--run", "results.run", "--data", "pairs.jsonl", "--split", "test"))
    Path("OTHER.run").write_bytes(Path("results.run").read_bytes())
    seeds = suggested(succeed(*after["significance"]))["significance"]
    assert seeds[-4:] == ["--data", "pairs.jsonl", "--split", "test"]
    for name in ("results", "OTHER"):
        Path(f"{name}-seed-1.run").write_bytes(Path("results.run").read_bytes())
    succeed(*seeds)


def test_a_model_that_is_measured_on_nanobeir_is_measured_on_own_data_next():
    assert list(next_steps.after_nanobeir("my model")) == [
        "To evaluate it on data of your own: negative-cache evaluate --model 'my model' --data my-pairs.csv"
    ]


def test_data_without_a_training_split_is_evaluated_next(beir: Path):
    (beir / "qrels" / "train.tsv").unlink()
    assert set(suggested(succeed("data", str(beir)))) == {"evaluate"}


def test_quiet_silences_them_and_json_stays_alone_on_stdout(place: Path):
    assert succeed("data", "pairs.jsonl", "--quiet").output == ""
    ended = succeed("data", "pairs.jsonl", "--json")
    assert json.loads(ended.stdout)["documents"] == 120
    assert suggested(ended)


def test_missing_packages_come_before_training():
    assert list(next_steps.after_doctor({"train": ["x>=1"], "docs": []})) == [
        "To install what training needs: pip install 'negative-cache[train]'"
    ]


def test_the_options_of_the_data_are_given_again():
    options = DataOptions(query_column="my query", strict=True, max_train_pairs=5, negatives="ignore")
    given = ["--query-column", "my query", "--negatives", "ignore", "--max-train-pairs", "5", "--strict"]
    assert options.arguments() == given
    assert options.arguments(("strict", "corpus")) == ["--strict"]
    assert DataOptions().arguments() == []
