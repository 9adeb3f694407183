"""Running a comparison: for each loss, a sweep of the learning rate, then runs with other seeds."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from negative_cache.workbench.compare.baselines import Baseline
from negative_cache.workbench.compare.comparison import BASELINES, Comparison, rounded
from negative_cache.workbench.compare.estimate import Estimate, Predictor, TimeLeft
from negative_cache.workbench.compare.isolated import Job, run_isolated
from negative_cache.workbench.compare.probe import Probe
from negative_cache.workbench.counting import counted
from negative_cache.workbench.data import RetrievalData, fingerprints
from negative_cache.workbench.evaluation import parse_measures
from negative_cache.workbench.evaluation.defaults import COMPARISON
from negative_cache.workbench.evaluation.significance import compare_systems
from negative_cache.workbench.evaluation.systems import read_systems, systems_of_comparison
from negative_cache.workbench.files import replacing, write_json
from negative_cache.workbench.models import load_model
from negative_cache.workbench.suggestions import UNFINISHED
from negative_cache.workbench.training.config import RunError, RunFailedError, changed_options
from negative_cache.workbench.training.curve import POINTS
from negative_cache.workbench.training.driver import RunOptions, finished_run
from negative_cache.workbench.training.record import Metrics, RunRecord, read_json

MAX_EXTENSIONS = 2
CHOICE = "MRR@10"
REPORTED = ("MRR@10", "nDCG@10", "R@100")
TESTED = ("MRR@10", "nDCG@10")
COSTS = ("seconds", "documents_encoded", "peak_memory_bytes")
OPTIONS = RunOptions(
    measure_before=False, measure_dev=True, keep_model=False, record_failure=True, cache_tokens=True,
    count_cut_texts=False,  # which the estimate does, once for all runs
)  # fmt: skip
_KEPT = ("steps", *COSTS, "dev", "after", "device", "threads", "failed")


class Watcher(Protocol):
    """Receives the progress of a comparison.

    Attributes:
        is_shown: Whether a user sees it. If not, the time is not estimated.
    """

    is_shown: bool

    def plan(self, lines: Sequence[str]) -> None:
        """What the comparison will cost, in words."""

    def begin(self, name: str, num_left: int, seconds_left: float | None) -> None:
        """A run begins. As far as is known, `num_left` runs are left, including this one, which take `seconds_left`."""

    def step(self, step: int, steps: int) -> None:
        """A step is done; of a baseline, `step` of `steps` documents are encoded."""

    def end(self, name: str, found: RunRecord | Metrics, is_old: bool) -> None:
        """A run has ended, or a baseline is measured; with `is_old`, that was in an earlier call."""


def compare(comparison: Comparison, data: RetrievalData, watcher: Watcher) -> dict[str, Any]:
    """Do all missing runs, and write `compare.json`.

    Args:
        comparison: What to compare.
        data: The data that the comparison names; `with_dev` is applied to it.
        watcher: Receives the progress.

    Returns:
        The content of `compare.json`.

    Raises:
        DataError: The data lacks a training or test split.
        RunError: The output folder has other content.
        RunFailedError: The process of a run was killed, or training failed with every loss. A learning rate or seed
            for which training fails is left out and listed in the result.
    """
    data = data.with_dev()
    train, searched = data.judged("train"), data.part("test").corpus
    about: dict[str, Any] = {"name": data.name, "notes": list(data.notes), "documents": len(searched)}
    about |= {"pairs": data.num_pairs("train"), "train_queries": len(train)}
    about |= {f"{split}_queries": len(data.graded(split)) for split in ("dev", "test")}
    about["fingerprint"] = fingerprints.of_data(data)
    result = _begin(comparison, about)
    runner = _Runner(comparison, data, watcher, result["losses"])
    runner.plan()
    for spec in comparison.losses:
        result["losses"][spec] = runner.measure(spec) if spec in BASELINES else runner.run(spec)
        write_json(Path(comparison.output) / COMPARISON, result)
    trained = [loss["runs"] for spec, loss in result["losses"].items() if spec not in BASELINES]
    if trained and not any(trained):
        raise RunFailedError(f"Training failed in every run. {failures_of(result)[0]}")
    result["significance"] = significance(Path(comparison.output), result["losses"])
    write_json(Path(comparison.output) / COMPARISON, result)
    return result


def significance(folder: Path, losses: dict[str, Any]) -> dict[str, Any]:
    """The `Significance` of the losses for each of the measures `TESTED`; empty with fewer than two losses.

    Args:
        folder: Folder of the comparison.
        losses: The entry `losses` of `compare.json`.
    """
    systems = systems_of_comparison(folder, losses)
    if len(systems) < 2:
        return {}
    values = read_systems(systems, parse_measures(" ".join(TESTED)))
    return {
        name: compare_systems({spec: [of_seed[name] for of_seed in seeds] for spec, seeds in values.items()}).as_dict()
        for name in TESTED
    }


def failures_of(result: dict[str, Any]) -> list[str]:
    """A sentence for each run that failed."""
    return [
        f"{spec}, rate {run['learning_rate']:g}, seed {run['seed']}: {run['failed']}"
        for spec, loss in result["losses"].items()
        for run in (*loss["sweep"], *loss["failed_runs"])
        if run["failed"] is not None
    ]


def summary(runs: Sequence[RunRecord]) -> dict[str, dict[str, float | None]]:
    """Mean and sample standard deviation over runs, of quality on the test split and of costs."""
    return {
        **quality_of([run.after or {} for run in runs]),
        **{name: _spread([getattr(run, name) for run in runs]) for name in COSTS},
    }


def quality_of(metrics: Sequence[Metrics]) -> dict[str, dict[str, float | None]]:
    """Mean and sample standard deviation of the measures `REPORTED`."""
    return {name: _spread([of_run[name] for of_run in metrics]) for name in REPORTED}


def best_rate(sweep: dict[float, RunRecord]) -> float:
    """The best learning rate on the dev split, the smallest in a tie. Failed runs are worse than all others."""
    return max(sorted(sweep), key=lambda rate: (sweep[rate].dev or {CHOICE: -1.0})[CHOICE])


def extensions(sweep: dict[float, RunRecord]) -> Iterator[float]:
    """Yield further learning rates while the best one is the lowest or highest. The caller adds each run to `sweep`."""
    if len(sweep) < 2:
        return
    for _ in range(MAX_EXTENSIONS):
        rates = sorted(sweep)
        if (best := best_rate(sweep)) == rates[-1]:
            yield rounded(rates[-1] * rates[-1] / rates[-2])
        elif best == rates[0]:
            yield rounded(rates[0] * rates[0] / rates[1])
        else:
            return


class _Runner:
    """Runs the losses one after another, and counts the runs that are left.

    Args:
        comparison: The comparison.
        data: Its data.
        watcher: Receives the progress.
        finished: The entry `losses` of `compare.json`.
    """

    def __init__(self, comparison: Comparison, data: RetrievalData, watcher: Watcher, finished: dict[str, Any]) -> None:
        self.comparison = comparison
        self.data = data
        self.watcher = watcher
        self.left = {spec: self._left(spec, finished.get(spec, {})) for spec in comparison.losses}
        self.num_left = {spec: len(seeds) for spec, seeds in self.left.items()}
        self.time_left = TimeLeft({})

    def plan(self) -> None:
        """Estimate the time of the runs, if a user sees it and there are runs."""
        losses = tuple(spec for spec, number in self.num_left.items() if number and spec not in BASELINES)
        if not losses or not self.watcher.is_shown:
            return
        self.watcher.begin("estimating the time", sum(self.num_left.values()), None)
        _make_untrained(self.comparison, self.data, 0)
        try:
            costs = run_isolated("estimate", Probe(self.comparison, losses), self.watcher.step)
        except RunFailedError as error:
            self.watcher.plan([f"The time cannot be estimated. {str(error).splitlines()[-1]}"])
            return
        predictor, last = Predictor(self.comparison, self.data, costs), self.comparison.seeds - 1
        runs = {spec: [predictor.run(spec, seed == last) for seed in self.left[spec]] for spec in losses}
        swept = [spec for spec in losses if 0 in self.left[spec] and len(self.comparison.rates()) > 1]
        further = {spec: [predictor.run(spec, last == 0)] * MAX_EXTENSIONS for spec in swept}
        if number := self.num_left.get("zero-shot"):
            runs["zero-shot"] = [predictor.zero_shot()] * number
        estimate = Estimate(self.comparison, runs, further)
        self.time_left = TimeLeft(estimate.seconds_per_run())
        self.watcher.plan([*estimate.lines(), *costs.notes])

    def run(self, spec: str) -> dict[str, Any]:
        """Choose the learning rate of a loss, then train with the other seeds."""
        sweep = {rate: self._record(spec, rate, 0) for rate in self.comparison.rates()}
        for rate in extensions(sweep):
            self.num_left[spec] += 1
            sweep[rate] = self._record(spec, rate, 0)
        rate = best_rate(sweep)
        result: dict[str, Any] = {
            "configuration": asdict(self.comparison.config(spec)),
            "learning_rate": rate,
            "at_the_edge": rate in (min(sweep), max(sweep)) and len(sweep) > 1,
            "sweep": [_short(sweep[rate]) for rate in sorted(sweep)],
            "runs": [],
            "failed_runs": [],
        }
        if sweep[rate].failed is not None:  # then all other rates failed, too
            return result
        records = [sweep[rate], *(self._record(spec, rate, seed) for seed in range(1, self.comparison.seeds))]
        runs = [record for record in records if record.failed is None]
        return {
            **result,
            "runs": [_short(record) for record in runs],
            "failed_runs": [_short(record) for record in records if record.failed is not None],
            "curve": runs[-1].curve,
            "summary": summary(runs),
        }

    def measure(self, name: str) -> dict[str, Any]:
        """Measure a baseline. Its result has no learning rate, and runs without costs."""
        runs: list[dict[str, Any]] = []
        for baseline in Baseline.all_of(self.comparison, name):
            title = name if baseline.seed is None else f"{name}, seed {baseline.seed}"
            is_old = baseline.is_measured()
            self._begin(title)
            began = time.monotonic()
            if not is_old:
                if name != "bm25":
                    _make_untrained(self.comparison, self.data, baseline.seed or 0)
                run_isolated(title, baseline, self.watcher.step)
            metrics = baseline.metrics()
            self._end(name, is_old, time.monotonic() - began)
            self.watcher.end(title, metrics, is_old)
            runs.append({"folder": baseline.output.name, "seed": baseline.seed, "after": metrics})
        return {
            "learning_rate": None,
            "sweep": [],
            "runs": runs,
            "failed_runs": [],
            "summary": quality_of([run["after"] for run in runs]),
        }

    def _record(self, spec: str, rate: float, seed: int) -> RunRecord:
        """Return the record of a run, and do the run if it is not complete."""
        job = self._job(spec, rate, seed)
        name = f"{spec}, rate {rate:g}, seed {seed}"
        self._begin(name)
        began, saved = time.monotonic(), _saved_record(job)
        if saved is None:
            shutil.rmtree(job.config.output, ignore_errors=True)  # a run without the curve
            _make_untrained(self.comparison, self.data, seed)
        record = saved or run_isolated(job.config.output, job, self.watcher.step)
        self._end(spec, saved is not None, time.monotonic() - began)
        self.watcher.end(name, record, saved is not None)
        return record

    def _job(self, spec: str, rate: float, seed: int) -> Job:
        has_curve = seed == self.comparison.seeds - 1
        return Job(self.comparison.run_config(spec, rate, seed), replace(OPTIONS, curve=POINTS if has_curve else ()))

    def _left(self, spec: str, finished: dict[str, Any]) -> list[int]:
        """The seeds of the runs of an entry that are not done, as far as is known."""
        if spec in BASELINES:
            return [
                baseline.seed or 0 for baseline in Baseline.all_of(self.comparison, spec) if not baseline.is_measured()
            ]
        rates = self.comparison.rates()
        left = [0 for rate in rates if _saved_record(self._job(spec, rate, 0)) is None]
        chosen = {*rates, *([finished["learning_rate"]] if "learning_rate" in finished else [])}
        for seed in range(1, self.comparison.seeds):
            if all(_saved_record(self._job(spec, rate, seed)) is None for rate in chosen):
                left.append(seed)
        return left

    def _begin(self, name: str) -> None:
        self.watcher.begin(name, sum(self.num_left.values()), self.time_left.seconds(self.num_left))

    def _end(self, spec: str, is_old: bool, seconds: float) -> None:
        if not is_old:
            self.num_left[spec] = max(0, self.num_left[spec] - 1)
            self.time_left.add(spec, seconds)


def _saved_record(job: Job) -> RunRecord | None:
    """The record of a finished run; None if there is none, or if it lacks a curve that is needed."""
    record = finished_run(job.config, resume=True)
    lacks_curve = record is not None and job.options.curve and not record.curve and record.failed is None
    return None if lacks_curve else record


def _begin(comparison: Comparison, about: dict[str, Any]) -> dict[str, Any]:
    """A result without losses, or the saved one; raises RunError if the folder has another comparison."""
    output = Path(comparison.output)
    path, losses = output / COMPARISON, {}
    configuration = json.loads(json.dumps(asdict(comparison)))
    if path.exists():
        saved = read_json(path)
        losses = saved["losses"]
        if changed := changed_options(saved["configuration"], configuration, ignored=("losses", "seeds", "output")):
            raise RunError(
                f"{comparison.output!r} has another comparison: {changed}. Give the same options, or another --output."
            )
        if saved["data"].get("fingerprint") != about["fingerprint"]:
            raise RunError(
                f"{comparison.output!r} has a comparison, and {comparison.data!r} has changed since it began. Restore "
                "the data, or give another --output."
            )
        left_out = [spec for spec in losses if spec not in comparison.losses]
        if left_out and saved["configuration"]["seeds"] != comparison.seeds:
            raise RunError(
                f"{comparison.output!r} has results of {counted(saved['configuration']['seeds'], 'seed')} of "
                f"{', '.join(left_out)}, and --seeds is {comparison.seeds}. Name these, too, in --losses, so that all "
                "have the same seeds."
            )
    elif output.exists() and any(output.iterdir()):
        raise RunError(f"{comparison.output!r} exists and has no {COMPARISON}. Choose another --output.")
    output.mkdir(parents=True, exist_ok=True)
    result = {
        "configuration": configuration,
        "data": about,
        "learning_rates": comparison.rates(),
        "losses": losses,
        "significance": {},
    }
    write_json(path, result)
    return result


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation; the latter is None with one value."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def _make_untrained(comparison: Comparison, data: RetrievalData, seed: int) -> None:
    """Build the model that all losses start from, unless it is loaded as it is."""
    folder = comparison.untrained(seed)
    if folder is None or folder.exists():
        return
    with replacing(folder, UNFINISHED) as temporary:
        model = load_model(comparison.model, data.training_texts(), seed)
        model.save_pretrained(str(temporary), create_model_card=False)


def _short(record: RunRecord) -> dict[str, Any]:
    """The fields of a record that `compare.json` contains, and the name of the run's folder."""
    configuration = record.configuration
    return {
        "folder": Path(configuration["output"]).name,
        "learning_rate": configuration["learning_rate"],
        "seed": configuration["seed"],
        **{key: getattr(record, key) for key in _KEPT},
    }
