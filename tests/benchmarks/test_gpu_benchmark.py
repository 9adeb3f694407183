"""`python -m benchmarks gpu`: its stages, the results that it keeps of failed ones, its tables and targets."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from benchmarks.__main__ import main
from benchmarks.gpu import docs, markdown
from benchmarks.gpu.results import Results, Row

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_the_source_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", "src")


def load(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu.json").read_text(encoding="utf-8"))


def test_a_rehearsal_measures_passes_and_steps(tmp_path: Path):
    assert main(["gpu", "--output", str(tmp_path), "--only", "passes,step", "--minutes", "4"]) == 0
    stages = load(tmp_path)["stages"]
    assert [record["state"] for record in stages.values()] == ["done", "done"]
    ways = {row["way"] for row in stages["passes"]["rows"]}
    kernels = {"fused", "fused, 8 draws", "fused, tf32"}
    assert {*kernels, "tiled", "product", markdown.COMPILED, "dense algorithm of the port"} == ways
    errors = {row["way"]: row["lse_error"] for row in stages["passes"]["rows"] if row["dtype"] == "float32"}
    assert max(errors["fused"], errors["tiled"]) < 1e-5
    assert all(row["ms"] > 0 for row in stages["passes"]["rows"])
    steps = {row["loss"]: row for row in stages["step"]["rows"]}
    assert steps["in-batch"]["of_in_batch"] == 1.0
    ours = {"negative cache, bfloat16 rows", "negative cache, int8 rows", "negative cache, auto, bfloat16 rows"}
    assert {*ours, "gradient cache, 2 x"} <= set(steps)
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "A rehearsal on a CPU" in page
    assert "| fused, 8 draws |" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.md", "log.txt"]


def test_a_stage_that_fails_or_is_cut_off_does_not_end_the_others(tmp_path: Path):
    """An empty model folder, and a time limit that is too short."""
    (tmp_path / "prepared" / "minilm").mkdir(parents=True)
    arguments = ["gpu", "--output", str(tmp_path), "--prepared", str(tmp_path / "prepared")]
    assert main([*arguments, "--only", "quality,passes", "--minutes", "2"]) == 1
    stages = load(tmp_path)["stages"]
    assert stages["passes"]["state"] == "done"
    assert stages["quality"]["state"] == "failed"
    assert "gpu-prepare" in stages["quality"]["error"]
    assert "gpu-prepare" in (tmp_path / "gpu.md").read_text(encoding="utf-8")
    rows = stages["passes"]["rows"]
    assert main([*arguments, "--only", "step", "--minutes", "0.05"]) == 1
    stages = load(tmp_path)["stages"]
    assert stages["step"]["state"] == "cut off"
    assert stages["passes"]["rows"] == rows  # of the earlier run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_its_rows_and_leaves_no_process(number: signal.Signals, tmp_path: Path):
    command = [sys.executable, "-m", "benchmarks", "gpu", "--output", str(tmp_path), "--only", "passes,step"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "passes.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Interrupted" in output
    stages = load(tmp_path)["stages"]
    assert stages["passes"]["state"] == "interrupted"
    assert stages["passes"]["rows"]
    assert stages["step"]["state"] == "not started"
    assert not [path for path in tmp_path.iterdir() if path.name == "passes.json"]
    left = [found.info["cmdline"] for found in psutil.process_iter(["cmdline"])]
    assert not [words for words in left if words and str(tmp_path) in words]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--only", "speed"), "the stages are works, passes, step, quality"),
        (("--minutes", "nan"), "expected a positive number"),
        (("--minutes", "0"), "expected a positive number"),
        (("--prepared", "nothing-there"), "gpu-prepare nothing-there"),
        (("--output", "README.md"), "cannot be created"),
    ],
)
def test_wrong_options_are_refused(
    options: tuple[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "minilm").mkdir()
    with pytest.raises(SystemExit):
        main(["gpu", "--output", str(tmp_path / "results"), "--prepared", str(tmp_path), *options])
    assert message in capsys.readouterr().err


def test_rows_are_on_disk_as_they_come(tmp_path: Path):
    results = Results(tmp_path / "rows.json")
    for number in range(3):
        results.add(number=number)
        assert json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))[-1] == {"number": number}


def pass_row(way: str, batch: int, ms: float, dtype: str = "bfloat16", **more: Any) -> Row:
    return {"batch": batch, "rows": 131_072, "dim": 768, "dtype": dtype, "way": way, "ms": ms, **more}


def some_rows() -> dict[str, list[Row]]:
    passes = [
        pass_row("fused", 128, 1.0, of_product=1.1, extra_mb=3.0, of_peak=0.2, teraflops=1.0),
        pass_row(markdown.COMPILED, 128, 2.0),
        pass_row("fused", 4096, 3.0, of_product=1.2, extra_mb=30.0, of_peak=0.6, teraflops=9.0),
        pass_row(markdown.COMPILED, 4096, 2.0),
        pass_row("fused", 128, 0.9, dtype="int8", of_product=2.0, extra_mb=3.0, of_peak=0.1, teraflops=1.0),
        {key: value for key, value in pass_row("dense", 128, 0.0).items() if key != "ms"} | {"failed": "OutOfMemory"},
    ]
    step = [{"batch": 64, "loss": "negative cache, bfloat16 rows", "of_in_batch": 1.7, "waits_of_the_library": 0}]
    return {"passes": passes, "step": step}


def test_targets_take_the_worst_size():
    made = {str(row["what"]): row for row in markdown.targets(some_rows())}
    product = made["pass, bfloat16 / product, B >= 128"]
    assert (product["measured"], product["verdict"]) == ("1.2 (B=4,096, N=131,072, D=768)", "NOT MET")
    compiled = f"pass, bfloat16 / {markdown.COMPILED}"
    assert (made[f"{compiled}, B <= 128"]["measured"], made[f"{compiled}, B <= 128"]["verdict"]) == ("0.5", "met")
    assert made[f"{compiled}, B > 128"]["verdict"] == "NOT MET"
    assert made["pass, share of the card's bfloat16 peak, B=4,096 N=131,072 D=768"]["verdict"] == "met"
    assert made["pass, extra memory, MB"]["verdict"] == "NOT MET"
    assert made["pass, int8 / bfloat16"]["verdict"] == "met"
    assert made["step / in-batch, B=64"]["verdict"] == "NOT MET"
    assert made["waits of the library in a step"]["verdict"] == "met"


def test_pages_get_their_tables(tmp_path: Path):
    stages = {name: {"rows": rows} for name, rows in some_rows().items()}
    machine = {"device": "Card X", "torch": "9", "triton": "8", "commit": "abc"}
    (tmp_path / "gpu.json").write_text(json.dumps({"machine": machine, "stages": stages}), encoding="utf-8")
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    before = "# A page\n\n<!-- gpu: pass -->\nold\n<!-- /gpu -->\n\nmore\n\n<!-- gpu: quality -->\n<!-- /gpu -->\n"
    page.write_text(before, encoding="utf-8")
    assert docs.update(tmp_path / "gpu.json", page.parent) == [page, page.parent / "images" / "gpu-pass.png"]
    text = page.read_text(encoding="utf-8")
    assert "Card X, torch 9, Triton 8, commit abc" in text
    assert "| bfloat16 | 131,072 | 768 | 4,096 | 3 |" in text
    assert "old" not in text
    assert text.endswith("<!-- gpu: quality -->\n<!-- /gpu -->\n")  # this stage has no rows
    assert docs.update(tmp_path / "gpu.json", page.parent) == []
    rehearsed = {"machine": {**machine, "device": "cpu"}, "stages": stages}
    (tmp_path / "cpu.json").write_text(json.dumps(rehearsed), encoding="utf-8")
    with pytest.raises(ValueError, match="rehearsal"):
        docs.update(tmp_path / "cpu.json", page.parent)
    page.write_text("<!-- gpu: speed -->\n<!-- /gpu -->", encoding="utf-8")
    with pytest.raises(ValueError, match="'speed'"):
        docs.update(tmp_path / "gpu.json", page.parent)


def test_quality_is_drawn_for_the_data_set_with_the_most_seeds(tmp_path: Path):
    def line(data: str, loss: str, count: int, value: float, deviation: float | None, seeds: int):
        made = {"data": data, "loss": loss, "documents_encoded": count, "seeds": seeds}
        return made | {"test_MRR@10": value, "test_MRR@10_std": deviation}

    few = [line("medquad", "in-batch", 100, 0.8, None, 1)]
    many = [line("nl2bash", "untrained", 0, 0.5, None, 1), line("nl2bash", "negative cache", 200, 0.7, 0.01, 3)]
    assert docs._measured_often(few) == []
    assert docs._measured_often([*few, *many]) == many
    drawn = docs.draw_quality(many, tmp_path / "images" / "gpu-quality.png")
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert docs._label(many[1], 160.0) == "negative cache (default)\n1.2 times the documents"
