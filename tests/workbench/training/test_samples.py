"""The samples of a run, against plain computations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss
from negative_cache.objective.batch import EMBEDDING
from negative_cache.workbench.data import RetrievalData, load_data
from negative_cache.workbench.evaluation import search_splits
from negative_cache.workbench.training import hard_negatives, samples
from support import ANCHORS, POSITIVES


def test_ranks_of_hits_agree_with_a_sort(static: SentenceTransformer):
    data = RetrievalData(
        "data",
        {f"d{n}": text for n, text in enumerate(POSITIVES)},
        {f"q{n}": text for n, text in enumerate(ANCHORS)},
        {"test": {"q3": ["d3", "d5"], "q7": ["d7"]}},
    )
    embeddings = static.encode(POSITIVES)
    for depth in (len(POSITIVES), 1):
        run = search_splits(static, data, ("test",), depth)["test"]
        results = samples.results_of(data, "test", run)
        for entry in samples.hits(data, "test", results, list(run)):
            scores = static.similarity(static.encode([entry["text"]]), embeddings)[0]
            order = [f"d{at}" for at in scores.argsort(descending=True).tolist()]
            relevant = data.qrels["test"][entry["query"]]
            rank = 1 + min(order.index(document) for document in relevant)
            assert entry["rank"] == (rank if rank <= depth else None)
            assert [hit["document"] for hit in entry["found"]] == order[:5][:depth]
            assert entry["num_results"] == depth


def test_the_queries_whose_rank_changed_most_are_shown():
    ranks = {  # before and after; 0 for one that is not found
        "q0": (1, 1), "q1": (0, 9), "q2": (8, 4), "q3": (2, 1), "q4": (9, 8), "q5": (7, 6), "q6": (5, 4), "q7": (1, 0),
        "q8": (0, 0), "q9": (1, 2),
    }  # fmt: skip
    data = RetrievalData(
        "data", {f"d{n}": f"text {n}" for n in range(1, 11)}, dict.fromkeys(ranks, "query"),
        {"test": {query: ["d1"] for query in ranks}},
    )  # fmt: skip

    def searched(place: int) -> samples.Results:
        run = {}
        for query, found in ranks.items():
            order = [f"d{n}" for n in range(2, 11)]
            if found[place]:
                order.insert(found[place] - 1, "d1")
            run[query] = {document: 1 - rank / 100 for rank, document in enumerate(order)}
        return samples.results_of(data, "test", run)

    first, second = searched(0), searched(1)
    shown = samples.before_and_after(data, "test", first, second)
    order = [entry["query"] for entry in shown["after"]]
    assert {*order[:2]} == {"q2", "q3"}  # both are halved
    assert order[2:] == ["q6", "q5", "q4", "q7", "q9"]  # q1 improved least: it was below nine
    assert [entry["rank"] for entry in shown["before"]] == [ranks[query][0] or None for query in order]
    assert [entry["rank"] for entry in shown["after"]] == [ranks[query][1] or None for query in order]
    assert shown["changes"] == {"better": 6, "worse": 2, "equal": 2}
    for before in (None, first):
        evenly = samples.before_and_after(data, "test", before, first)
        assert [entry["query"] for entry in evenly["after"]] == list(ranks)
        assert evenly["before"] == ([] if before is None else evenly["after"])


def test_samples_of_a_cache_agree_with_the_dense_softmax(static: SentenceTransformer):
    """Against a plain computation on the whole cache."""
    loss = NegativeCacheRankingLoss(static, cache_size=16, scale=10.0, seed=0, relative_margin=0.0)
    data = RetrievalData(
        "data",
        {f"d{n}": text for n, text in enumerate(POSITIVES)},
        {f"q{n}": text for n, text in enumerate(ANCHORS)},
        {"train": {f"q{n}": [f"d{n}"] for n in range(len(ANCHORS))}},
    )
    for first in (0, 4, 8):
        part = slice(first, first + 4)
        columns = [static.preprocess(texts[part]) for texts in (ANCHORS, POSITIVES)]
        loss(columns, torch.arange(first, first + 4)).backward()
    cache = loss.cache_loss.cache
    labels = cache.document_ids[:12, 1]
    with torch.no_grad():
        cache.stored(EMBEDDING)[0].add_(0.1 * torch.randn(16, 32, generator=torch.Generator().manual_seed(0)))
    found = samples.of_cache(loss, static, data)
    queries = hard_negatives.embed_queries(static, ANCHORS)
    rows = cache.data[EMBEDDING][:12]
    similarities = queries @ rows.T
    assert len(found["negatives"]) == 10
    for entry in found["negatives"]:
        at = int(entry["query"][1:])
        own = float(queries[at] @ hard_negatives.embed_documents(static, POSITIVES)[at])
        assert entry["positive"]["similarity"] == pytest.approx(own, abs=1e-5)
        assert entry["positive"]["age"] == int(cache.age[:12][labels == at])
        is_negative = (labels != at) & (similarities[at] <= own)
        assert entry["num_hidden"] == 11 - int(is_negative.sum())
        expected = torch.where(is_negative, 10 * similarities[at], -torch.inf).softmax(dim=0)
        best = expected.argsort(descending=True)[: min(6, int(is_negative.sum()))]
        assert [row["document"] for row in entry["negatives"]] == [f"d{int(labels[b])}" for b in best]
        probabilities = torch.tensor([row["probability"] for row in entry["negatives"]])
        torch.testing.assert_close(probabilities, expected[best], atol=1e-5, rtol=1e-4)
    new = hard_negatives.embed_documents(static, [POSITIVES[int(number)] for number in labels])
    pairs = sorted(zip(cache.age[:12].tolist(), (rows - new).square().sum(dim=1).tolist(), strict=True))
    torch.testing.assert_close(
        torch.tensor(sorted(found["staleness_by_age"])), torch.tensor(pairs), atol=1e-5, rtol=1e-3
    )
    assert samples.of_cache(torch.nn.Identity(), static, data) == {}


def test_a_document_with_the_id_of_the_query_is_not_listed_as_a_hard_negative(
    static: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(samples, "NUM_NEGATIVES", len(POSITIVES))  # all documents that may be drawn
    loss = NegativeCacheRankingLoss(static, cache_size=16, scale=10.0, seed=0)
    names = [f"d{number}" for number in range(len(POSITIVES))]
    data = RetrievalData(
        "data",
        dict(zip(names, POSITIVES, strict=True)),
        dict(zip(names, ANCHORS, strict=True)),
        {"train": {name: [names[at - 1]] for at, name in enumerate(names)}},
    )
    loss([static.preprocess(texts) for texts in (ANCHORS, POSITIVES)], torch.arange(len(names))).backward()

    def listed(data: RetrievalData) -> list[bool]:
        entries = samples.of_cache(loss, static, data)["negatives"]
        return [entry["query"] in [row["document"] for row in entry["negatives"]] for entry in entries]

    assert all(listed(data))
    assert not any(listed(data.ignoring_identical_ids()))


def test_the_written_hard_negatives_are_the_most_similar_cached_documents(static: SentenceTransformer, tmp_path: Path):
    loss = NegativeCacheRankingLoss(static, cache_size=16, seed=0)
    qrels = {f"q{n}": [f"d{n}"] for n in range(12)} | {"q3": ["d3", "d4"]}
    data = RetrievalData(
        "data",
        {f"d{n}": text for n, text in enumerate(POSITIVES)},
        {f"q{n}": text for n, text in enumerate(ANCHORS)},
        {"train": qrels},
    )
    with pytest.raises(ValueError, match="there was no training step"):
        hard_negatives.write_hard_negatives(tmp_path / "hard.jsonl", loss, static, data)
    loss.fill_from(POSITIVES[:12], range(12), show_progress_bar=False)
    hard_negatives.write_hard_negatives(tmp_path / "hard.jsonl", loss, static, data)
    rows = [json.loads(line) for line in (tmp_path / "hard.jsonl").read_text().splitlines()]
    similarities = static.similarity(static.encode(ANCHORS[:12]), static.encode(POSITIVES[:12]))
    expected = []
    for query, relevant in qrels.items():
        at = int(query[1:])
        order = [f"d{number}" for number in similarities[at].argsort(descending=True).tolist()]
        best = [data.corpus[key] for key in order if key not in relevant][:5]
        for key in relevant:
            expected.append({"query": ANCHORS[at], "positive": data.corpus[key]})
            expected[-1] |= {f"negative_{number}": text for number, text in enumerate(best, start=1)}
    assert rows == expected
    read = load_data(str(tmp_path / "hard.jsonl"))
    assert read.form == "n-tuples"
    assert sum(map(len, read.negatives.values())) == 12 * 5
