"""Encoding of a corpus, and documents that are ignored."""

from __future__ import annotations

import random
from dataclasses import replace
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


def test_a_document_with_the_id_of_the_query_is_left_out_of_its_results():
    """As if each query were searched in the corpus without that document."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghij", k=4)) for _ in range(60)]
    corpus = {f"d{number}": " ".join(chance.sample(words, 6)) for number in range(130)}
    queries = {f"d{number}": corpus[f"d{number}"] for number in range(20)} | {"other": " ".join(words[:4])}
    relevant = {query: chance.sample(["d50", "d70", "d90", "d110"], 2) for query in queries}
    data = RetrievalData("set", corpus, queries, {"test": relevant})
    model = load_model("static", corpus.values(), seed=0)
    assert evaluation.evaluate(model, data, "test")["recall@1"] == 0  # a query's own text is always the first

    ignoring = data.ignoring_identical_ids()
    parts = []
    for query, documents in relevant.items():
        others = {name: text for name, text in corpus.items() if name != query}
        parts.append(
            evaluation.evaluate(model, replace(data, corpus=others, qrels={"test": {query: documents}}), "test")
        )
    found = evaluation.evaluate(model, ignoring, "test")
    names = ("mrr@10", "ndcg@10", "recall@1", "recall@10", "recall@100")
    for name in names:
        assert found[name] == pytest.approx(sum(part[name] for part in parts) / len(parts)), name
    assert found["mrr@10"] > evaluation.evaluate(model, data, "test")["mrr@10"]

    of_trainer = evaluation.make_evaluator(model, ignoring, "test")(model)
    for name in names:
        assert of_trainer[f"test_cosine_{name}"] == pytest.approx(found[name]), name
    assert "test_cosine_accuracy@101" not in of_trainer

    encoded = evaluation.encode_corpus(model, ignoring)
    for ranking in evaluation.rankings_of(model, ignoring, relevant, encoded, 130):
        listed = [name for name, _ in ranking.found]
        assert listed == [name for name in dict.fromkeys(listed) if name != ranking.query]
        assert len(listed) == (130 if ranking.query == "other" else 129)
        assert ranking.rank == 1 + min(listed.index(name) for name in relevant[ranking.query])


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
