"""The differences between runs, and between a run before and after training, query by query, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from negative_cache.workbench.evaluation.significance import Array, PerQuery, bootstrap_interval
from negative_cache.workbench.evaluation.systems import PER_QUERY
from negative_cache.workbench.training.record import read_json


class Values(NamedTuple):
    """The values of the queries of the test split.

    Attributes:
        corpus: A fingerprint of the documents that were searched.
        before: Name of a measure -> query id -> value before training; None if not measured.
        after: The same after training, for each seed.
    """

    corpus: str
    before: Mapping[str, PerQuery] | None
    after: list[Mapping[str, PerQuery]]


class Difference(NamedTuple):
    """The mean difference of a measure over queries, with the limits of its 95 % confidence interval."""

    difference: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval does not contain 0."""
        return self.low > 0 or self.high < 0


class Pair(NamedTuple):
    """Two sets of values of the same queries.

    Attributes:
        run: Number of the run.
        baseline: Number of the run that it is compared with; None for the same run before training.
        first: Values of the run, for each seed.
        second: Values that are subtracted, for each seed.
    """

    run: int
    baseline: int | None
    first: Sequence[Mapping[str, PerQuery]]
    second: Sequence[Mapping[str, PerQuery]]


def read_values(folders: Sequence[Path]) -> Values | None:
    """The values of a run, from the folders of its seeds; None if a folder has none after training."""
    files = [folder / PER_QUERY for folder in folders]
    if not all(file.is_file() for file in files):
        return None
    contents: list[dict[str, Any]] = [read_json(file) for file in files]
    if not all(content.get("after") for content in contents):
        return None
    before = contents[0].get("before") if len(contents) == 1 else None
    return Values(contents[0]["corpus"]["fingerprint"], before, [content["after"] for content in contents])


def baseline_of(losses: Sequence[str]) -> int:
    """The run that others are compared with: the first one with in-batch negatives alone, or the first one."""
    return losses.index("in-batch") if "in-batch" in losses else 0


def pairs_of(values: Sequence[Values | None], baseline: int) -> list[Pair]:
    """What is compared: each run with itself before training, and with the baseline if it has the same data.

    Args:
        values: The values of each run; None if it has none.
        baseline: Number of the baseline.
    """
    pairs, other = [], values[baseline]
    for number, own in enumerate(values):
        if own is None:
            continue
        if own.before is not None:
            pairs.append(Pair(number, None, own.after, [own.before]))
        if other is not None and number != baseline and other.corpus == own.corpus and _queries(other) == _queries(own):
            pairs.append(Pair(number, baseline, own.after, other.after))
    return pairs


def differences_of(pairs: Sequence[Pair], measures: Sequence[str]) -> list[dict[str, Difference]]:
    """For each pair, its difference in each of the measures. The values of a query are averaged over seeds first."""
    by_queries: dict[frozenset[str], list[int]] = {}
    for place, pair in enumerate(pairs):
        by_queries.setdefault(frozenset(pair.first[0][measures[0]]), []).append(place)
    found: list[dict[str, Difference]] = [{} for _ in pairs]
    for queries, places in by_queries.items():  # one bootstrap for all pairs with the same queries
        order = sorted(queries)
        columns = [
            _means(pairs[place].first, measure, order) - _means(pairs[place].second, measure, order)
            for place in places
            for measure in measures
        ]
        differences = np.stack(columns, axis=1)
        numbers = zip(
            differences.mean(axis=0).tolist(), *(a.tolist() for a in bootstrap_interval(differences)), strict=True
        )
        for place in places:
            found[place] = {measure: Difference(*next(numbers)) for measure in measures}
    return found


def _queries(values: Values) -> set[str]:
    return set(next(iter(values.after[0].values())))


def _means(seeds: Sequence[Mapping[str, PerQuery]], measure: str, queries: Sequence[str]) -> Array:
    """The mean over seeds of each query's value: `[queries]`."""
    return np.array([[seed[measure][query] for query in queries] for seed in seeds], dtype=np.float64).mean(axis=0)
