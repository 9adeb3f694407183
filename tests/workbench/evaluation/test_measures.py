"""Measures, against pytrec_eval and against formulas."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import pytrec_eval

from negative_cache.workbench.evaluation.measures import MeasureError, depth_of, judge, means, parse_measures, ranked

# ours -> trec_eval's
NAMES = {
    "nDCG@10": "ndcg_cut_10", "nDCG": "ndcg", "AP": "map", "AP@100": "map_cut_100", "MRR": "recip_rank",
    "R@1": "recall_1", "R@10": "recall_10", "P@5": "P_5", "Success@5": "success_5",
}  # fmt: skip


def random_judgements(seed: int) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, float]]]:
    """Graded judgements and results with ties, queries without results, and unjudged documents."""
    chance = random.Random(seed)
    documents = [f"d{number}" for number in range(60)] + ["é", "z", "文", "D1"]
    qrels, run = {}, {}
    for number in range(40):
        judged = chance.sample(documents, chance.randint(1, 20))
        qrels[f"q{number}"] = {document: chance.choice([-1, 0, 0, 1, 2, 3]) for document in judged}
        found = chance.sample(documents, chance.randint(0, 50))
        scores = [chance.choice([0.0, 0.5, 1.0, 1.0 + 1e-9, -2.0, chance.random()]) for _ in found]
        if number % 7:
            run[f"q{number}"] = dict(zip(found, scores, strict=True))
    run["unjudged"] = {"d1": 1.0}
    qrels["nothing relevant"] = {"d1": 0}
    return qrels, run


@pytest.mark.parametrize("seed", range(5))
def test_values_equal_those_of_pytrec_eval(seed: int):
    qrels, run = random_judgements(seed)
    measures = parse_measures(" ".join([*NAMES, "MRR@10"]))
    values = judge(qrels, run, measures)
    expected = pytrec_eval.RelevanceEvaluator(
        qrels, {"ndcg_cut.10", "ndcg", "map", "map_cut.100", "recip_rank", "recall.1,10", "P.5", "success.5"}
    ).evaluate({query: run.get(query, {}) for query in qrels})
    for ours, theirs in NAMES.items():
        assert values[ours] == {query: expected[query][theirs] for query in qrels}, ours
    reciprocal = {query: expected[query]["recip_rank"] for query in qrels}
    assert values["MRR@10"] == {query: value if value >= 1 / 10 else 0.0 for query, value in reciprocal.items()}
    assert means(values)["AP"] == pytest.approx(sum(values["AP"].values()) / len(qrels))


def test_values_equal_the_formulas():
    """nDCG with the grade as gain, and the others with a grade above 0 as relevant."""
    qrels, run = random_judgements(9)
    values = judge(qrels, run, parse_measures("nDCG@10 MRR@10 AP@100 R@10"))
    for query, grades in qrels.items():
        found = run.get(query, {})
        order = sorted(sorted(found, reverse=True), key=lambda document: -np.float32(found[document]))
        assert ranked(found) == order
        gains = [max(0, grades.get(document, 0)) for document in order]
        ideal = sorted((max(0, grade) for grade in grades.values()), reverse=True)
        dcg, best = (sum(gain / math.log2(rank + 2) for rank, gain in enumerate(row[:10])) for row in (gains, ideal))
        count = sum(gain > 0 for gain in ideal)
        ranks = [rank for rank, gain in enumerate(gains, 1) if gain]
        expected = {
            "nDCG@10": dcg / best if best else 0.0,
            "MRR@10": 1 / ranks[0] if ranks and ranks[0] <= 10 else 0.0,
            "AP@100": sum(place / rank for place, rank in enumerate(ranks, 1)) / count if count else 0.0,
            "R@10": sum(rank <= 10 for rank in ranks) / count if count else 0.0,
        }
        assert {name: of_query[query] for name, of_query in values.items()} == pytest.approx(expected)


def test_nan_is_higher_than_all_other_scores():
    assert ranked({"a": 1.0, "b": math.nan, "c": math.inf, "d": math.nan, "e": -math.inf}) == ["d", "b", "c", "a", "e"]
    assert judge({"q": {"b": 1}}, {"q": {"a": 1.0, "b": math.nan}}, parse_measures("MRR"))["MRR"] == {"q": 1.0}


def test_grades_with_decimals_are_gains_of_ndcg():
    grades = {"a": 0.25, "b": 2.5, "c": 0.0, "d": 1e-9}
    run = {"q": {"c": 4.0, "a": 3.0, "b": 2.0}}
    values = judge({"q": grades}, run, parse_measures("nDCG@10 R@10"))
    dcg = 0.25 / math.log2(3) + 2.5 / 2
    assert values["nDCG@10"]["q"] == pytest.approx(dcg / (2.5 + 0.25 / math.log2(3)), rel=1e-5)
    assert values["R@10"]["q"] == pytest.approx(2 / 3)
    with pytest.raises(MeasureError, match=r"P\(rel=2\)@5 needs grades that are integers"):
        judge({"q": grades}, run, parse_measures("P(rel=2)@5"))
    with pytest.raises(MeasureError, match="too many levels"):
        judge({"q": {"a": 1e9}}, run, parse_measures("nDCG@10"))
    with pytest.raises(MeasureError, match="not finite"):
        judge({"q": {"a": math.nan}}, run, parse_measures("nDCG@10"))


def test_names_of_measures_are_read_liberally_and_written_in_one_way():
    names = parse_measures("ndcg@10, RR@5 map recall@7 Precision@3\n Map@20 SUCCESS@1 p(rel=2)@5 mrr")
    expected = ["nDCG@10", "MRR@5", "AP", "R@7", "P@3", "AP@20", "Success@1", "P(rel=2)@5", "MRR"]
    assert list(names) == expected
    values = judge({"q": {"a": 2, "b": 1}}, {"q": {"a": 2.0, "b": 1.0}}, names)
    assert {name: value["q"] for name, value in values.items()} == pytest.approx(
        {**dict.fromkeys(expected, 1.0), "P@3": 2 / 3, "P(rel=2)@5": 1 / 5}
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "No measure"),
        ("nDCG@10 nDGC@10", "'nDGC@10' is unknown"),
        ("nDCG10", "unknown"),
        ("R", "'R' needs a cut-off, such as R@10"),
        ("P(rel=2)", r"needs a cut-off, such as P\(rel=2\)@10"),
        ("IPrec", "needs the parameter recall, in parentheses"),
        ("P(rel=x)@5", "invalid"),
        ("ERR@10", "'ERR@10' is not supported: no installed package computes it for ids that are no integers"),
        ("nDCG(dcg='exp-log2')@10", "is not supported"),
        ("P@0", "positive integer"),
        ("P@x", "positive integer"),
        ("P@", "positive integer"),
        ("P(level=2)@5", "level"),
        ("P(rel=)@5", "invalid"),
        ("NumRel", "no mean over queries"),
        ("alpha_nDCG@10", "no installed package"),
    ],
)
def test_a_measure_that_is_no_measure_is_an_error(text: str, message: str):
    with pytest.raises(MeasureError, match=message):
        parse_measures(text)


def test_the_depth_is_the_largest_cutoff_of_all_measures():
    depths = {"nDCG@10 R@7": 100, "R@1000 P@5": 1000, "AP P@5": 1000, "AP R@2000": 2000}
    assert {text: depth_of(parse_measures(text)) for text in depths} == depths
