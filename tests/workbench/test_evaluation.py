"""Encoding of a corpus."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from negative_cache.workbench import evaluation
from negative_cache.workbench.data import RetrievalData
from negative_cache.workbench.models import load_model
from support import Recorder


def test_documents_are_encoded_in_chunks_with_progress(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evaluation, "TEXTS_PER_CHUNK", 3)
    texts = ["one", "a much longer one than that", "three or so", "", "five", "a six", "seven is it"]
    model = load_model("static", texts, seed=0)
    reported: list[tuple[int, int]] = []
    found = evaluation.encode_documents(model, texts, lambda *progress: reported.append(progress))
    torch.testing.assert_close(found, model.encode_document(texts, convert_to_tensor=True))
    assert reported == [(3, 7), (6, 7), (7, 7)]


class Scores:
    """A model that only scores: the similarity of a query and a document is a given number."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores

    def __getitem__(self, at: int) -> None:
        return None

    def encode_query(self, texts: list[str], **_: Any) -> Tensor:
        return torch.arange(len(texts))

    def similarity(self, queries: Tensor, documents: Tensor) -> Tensor:
        return self.scores[queries]


def test_many_relevant_documents_are_ranked_in_bounded_memory(monkeypatch: pytest.MonkeyPatch):
    """Ranks are those of a sort by score and id, whatever is compared at once."""
    num_documents, largest = 200, 1_000
    torch.manual_seed(0)
    scores = torch.randint(20, (3, num_documents)).float()  # with ties
    names = [f"d{number:03}" for number in range(num_documents)]
    relevant = [names[:1], names[5:150:3], names]
    data = RetrievalData(
        "x", dict.fromkeys(names, ""), dict.fromkeys("abc", ""), {"test": dict(zip("abc", relevant, strict=True))}
    )
    monkeypatch.setattr(evaluation, "SCORES_PER_CHUNK", largest)
    recorder = Recorder()
    with recorder:
        found = evaluation.metrics_of(Scores(scores), data, "test", evaluation.Corpus(names, torch.empty(200, 1)))
    assert recorder.largest <= largest
    for k in (1, 10, 100):
        best = [{names[at] for at in row.argsort(descending=True, stable=True)[:k].tolist()} for row in scores]
        recalls = [len(top.intersection(own)) / len(own) for top, own in zip(best, relevant, strict=True)]
        assert found[f"recall@{k}"] == pytest.approx(sum(recalls) / 3)
