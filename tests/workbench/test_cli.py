"""What all commands have in common: --json, --quiet, progress, exit codes; and doctor."""

from __future__ import annotations

import contextlib
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
from typer.testing import CliRunner

from negative_cache import NegativeCacheLoss
from negative_cache.workbench import machine
from negative_cache.workbench.cli import app
from negative_cache.workbench.compare import Comparison
from negative_cache.workbench.config import RunConfig, RunError
from support import random_pairs

COMMANDS = ("train", "compare", "evaluate", "search", "report", "memory", "doctor")


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
        "train": ["train", *data, "--output", str(output), *small, "--max-steps", "3"],
        "compare": [
            "compare", *data, "--output", str(output), *small, "--losses", "in-batch", "--seeds", "1", "--epochs",
            "0.2", "--learning-rates", "0.05",
        ],
        "evaluate": ["evaluate", *data, *model],
        "search": ["search", *data, *model, "-n", "2", "[red]abc"],
        "report": ["report", str(place / "model"), "--output", str(output.with_suffix(".html"))],
        "memory": ["memory", "--dim", "64"],
        "doctor": ["doctor"],
    }[command]  # fmt: skip


def invoke(*args: str, **environment: str):
    return CliRunner().invoke(app, list(args), env=environment)


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_all_of_stdout_and_progress_is_on_stderr(command: str, place: Path, tmp_path: Path):
    given = arguments(command, place, tmp_path / "out")
    ended = invoke(*given, "--json", FORCE_COLOR="1")  # as on a terminal
    assert ended.exit_code == 0, ended.output
    found = json.loads(ended.stdout, parse_constant=pytest.fail)
    assert found
    assert "Loading libraries" in ended.stderr
    expected = {
        "train": lambda: found == json.loads((tmp_path / "out" / "run.json").read_text()),
        "compare": lambda: found == json.loads((tmp_path / "out" / "compare.json").read_text()),
        "evaluate": lambda: found["num_documents"] == 120,
        "search": lambda: (found[0]["query"], len(found[0]["documents"])) == ("[red]abc", 2),
        "report": lambda: (
            found["runs"] == ["model"] and Path(found["output"]).read_text().startswith("<!doctype html>")
        ),
        "memory": lambda: found["embeddings"] == 131_072 * 64 * 4,
        "doctor": lambda: found["versions"]["torch"] == version("torch"),
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
    ended = invoke("evaluate", "--model", "x", "--data", "[nowhere]", "--quiet", "--json")
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert "'[nowhere]' is no file" in ended.stderr


def test_a_training_that_fails_ends_with_one(place: Path, tmp_path: Path):
    ended = invoke(*arguments("train", place, tmp_path / "out"), "--learning-rate", "1e38")
    assert ended.exit_code == 1, ended.output
    assert "Training failed after step" in ended.stderr
    assert "Traceback" not in ended.output


def test_a_rank_that_is_not_the_first_says_nothing():
    ended = invoke("memory", "--dim", "64", "--json", RANK="1")
    assert (ended.exit_code, ended.output) == (0, "")


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(place: Path, tmp_path: Path):
    """On a real terminal, where the bar is drawn."""
    output = tmp_path / "out"
    given = ["train", "--data", str(place / "pairs.jsonl"), "--output", str(output), "--batch-size", "8", "--epochs"]
    given += ["9999", "--cache-size", "64", "--save-steps", "2"]
    terminal, end = pty.openpty()
    environment = {**os.environ, "COLUMNS": "150"}
    process = subprocess.Popen(
        [sys.executable, "-m", "negative_cache", *given],
        stdout=subprocess.PIPE, stderr=end, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
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
    assert f"Go on with: negative-cache train --data {place / 'pairs.jsonl'}" in words
    assert "--save-steps 2 --resume" in words


def _read(terminal: int, said: list[bytes]) -> None:
    with contextlib.suppress(OSError):  # how the end of a terminal shows
        while part := os.read(terminal, 4096):
            said.append(part)
    os.close(terminal)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        ("in-batch", {"top_k": 64}, "--top-k has no effect on --loss in-batch, only on negative-cache"),
        ("in-batch", {"num_samples": 4}, "--num-samples has no effect"),
        ("gradcache", {"cache_size": 8192}, "--cache-size has no effect on --loss gradcache"),
        ("memory-bank", {"shared": False}, "--shared has no effect"),
        ("negative-cache", {"shared": False, "num_candidates": 8}, "--num-candidates has no effect with --no-shared"),
        ("negative-cache", {"num_candidates": 0}, "--num-candidates is 0"),
    ],
)
def test_options_without_effect_are_refused(loss: str, options: dict, message: str):
    with pytest.raises(RunError, match=message):
        RunConfig(data="d", model="static", loss=loss, output="o", **options)


def test_options_with_effect_are_taken():
    RunConfig(data="d", model="static", loss="memory-bank", output="o", cache_size=99)
    RunConfig(data="d", model="static", loss="negative-cache", output="o", num_candidates=4, use_lru=False)
    with pytest.raises(ValueError, match="only chosen from with shared=True"):
        NegativeCacheLoss(lambda x: x, 4, shared=False, num_candidates=8)


def test_a_comparison_gives_each_loss_what_has_an_effect_on_it():
    given = Comparison("d", "static", ("in-batch", "memory-bank", "negative-cache"), "o", cache_size=99, num_samples=3)
    found = [given.config(spec) for spec in given.losses]
    assert [config.cache_size for config in found] == [16_384, 99, 99]
    assert [config.num_samples for config in found] == [1, 1, 3]


def test_candidates_and_lru_reach_the_run(place: Path, tmp_path: Path):
    ended = invoke(*arguments("train", place, tmp_path / "out"), "--num-candidates", "3", "--no-use-lru", "--json")
    options = json.loads(ended.stdout)["configuration"]
    assert (options["num_candidates"], options["use_lru"]) == (3, False)


def test_doctor_says_what_would_search_and_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    metadata = tmp_path / "negative_cache-0.1.0.dist-info"
    metadata.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: negative-cache", "Version: 0.1.0"]
    lines += ["Provides-Extra: train", "Provides-Extra: all", 'Requires-Dist: torch>=999; extra == "train"']
    lines += ['Requires-Dist: no-such-package>=2; extra == "train"', 'Requires-Dist: typer; extra == "train"']
    lines += ['Requires-Dist: negative-cache[train]; extra == "all"']
    (metadata / "METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    unmet = [f"torch>=999 (has {version('torch')})", "no-such-package>=2"]
    assert machine.look()["extras"] == {"train": unmet, "all": unmet}
    ended = invoke("doctor", COLUMNS="200")
    assert "pip install 'negative-cache[train]'" in ended.output
    assert "tiled PyTorch, float32 rows." in ended.output
    (cpu, *_) = machine.devices(32, "int8", 1, None, True)
    assert cpu["device"] == "cpu"
    assert "int8 rows" in cpu["retrieval"]


def test_without_its_packages_the_command_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; from negative_cache.__main__ import main; main()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.strip().endswith("(typer): pip install 'negative-cache[train]'")
