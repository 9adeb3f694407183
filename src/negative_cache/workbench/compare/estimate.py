"""What the runs of a comparison will cost, before they start, and the time that is left."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from negative_cache.workbench.compare.comparison import BASELINES, Comparison
from negative_cache.workbench.compare.probe import Costs
from negative_cache.workbench.counting import counted, percent
from negative_cache.workbench.data import RetrievalData
from negative_cache.workbench.training.config import num_steps
from negative_cache.workbench.training.curve import POINTS


@dataclass(frozen=True)
class RunCost:
    """The predicted cost of a run, or of the measurement of a baseline.

    Attributes:
        steps: Optimizer steps.
        documents: Documents that training encodes.
        training: Seconds of training, with mining.
        evaluation: Seconds of evaluations, and of loading.
    """

    steps: int
    documents: float
    training: float
    evaluation: float

    @property
    def seconds(self) -> float:
        """All seconds."""
        return self.training + self.evaluation


class Predictor:
    """Predicts the cost of runs.

    Args:
        comparison: The comparison.
        data: Its data, with a dev split.
        costs: The measured costs.
    """

    def __init__(self, comparison: Comparison, data: RetrievalData, costs: Costs) -> None:
        self._comparison = comparison
        self._data = data
        self._costs = costs
        self._num_pairs = data.num_pairs("train")

    def run(self, spec: str, has_curve: bool) -> RunCost:
        """The cost of a run of a loss, to the end of its steps."""
        config, costs = self._comparison.config(spec), self._costs
        cost, corpus, num_queries = costs.training[spec], len(self._data.corpus), len(self._data.judged("train"))
        steps = num_steps(config, self._num_pairs)
        queries = self._num_pairs * config.epochs
        if config.max_steps is not None:
            queries = steps * min(config.batch_size * config.gradient_accumulation_steps, self._num_pairs)
        training, documents = queries * cost.seconds + steps * cost.seconds_per_step, queries * cost.documents
        if config.loss == "mined":
            training += config.mining_rounds * (corpus * costs.document + num_queries * costs.query)
            documents += config.mining_rounds * (corpus + num_queries)
        if config.fill_from_corpus:
            training += corpus * costs.document
            documents += corpus
        evaluation = self._start() + self._evaluation("dev", "test")
        if has_curve:
            evaluation += len(POINTS) * self._evaluation("test")
        if config.eval_steps is not None:
            evaluation += steps // config.eval_steps * self._evaluation("dev")
        return RunCost(steps, documents, training, evaluation)

    def zero_shot(self) -> RunCost:
        """The cost of measuring the model before training."""
        return RunCost(0, 0, 0, self._costs.start + self._evaluation("test"))

    def _start(self) -> float:
        """Seconds before training, in which a static model tokenizes all texts."""
        return self._costs.start + self._costs.tokens * (len(self._data.corpus) + len(self._data.queries))

    def _evaluation(self, *splits: str) -> float:
        costs, seconds = self._costs, 0.0
        for part in {id(part): part for part in map(self._data.part, splits)}.values():
            seconds += len(part.corpus) * costs.document
        for split in splits:
            num_queries, num_documents = len(self._data.graded(split)), len(self._data.part(split).corpus)
            seconds += num_queries * (costs.query + costs.judgement + num_documents * costs.score)
        return seconds


@dataclass(frozen=True)
class Estimate:
    """What a comparison will cost.

    Attributes:
        comparison: The comparison.
        runs: Entry of `losses` -> the costs of its runs that are not done yet. BM25 has none.
        further: Loss -> the costs of the further runs if its best learning rate is the lowest or highest one.
    """

    comparison: Comparison
    runs: Mapping[str, Sequence[RunCost]]
    further: Mapping[str, Sequence[RunCost]]

    def seconds_per_run(self) -> dict[str, float]:
        """The mean seconds of the runs of each entry."""
        return {spec: statistics.fmean(cost.seconds for cost in runs) for spec, runs in self.runs.items() if runs}

    def lines(self) -> list[str]:
        """The estimate in words, a few lines."""
        costs = [cost for runs in self.runs.values() for cost in runs]
        more = [cost for runs in self.further.values() for cost in runs]
        trained = {spec: runs for spec, runs in self.runs.items() if spec not in BASELINES}
        runs = counted(sum(map(len, trained.values())), "training run")
        up_to = ""
        if more:
            runs += f", and up to {len(more)} more if the best learning rates are the lowest or highest ones"
            up_to = f"; up to {duration(sum(cost.seconds for cost in (*costs, *more)))} with the runs of further rates"
        is_longest = "" if self.comparison.early_stopping_patience is None else ", without early stopping"
        documents = sum(cost.documents for cost in costs)
        seconds, evaluation = (sum(getattr(cost, name) for cost in costs) for name in ("seconds", "evaluation"))
        lines = [
            f"{runs}. Steps of a run: {_steps_in_words(trained)}. Documents encoded in training: {documents:,.0f}.",
            f"Estimated time: {duration(seconds)}, {percent(evaluation / seconds)} of it for evaluation{up_to}. It is "
            f"extrapolated from a few steps and texts on this machine{is_longest}.",
        ]
        if shorter := self._shorter(costs):
            lines.append(f"To make it shorter: {', '.join(shorter)}.")
        return lines

    def _shorter(self, costs: Sequence[RunCost]) -> list[str]:
        comparison = self.comparison
        is_mostly_evaluation = sum(cost.evaluation for cost in costs) > sum(cost.training for cost in costs)
        ways = {
            "--seeds 1": comparison.seeds > 1,
            "one rate as --learning-rates": len(comparison.rates()) > 1,
            "--eval-documents": is_mostly_evaluation and comparison.data_options.eval_documents is None,
            "--max-train-pairs": comparison.data_options.max_train_pairs is None and comparison.max_steps is None,
            "--max-steps": comparison.max_steps is None and not any(":epochs=" in spec for spec in comparison.losses),
        }
        return [way for way, applies in ways.items() if applies]


def _steps_in_words(runs: Mapping[str, Sequence[RunCost]]) -> str:
    """The steps of a run of each loss, or the one number if all have the same."""
    steps = {spec: of_loss[0].steps for spec, of_loss in runs.items()}
    if len(set(steps.values())) == 1:
        return f"{next(iter(steps.values())):,}"
    return ", ".join(f"{spec} {number:,}" for spec, number in steps.items())


class TimeLeft:
    """The time that a comparison still takes: by the runs that have ended, and before that, by the estimate.

    Args:
        predicted: Entry of `losses` -> predicted seconds of a run; empty without an estimate.
    """

    def __init__(self, predicted: Mapping[str, float]) -> None:
        self._predicted = predicted
        self._ended: dict[str, list[float]] = defaultdict(list)

    def add(self, spec: str, seconds: float) -> None:
        """Add a run that has ended."""
        self._ended[spec].append(seconds)

    def seconds(self, num_left: Mapping[str, int]) -> float | None:
        """Seconds of the runs that are left of each entry; None if nothing is known of one."""
        known = {spec: statistics.fmean(seconds) for spec, seconds in self._ended.items()}
        both = known.keys() & self._predicted.keys()
        ratio = sum(known[spec] for spec in both) / sum(self._predicted[spec] for spec in both) if both else 1.0
        per_run = {**{spec: ratio * seconds for spec, seconds in self._predicted.items()}, **known}
        left = {spec: number for spec, number in num_left.items() if number and spec != "bm25"}
        return sum(number * per_run[spec] for spec, number in left.items()) if left.keys() <= per_run.keys() else None


def duration(seconds: float) -> str:
    """A time in words, such as 40 s, 12 min or 3.5 h."""
    if seconds < 90:
        return f"{max(1, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
