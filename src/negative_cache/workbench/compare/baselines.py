"""What a comparison measures without training: BM25, and the model before training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from negative_cache.workbench.compare.comparison import Comparison
from negative_cache.workbench.data import DataOptions, load_data
from negative_cache.workbench.evaluation import (
    DEFAULT_MEASURES,
    EncodingOptions,
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
from negative_cache.workbench.training.record import Metrics, read_json


@dataclass(frozen=True)
class Baseline:
    """The measurement of a baseline on the test split.

    Attributes:
        name: One of `BASELINES`.
        seed: Seed of the untrained model's weights; None if there is nothing random.
        data: See `load_data`.
        data_options: See `load_data`.
        model: Name or path of the model before training.
        output: Folder of its `queries.json`.
        encoding: How the model encodes.
    """

    name: str
    seed: int | None
    data: str
    data_options: DataOptions
    model: str
    output: Path
    encoding: EncodingOptions

    @classmethod
    def all_of(cls, comparison: Comparison, name: str) -> list[Baseline]:
        """The measurements of a baseline for a comparison: one, or one for each seed of an untrained model."""
        is_random = name != "bm25" and comparison.is_from_scratch
        return [
            cls(
                name=name,
                seed=seed if is_random else None,
                data=comparison.data,
                data_options=comparison.data_options,
                model=comparison.initial_model(seed),
                output=Path(comparison.output) / "runs" / (f"{name}_seed-{seed}" if is_random else name),
                encoding=EncodingOptions(comparison.query_prompt, comparison.document_prompt),
            )
            for seed in range(comparison.seeds if is_random else 1)
        ]

    def __call__(self, on_progress: OnProgress) -> Metrics:
        """Measure it, write `queries.json`, and return the metrics."""
        data, measures = load_data(self.data, self.data_options), parse_measures(DEFAULT_MEASURES)
        if self.name == "bm25":
            quality = judge_split(data, "test", bm25_run(data, "test", depth_of(measures)), measures)
        else:
            model = load_trained(self.model)
            quality = evaluate(model, data, ("test",), measures, self.encoding, on_progress)["test"]
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.output, ".partial") as temporary:
            temporary.mkdir(exist_ok=True)  # one is left if the process was killed
            write_json(temporary / PER_QUERY, {"corpus": corpus_of(data, "test"), "after": quality.per_query})
        return self.metrics()

    def is_measured(self) -> bool:
        """Whether it was measured in an earlier call."""
        return self.output.exists()

    def metrics(self) -> Metrics:
        """The means over the queries, from `queries.json`."""
        return means(read_json(self.output / PER_QUERY)["after"])
