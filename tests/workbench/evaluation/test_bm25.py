from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from negative_cache.workbench.data import RetrievalData
from negative_cache.workbench.evaluation.bm25 import K1, B, bm25_run


def data_of(corpus: dict[str, str], queries: dict[str, str]) -> RetrievalData:
    return RetrievalData("d", corpus, queries, {"test": {query: [next(iter(corpus))] for query in queries}})


def oracle(corpus: dict[str, str], query: str) -> dict[str, float]:
    """Robertson's formula with Lucene's inverse document frequency and without the factor k1 + 1."""
    documents = {name: Counter(text.lower().split()) for name, text in corpus.items()}
    mean_length = sum(map(Counter.total, documents.values())) / len(documents)
    scores = {}
    for name, counts in documents.items():
        score = 0.0
        for word in query.lower().split():
            holders = sum(word in other for other in documents.values())
            idf = math.log(1 + (len(documents) - holders + 0.5) / (holders + 0.5))
            length = K1 * (1 - B + B * counts.total() / mean_length)
            score += idf * counts[word] / (counts[word] + length)
        if score > 0:
            scores[name] = score
    return scores


def test_scores_are_those_of_the_formula():
    rng = random.Random(0)
    words = ["Red", "green", "blue", "the", "a", "x", "7", "naïve", "ЁЖ", "under_score"]
    corpus = {f"d{n}": " ".join(rng.choices(words, k=rng.randint(0, 9))) for n in range(40)}
    queries = {f"q{n}": " ".join(rng.choices([*words, "unknown"], k=rng.randint(1, 5))) for n in range(15)}
    queries["q0"] = "Red red RED"  # a word counts each time
    run = bm25_run(data_of(corpus, queries), "test", k=1000)
    assert list(run) == list(queries)
    for query, text in queries.items():
        assert run[query] == pytest.approx(oracle(corpus, text), rel=1e-5)


def test_the_best_documents_come_first_and_ties_in_descending_order_of_ids():
    corpus = {"a": "red", "b": "red red", "c": "red", "e": "green", "d": "red", "f": "blue", "g": ""}
    queries = {"q": "red", "none": "unknown words", "empty": "...", "r": "green blue"}
    data = data_of(corpus, queries)
    for k in (1, 2, 3, 4, 5, 100):
        run = bm25_run(data, "test", k)
        assert list(run["q"]) == ["b", "d", "c", "a"][:k]
        assert list(run["r"]) == ["f", "e"][:k]
        assert run["none"] == run["empty"] == {}
    assert bm25_run(data_of({"a": "...", "b": ""}, {"q": "red"}), "test", 5) == {"q": {}}


def test_the_document_with_the_id_of_the_query_is_left_out_if_the_data_ignore_it():
    data = data_of({"a": "red red", "b": "red", "c": "green"}, {"a": "red", "c": "red"})
    assert list(bm25_run(data, "test", 1)["a"]) == ["a"]
    data = replace(data, ignores_identical_ids=True)
    assert list(bm25_run(data, "test", 1)["a"]) == ["b"]
    assert list(bm25_run(data, "test", 2)["c"]) == ["a", "b"]


def test_a_split_is_searched_in_its_own_corpus():
    other = data_of({"x": "green", "y": "red"}, {"p": "red"})
    data = replace(data_of({"a": "red"}, {"q": "red"}), elsewhere={"test": other})
    assert [list(found) for found in bm25_run(data, "test", 5).values()] == [["y"]]


def test_chinese_and_japanese_are_searched_by_character():
    data = data_of(
        {"a": "北京大学在北京", "b": "上海的天气", "c": "カタカナ と かな"},
        {"q": "北京", "r": "天氣", "s": "かカタカナ"},
    )
    run = bm25_run(data, "test", 10)
    assert list(run["q"]) == ["a"]
    assert list(run["r"]) == ["b"]
    assert list(run["s"]) == ["c"]


@pytest.mark.parametrize("first", ["", "import jax.lax; ", "from bm25s import selection; "])
def test_jax_is_left_alone(tmp_path: Path, first: str):
    """bm25s starts JAX, which takes most of the memory of a GPU."""
    lax = tmp_path / "jax" / "lax.py"
    lax.parent.mkdir()
    (lax.parent / "__init__.py").write_text("")
    lax.write_text("def top_k(*_):\n    print('JAX has started')\n")
    use = "import negative_cache.workbench.evaluation.bm25; import jax.lax; print(jax.lax.__name__)"
    ran = subprocess.run(
        [sys.executable, "-c", first + use],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    started = ["JAX has started"] if "bm25s" in first else []  # without us: the test can fail
    assert ran.stdout.split("\n") == [*started, "jax.lax", ""]
