"""`negative-cache data`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import DOCUMENTS, invoke, write_beir
from negative_cache.workbench.models import load_model
from support import random_pairs


@pytest.fixture(scope="module")
def beir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_beir(tmp_path_factory.mktemp("data") / "set")


def test_the_result_as_json_has_the_splits_and_the_warnings(beir: Path):
    ended = invoke("data", beir, "--json")
    assert ended.exit_code == 0, ended.output
    found = json.loads(ended.stdout)
    assert {"form", "documents", "splits", "skipped", "notes", "warnings"} <= found.keys()
    sizes = {
        name: [split[key] for key in ("queries", "positives", "negatives")] for name, split in found["splits"].items()
    }
    assert sizes == {"train": [60, 61, 0], "dev": [10, 10, 0], "test": [10, 10, 0]}
    assert found["documents"] == 80
    assert found["lengths"]["unit"] == "words"
    assert [line for line in found["warnings"] if line.startswith("only 10 test queries")]


def test_tables_examples_and_warnings_are_printed(beir: Path):
    ended = invoke("data", beir, COLUMNS="100")
    assert ended.exit_code == 0, ended.output
    words = " ".join(ended.stdout.split())
    assert "80 documents, 80 queries" in words
    assert "│ train │ 60 │ 61 │ 0 │ 80 │" in words
    assert "Lengths in words" in words
    assert "Example 3" in words
    assert "Warning: only 10 test queries" in words


@pytest.mark.parametrize(("name", "limit"), [("tiny", 128), ("static", None)])
def test_a_model_counts_tokens_and_has_a_limit(beir: Path, tmp_path: Path, name: str, limit: int | None):
    model = load_model(name, ["the apple that someone paints"] * 9, seed=0)
    model.save(str(tmp_path / name))
    ended = invoke("data", beir, "--model", tmp_path / name, "--json")
    assert ended.exit_code == 0, ended.output
    lengths = json.loads(ended.stdout)["lengths"]
    assert (lengths["unit"], lengths["limit"]) == (f"tokens of {tmp_path / name}", limit)
    inputs = [model.preprocess([f"A title\n{text}"]) for text in DOCUMENTS.values()]
    assert lengths["documents"]["max"] == max(features["input_ids"].numel() for features in inputs)


def test_options_of_the_data_are_those_of_the_other_commands(tmp_path: Path):
    random_pairs(tmp_path / "pairs.jsonl", 60)
    ended = invoke(
        "data", tmp_path / "pairs.jsonl", "--query-column", "positive", "--positive-column", "query", "--json"
    )
    assert ended.exit_code == 0, ended.output
    assert len(json.loads(ended.stdout)["examples"][0]["query"].split()) == 10


def test_data_that_cannot_be_read_and_a_model_that_does_not_exist_are_errors(beir: Path, tmp_path: Path):
    ended = invoke("data", tmp_path / "nowhere")
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert "nowhere' is not a file" in ended.stderr
    ended = invoke("data", beir, "--model", tmp_path / "nowhere")
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert "Cannot load the model" in ended.stderr


def test_a_warning_of_the_reading_is_shown_as_one(tmp_path: Path):
    (tmp_path / "a.csv").write_text("query,document,score\nq,d,0.3\nr,e,1\n")
    ended = invoke("data", str(tmp_path / "a.csv"))
    assert ended.exit_code == 0, ended.output
    assert "Warning: a: 'score' has values other than 0 and 1, such as '0.3'" in ended.stderr
    assert "Note: a: columns that are read" in ended.stderr
