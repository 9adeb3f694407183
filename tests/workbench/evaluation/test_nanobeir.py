"""NanoBEIR, from a local folder of its layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset

from command_line import DOCUMENTS
from negative_cache.workbench.data import RetrievalData
from negative_cache.workbench.evaluation import EncodingOptions, evaluate
from negative_cache.workbench.evaluation.nanobeir import NAMES, NanoBeirError, evaluate_nanobeir, parse_names
from negative_cache.workbench.models import load_model

SPLITS = ("NanoNQ", "NanoFEVER")


def write_nanobeir(folder: Path) -> None:
    """Each split has 40 of the documents, and queries of two of their words."""
    configurations = []
    for subset in ("corpus", "queries", "qrels"):
        (folder / subset).mkdir(parents=True)
        files = [f"  - split: {split}\n    path: {subset}/{split}.parquet" for split in SPLITS]
        configurations.append("\n".join([f"- config_name: {subset}", "  data_files:", *files]))
    (folder / "README.md").write_text("\n".join(["---", "configs:", *configurations, "---", ""]))
    for number, split in enumerate(SPLITS):
        part = dict(list(DOCUMENTS.items())[40 * number : 40 * number + 40])
        rows = {
            "corpus": [{"_id": key, "text": text} for key, text in part.items()],
            "queries": [{"_id": f"q{key}", "text": " ".join(text.split()[4:6])} for key, text in part.items()],
            "qrels": [{"query-id": f"q{key}", "corpus-id": key} for key in part],
        }
        for subset, content in rows.items():
            Dataset.from_list(content).to_parquet(str(folder / subset / f"{split}.parquet"))


def test_metrics_are_those_of_the_same_data_and_their_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_nanobeir(tmp_path / "nano")
    model = load_model("static", DOCUMENTS.values(), seed=0)
    options, progress = EncodingOptions(query_prompt="the ", document_prompt="", truncate_dim=64), []
    found = evaluate_nanobeir(
        model, ["nq", "fever"], options, lambda *done: progress.append(done), dataset=str(tmp_path / "nano")
    )
    assert progress == [(1, 2), (2, 2)]
    assert list(found) == [*SPLITS, "mean"]
    for number, split in enumerate(SPLITS):
        part = dict(list(DOCUMENTS.items())[40 * number : 40 * number + 40])
        queries = {f"q{key}": " ".join(text.split()[4:6]) for key, text in part.items()}
        data = RetrievalData("x", part, queries, {"test": {f"q{key}": [key] for key in part}})
        expected = evaluate(model, data, ("test",), options=options)["test"].metrics()
        assert 0 < expected["MRR@10"] < 1
        assert found[split] == pytest.approx(expected, abs=1e-6)
    assert found["mean"]["nDCG@10"] == pytest.approx(sum(found[split]["nDCG@10"] for split in SPLITS) / 2)
    with pytest.raises(NanoBeirError, match="Cannot load msmarco of"):
        evaluate_nanobeir(model, ["msmarco"], options, dataset=str(tmp_path / "nano"))


def test_names_of_its_datasets_are_checked():
    assert parse_names("all") == list(NAMES)
    assert parse_names("MSMARCO, nq") == ["msmarco", "nq"]
    with pytest.raises(NanoBeirError, match="'trec' is no dataset of NanoBEIR; expected all, climatefever"):
        parse_names("nq,trec")
