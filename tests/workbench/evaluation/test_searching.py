"""Search in a corpus, and documents that are ignored."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from negative_cache.workbench.data import DataError, RetrievalData
from negative_cache.workbench.evaluation import encoding, searching
from negative_cache.workbench.evaluation.encoding_options import EncodingError, EncodingOptions
from negative_cache.workbench.evaluation.measures import ranked
from negative_cache.workbench.evaluation.quality import evaluate, make_evaluator
from negative_cache.workbench.evaluation.searching import search_corpus, search_splits
from negative_cache.workbench.model_names import ModelError
from negative_cache.workbench.models import load_model
from support import Recorder

TEXTS = {
    "one": "one", "two": "a much longer one than that", "3": "three or so", "4": "", "5": "five", "6": "a six",
    "7": "seven is it",
}  # fmt: skip


def dataset(seed: int = 0, num_documents: int = 130) -> RetrievalData:
    """Each of the first 20 queries is a document, too, with the same id."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdefghij", k=4)) for _ in range(60)]
    corpus = {f"d{number}": " ".join(chance.sample(words, 6)) for number in range(num_documents)}
    queries = {f"d{number}": corpus[f"d{number}"] for number in range(20)} | {"other": " ".join(words[:4])}
    relevant = {query: chance.sample(["d50", "d70", "d90", "d110"], 2) for query in queries}
    return RetrievalData("set", corpus, queries, {"test": relevant})


def test_documents_are_encoded_in_chunks_with_progress(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encoding, "TEXTS_PER_CALL", 3)
    monkeypatch.setattr(searching, "DOCUMENTS_PER_CHUNK", 4)
    model = load_model("static", TEXTS.values(), seed=0)
    reported: list[tuple[int, int]] = []
    queries = {"a": "one of seven", "b": "five"}
    run = search_corpus(model, TEXTS, queries, 7, on_progress=lambda *progress: reported.append(progress))
    assert reported == [(3, 7), (4, 7), (7, 7)]
    scores = model.similarity(model.encode(list(queries.values())), model.encode(list(TEXTS.values())))
    for row, found in zip(scores.tolist(), run.values(), strict=True):
        expected = dict(zip(TEXTS, row, strict=True))
        assert found == pytest.approx(expected, abs=1e-6)
        assert list(found) == ranked(found)


def test_a_document_with_the_id_of_the_query_is_left_out_of_its_results():
    """As if each query were searched in the corpus without that document."""
    data = dataset()
    corpus, relevant = dict(data.corpus), data.qrels["test"]
    model = load_model("static", corpus.values(), seed=0)
    plain = evaluate(model, data, ("test",))["test"].metrics()
    assert plain["R@1"] == 0  # a query's own text is always the first

    ignoring = data.ignoring_identical_ids()
    found = evaluate(model, ignoring, ("test",))["test"]
    for query, documents in relevant.items():
        others = {name: text for name, text in corpus.items() if name != query}
        part = evaluate(model, replace(data, corpus=others, qrels={"test": {query: documents}}), ("test",))["test"]
        assert part.run[query] == pytest.approx(found.run[query], abs=1e-6)
        for name, values in part.per_query.items():
            assert values[query] == found.per_query[name][query], name
    assert found.metrics()["MRR@10"] > plain["MRR@10"]

    of_trainer = make_evaluator(model, ignoring, "test")(model)
    ours = {"mrr@10": "MRR@10", "ndcg@10": "nDCG@10", "recall@1": "R@1", "recall@10": "R@10", "recall@100": "R@100"}
    for name, measure in {**ours, "map@100": "AP@100"}.items():
        assert of_trainer[f"test_cosine_{name}"] == pytest.approx(found.metrics()[measure]), name
    assert "test_cosine_accuracy@101" not in of_trainer

    every = search_splits(model, ignoring, ("test",), 130)["test"]
    for query, documents in every.items():
        assert query not in documents
        assert len(documents) == (130 if query == "other" else 129)


class Scores:
    """A model that only scores: the similarity of a query and a document is a given number."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores

    def add(self, best: searching._Best, places: Tensor, size: int) -> None:
        """Add all documents in chunks of `size`."""
        for start in range(0, len(places), size):
            chunk = slice(start, start + size)
            best.add(torch.arange(len(places))[chunk], places[chunk], start)

    def similarity(self, queries: Tensor, documents: Tensor) -> Tensor:
        return self.scores[queries][:, documents]


@pytest.mark.parametrize("size", [7, 64, 200])
def test_the_best_documents_are_those_of_a_sort_in_bounded_memory(monkeypatch: pytest.MonkeyPatch, size: int):
    """Also with ties at the boundary, infinite scores, NaN with a sign, and zeros with a sign."""
    num_documents, depth = 200, 30
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-5, 5, (9, num_documents), generator=generator).float()  # with ties
    scores[0, :50] = torch.nan
    scores[0, 50:60] = -torch.nan
    scores[1, ::3] = torch.inf
    scores[1, 1::3] = -torch.inf
    scores[2] = torch.where(torch.arange(num_documents) % 2 == 0, 0.0, -0.0)
    names = [f"d{number}" for number in torch.randperm(num_documents, generator=generator).tolist()]
    texts = searching.Texts.of(dict.fromkeys(names, ""))
    places = torch.from_numpy(texts.places_of_ids())
    ignored = torch.tensor([-1] * 8 + [17])
    largest = max(2 * size, 10 * depth)
    monkeypatch.setattr(searching, "SCORES_PER_BLOCK", largest)
    model, recorder = Scores(scores), Recorder()
    best = searching.BestDocuments(torch.arange(9), model.similarity, depth, ignored)
    with recorder:
        model.add(best, places, size)
    assert recorder.largest <= max(largest, 9 * num_documents)  # the latter is the table that this test looks up
    run = best.run("abcdefghi", texts, places)
    for row, left_out, found in zip(scores.tolist(), ignored.tolist(), run.values(), strict=True):
        given = dict(zip(names, row, strict=True))
        expected = [name for name in ranked(given) if left_out < 0 or name != names[left_out]]
        assert list(found) == expected[:depth]
        assert all(value == given[name] or value != value for name, value in found.items())


def test_splits_are_searched_in_their_own_corpus_with_each_corpus_encoded_once():
    data = dataset()
    qrels = {"dev": {"other": ["d50"]}, "test": dict(data.qrels["test"])}
    other = RetrievalData("other", {"x": "abcd efgh", "y": "ijab"}, {"q": "ijab"}, {"train": {"q": ["y"]}})
    together = replace(data, qrels=qrels, elsewhere={"train": other})
    model = load_model("static", data.corpus.values(), seed=0)
    totals: list[int] = []
    runs = search_splits(
        model, together, ("dev", "test", "train"), 5, on_progress=lambda _, total: totals.append(total)
    )
    assert totals == [130, 2]
    assert {split: list(run) for split, run in runs.items()} == {
        "dev": ["other"], "test": list(qrels["test"]), "train": ["q"],
    }  # fmt: skip
    assert runs["dev"]["other"] == runs["test"]["other"] == search_corpus(model, data.corpus, data.queries, 5)["other"]
    assert set(runs["train"]["q"]) == {"x", "y"}
    quality = evaluate(model, together, ("train",))["train"]
    assert quality.metrics()["num_documents"] == 2
    with pytest.raises(DataError, match="dev"):
        search_splits(model, replace(data), ("dev",), 5)


def test_prompts_dimensions_batches_and_dtype_are_those_of_the_model_or_those_given():
    model = load_model("static", TEXTS.values(), seed=0)
    model.prompts = {"query": "three ", "document": "seven "}
    queries = {"a": "one", "b": "a much"}

    def scores(query_prompt: str, document_prompt: str, dim: int | None = None) -> list[list[float]]:
        rows = [model.encode([prompt + text for text in texts], prompt="", truncate_dim=dim)
                for prompt, texts in ((query_prompt, queries.values()), (document_prompt, TEXTS.values()))]  # fmt: skip
        return model.similarity(*rows).tolist()

    def found(**options: Any) -> list[list[float]]:
        run = search_corpus(model, TEXTS, queries, 7, options=EncodingOptions(**options))
        return [[run[query][name] for name in TEXTS] for query in queries]

    def close(expected: list[list[float]], tolerance: float = 1e-6) -> list[Any]:
        return [pytest.approx(row, abs=tolerance) for row in expected]

    assert found(batch_size=2) == close(scores("three ", "seven "))
    assert found(query_prompt="", document_prompt="it ", truncate_dim=16) == close(scores("", "it ", 16))
    assert found(query_prompt="", document_prompt="", dtype="bfloat16", device="cpu") == close(scores("", ""), 0.02)
    assert next(model.parameters()).dtype == torch.bfloat16
    with pytest.raises(ModelError, match="--max-seq-length has no effect on a static model"):
        found(max_seq_length=4)
    with pytest.raises(EncodingError, match="--truncate-dim is 999; the embeddings have 256"):
        found(truncate_dim=999)


def test_texts_are_cut_at_the_length_that_is_given():
    model = load_model("tiny", TEXTS.values(), seed=0)
    long = {name: f"{text} {'more words ' * 9}" for name, text in TEXTS.items()}
    queries = {"a": "one"}
    whole = search_corpus(model, long, queries, 7)
    options = EncodingOptions(max_seq_length=3)
    assert search_corpus(model, long, queries, 7, options=options) != whole
    model.max_seq_length = 3
    assert search_corpus(model, long, queries, 7) == search_corpus(model, long, queries, 7, options=options)
    with pytest.raises(ModelError, match="--max-seq-length is 9999; the model has positions for"):
        search_corpus(model, long, queries, 7, options=EncodingOptions(max_seq_length=9999))


def test_several_devices_give_the_results_of_one(tmp_path: Path):
    data = dataset(num_documents=60)
    load_model("static", data.corpus.values(), seed=0).save_pretrained(str(tmp_path / "model"))
    model = SentenceTransformer(str(tmp_path / "model"))
    runs = [
        search_corpus(model, data.corpus, data.queries, 10, options=EncodingOptions(device=device))
        for device in ("cpu", "cpu, cpu")
    ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"truncate_dim": -1}, "--truncate-dim is -1"),
        ({"max_seq_length": 0}, "--max-seq-length is 0"),
        ({"dtype": "int8"}, "expected one of float32, bfloat16, float16"),
        ({"device": "gpu"}, "'gpu' is not available"),
        ({"device": "cpu,"}, "'' is not available"),
        ({"device": "cpu,cuda:77"}, "'cuda:77' is not available"),
    ],
)
def test_options_that_cannot_be_used_are_an_error(options: dict[str, Any], message: str):
    with pytest.raises(EncodingError, match=message):
        EncodingOptions(**options)
