"""The quality before training is measured once for a model and data, and then kept in the user's cache folder."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer

from command_line import DOCUMENTS, invoke
from negative_cache.workbench.data import RetrievalData, load_data
from negative_cache.workbench.evaluation import evaluate
from negative_cache.workbench.models import load_model
from negative_cache.workbench.training import before
from negative_cache.workbench.training.before import quality_before

NOTE = "The quality before training is that of an earlier run with the same model and data, from "


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "negative-cache" / "before"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    load_model("tiny", DOCUMENTS.values(), 0).save_pretrained(str(tmp_path / "start"), create_model_card=False)
    return tmp_path / "start"


@pytest.fixture
def data(beir: Path) -> RetrievalData:
    return load_data(str(beir))


class Counted:
    """Counts the evaluations, by their progress."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, done: int, total: int) -> None:
        self.number += done == total

    def measure(self, folder: Path, data: RetrievalData) -> dict[str, Any]:
        return quality_before(SentenceTransformer(str(folder)), folder, data, self)


def test_a_second_run_takes_over_what_it_would_measure(
    saved: Path, beir: Path, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
):
    given = ["train", "--data", beir, "--model", saved, "--batch-size", 8, "--max-steps", 2, "--report-to", "none"]
    options: dict[str, list[object]] = {
        "first": ["--cache-size", 32],
        "second": ["--loss", "in-batch", "--seed", 5, "--learning-rate", 0.01],
        "elsewhere": ["--loss", "in-batch"],
    }
    found = {}
    for name, others in options.items():
        environment = {"XDG_CACHE_HOME": str(tmp_path / "other")} if name == "elsewhere" else {}
        caplog.clear()
        ended = invoke(*given, *others, "--output", tmp_path / name, **environment)
        assert ended.exit_code == 0, ended.output
        (kept,) = cache.iterdir()
        assert any(message.startswith(f"{NOTE}{kept}. Remove the file") for message in caplog.messages) == (
            name == "second"
        )
        files = [json.loads((tmp_path / name / f"{file}.json").read_text()) for file in ("run", "queries")]
        found[name] = [content["before"] for content in files]
    assert found["first"] == found["second"] == found["elsewhere"]
    model = SentenceTransformer(str(saved))
    quality = evaluate(model, load_data(str(beir)), ("test",))["test"]
    assert found["second"] == [quality.metrics(), quality.per_query]


def test_another_model_or_other_data_is_measured(saved: Path, data: RetrievalData, tmp_path: Path, cache: Path):
    counted = Counted()
    counted.measure(saved, data)
    counted.measure(saved, replace(data, notes=("a note",), negatives={}))
    assert counted.number == 1
    others = [
        data.with_eval_documents(30),
        replace(data, corpus={**data.corpus, "new": "a text"}),
        replace(data, corpus=dict(reversed(list(data.corpus.items())))),
        replace(data, queries={**data.queries, "qd70": "other"}),
        replace(data, qrels={**data.qrels, "test": {**data.qrels["test"], "qd70": ["d1"]}}),
        replace(data, grades={"test": {"qd70": {"d70": 2.0}}}),
    ]
    for number, other in enumerate(others, start=2):
        counted.measure(saved, other)
        assert counted.number == number
    model = SentenceTransformer(str(saved))
    model.prompts = {"query": "query: ", "document": ""}
    model.save_pretrained(str(tmp_path / "prompt"), create_model_card=False)
    load_model("tiny", DOCUMENTS.values(), 1).save_pretrained(str(tmp_path / "weights"), create_model_card=False)
    for name in ("prompt", "weights"):
        counted.measure(tmp_path / name, data)
    assert counted.number == len(others) + 3 == len(list(cache.iterdir()))


@pytest.mark.parametrize("damage", ["", "[]", "{}", "{", '{"measured": 3, "digest": "x"}', None, b"\xff"])
def test_a_damaged_file_is_measured_again_and_replaced(
    damage: str | bytes | None, saved: Path, data: RetrievalData, cache: Path
):
    counted = Counted()
    first = counted.measure(saved, data)
    (kept,) = cache.iterdir()
    whole = kept.read_text()
    if isinstance(damage, bytes):
        kept.write_bytes(damage)
    else:
        kept.write_text(whole.replace('"num_documents": 80', '"num_documents": 81') if damage is None else damage)
    assert kept.read_bytes() != whole.encode()
    assert counted.measure(saved, data) == first
    assert (counted.number, kept.read_text()) == (2, whole)


def test_a_cache_folder_that_cannot_be_used_is_no_error(
    saved: Path, data: RetrievalData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    counted = Counted()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert counted.measure(saved, data) == counted.measure(saved, data)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    counted.measure(saved, data)
    assert counted.number == 3


def test_the_files_that_were_used_last_are_kept(
    saved: Path, data: RetrievalData, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(before, "MAX_KEPT", 2)
    counted, sizes = Counted(), (30, 40, 50)
    names = []
    for number, size in enumerate(sizes[:2]):
        counted.measure(saved, data.with_eval_documents(size))
        (new,) = set(cache.iterdir()) - set(names)
        os.utime(new, (number, number))
        names.append(new)
    counted.measure(saved, data.with_eval_documents(30))  # now the second one was not used for longer
    counted.measure(saved, data.with_eval_documents(50))
    assert names[0] in cache.iterdir()
    assert names[1] not in cache.iterdir()
    assert len(list(cache.iterdir())) == 2
    assert counted.number == 3
