"""What a comparison measures without training: BM25, and the model before training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from negative_cache.workbench.compare.comparison import Comparison
from negative_cache.workbench.data import load_data
from negative_cache.workbench.evaluation import (
    DEFAULT_MEASURES,
    OnProgress,
    depth_of,
    evaluate,
    judge_split,
    means,
    parse_measures,
)
from negative_cache.workbench.evaluation.bm25 import bm25_run
from negative_cache.workbench.evaluation.systems import PER_QUERY, corpus_of
from negative_cache.workbench.files import replacing, write_json
from negative_cache.workbench.models import load_trained
from negative_cache.workbench.suggestions import UNFINISHED
from negative_cache.workbench.training.preparation import set_inputs
from negative_cache.workbench.training.record import Metrics, read_json


@dataclass(frozen=True)
class Baseline:
    """The measurement of a baseline on the test split.

    Attributes:
        name: One of `BASELINES`.
        comparison: What it is compared with.
        seed: Seed of the untrained model's weights; None if there is nothing random.
        model: Name or path of the model before training.
    """

    name: str
    comparison: Comparison
    seed: int | None
    model: str

    @classmethod
    def all_of(cls, comparison: Comparison, name: str) -> list[Baseline]:
        """The measurements of a baseline for a comparison: one, or one for each seed of an untrained model."""
        is_random = name != "bm25" and comparison.is_from_scratch
        return [
            cls(name, comparison, seed if is_random else None, comparison.initial_model(seed))
            for seed in range(comparison.seeds if is_random else 1)
        ]

    @property
    def output(self) -> Path:
        """Folder of its `queries.json`."""
        name = self.name if self.seed is None else f"{self.name}_seed-{self.seed}"
        return Path(self.comparison.output) / "runs" / name

    def __call__(self, on_progress: OnProgress) -> Metrics:
        """Measure it, write `queries.json`, and return the metrics."""
        data, measures = load_data(self.comparison.data, self.comparison.data_options), parse_measures(DEFAULT_MEASURES)
        if self.name == "bm25":
            quality = judge_split(data, "test", bm25_run(data, "test", depth_of(measures)), measures)
        else:
            model = load_trained(self.model)
            set_inputs(model, self.comparison)
            quality = evaluate(model, data, ("test",), measures, on_progress=on_progress)["test"]
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.output, UNFINISHED) as temporary:
            temporary.mkdir(exist_ok=True)  # one is left if the process was killed
            write_json(temporary / PER_QUERY, {"corpus": corpus_of(data, "test"), "after": quality.per_query})
        return self.metrics()

    def is_measured(self) -> bool:
        """Whether it was measured in an earlier call."""
        return self.output.exists()

    def metrics(self) -> Metrics:
        """The means over the queries, from `queries.json`."""
        return means(read_json(self.output / PER_QUERY)["after"])
