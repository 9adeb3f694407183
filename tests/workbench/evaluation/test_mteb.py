"""The folder that `train` writes, in mteb."""

from __future__ import annotations

import json
from pathlib import Path

import mteb
import pytest
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from sentence_transformers import SentenceTransformer

from command_line import DOCUMENTS, invoke
from negative_cache.workbench.data import load_data


def task_of(folder: Path) -> AbsTaskRetrieval:
    """A retrieval task of mteb with the test split of a data set."""
    data = load_data(str(folder))
    judged = data.judged("test")

    class Task(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="OwnRetrieval",
            description="A data set of files.",
            dataset={"path": "own", "revision": "1"},
            type="Retrieval",
            category="t2t",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, *_: object, **__: object) -> None:
            corpus = [{"id": key, "title": "", "text": text} for key, text in data.corpus.items()]
            queries = [{"id": key, "text": data.queries[key]} for key in judged]
            part = {
                "corpus": Dataset.from_list(corpus),
                "queries": Dataset.from_list(queries),
                "relevant_docs": {key: dict.fromkeys(documents, 1) for key, documents in judged.items()},
                "top_ranked": None,
            }
            self.dataset, self.data_loaded = {"default": {"test": part}}, True

    return Task()


def test_mteb_measures_a_trained_model_as_evaluate_does(beir: Path, tmp_path: Path):
    queries = [{"id": f"q{key}", "text": text.split()[1]} for key, text in DOCUMENTS.items()]  # eight documents each
    (beir / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    given = ["--data", beir, "--batch-size", 8, "--cache-size", 64, "--max-steps", 4]
    assert invoke("train", "--output", tmp_path / "model", *given).exit_code == 0
    model = SentenceTransformer(str(tmp_path / "model"))
    result = mteb.evaluate(model, task_of(beir), cache=None, show_progress_bar=False, co2_tracker=False)
    (scores,) = result.task_results[0].scores["test"]
    ours = json.loads(invoke("evaluate", "--model", tmp_path / "model", "--data", beir, "--json").stdout)
    for name, key in (("nDCG@10", "ndcg_at_10"), ("R@10", "recall_at_10"), ("AP@100", "map_at_100")):
        assert scores[key] == pytest.approx(ours[name], abs=1e-5), name  # mteb rounds to five decimals
    assert 0 < ours["nDCG@10"] < 1
