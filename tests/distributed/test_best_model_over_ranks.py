"""Several ranks keep the best model on the dev split, and stop early at the same step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from command_line import DOCUMENTS, write_beir
from negative_cache.workbench.data import load_data
from negative_cache.workbench.evaluation import evaluate
from negative_cache.workbench.models import load_model


def test_ranks_stop_at_the_same_step_and_save_the_best_model(tmp_path: Path):
    write_beir(tmp_path / "set")
    keys = list(DOCUMENTS)
    wrong = [f"q{key}\t{keys[at - 7]}\t1" for at, key in enumerate(keys)]  # so that the dev split gets worse
    (tmp_path / "set" / "qrels" / "train.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *wrong]) + "\n")
    load_model("static", DOCUMENTS.values(), 0).save_pretrained(str(tmp_path / "model"), create_model_card=False)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    job = str(Path(__file__).parents[1] / "best_model_job.py")
    ended = subprocess.run(
        [*launch, job, str(tmp_path)], env=environment, timeout=120, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert ended.returncode == 0, ended.stdout.decode()
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    found = {row["step"]: row[key] for row in record["history"] for key in row if key == "eval_dev_cosine_mrr@10"}
    steps = list(found)
    assert record["ranks"] == 2
    assert record["best_step"] == max(found, key=lambda step: (found[step], -step))
    assert record["steps"] == steps[-1] < 40
    assert steps.index(record["best_step"]) == len(steps) - 3  # then two evaluations were not better
    assert [(tmp_path / f"steps-{rank}").read_text() for rank in (0, 1)] == [str(record["steps"])] * 2
    quality = evaluate(SentenceTransformer(str(tmp_path / "out")), load_data(str(tmp_path / "set")), ("dev", "test"))
    assert quality["dev"].metrics()["MRR@10"] == pytest.approx(found[record["best_step"]])
    assert found[record["best_step"]] > found[steps[-1]]
    assert quality["test"].metrics() == record["after"]
