"""`train` with a transformer that has parameters without a gradient, on two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from negative_cache.workbench.data import load_data
from negative_cache.workbench.models import freeze_unused, load_model, load_trained
from support import random_pairs

POOLER = "pooler."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("transformers")
    random_pairs(path / "pairs.jsonl", 100)
    texts = load_data(str(path / "pairs.jsonl")).training_texts()
    load_model("tiny", texts, 0).save_pretrained(str(path / "model"))
    return path


def test_parameters_that_no_embedding_depends_on_are_frozen(folder: Path):
    model = load_trained(str(folder / "model"))
    freeze_unused(model)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert len(frozen) == 2
    assert all(POOLER in name for name in frozen)


@pytest.mark.parametrize("loss", ["negative-cache", "in-batch", "gradcache"])
def test_a_transformer_with_a_pooler_trains_on_two_ranks(loss: str, folder: Path):
    output = folder / loss
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "negative_cache", "train", "--data", str(folder / "pairs.jsonl"), "--model"]
    command += [str(folder / "model"), "--loss", loss, "--output", str(output), "--max-steps", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    ended = subprocess.run(
        [*command, "--batch-size", "8"], env=environment, text=True, capture_output=True, timeout=200
    )
    assert ended.returncode == 0, ended.stderr
    before, after = (load_trained(str(path)).state_dict() for path in (folder / "model", output))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in same if before[name].is_floating_point()} == {name for name in before if POOLER in name}
