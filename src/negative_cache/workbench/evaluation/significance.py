"""Paired tests of the difference between retrieval systems, over the queries that all of them answered.

The query is the unit that is resampled: the values of a query are first averaged over the seeds of a system. A test
therefore tells whether a difference would also be found with other queries of the same kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from negative_cache.workbench.counting import counted_queries
from negative_cache.workbench.evaluation.defaults import ALPHA

Array = npt.NDArray[np.float64]
PerQuery = Mapping[str, float]
"""Query id -> value of a measure."""

CONFIDENCE = 0.95
MAX_EXACT = 16  # queries that differ, up to which all sign flips are enumerated
FLIPS = 100_000
RESAMPLES = 10_000
COLUMNS = ("pair", "difference", "95 % interval", "p (Holm)", "verdict")
SEED = 0

_QUERIES_PER_BYTE = 8
_RESAMPLES_PER_BLOCK = 64
_ROUNDING = 1e-10  # sums that differ by less, relative to the sum of the absolute differences, are equal


class System(NamedTuple):
    """The quality of a system.

    Attributes:
        mean: Mean over queries and seeds.
        std: Sample standard deviation over seeds of the mean over queries; None with one seed.
        seeds: Number of seeds.
    """

    mean: float
    std: float | None
    seeds: int


class Difference(NamedTuple):
    """The difference between two systems.

    Attributes:
        system: The name of the system.
        baseline: The name of the system that it is compared with.
        difference: Mean over queries of the system's value minus the baseline's.
        low: Lower limit of the 95 % confidence interval of `difference`.
        high: Upper limit of the interval.
        p: p-value of the two-sided randomisation test.
        p_holm: p-value after Holm's correction over all differences of the same `Significance`.
    """

    system: str
    baseline: str
    difference: float
    low: float
    high: float
    p: float
    p_holm: float

    @property
    def systems(self) -> set[str]:
        """The names of both."""
        return {self.system, self.baseline}

    @property
    def worse(self) -> str:
        """The name of the system with the lower mean."""
        return self.baseline if self.difference > 0 else self.system

    def is_significant(self, alpha: float = ALPHA) -> bool:
        """Whether the corrected p-value is below the significance level `alpha`."""
        return self.p_holm < alpha

    def in_words(self, alpha: float = ALPHA) -> str:
        """The result in one sentence."""
        p = p_in_words(self.p_holm)
        if not self.is_significant(alpha):
            return f"No significant difference between {self.system} and {self.baseline} ({p})."
        low, high = (self.low, self.high) if self.difference > 0 else (-self.high, -self.low)
        (better,) = self.systems - {self.worse}
        limits = f"{100 * CONFIDENCE:g} % interval {low:.4f} to {high:.4f}"
        return f"{better} is better than {self.worse} by {abs(self.difference):.4f} ({limits}, {p})."

    def cells(self, alpha: float = ALPHA) -> list[str]:
        """The cells of a row of a table with the headings `COLUMNS`."""
        interval = f"{self.low:+.4f} to {self.high:+.4f}"
        says = "significant" if self.is_significant(alpha) else "not significant"
        return [
            f"{self.system} - {self.baseline}",
            f"{self.difference:+.4f}",
            interval,
            p_in_words(self.p_holm).removeprefix("p ").removeprefix("= "),
            says,
        ]


class Significance(NamedTuple):
    """The comparison of some systems by one measure.

    Attributes:
        num_queries: Number of queries.
        systems: Name -> quality.
        differences: One for each pair of systems that was compared.
    """

    num_queries: int
    systems: dict[str, System]
    differences: list[Difference]

    def best(self) -> str:
        """The system with the highest mean."""
        return max(self.systems, key=lambda name: self.systems[name].mean)

    def as_dict(self) -> dict[str, Any]:
        """The same as dictionaries, for JSON."""
        return {
            "num_queries": self.num_queries,
            "systems": {name: system._asdict() for name, system in self.systems.items()},
            "differences": [difference._asdict() for difference in self.differences],
        }


def compare_systems(values: Mapping[str, Sequence[PerQuery]], baseline: str | None = None) -> Significance:
    """Compare systems by the values of one measure for the same queries.

    Args:
        values: Name of a system -> its values by query, for each of its seeds.
        baseline: The system that all others are compared with; None to compare every pair, each with the system that
            comes first in `values` as the baseline.

    Raises:
        ValueError: Fewer than two systems, an unknown baseline, a system without seeds, no queries, or systems with
            different queries.
    """
    if len(values) < 2:
        raise ValueError(f"A comparison needs at least two systems, got {list(values)}.")
    if baseline is not None and baseline not in values:
        raise ValueError(f"The baseline {baseline!r} is not one of the systems {list(values)}.")
    by_seed = _arrays_of(values)
    means = {name: array.mean(axis=0) for name, array in by_seed.items()}
    if baseline is None:
        pairs = [(system, first) for first, system in combinations(values, 2)]
    else:
        pairs = [(system, baseline) for system in values if system != baseline]
    differences = np.stack([means[system] - means[other] for system, other in pairs], axis=1)
    p = randomisation_test(differences)
    low, high = bootstrap_interval(differences)
    columns = zip(differences.mean(axis=0), low, high, p, holm(p), strict=True)
    return Significance(
        num_queries=len(differences),
        systems={name: _system(array) for name, array in by_seed.items()},
        differences=[
            Difference(*pair, *(float(number) for number in numbers))
            for pair, numbers in zip(pairs, columns, strict=True)
        ],
    )


def check_same_queries(runs: Iterable[tuple[str, PerQuery]]) -> None:
    """Raise ValueError unless all runs have values for the same queries.

    Args:
        runs: The name of each run for the message, and its values.
    """
    (first_name, first), *others = runs
    for name, found in others:
        if found.keys() != first.keys():
            lacking, more = sorted(first.keys() - found.keys()), sorted(found.keys() - first.keys())
            raise ValueError(
                f"Systems must be compared on the same queries. {name!r} lacks {_some(lacking)} of {first_name!r} and "
                f"has {_some(more)} that {first_name!r} lacks. Measure both on the same split."
            )


def randomisation_test(differences: Array) -> Array:
    """p-values `[pairs]` of Fisher's two-sided randomisation test of a mean difference of 0.

    If two systems are equally good, the sign of each query's difference is as likely positive as negative. The p-value
    is the share of sign flips for which the absolute sum of the differences is at least the observed one. All flips
    are enumerated if at most `MAX_EXACT` queries differ. Otherwise `FLIPS` random ones are drawn, with the same seed
    in every call, and the observed signs count as one more.

    Args:
        differences: `[queries, pairs]`.
    """
    size = np.abs(differences).sum(axis=0)
    observed = np.abs(differences.sum(axis=0)) - _ROUNDING * size
    is_short = (differences != 0).sum(axis=0) <= MAX_EXACT
    p = np.empty(differences.shape[1])
    for pair in np.flatnonzero(is_short):
        column = differences[:, pair]
        p[pair] = (np.abs(_signed_sums(column[column != 0])) >= observed[pair]).mean()
    if not is_short.all():
        sums = _random_sums(differences[:, ~is_short])
        p[~is_short] = (1 + (np.abs(sums) >= observed[~is_short]).sum(axis=0)) / (1 + FLIPS)
    return p


def bootstrap_interval(differences: Array, confidence: float = CONFIDENCE) -> tuple[Array, Array]:
    """Limits `[pairs]`, `[pairs]` of the confidence intervals of the mean differences.

    The bias-corrected and accelerated bootstrap (BCa) with `RESAMPLES` samples of the queries, drawn with the same
    seed in every call.

    Args:
        differences: `[queries, pairs]`.
        confidence: Probability with which an interval contains the true difference.
    """
    means, samples = differences.mean(axis=0), _bootstrap_means(differences)
    centred = differences - means
    squares = (centred**2).sum(axis=0)
    limits = np.empty((2, differences.shape[1]))
    normal, tail = NormalDist(), (1 - confidence) / 2
    for pair, mean in enumerate(means):
        if squares[pair] == 0:
            limits[:, pair] = mean
            continue
        own = samples[:, pair]
        below = ((own < mean).mean() + (own <= mean).mean()) / 2  # a sample with the same mean counts half
        bias = normal.inv_cdf(float(below.clip(1 / RESAMPLES, 1 - 1 / RESAMPLES)))
        acceleration = float((centred[:, pair] ** 3).sum() / (6 * squares[pair] ** 1.5))
        shifted = [bias + normal.inv_cdf(level) for level in (tail, 1 - tail)]
        levels = [normal.cdf(bias + z / max(1 - acceleration * z, 1e-9)) for z in shifted]
        limits[:, pair] = np.quantile(own, levels)
    return limits[0], limits[1]


def holm(p: Array) -> Array:
    """Holm's correction: p-values such that rejecting those below alpha makes any false rejection rarer than alpha."""
    order = np.argsort(p, kind="stable")
    scaled = p[order] * np.arange(len(p), 0, -1)
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return corrected


def p_in_words(p: float) -> str:
    """A p-value with two digits, such as "p = 0.021"."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def _arrays_of(values: Mapping[str, Sequence[PerQuery]]) -> dict[str, Array]:
    """The values `[seeds, queries]` of each system, with the queries sorted: the order decides what is sampled."""
    for name, seeds in values.items():
        if not seeds or not seeds[0]:
            raise ValueError(f"{name!r} has no values of queries.")
    check_same_queries((name, found) for name, seeds in values.items() for found in seeds)
    queries = sorted(next(iter(values.values()))[0])
    arrays = {}
    for name, seeds in values.items():
        arrays[name] = np.array([[found[query] for query in queries] for found in seeds], dtype=np.float64)
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{name!r} has a value that is not finite.")
    return arrays


def _some(queries: list[str]) -> str:
    shown = ", ".join([*map(repr, queries[:3]), *(["..."] if len(queries) > 3 else [])])
    return counted_queries(len(queries)) + (f" ({shown})" if queries else "")


def _system(array: Array) -> System:
    means = array.mean(axis=1)
    std = float(means.std(ddof=1)) if len(means) > 1 else None
    return System(float(means.mean()), std, len(means))


def _signed_sums(values: Array) -> Array:
    """The sums of `values [n, ...]` with each of the `2**n` choices of signs: `[2**n, ...]`."""
    sums = np.zeros((1, *values.shape[1:]))
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def _random_sums(differences: Array) -> Array:
    """The sums over queries of `differences [queries, pairs]` with random signs: `[FLIPS, pairs]`.

    A random byte holds the signs of eight queries, and selects one of the 256 signed sums of these queries. This needs
    an eighth of the additions, and no array of signs of all queries.
    """
    rng = np.random.default_rng(SEED)
    sums = np.zeros((FLIPS, differences.shape[1]))
    for start in range(0, len(differences), _QUERIES_PER_BYTE):
        table = _signed_sums(differences[start : start + _QUERIES_PER_BYTE])
        sums += table[rng.integers(len(table), size=FLIPS, dtype=np.uint8)]
    return sums


def _bootstrap_means(differences: Array) -> Array:
    """The means of samples of the queries with replacement: `[RESAMPLES, pairs]`."""
    rng = np.random.default_rng(SEED)
    count = len(differences)
    means = np.empty((RESAMPLES, differences.shape[1]))
    for start in range(0, RESAMPLES, _RESAMPLES_PER_BLOCK):
        block = means[start : start + _RESAMPLES_PER_BLOCK]
        drawn = rng.integers(count, size=(len(block), count)) + count * np.arange(len(block))[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * len(block)).reshape(len(block), count)
        block[:] = times @ differences / count
    return means
