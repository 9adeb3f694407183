"""`--config`: options from a YAML file, or from the record of an earlier call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from command_line import invoke


def configuration(*arguments: object) -> dict[str, Any]:
    ended = invoke("train", *arguments, "--json", "--quiet")
    assert ended.exit_code == 0, ended.output
    found: dict[str, Any] = json.loads(ended.stdout)["configuration"]
    return found


def test_options_of_the_command_precede_those_of_the_file(beir: Path, tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"data: {beir}\noutput: {tmp_path / 'first'}\nbatch-size: 8\ncache_size: 64  # rows\nmax_steps: 3\n"
        "learning_rate: 5e-2\nin_batch: false\nnum_samples: 2\nstrict: true\nmargin_is_no_option_of: null\n"
    )
    ended = invoke("train", "--config", file)
    assert ended.exit_code == 2
    assert "'margin_is_no_option_of', which is not an option of this command" in " ".join(ended.stderr.split())
    file.write_text(file.read_text().replace("margin_is_no_option_of", "absolute_margin"))
    found = configuration("--config", file, "--max-steps", 2, "--in-batch")
    assert (found["batch_size"], found["cache_size"], found["max_steps"], found["in_batch"]) == (8, 64, 2, True)
    assert (found["learning_rate"], found["num_samples"], found["data_options"]["strict"]) == (0.05, 2.0, True)
    assert found["absolute_margin"] is None
    assert found["epochs"] == 3.0


def test_the_record_of_a_run_is_a_configuration_without_its_output(beir: Path, tmp_path: Path):
    given = ["--data", beir, "--batch-size", 8, "--cache-size", 64, "--max-steps", 2, "--save-steps", 0, "--no-use-lru"]
    given += ["--ignore-identical-ids", "--query-prompt", ""]
    first = configuration(*given[:-3], "--query-prompt", "", "--output", tmp_path / "first")
    record = tmp_path / "first" / "run.json"
    ended = invoke("train", "--config", record)
    assert ended.exit_code == 2
    assert "Missing option '--output'" in ended.stderr
    second = configuration("--config", record, "--output", tmp_path / "second")
    assert {**second, "output": first["output"]} == first
    assert (first["save_steps"], first["use_lru"], first["query_prompt"]) == (None, False, "")


def test_a_comparison_can_be_repeated_from_its_record(beir: Path, tmp_path: Path):
    given = ["--data", beir, "--batch-size", 8, "--epochs", 0.2, "--seeds", 1, "--learning-rates", "0.04,0.05"]
    ended = invoke("compare", *given, "--losses", "bm25,in-batch", "--output", tmp_path / "first", "--json")
    assert ended.exit_code == 0, ended.output
    again = ["compare", "--config", tmp_path / "first" / "compare.json"]
    ended = invoke(*again, "--output", tmp_path / "second", "--losses", "bm25", "--json")
    assert ended.exit_code == 0, ended.output
    first, second = (json.loads((tmp_path / name / "compare.json").read_text()) for name in ("first", "second"))
    assert second["configuration"]["losses"] == ["bm25"]
    names = first["configuration"].keys() - {"losses", "output"}
    assert {name: second["configuration"][name] for name in names} == {
        name: first["configuration"][name] for name in names
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 8", "has 'batchsize', which is not an option of this command. Did you mean batch_size?"),
        ("resumed: true", "Did you mean resume?"),
        ("zzz: 1", "The options are data, output, model"),
        ("- 8", "has no options: expected lines such as `batch_size: 64`"),
        ("a: [", "cannot be read: while parsing"),
        ("epochs: many", "Invalid value for '--epochs'"),
        ("epochs: {a: 1}", "the value of 'epochs' is a mapping; expected that of --epochs"),
        (None, "No such file or directory"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str | None, message: str):
    if text is not None:
        (tmp_path / "c.yaml").write_text(text)
    ended = invoke("train", "--config", tmp_path / "c.yaml", "--data", "nowhere", "--output", tmp_path / "out")
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert message in " ".join(ended.stderr.split())
