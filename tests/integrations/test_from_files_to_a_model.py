"""`negative_cache.data`: from a folder of files, or from dicts with ids of texts, to a trained model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from negative_cache.data import DataError, DataOptions, RetrievalData, load_data
from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss
from support import ANCHORS, HARD, POSITIVES
from text_models import make_static, train

CORPUS = {f"doc_{i}": text for i, text in enumerate([*POSITIVES, *HARD])}
QUERIES = {f"q{i}": text for i, text in enumerate(ANCHORS)}
TRAIN = {f"q{i}": [f"doc_{i}", *([f"doc_{12 + i}"] if i % 2 else [])] for i in range(12)}  # one or two documents


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in the layout of BEIR."""
    (tmp_path / "qrels").mkdir()
    for name, texts in (("corpus", CORPUS), ("queries", QUERIES)):
        lines = [json.dumps({"_id": key, "text": text}) for key, text in texts.items()]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for split in ("train", "test"):
        rows = [f"{query}\t{document}\t1" for query, documents in TRAIN.items() for document in documents]
        (tmp_path / "qrels" / f"{split}.tsv").write_text(
            "\n".join(["query-id\tcorpus-id\tscore", *rows]), encoding="utf-8"
        )
    return tmp_path


def test_a_folder_trains_a_model_that_knows_all_positives(folder: Path):
    data = load_data(str(folder))
    assert data.judged("test") == TRAIN
    rows = data.training_set()
    assert rows.column_names == ["anchor", "positive", "label"]
    assert rows[1] == {"anchor": ANCHORS[1], "positive": POSITIVES[1], "label": [1, 13]}
    assert rows[2] == {"anchor": ANCHORS[1], "positive": HARD[1], "label": [13, 1]}
    model = make_static()
    loss = NegativeCacheRankingLoss(model, 64, num_samples=1, seed=0)
    train(model, loss, rows, folder / "model", steps=6)
    cache = loss.cache_loss.cache
    assert set(cache.document_ids[cache.filled, 1].tolist()) == {label[0] for label in rows["label"]}


def test_dicts_make_the_same_rows(folder: Path):
    data = RetrievalData("mine", CORPUS, QUERIES, {"train": TRAIN})
    assert data.training_set()[:] == load_data(str(folder)).training_set()[:]


def test_options_and_errors_are_public(folder: Path):
    assert load_data(str(folder), DataOptions(max_train_pairs=5)).training_set().num_rows <= 5
    with pytest.raises(DataError, match="is not a file, not a folder"):
        load_data(str(folder / "nothing"))


def test_errors_name_the_fields_of_the_options(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("page,day,answer\na,2024-05-01,b\n")
    for options, message in (
        (DataOptions(encoding="no-such"), "--encoding: there is no .* In Python: DataOptions\\(encoding=\\.\\.\\.\\)"),
        (None, "--query-column .* In Python: DataOptions\\(query_column=\\.\\.\\.\\)"),
    ):
        with pytest.raises(DataError, match=message):
            load_data(str(path), options)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "one.txt").write_text("a note")
    for name, message in (("nothing", "is not a file"), ("notes", "alone can be searched: .* --corpus .*notes$")):
        with pytest.raises(DataError, match=message) as raised:
            load_data(str(tmp_path / name))
        assert "In Python" not in str(raised.value)  # no option helps
