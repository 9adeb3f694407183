from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from negative_cache.workbench.evaluation import significance
from negative_cache.workbench.evaluation.significance import (
    Array,
    bootstrap_interval,
    compare_systems,
    holm,
    randomisation_test,
)
from stats import ALPHA

GAINS = np.array([0, 1 / 3, 1 / 2, 1])  # reciprocal ranks, so that sums are often equal


def experiments(number: int, num_queries: int, seeds: int = 1) -> tuple[Array, Array]:
    """Values `[seeds, queries, experiments]` of two systems that are equally good. Queries differ more than systems."""
    rng = np.random.default_rng(number)
    easiness = rng.normal(size=(num_queries, number))
    first, second = (easiness + rng.normal(scale=0.3, size=(num_queries, number)) for _ in range(2))
    noise = rng.normal(scale=0.1, size=(2, seeds, num_queries, number))
    return first + noise[0], second + noise[1]


def rejections(p: Array) -> int:
    return int((p < 0.05).sum())


def limits(count: int) -> tuple[float, float]:
    """Between which the number of rejections of a test of level 5 % lies in `count` experiments."""
    low, high = stats.binom.interval(1 - ALPHA, count, 0.05)
    return low, high


@pytest.mark.parametrize("num_queries", [1, 2, 7, 12])
def test_the_enumerated_p_value_is_that_of_scipy(num_queries: int):
    rng = np.random.default_rng(num_queries)
    differences = rng.choice(GAINS, size=(num_queries, 20)) - rng.choice(GAINS, size=(num_queries, 20))
    found = randomisation_test(np.concatenate([differences, np.zeros((30, 20))]))
    for column, p in zip(differences.T, found, strict=True):
        column = column[column != 0]
        if not column.size:
            assert p == 1
            continue
        signs = np.array(np.meshgrid(*[[-1, 1]] * len(column))).reshape(len(column), -1)
        sums = np.abs(column @ signs)
        assert p == (sums >= sums[0] - 1e-9).mean()
        if len(column) > 1:
            expected = stats.permutation_test((column,), np.sum, permutation_type="samples", n_resamples=np.inf)
            assert p == pytest.approx(expected.pvalue)


def test_the_drawn_p_value_agrees_with_the_enumerated_one():
    differences = np.random.default_rng(0).choice([-1, -0.5, 0.25, 0.5, 1], p=[0.1, 0.15, 0.15, 0.3, 0.3], size=(18, 8))
    signs = 1 - 2.0 * ((np.arange(2**18)[:, None] >> np.arange(18)) & 1)
    exact = (np.abs(signs @ differences) >= np.abs(differences.sum(axis=0)) - 1e-9).mean(axis=0)
    assert exact.min() < 0.05 < 0.2 < exact.max()
    found = randomisation_test(differences)
    assert (found != exact).any()
    deviation = np.sqrt(exact * (1 - exact) / significance.FLIPS)
    assert (np.abs(found - exact) < 6 * deviation + 1 / significance.FLIPS).all()


@pytest.mark.parametrize("num_queries", [14, 61])  # enumerated, drawn
def test_the_p_value_is_uniform_if_systems_are_equally_good(num_queries: int):
    first, second = experiments(400, num_queries)
    p = np.concatenate([randomisation_test(part) for part in np.split((second - first)[0], 4, axis=1)])
    low, high = limits(400)
    assert low <= rejections(p) <= high
    assert stats.kstest(p, "uniform").pvalue > ALPHA


def test_the_check_sees_a_test_that_is_not_paired_or_counts_every_seed_as_a_query():
    first, second = experiments(400, 61, seeds=5)
    low, high = limits(400)
    unpaired = stats.ttest_ind(first.mean(axis=0), second.mean(axis=0)).pvalue
    assert rejections(unpaired) < low
    flat = (second - first).reshape(-1, 400)
    assert rejections(np.concatenate([randomisation_test(part) for part in np.split(flat, 4, axis=1)])) > high
    averaged = (second - first).mean(axis=0)
    p = np.concatenate([randomisation_test(part) for part in np.split(averaged, 4, axis=1)])
    assert low <= rejections(p) <= high


def test_a_real_difference_is_found_that_an_unpaired_test_misses():
    first, second = experiments(20, 200)
    second = second + 0.15
    assert rejections(randomisation_test((second - first)[0])) == 20
    assert rejections(stats.ttest_ind(first[0], second[0]).pvalue) < 20


def test_holms_correction_equals_an_example_by_hand():
    # Sorted: 0.005 * 4, 0.01 * 3, 0.03 * 2, 0.04 * 1, which is below the one before it
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.6, 0.5])) == pytest.approx([1, 1])
    assert holm(np.array([0.3])) == pytest.approx([0.3])


def test_the_interval_contains_the_true_difference_as_often_as_it_says():
    count = 60
    differences = np.random.default_rng(0).normal(0.1, 0.4, size=(count, 1000))
    low, high = bootstrap_interval(differences)
    # Of normal values, the bootstrap's interval is about mean ± 1.96 * (the deviation with divisor n) / sqrt(n).
    expected = 2 * stats.t.cdf(1.96 * np.sqrt((count - 1) / count), count - 1) - 1
    fewest, most = stats.binom.interval(1 - ALPHA, 1000, expected)
    assert fewest <= ((low <= 0.1) & (high >= 0.1)).sum() <= most
    narrow = bootstrap_interval(differences, confidence=0.8)
    assert ((narrow[0] <= 0.1) & (narrow[1] >= 0.1)).sum() < fewest  # what the check would see


def test_the_interval_of_skewed_differences_is_that_of_scipy():
    differences = np.random.default_rng(1).exponential(size=(40, 3)) - 0.8
    low, high = bootstrap_interval(differences)
    for pair in range(3):
        expected = stats.bootstrap(
            (differences[:, pair],), np.mean, n_resamples=40_000, method="BCa", rng=np.random.default_rng(2)
        )
        interval, deviation = expected.confidence_interval, expected.standard_error
        assert [low[pair], high[pair]] == pytest.approx([interval.low, interval.high], abs=0.15 * deviation)
        assert high[pair] - differences[:, pair].mean() > differences[:, pair].mean() - low[pair]


def test_every_pair_is_compared_with_the_system_before_it_or_with_the_baseline():
    easy = {f"q{n}": n % 5 / 5 for n in range(100)}
    better = {query: value + 0.1 + int(query[1:]) % 2 * 0.1 for query, value in easy.items()}
    values = {"a": [easy, easy], "b": [better, easy], "c": [dict(reversed(better.items()))]}
    found = compare_systems(values)
    assert [(one.system, one.baseline) for one in found.differences] == [("b", "a"), ("c", "a"), ("c", "b")]
    assert [one.difference for one in found.differences] == pytest.approx([0.075, 0.15, 0.075])
    assert all(one.low <= one.difference <= one.high and one.is_significant() for one in found.differences)
    assert found.num_queries == 100
    assert found.systems["b"].mean == pytest.approx(0.475)
    assert found.systems["b"].std == pytest.approx(0.15 / 2**0.5)
    assert found.systems["b"].seeds == 2
    assert found.systems["c"].std is None
    assert json.loads(json.dumps(found.as_dict()))["differences"][0]["system"] == "b"
    assert compare_systems(values) == found

    against = compare_systems(values, baseline="c")
    assert [(one.system, one.baseline) for one in against.differences] == [("a", "c"), ("b", "c")]
    assert against.differences[0].difference == pytest.approx(-0.15)
    assert against.differences[0].low == pytest.approx(-found.differences[1].high, abs=0.01)

    (same,) = compare_systems({"a": [easy], "d": [easy]}).differences
    assert same[2:] == (0, 0, 0, 1, 1)
    assert not same.is_significant()


@pytest.mark.parametrize(
    ("values", "baseline", "message"),
    [
        ({"a": [{"q": 1.0}]}, None, "at least two systems"),
        ({"a": [{"q": 1.0}], "b": [{"q": 1.0}]}, "c", "The baseline 'c' is not one of"),
        ({"a": [{"q": 1.0}], "b": []}, None, "'b' has no values"),
        ({"a": [{}], "b": [{"q": 1.0}]}, None, "'a' has no values"),
        ({"a": [{"q": 1.0}], "b": [{"q": float("nan")}]}, None, "'b' has a value that is not finite"),
        (
            {"a": [{"q": 1.0, "r": 0.0}], "b": [{"q": 1.0, "s": 0.0, "t": 1.0}]},
            None,
            "'b' lacks 1 query ('r') of 'a' and has 2 queries ('s', 't') that 'a' lacks",
        ),
    ],
)
def test_systems_that_cannot_be_compared_are_refused(
    values: dict[str, list[dict[str, float]]], baseline: str | None, message: str
):
    with pytest.raises(ValueError) as error:
        compare_systems(values, baseline)
    assert message in str(error.value)
