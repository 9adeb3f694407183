"""The configuration of a run: which options have an effect, and what is refused."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from negative_cache.workbench.data import DataOptions
from negative_cache.workbench.training.config import RunConfig, RunError, changed_options


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        ("in-batch", {"refresh_per_step": 64}, "--refresh-per-step has no effect with --loss in-batch, only with neg"),
        ("in-batch", {"num_samples": 4}, "--num-samples has no effect"),
        ("gradcache", {"cache_size": 8192}, "--cache-size has no effect with --loss gradcache"),
        ("memory-bank", {"shared": False}, "--shared has no effect"),
        ("in-batch", {"num_negatives": 4}, "--num-negatives has no effect with --loss in-batch, only with mined"),
        ("mined", {"guide": "m"}, "--guide has no effect with --loss mined, only with gist and cached-gist"),
        ("mined", {"absolute_margin": 0.1}, "--absolute-margin has no effect"),
        ("gist", {"cache_size": 99}, "--cache-size has no effect"),
        ("negative-cache", {"num_samples": 0.25, "shared": False}, "--num-samples is 0.25; without shared documents"),
        ("negative-cache", {"num_samples": 0}, '--num-samples is 0; it must be above 0, such as 0.25. Or "auto"'),
        ("negative-cache", {"num_samples": "many"}, "--num-samples is 'many'; it must be a finite number. Or \"auto\""),
    ],
)
def test_options_without_effect_are_refused(loss: str, options: dict, message: str):
    with pytest.raises(RunError, match=message):
        RunConfig(data="d", model="static", loss=loss, output="o", **options)


def test_changed_options_are_named_as_they_are_typed():
    before = asdict(RunConfig("d", "static", "negative-cache", "out", learning_rate=0.1))
    now = asdict(
        RunConfig(
            "d v1.0", "static", "negative-cache", "other", max_steps=5, symmetric=True, scale=2e-5,
            data_options=DataOptions(negatives="ignore"),
        )
    )  # fmt: skip
    assert changed_options(before, before) == ""
    assert changed_options(before, now, ignored=("output",)) == (
        "--data was d, is 'd v1.0'; --max-steps was not given, is 5; --learning-rate was 0.1, is not given; "
        "--scale was 20, is 2e-05; --symmetric was off, is on; --negatives was all, is ignore"
    )


def test_options_with_effect_are_accepted():
    RunConfig(data="d", model="static", loss="memory-bank", output="o", cache_size=99)
    RunConfig(data="d", model="static", loss="negative-cache", output="o", refresh_per_step=4, use_lru=False)
    RunConfig(data="d", model="static", loss="negative-cache", output="o", num_samples=0.25)
    RunConfig(data="d", model="static", loss="negative-cache", output="o", shared=False, num_samples=2)
    RunConfig(
        data="d", model="static", loss="mined", output="o", num_negatives=4, relative_margin=0.1, mining_start=0.5
    )
    RunConfig(data="d", model="m", loss="gist", output="o", guide="g", absolute_margin=0.1)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (
            "mined",
            {"range_min": 50},
            "--range-min is 50 and --range-max 50; expected a range .* at least .* 1, documents",
        ),
        ("mined", {"num_negatives": 9, "range_max": 8}, "at least --num-negatives, 9"),
        ("mined", {"num_negatives": 0}, "--num-negatives is 0; it must be positive"),
        ("mined", {"mining_rounds": 0}, "--mining-rounds is 0; it must be positive"),
        ("mined", {"mining_start": 1.0}, "--mining-start is 1.0; it must be at least 0 and below 1"),
        ("mined", {"relative_margin": -0.1}, "--relative-margin is -0.1; it must be"),
        ("mined", {"sampling_strategy": "best"}, "--sampling-strategy is 'best'; expected one of top, random"),
        ("gist", {"absolute_margin": 0.1, "relative_margin": 0.1}, "--loss gist takes one margin"),
    ],
)
def test_options_of_hard_negatives_are_checked(loss: str, options: dict, message: str):
    with pytest.raises(RunError, match=message):
        RunConfig(data="d", model="m", loss=loss, output="o", **options)
