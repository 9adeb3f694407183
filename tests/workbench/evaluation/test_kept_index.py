"""The embeddings of a corpus are kept between searches: exactly, for the same model, texts and options only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from command_line import DOCUMENTS
from negative_cache.workbench.data.texts import Texts
from negative_cache.workbench.evaluation import index as indices
from negative_cache.workbench.evaluation import searching
from negative_cache.workbench.evaluation.encoding_options import EncodingOptions
from negative_cache.workbench.evaluation.index import Index, index_of
from negative_cache.workbench.evaluation.searching import search
from negative_cache.workbench.models import load_model

CORPUS = Texts.of(DOCUMENTS)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "negative-cache" / "index"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("model"))
    load_model("tiny", DOCUMENTS.values(), seed=0).save_pretrained(folder, create_model_card=False)
    return folder


@pytest.fixture
def model(saved: str) -> SentenceTransformer:
    return SentenceTransformer(saved)


def index_for(model: str | SentenceTransformer, corpus: Texts = CORPUS, **options: Any) -> Index:
    """The index for a model, which has not encoded anything yet."""
    loaded = SentenceTransformer(model) if isinstance(model, str) else model
    index = index_of(loaded, corpus, EncodingOptions(**options))
    assert index is not None
    return index


def searched(model: SentenceTransformer, index: Index | None) -> tuple[list[tuple[str, float]], int]:
    """Results, and the number of documents that were encoded."""
    encoded = [0]
    (hits,) = search(model, CORPUS, ["the river"], 80, on_progress=lambda done, _: encoded.append(done), index=index)
    return [(hit.document_id, hit.score) for hit in hits], max(encoded)


def test_a_later_search_has_the_same_results_without_encoding(
    model: SentenceTransformer, saved: str, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(searching, "DOCUMENTS_PER_CHUNK", 32)
    index = index_for(saved)
    assert not index.is_kept
    wanted = searched(model, None)
    assert wanted[1] == 80
    assert searched(model, index) == wanted
    later = index_for(saved)
    assert later.is_kept
    assert searched(model, later) == (wanted[0], 0)
    (file,) = cache.iterdir()
    assert later.path == file
    kept = np.load(file)
    np.testing.assert_allclose(kept, model.encode_document(list(DOCUMENTS.values())), atol=1e-6)
    assert later.num_bytes == kept.nbytes


def test_another_model_corpus_or_encoding_has_another_index(saved: str):
    first = index_for(saved)
    assert index_for(saved, batch_size=3, query_prompt="q: ").path == first.path
    prompted, shorter, changed = (SentenceTransformer(saved) for _ in range(3))
    prompted.prompts["document"] = "passage: "
    shorter.max_seq_length = 5
    with torch.no_grad():
        next(changed.parameters())[3] += 1e-3
    others = [
        *map(index_for, (prompted, shorter, changed)),
        index_for(saved, Texts.of(reversed(DOCUMENTS.items()))),
        index_for(saved, Texts.of({**DOCUMENTS, "d3": "changed"})),
        index_for(saved, document_prompt="passage: "),
        index_for(saved, truncate_dim=8),
        index_for(saved, max_seq_length=8),
        index_for(saved, dtype="bfloat16"),
    ]
    assert len({found.path for found in [first, *others]}) == 1 + len(others)


def test_embeddings_of_an_interrupted_or_damaged_file_are_not_used(model: SentenceTransformer, saved: str, cache: Path):
    def interrupted() -> Iterator[Tensor]:
        yield torch.zeros(40, 128)
        raise KeyboardInterrupt

    index = index_for(saved)
    with pytest.raises(KeyboardInterrupt):
        index.keep(interrupted())
    assert list(cache.iterdir()) == []
    wanted = searched(model, index)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:-1], b"", whole[128:], whole.replace(b"(80, ", b"(40, ")):
        file.write_bytes(damaged)
        again = index_for(saved)
        assert not again.is_kept
        assert searched(model, again) == wanted
        assert file.read_bytes() == whole


def test_a_search_goes_on_if_the_embeddings_cannot_be_kept(
    model: SentenceTransformer, saved: str, cache: Path, caplog: pytest.LogCaptureFixture
):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file in place of the folder")
    assert searched(model, index_for(saved)) == searched(model, None)
    assert any(message.startswith("The embeddings cannot be kept for later searches: ") for message in caplog.messages)


def test_the_files_that_were_used_last_are_kept(
    model: SentenceTransformer, saved: str, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    size = 80 * 128 * 4
    monkeypatch.setattr(indices, "MAX_BYTES", 2 * size + 1000)
    cache.mkdir(parents=True)
    for age, name in enumerate(("new.npy", "old.npy", "left-by-a-process.tmp"), start=1):
        (cache / name).write_bytes(b"0" * size)
        os.utime(cache / name, (1e9 - age, 1e9 - age))
    index = index_for(saved)
    searched(model, index)
    assert {path.name for path in cache.iterdir()} == {index.path.name, "new.npy"}
    monkeypatch.setattr(indices, "MAX_BYTES", size - 1)
    assert index_of(model, CORPUS, EncodingOptions()) is None
    assert not index_for(saved, truncate_dim=64).is_kept
