"""`negative-cache doctor`: packages, devices and the memory of a cache."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from command_line import invoke
from negative_cache.workbench import environment


def test_doctor_reports_the_search_and_unmet_requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    metadata = tmp_path / "negative_cache-0.1.0.dist-info"
    metadata.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: negative-cache", "Version: 0.1.0"]
    lines += ["Provides-Extra: train", "Provides-Extra: all", 'Requires-Dist: torch>=999; extra == "train"']
    lines += ['Requires-Dist: no-such-package>=2; extra == "train"', 'Requires-Dist: typer; extra == "train"']
    lines += ['Requires-Dist: negative-cache[train]; extra == "all"']
    (metadata / "METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    unmet = [f"torch>=999 (has {version('torch')})", "no-such-package>=2"]
    assert environment.describe()["extras"] == {"train": unmet, "all": unmet}
    ended = invoke("doctor", COLUMNS="200")
    assert "pip install 'negative-cache[train]'" in ended.output
    assert "tiled PyTorch, float32 rows." in ended.output


def test_devices_report_the_search_of_narrow_rows():
    (cpu, *_) = environment.devices(32, "int8", num_samples=1, shared=True)
    assert cpu["device"] == "cpu"
    assert "int8 rows" in cpu["retrieval"]


def test_doctor_prints_one_line_per_device(monkeypatch: pytest.MonkeyPatch):
    """Here, the other accelerator is a device without values."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("meta"))
    lines = invoke("doctor", COLUMNS="200").output.splitlines()
    assert "Search on cpu: tiled PyTorch, float32 rows." in lines
    assert "Search on meta: tiled PyTorch, float32 rows." in lines
    assert any("meta: META" in line and "unknown" in line for line in lines)  # its memory


def test_memory_is_predicted_per_rank():
    sizes = {}
    for ranks in (1, 4):
        options = ["--dim", 100, "--cache-size", 8000, "--embedding-dtype", "int8", "--ranks", ranks]
        result = invoke("doctor", *options, "--json")
        assert result.exit_code == 0, result.output
        sizes[ranks] = json.loads(result.stdout)["memory"]
    assert sizes[1]["embeddings"] == 8000 * (100 + 4)  # bytes, and a float32 scale per row
    assert sizes[4]["embeddings"] == sizes[1]["embeddings"] / 4
    assert sizes[1]["step"] > 0
    assert invoke("doctor", "--embedding-dtype", "int4").exit_code == 2
