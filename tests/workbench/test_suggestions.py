"""What is proposed for a name that does not exist, and the errors that propose it."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_line import invoke, write_beir
from negative_cache.workbench.suggestions import did_you_mean, did_you_mean_path


def test_the_most_similar_name_is_proposed_and_nothing_if_none_is_similar():
    assert did_you_mean("batch_sise", ["batch_size", "epochs"]) == " Did you mean batch_size?"
    assert did_you_mean("xyz", ["batch_size", "epochs"]) == ""


def test_files_beside_a_path_and_other_names_are_proposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "my-pairs.csv").touch()
    assert did_you_mean_path("data/my-pair.csv") == f" Did you mean {Path('data/my-pairs.csv')}?"
    assert did_you_mean_path("dta") == " Did you mean data?"
    assert did_you_mean_path("some/where/data") == " Did you mean data?"
    assert did_you_mean_path("some/where/data", suits=Path.is_file) == ""
    assert did_you_mean_path("statc", "static") == " Did you mean static?"
    (tmp_path / "my-static.partial").mkdir()  # an unfinished run
    assert did_you_mean_path("my-sttic", "static") == " Did you mean static?"
    assert did_you_mean_path("my-sttic") == ""
    (tmp_path / "my-static").mkdir()
    assert did_you_mean_path("my-sttic", "static") == " Did you mean my-static?"
    assert did_you_mean_path("dta", suits=Path.is_file) == ""
    (tmp_path / "half.partial").mkdir()
    assert did_you_mean_path("half/", "hall") == " Its run, in half.partial, is not finished."
    for name in ("no/such/folder", "..", "", "\0"):
        assert did_you_mean_path(name) == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data", "sett"], "Did you mean set?"),
        (
            ["train", "--data", "set", "--model", "statc", "--output", "out"],
            "Did you mean static? Give static, tiny, a folder",
        ),
        (["train", "--data", "set", "--model", "static:statc", "--output", "out"], "). Give a folder or the name"),
        (["evaluate", "--data", "set", "--model", "./my-modl"], "Did you mean my-model? Give the --output of train"),
        (["search", "a", "--data", "set", "--model", "my-modl"], "Did you mean my-model? Give a folder or the name"),
        (["search", "a", "--data", "set", "--model", "sett"], "). Give a folder or the name"),
        (["search", "a", "--data", "set", "--model", "my-statc"], "). Give a folder or the name"),
        (["search", "a", "--data", "set", "--model", "my-static"], "Its run, in my-static.partial, is not finished."),
        (["significance", "sett", "other"], "Did you mean set? Give RUN"),
        (["significance", "my-static", "other"], "Its run, in my-static.partial, is not finished. Give RUN"),
        (["train", "--data", "set", "--output", "set"], "exists and is not empty. Choose another --output."),
        (["train", "--data", "test-only", "--output", "out"], "it has test. Give data with training pairs"),
        (["train", "--data", "set", "--output", "out", "--report-to", "wandb"], "pip install wandb, or leave it out"),
    ],
)
def test_errors_say_what_to_type(words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_beir(tmp_path / "set")
    other = write_beir(tmp_path / "test-only")
    for folder in ("my-model", "my-static.partial"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "modules.json").touch()
    for split in ("train", "dev"):
        (other / "qrels" / f"{split}.tsv").unlink()
    ended = invoke(*words)
    assert ended.exit_code == 2, ended.output
    assert said in ended.stderr
    assert not Path("out").exists()


def test_resuming_without_an_unfinished_run_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.chdir(tmp_path)
    write_beir(tmp_path / "set")
    ended = invoke("train", "--data", "set", "--output", "out", "--resume", "--max-steps", "2", "--batch-size", "8")
    assert ended.exit_code == 0, ended.output
    assert "There is no unfinished run in out.partial: training begins at step 0." in caplog.text


def test_resuming_a_run_without_a_checkpoint_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.chdir(tmp_path)
    write_beir(tmp_path / "set")
    Path("out.partial").mkdir()
    ended = invoke("train", "--data", "set", "--output", "out", "--resume", "--max-steps", "2", "--batch-size", "8")
    assert ended.exit_code == 0, ended.output
    assert "The run in out.partial has no checkpoint yet: training begins at step 0." in caplog.text
