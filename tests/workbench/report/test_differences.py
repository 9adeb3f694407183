"""The differences on a page, against the paired comparison of `significance`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from negative_cache.workbench.evaluation.significance import compare_systems
from negative_cache.workbench.report.differences import Values, baseline_of, differences_of, pairs_of, read_values

MEASURES = ("MRR@10", "R@1")


def values(rng: np.random.Generator, shift: float, count: int = 30) -> dict[str, dict[str, float]]:
    """Values of measures for each query, whose order differs from call to call."""
    queries = [f"q{number}" for number in rng.permutation(count)]
    return {name: {query: float(rng.random() + shift) for query in queries} for name in MEASURES}


def write(folder: Path, corpus: str, before: object, after: object) -> Path:
    folder.mkdir(parents=True)
    content = {"corpus": {"num_documents": 5, "fingerprint": corpus}, "before": before, "after": after}
    (folder / "queries.json").write_text(json.dumps(content))
    return folder


def test_differences_and_intervals_are_those_of_significance(tmp_path: Path):
    rng = np.random.default_rng(0)
    first = [values(rng, 0.3), values(rng, 0.1)]
    second, before, other = values(rng, 0), values(rng, -0.5), values(rng, 0.2, count=12)
    found = [
        read_values([write(tmp_path / f"seed-{number}", "c", None, seed) for number, seed in enumerate(first)]),
        read_values([write(tmp_path / "second", "c", before, second)]),
        read_values([write(tmp_path / "other", "c", None, other)]),  # other queries
        read_values([write(tmp_path / "documents", "d", None, second)]),  # other documents
        read_values([write(tmp_path / "failed", "c", None, None)]),
        read_values([tmp_path]),
    ]
    assert found[4:] == [None, None]
    pairs = pairs_of(found, 1)
    assert [(pair.run, pair.baseline) for pair in pairs] == [(0, 1), (1, None)]
    differences = differences_of(pairs, MEASURES)
    for own, (a, b) in zip(differences, ((first, [second]), ([second], [before])), strict=True):
        for measure in MEASURES:
            systems = {"a": [seed[measure] for seed in a], "b": [seed[measure] for seed in b]}
            (wanted,) = compare_systems(systems, "b").differences
            assert own[measure].difference == pytest.approx(wanted.difference)
            assert wanted.low < own[measure].difference < wanted.high
            assert own[measure].is_clear == (own[measure].low > 0 or own[measure].high < 0)
            assert [own[measure].low, own[measure].high] == pytest.approx([wanted.low, wanted.high])
    assert all(differences[1][measure].is_clear for measure in MEASURES)


def test_equal_values_have_no_clear_difference():
    own = values(np.random.default_rng(1), 0)
    (found,) = differences_of(pairs_of([Values("c", own, [own])], 0), MEASURES)
    assert [tuple(found[name]) for name in MEASURES] == [(0, 0, 0)] * 2
    assert not found["R@1"].is_clear


def test_runs_are_compared_with_in_batch_if_there_is_one():
    assert baseline_of(["negative-cache", "in-batch", "gist"]) == 1
    assert baseline_of(["negative-cache", "gist"]) == 0
