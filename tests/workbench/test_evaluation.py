"""Encoding of a corpus, and documents that are ignored."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from negative_cache.workbench import evaluation
from negative_cache.workbench.data import RetrievalData
from negative_cache.workbench.models import load_model


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
