"""The help: what it imports, its groups, defaults and examples."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import typer

from command_line import invoke
from negative_cache.workbench.cli import app
from negative_cache.workbench.cli.examples import EXAMPLES
from negative_cache.workbench.compare.comparison import Comparison
from negative_cache.workbench.evaluation.encoding_options import EncodingOptions
from negative_cache.workbench.model_names import learning_rate_of
from negative_cache.workbench.training.config import EMBEDDING_DTYPES, LOSSES, SCHEDULES, RunConfig

COMMANDS = typer.main.get_command(app).commands
HEAVY = ["torch", "numpy", "datasets", "transformers", "sentence_transformers", "pyarrow", "pandas", "rich"]
MISTAKES = [
    ["train", "--lerning-rate", "1"],
    ["train", "--data"],
    ["train"],
    ["compare", "--data", "x", "--output", "y", "--epochs", "many"],
    ["no-such-command"],
    ["--version"],
    ["--help"],
]


@pytest.mark.parametrize(
    "words", [[name, "--help"] for name in COMMANDS] + MISTAKES, ids=lambda words: "_".join(words).replace("/", "")
)
def test_help_and_mistakes_in_options_import_no_large_package(words: list[str]):
    code = (
        f"import json, sys\nsys.argv[1:] = {words}\nfrom negative_cache.__main__ import main\ntry: main()\n"
        f"finally: print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == (0 if words[-1] in ("--help", "--version") else 2), ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1]) == []
    assert "Traceback" not in ended.stderr


def test_the_check_sees_an_import():
    code = f"import sys, rich; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "['rich']"


def test_the_first_screen_has_a_whole_line_for_each_command_in_the_order_of_use():
    shown = invoke("--help", COLUMNS="80").stdout
    rows = re.findall(r"^  (\w+)  +(\w.*)$", shown.partition("Commands:")[2], re.MULTILINE)
    assert [name for name, _ in rows] == list(EXAMPLES) == list(COMMANDS)
    assert all(text.endswith(".") and "..." not in text for _, text in rows)
    assert [name for name, _ in rows][:4] == ["doctor", "data", "train", "evaluate"]
    assert f"\n    {EXAMPLES['train'][0]}\n" in shown


@pytest.mark.parametrize("command", ["train", "compare"])
def test_the_help_shows_every_option_once_in_a_group(command: str):
    shown = invoke(command, "--help", COLUMNS="200").stdout
    headings = re.findall(r"^(\w[\w ]*):$", shown, re.MULTILINE)
    assert headings[:4] == ["Options", "Data", "Loss", "Training"]
    found = re.findall(r"^  (?:-q, )?(?:--quiet|(--[a-z0-9-]+))", shown, re.MULTILINE)
    assert len(found) == len(set(found)) == len(COMMANDS[command].params) + 1  # --help


@pytest.mark.parametrize(
    ("command", "groups"),
    [
        ("evaluate", ["Options", "Data", "Encoding"]),
        ("search", ["Arguments", "Options", "Data", "Encoding"]),
        ("significance", ["Arguments", "Options", "Data"]),
        ("doctor", ["Options"]),
    ],
)
def test_commands_that_do_not_train_have_fewer_groups(command: str, groups: list[str]):
    shown = invoke(command, "--help").stdout
    assert re.findall(r"^(\w[\w ]*):$", shown, re.MULTILINE) == [*groups, "Examples"]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_ends_with_examples_on_one_line_each(command: str):
    shown = invoke(command, "--help", COLUMNS="80").stdout
    assert shown.rstrip().partition("Examples:\n")[2].splitlines() == [f"  {line}" for line in EXAMPLES[command]]
    assert 1 <= len(EXAMPLES[command]) <= 3


def test_examples_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On a few pairs; `compare` takes long, a pretrained model needs the hub: their options are parsed alone."""
    monkeypatch.chdir(tmp_path)
    rows = [f"how do I open box {i} {word},box {i} opens with the {word}" for i in range(60) for word in ("key", "pin")]
    for name, columns in (("my-pairs.csv", "query,positive"), ("questions.csv", "question,answer")):
        Path(name).write_text("\n".join([columns, *rows]) + "\n", encoding="utf-8")
    Path("notes.txt").write_text("a note\nanother note\n", encoding="utf-8")
    num_run = 0
    for name, lines in EXAMPLES.items():
        for line in lines:
            words = shlex.split(line)[1:]
            assert words[0] == name
            COMMANDS[name].make_context(name, words[1:])
            if name == "compare" or "comparison" in words or "python-code" in words:
                continue
            words = ["static" if word.endswith("all-MiniLM-L6-v2") else word for word in words]
            words = ["questions.csv" if "question" in words and word == "my-pairs.csv" else word for word in words]
            ended = invoke(*words)
            assert ended.exit_code == 0, (line, ended.output)
            num_run += 1
    assert num_run >= 12


@pytest.mark.parametrize(("command", "kind"), [("train", RunConfig), ("compare", Comparison)])
def test_the_defaults_of_options_are_those_of_the_configuration(command: str, kind: type):
    defaults = {field.name: field.default for field in fields(kind) if field.default is not MISSING}
    shown = {param.name: param.default for param in COMMANDS[command].params if param.name in defaults}
    assert len(shown) > 20
    assert {name: defaults[name] for name in shown} == shown


def test_the_encoding_options_are_the_fields_of_the_class():
    names = {param.name for param in COMMANDS["search"].params}
    assert {field.name for field in fields(EncodingOptions)} <= names


def test_the_help_names_the_choices_and_the_defaults_that_depend_on_the_model():
    shown = " ".join(invoke("train", "--help", COLUMNS="200").stdout.split())
    for name in (*LOSSES, *EMBEDDING_DTYPES, *SCHEDULES):
        assert name in shown
    for model in ("static", "tiny"):
        assert f"{learning_rate_of(model):g} for {model}," in shown
    assert f"{learning_rate_of('static:any'):g} for static:NAME" in shown
    assert f"{learning_rate_of('any/model'):g} for all others" in shown
    assert f"{learning_rate_of('any/model', has_adapters=True):g} with --lora" in shown
    for text in ("--batch-size <int> Queries per batch, on each rank. [default: 64]", "[default: linear]"):
        assert text in shown
    assert re.search(r"--warmup-ratio <float> [^[]*\[default: 0.1\]", shown)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["train", "--lr", "1"], "--learning-rate"),
        (["compare", "--lr=1"], "--learning-rates"),
        (["evaluate", "--bs", "8"], "--batch-size"),
        (["train", "--max_length", "64"], "--max-seq-length"),
        (["train", "--temperature", "0.05"], "--scale"),
        (["search", "--top-k", "10"], "--num-results"),
        (["search", "-k", "10"], "--num-results"),
    ],
)
def test_names_of_options_in_other_programs_are_understood(words: list[str], meant: str):
    ended = invoke(*words)
    assert ended.exit_code == 2
    (proposed,) = re.findall(r"No such option:? '?--?[\w-]+'?.* \((.*)\)", ended.stderr)
    assert re.findall(r"--[a-z-]+", proposed) == [meant]


def test_an_option_without_a_counterpart_proposes_none():
    assert "--scale" not in invoke("search", "--temperature", "1").stderr


def test_a_missing_option_is_explained():
    assert "Missing option '--model'. A name or path" in " ".join(invoke("search", "a query").stderr.split())
    assert "Missing option '--output'. New folder" in " ".join(invoke("train", "--data", "x").stderr.split())
