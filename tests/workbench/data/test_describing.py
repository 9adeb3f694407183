"""What `describe` counts, against counts of a few lines of Python, and what `advice` says about it."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from negative_cache.workbench.data import RetrievalData, describing
from negative_cache.workbench.data.advice import advice
from negative_cache.workbench.data.describing import (
    EXAMPLE_CHARS,
    Measure,
    count_words,
    describe,
    detectable_difference,
)


def data_of(**given) -> RetrievalData:
    return RetrievalData("set", **{"corpus": {}, "queries": {}, "qrels": {}, **given})


@pytest.fixture(scope="module")
def random_data() -> RetrievalData:
    """Texts of few words, so that many are equal, and judgements of chance."""
    chance = random.Random(0)
    words = ["red", "green", "blue", "grey"]
    texts = [" ".join(chance.choices(words, k=chance.randrange(1, 5))) for _ in range(500)]
    corpus = {f"d{number}": text for number, text in enumerate(texts[:200])}
    queries = {f"q{number}": text for number, text in enumerate(texts[200:])}
    names = list(queries)
    parts = {"other": names[:50], "test": names[50:100], "train": names[100:280]}
    qrels = {
        split: {query: chance.sample(list(corpus)[:150], chance.randrange(1, 4)) for query in part}
        for split, part in parts.items()
    }
    grades = {"test": {query: {**dict.fromkeys(qrels["test"][query], 2.0), "d160": 0.0} for query in names[50:60]}}
    negatives = {query: chance.sample(list(corpus)[150:], chance.randrange(1, 4)) for query in names[100:150]}
    return data_of(corpus=corpus, queries=queries, qrels=qrels, grades=grades, negatives=negatives, form="made up")


def test_each_split_is_counted(random_data: RetrievalData):
    found = describe(random_data)
    assert list(found["splits"]) == ["train", "test", "other"]
    corpus, queries = random_data.corpus, random_data.queries
    for name, split in found["splits"].items():
        qrels = random_data.qrels[name]
        texts = {query: {corpus[document] for document in documents} for query, documents in qrels.items()}
        uses = Counter(text for positives in texts.values() for text in positives)
        assert split["queries"] == len(qrels)
        assert split["documents"] == 200
        assert split["positives"] == sum(map(len, qrels.values()))
        assert split["negatives"] == sum(len(random_data.negatives.get(query, [])) for query in qrels)
        assert split["queries_with_several_positives"] == sum(len(documents) > 1 for documents in qrels.values())
        assert split["queries_that_share_a_positive"] == sum(
            any(uses[text] > 1 for text in positives) for positives in texts.values()
        )
        assert split["queries_of_most_frequent_positive"] == max(uses.values())
        assert uses[split["most_frequent_positive"]] == max(uses.values())
        assert split["positives_equal_to_query"] == sum(
            queries[query] == corpus[document] for query, documents in qrels.items() for document in documents
        )
    num_graded = sum(len(random_data.qrels["test"][f"q{number}"]) for number in range(50, 60))
    num_others = found["splits"]["test"]["positives"] - num_graded
    assert found["splits"]["test"]["grades"] == {"0": 10, "1": num_others, "2": num_graded}
    assert found["splits"]["train"]["grades"] == {"1": found["splits"]["train"]["positives"]}


def test_texts_of_a_dataset_are_counted(random_data: RetrievalData):
    found = describe(random_data)
    corpus, queries, qrels = random_data.corpus, random_data.queries, random_data.qrels
    assert (found["name"], found["form"], found["documents"], found["queries"]) == ("set", "made up", 200, 300)
    assert found["duplicates"] == {
        "documents": 200 - len(set(corpus.values())),
        "queries": 300 - len(set(queries.values())),
    }
    assert found["near_duplicates"]["sample"] == len(set(corpus.values()))
    positives = {
        name: {corpus[document] for documents in of_split.values() for document in documents}
        for name, of_split in qrels.items()
    }
    others = [text for text in corpus.values() if text not in set().union(*positives.values())]
    negatives = {corpus[document] for documents in random_data.negatives.values() for document in documents}
    assert found["documents_without_query"] == len(others)
    assert found["only_negatives"] == sum(text in negatives for text in others)
    assert found["queries_equal_to_document"] == sum(text in set(corpus.values()) for text in queries.values())
    expected = []
    for first, second in combinations(["train", "test", "other"], 2):
        texts = {queries[query] for query in qrels[first]}
        shared = sum(queries[query] in texts for query in qrels[second])
        both = len(positives[first] & positives[second])
        expected.append({"first": first, "second": second, "queries": shared, "documents": both})
    counted = [{key: number for key, number in overlap.items() if key != "alike"} for overlap in found["overlap"]]
    assert sorted(counted, key=str) == sorted(expected, key=str)


def test_positives_that_resemble_those_of_another_split_are_counted(monkeypatch: pytest.MonkeyPatch):
    words = [" ".join(f"{letter}{number}" for letter in "abcdefghijkl") for number in range(4)]
    corpus = {"a": words[0], "b": words[1], "c": f"{words[0]} x", "d": words[2], "e": f"{words[3]} x", "f": words[3]}
    qrels = {"train": {"p": ["a"], "q": ["b", "f"]}, "test": {"r": ["c", "d"], "s": ["b", "e"]}}
    data = data_of(corpus=corpus, queries={query: query for query in "pqrs"}, qrels=qrels)
    (overlap,) = describe(data)["overlap"]
    assert overlap == {"first": "train", "second": "test", "queries": 0, "documents": 1, "alike": 2}  # c and e
    assert any(line.startswith("50 % of the test positives resemble a train") for line in advice(describe(data)))
    monkeypatch.setattr(describing, "MAX_SAMPLE", 5)
    (overlap,) = describe(data)["overlap"]
    assert overlap["alike"] is None


def test_lengths_are_percentiles_of_what_the_measure_returns(random_data: RetrievalData):
    reports = []
    measure = Measure("characters", lambda texts: [len(text) for text in texts], 15)
    found = describe(random_data, measure, lambda done, total: reports.append((done, total)))["lengths"]
    lengths = sorted(map(len, random_data.corpus.values()))
    assert found["documents"] == {str(p): lengths[math.ceil(2 * p) - 1] for p in (50, 90, 99)} | {"max": lengths[-1]}
    judged = [
        document for qrels in random_data.qrels.values() for documents in qrels.values() for document in documents
    ]
    assert (found["unit"], found["limit"]) == ("characters", 15)
    assert found["positives_over_limit"] == sum(len(random_data.corpus[document]) > 15 for document in judged)
    assert reports[-1] == (500, 500)


def test_words_are_counted_in_all_scripts():
    assert count_words(["a bc  d\n", "", "ein Wort mit ü", "我喜欢 NLP", "私はNLPが好き"]) == [3, 0, 4, 4, 6]


def test_a_split_that_is_searched_elsewhere_is_counted_there():
    other = data_of(corpus={"a": "same", "b": "x"}, queries={"q": "one"}, qrels={"test": {"q": ["a"]}})
    data = data_of(corpus={"d": "same"}, queries={"p": "one"}, qrels={"train": {"p": ["d"]}}, elsewhere={"test": other})
    found = describe(data)
    assert {name: split["documents"] for name, split in found["splits"].items()} == {"train": 1, "test": 2}
    assert found["overlap"] == [{"first": "train", "second": "test", "queries": 1, "documents": 1, "alike": 0}]
    assert found["documents_without_query"] == 0


def test_examples_have_negatives_if_there_are_any_and_are_clipped():
    long = "word " * 100
    queries = {f"q{number}": f"query {number}" for number in range(6)}
    data = data_of(
        corpus={"d": "a\ndocument", "n": long}, queries=queries, qrels={"train": {query: ["d"] for query in queries}},
        negatives={"q4": ["n"]},
    )  # fmt: skip
    found = describe(data)["examples"]
    assert [example["query"] for example in found] == ["query 4", "query 0", "query 1"]
    assert found[0]["positive"] == "a document"
    assert len(found[0]["negative"]) == EXAMPLE_CHARS
    assert found[0]["negative"].endswith("word wo...")
    assert found[1]["negative"] is None


def test_data_without_a_judgement_or_document_is_described():
    found = describe(data_of())
    assert (found["documents"], found["splits"], found["examples"], found["overlap"]) == (0, {}, [], [])
    assert found["lengths"]["documents"] == {}
    assert len(advice(found)) == 2


def test_the_detectable_difference_is_what_chance_exceeds_in_one_of_twenty_comparisons():
    random_numbers = np.random.default_rng(0)
    means = random_numbers.normal(0, 0.3, size=(20_000, 100)).mean(axis=1)
    assert abs((np.abs(means) > detectable_difference(100)).mean() - 0.05) < 0.01


# Advice


def pairs(queries: list[str], documents: list[str], split: str = "train", first: int = 0) -> dict:
    """A query for each document, by number."""
    numbers = range(first, first + len(queries))
    return {
        "corpus": {f"d{number}": text for number, text in zip(numbers, documents, strict=True)},
        "queries": {f"q{number}": text for number, text in zip(numbers, queries, strict=True)},
        "qrels": {split: {f"q{number}": [f"d{number}"] for number in numbers}},
    }


def joined(*parts: dict) -> RetrievalData:
    return data_of(**{name: {k: v for part in parts for k, v in part[name].items()} for name in parts[0]})


UNLIKE = [" ".join(f"{a}{number}" for a in "abcdef") for number in range(1_000)]
ASKED = [f"question {number}" for number in range(1_000)]
TEST = pairs(ASKED[500:], UNLIKE[500:], "test", first=500)


def test_data_without_a_fault_gets_no_advice():
    assert advice(describe(joined(pairs(ASKED[:500], UNLIKE[:500]), TEST))) == []


def test_few_queries_with_the_same_positive_are_chance():
    train, test = pairs(ASKED[:20], ["yes"] * 3 + UNLIKE[:17]), pairs(ASKED[500:502], ["no"] * 2, "test", first=500)
    assert not any("same positive" in line for line in advice(describe(joined(train, test))))


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        ((ASKED[:500], UNLIKE[:500]), None, "no test split"),
        (
            (ASKED[:500], UNLIKE[:500]),
            pairs(ASKED[500:540], UNLIKE[500:540], "test", first=500),
            r"only 40 test queries: a difference in MRR@10 under about 0\.09 may be chance",
        ),
        ((ASKED[440:940], UNLIKE[:500]), TEST, "88 % of the test queries are train queries, too"),
        ((ASKED[:500], [*UNLIKE[:400], *UNLIKE[:100]]), TEST, "10 % of the documents are equal to an earlier one"),
        ((ASKED[:400] + ASKED[:100], UNLIKE[:500]), TEST, "10 % of the queries are equal to an earlier one"),
        (
            (ASKED[:500], [f"{UNLIKE[0]} {'same words again ' * 5} {n}" for n in range(500)]),
            TEST,
            "50 % of 1,000 examined documents resemble another one",
        ),
        (
            (ASKED[:500], [text + " word" * 400 * (n < 200) for n, text in enumerate(UNLIKE[:500])]),
            TEST,
            "20 % of the positives are longer than 380 words",
        ),
        ((ASKED[:500], ["yes"] * 500), TEST, "every train query has the same positive"),
        (
            (ASKED[:500], ["yes"] * 100 + UNLIKE[:400]),
            TEST,
            "20 % of the train queries, 100, have the same positive: 'yes'. Check that .* placeholder.$",
        ),
        (
            (ASKED[:500], UNLIKE[:500]),
            pairs(ASKED[500:506], UNLIKE[500:501] * 6, "test", first=500),
            "every test query has the same positive: it measures the rank of one document",
        ),
        ((UNLIKE[:500], UNLIKE[:500]), TEST, "100 % of the train pairs have equal texts"),
        ((UNLIKE[:500], UNLIKE[:500]), TEST, "50 % of the queries are documents, too"),
    ],
)
def test_a_fault_is_named_with_its_size(train: tuple[list[str], list[str]], test: dict | None, expected: str):
    found = describe(joined(*([pairs(*train)] if test is None else [pairs(*train), test])))
    assert any(re.match(expected, line) for line in advice(found)), advice(found)


def test_data_without_training_pairs_says_so():
    assert advice(describe(joined(TEST))) == ["no train split: the data can be evaluated on, but not trained on."]


def test_dev_and_test_may_share_queries_with_a_warning_and_parts_of_dev_without():
    half = {"test": dict(list(TEST["qrels"]["test"].items())[:250])}
    dev, small = TEST["qrels"]["test"], half["test"]
    data = joined(pairs(ASKED[:500], UNLIKE[:500]), TEST)
    (warning,) = advice(describe(replace(data, qrels={**data.qrels, "dev": dev})))
    assert warning.startswith(
        "100 % of the test queries are dev queries, too: metrics of test are too high if a learning"
    )
    parts = {"train": data.qrels["train"], "dev": dev, "dev.small": small}
    (warning,) = advice(describe(replace(data, qrels=parts)))
    assert warning.startswith("no test split")
