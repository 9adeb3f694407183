"""Behaviour that all commands share: --json, --quiet, progress, exit codes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from rich.console import Console

from command_line import invoke
from negative_cache.workbench.cli import progress
from negative_cache.workbench.cli.progress import training_bar
from negative_cache.workbench.cli.terminal import Terminal
from support import random_pairs

COMMANDS = ("data", "train", "compare", "evaluate", "search", "report", "doctor")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pairs, and a model trained on them."""
    folder = tmp_path_factory.mktemp("place")
    random_pairs(folder / "pairs.jsonl", 120)
    ended = invoke(*arguments("train", folder, folder / "model"))
    assert ended.exit_code == 0, ended.output
    return folder


def arguments(command: str, place: Path, output: Path) -> list[str]:
    """A quick call of each command."""
    data, model = ["--data", str(place / "pairs.jsonl")], ["--model", str(place / "model")]
    small = ["--batch-size", "8", "--cache-size", "64"]
    return {
        "data": ["data", str(place / "pairs.jsonl")],
        "train": ["train", *data, "--output", str(output), *small, "--max-steps", "3"],
        "compare": [
            "compare", *data, "--output", str(output), *small, "--losses", "in-batch", "--seeds", "1", "--epochs",
            "0.2", "--learning-rates", "0.05",
        ],
        "evaluate": ["evaluate", *data, *model],
        "search": ["search", *data, *model, "-n", "2", "[red]abc"],
        "report": ["report", str(place / "model"), "--output", str(output.with_suffix(".html"))],
        "doctor": ["doctor"],
    }[command]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_all_of_stdout_and_progress_is_on_stderr(command: str, place: Path, tmp_path: Path):
    given = arguments(command, place, tmp_path / "out")
    ended = invoke(*given, "--json", FORCE_COLOR="1")  # as on a terminal
    assert ended.exit_code == 0, ended.output
    found = json.loads(ended.stdout, parse_constant=pytest.fail)
    assert found
    assert "Loading libraries" in ended.stderr
    expected = {
        "data": lambda: found["documents"] == 120,
        "train": lambda: found == json.loads((tmp_path / "out" / "run.json").read_text()),
        "compare": lambda: found == json.loads((tmp_path / "out" / "compare.json").read_text()),
        "evaluate": lambda: found["num_documents"] == 120,
        "search": lambda: (found[0]["query"], len(found[0]["documents"])) == ("[red]abc", 2),
        "report": lambda: (
            found["runs"] == ["model"] and Path(found["output"]).read_text().startswith("<!doctype html>")
        ),
        "doctor": lambda: (
            (found["versions"]["torch"], found["memory"]["embeddings"]) == (version("torch"), 131_072 * 768 * 4)
        ),
    }[command]
    assert expected()


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "compare"])  # which takes the longest
def test_quiet_prints_nothing(command: str, place: Path, tmp_path: Path):
    ended = invoke(*arguments(command, place, tmp_path / "out"), "--quiet", FORCE_COLOR="1")
    assert ended.exit_code == 0, ended.output
    assert ended.output == ""


def test_quiet_and_json_print_the_result_alone_and_errors_are_never_quiet(place: Path, tmp_path: Path):
    ended = invoke(*arguments("evaluate", place, tmp_path), "--quiet", "--json")
    assert json.loads(ended.stdout)["num_queries"] > 0
    assert ended.stderr == ""
    ended = invoke("evaluate", "--model", place / "model", "--data", "[nowhere]", "--quiet", "--json")
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert "'[nowhere]' is not a file" in ended.stderr


@pytest.mark.parametrize("command", ["train", "compare", "evaluate"])
def test_ignoring_identical_ids_of_data_without_any_is_refused(command: str, place: Path, tmp_path: Path):
    ended = invoke(*arguments(command, place, tmp_path / "out"), "--ignore-identical-ids")
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert "--ignore-identical-ids has no effect on pairs: no query has the id of a document" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_failed_training_exits_with_1(place: Path, tmp_path: Path):
    ended = invoke(*arguments("train", place, tmp_path / "out"), "--learning-rate", "1e38")
    assert ended.exit_code == 1, ended.output
    assert "Training failed after step" in ended.stderr
    assert "Traceback" not in ended.output


def test_only_the_first_rank_prints():
    ended = invoke("doctor", "--json", RANK="1")
    assert (ended.exit_code, ended.output) == (0, "")


def test_ctrl_c_exits_with_130_and_says_how_to_continue(place: Path, tmp_path: Path):
    """On a pseudo-terminal, where the bar is drawn."""
    output = tmp_path / "out"
    given = ["train", "--data", str(place / "pairs.jsonl"), "--output", str(output), "--batch-size", "8", "--epochs"]
    given += ["9999", "--cache-size", "64", "--save-steps", "2"]
    terminal, end = pty.openpty()
    environment = {**os.environ, "COLUMNS": "150"}
    process = subprocess.Popen(
        [sys.executable, "-m", "negative_cache", *given],
        stdout=subprocess.PIPE, stderr=end, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background processes ignore it
    )  # fmt: skip
    os.close(end)
    said: list[bytes] = []
    reader = threading.Thread(target=_read, args=(terminal, said))
    reader.start()
    try:
        deadline = time.monotonic() + 100
        while not list(output.with_name("out.partial").glob("checkpoint-*/trainer_state.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    reader.join(timeout=10)
    shown = b"".join(said).decode()
    assert process.returncode == 130, shown
    assert stdout == ""
    assert "Traceback" not in shown
    for text in ("Loading libraries", "Reading ", "negative-cache: preparing"):
        assert text in shown
    assert re.search(r" [2-9]/\d{5,}", shown)  # the bar
    words = " ".join(shown.split())
    assert "Stopped." in words
    assert f"Continue with: negative-cache train --data {place / 'pairs.jsonl'}" in words
    assert "--save-steps 2 --resume" in words


def _read(terminal: int, said: list[bytes]) -> None:
    with contextlib.suppress(OSError):  # the terminal was closed
        while part := os.read(terminal, 4096):
            said.append(part)
    os.close(terminal)


def test_the_bar_shows_all_steps_on_80_columns():
    terminal = Terminal()
    terminal.progress = Console(file=io.StringIO(), width=80, force_terminal=True, no_color=True)
    with training_bar(terminal, "negative-cache") as (on_step, on_progress):
        on_progress(5, 20)
        on_step(93, 20_000, {"loss": 0.1341, "cache/staleness": 0.003812, "cache/fill": 0.07744})
    shown = terminal.progress.file.getvalue()
    assert "93/20000 loss 0.134 " in shown
    assert "…" not in shown


def test_without_a_terminal_there_is_a_line_of_progress_now_and_then(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0.5)
    terminal = Terminal()
    terminal.progress = Console(file=io.StringIO(), width=80)
    with training_bar(terminal, "negative-cache") as (on_step, on_progress):
        on_progress(5, 20)
        for step in range(1, 41):
            time.sleep(0.05)
            on_step(step, 400, {"loss": 0.1341})
        shown = terminal.progress.file.getvalue()
        before_the_end = shown.splitlines()
    assert 2 <= len(before_the_end) <= 6
    assert before_the_end[0].startswith(f"negative-cache {progress.FIRST_UPDATES}/400 ")  # the expected time
    for line in before_the_end:
        assert re.fullmatch(r"negative-cache \d+/400  0:00:[12]\d left  loss 0.134", line), line


def test_the_library_imports_no_optional_package():
    names = ["sentence_transformers", "transformers", "datasets", "typer", "rich", "triton", "lightning"]
    show = f"print([name for name in {names} if name in sys.modules])"
    code = f"import sys\nfrom negative_cache import *\n{show}; import rich; {show}"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == ["[]", "['rich']"]  # the second line shows that the check works


def test_without_its_packages_the_command_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; from negative_cache.__main__ import main; main()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.strip().endswith("(typer): pip install 'negative-cache[train]'")


def test_a_query_of_many_pages_is_answered_at_once(place: Path):
    """rich needs minutes for a heading of this length."""
    began = time.monotonic()
    empty = invoke("search", " ", "--data", str(place / "pairs.jsonl"), "--model", str(place / "model"))
    assert empty.exit_code == 2
    assert "A query is empty" in empty.stderr
    ended = invoke("search", "ab " * 30_000, "--data", str(place / "pairs.jsonl"), "--model", str(place / "model"))
    assert ended.exit_code == 0, ended.output
    assert time.monotonic() - began < 20
    assert ended.stdout.startswith("ab ab ab")
