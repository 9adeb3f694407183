"""Losses compared: the same data, model and epochs; each with the learning rate that is best on the dev split."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, get_args, get_type_hints

from negative_cache.workbench.config import LOSSES, RunConfig, RunError, RunFailedError, has_effect
from negative_cache.workbench.data import RetrievalData
from negative_cache.workbench.measuring import Job, measure_apart, saved_record
from negative_cache.workbench.models import LEARNING_RATES, learning_rate_of, load_model
from negative_cache.workbench.training import write_json

RESULT = "compare.json"
RATE_FACTORS = (0.4, 1.0, 2.5)
MAX_EXTENSIONS = 2
CHOICE = "mrr@10"
_KEPT = ("dev", "test", "device", "threads", "failed")
REPORTED = ("mrr@10", "ndcg@10", "recall@100")
COSTS = ("seconds", "documents_encoded", "peak_memory_bytes")

# What all runs of a comparison have in common, or what it sets itself.
FIXED_FIELDS = {
    "data", "model", "loss", "output", "epochs", "max_steps", "learning_rate", "seed", "eval_steps", "save_steps",
}  # fmt: skip


def parse_losses(text: str) -> tuple[str, ...]:
    """Losses that are separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_rates(text: str | None) -> tuple[float, ...] | None:
    """Learning rates that are separated by commas."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RunError(f"--learning-rates is {text!r}; expected numbers, separated by commas.") from None


class Watcher(Protocol):
    """Is told how a comparison goes on."""

    def begin(self, name: str, num_left: int) -> None:
        """A run begins; so many are left, it included, as far as is known."""

    def step(self, step: int, steps: int) -> None:
        """A step was done."""

    def end(self, name: str, record: dict[str, Any], was_there: bool) -> None:
        """A run has ended now, or had ended already."""


@dataclass(frozen=True)
class Comparison:
    """What is compared; checked when it is made.

    Attributes:
        data: See `load_data`.
        model: See `load_model`.
        losses: Names, each maybe with options of its own: `NAME:field=value:field=value`, fields of `RunConfig`.
        output: Folder of the results. The same comparison goes on there; more losses and seeds may join it.
        batch_size: Queries per step.
        epochs: Passes over the training pairs.
        seeds: The rate is chosen with seed 0 and used with the seeds 0 to `seeds - 1`.
        cache_size: Rows of the cache, or of the memory bank's queue.
        scale: Factor of the similarities.
        num_samples: Cached documents encoded per query by the negative cache.
        embedding_dtype: How the negative cache stores embeddings.
        learning_rates: Increasing; None for 0.4, 1 and 2.5 times the model's usual one.
        gradcache_factor: The batch of gradcache is so many times as large.
        query_column: See `load_data`.
        positive_column: See `load_data`.
    """

    data: str
    model: str
    losses: tuple[str, ...]
    output: str
    batch_size: int = 64
    epochs: float = 3.0
    seeds: int = 3
    cache_size: int = 16_384
    scale: float = 20.0
    num_samples: int = 1
    embedding_dtype: str = "float32"
    learning_rates: tuple[float, ...] | None = None
    gradcache_factor: int = 16
    query_column: str | None = None
    positive_column: str | None = None

    def __post_init__(self) -> None:
        for name in ("seeds", "gradcache_factor"):
            if getattr(self, name) < 1:
                raise RunError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be positive.")
        rates = self.rates()
        if not rates or any(not 0 < rate < math.inf for rate in rates) or sorted(set(rates)) != list(rates):
            raise RunError(f"--learning-rates is {list(rates)}; expected positive numbers, the smallest first.")
        if not self.losses or len(set(self.losses)) < len(self.losses):
            raise RunError(f"--losses is {list(self.losses)}; expected one or more, each once.")
        for spec in self.losses:
            self.config(spec)

    def rates(self) -> list[float]:
        """The learning rates to begin with."""
        if self.learning_rates is not None:
            return list(self.learning_rates)
        return [_rounded(factor * learning_rate_of(self.model)) for factor in RATE_FACTORS]

    def config(self, spec: str) -> RunConfig:
        """The configuration of a loss, without the rate and seed of a run."""
        name, *options = spec.split(":")
        if name not in LOSSES:
            raise RunError(f"--losses has {name!r}; expected {', '.join(LOSSES)}, separated by commas.")
        names = [field.name for field in fields(self) if field.name in _OPTIONS and has_effect(name, field.name)]
        shared = {field: getattr(self, field) for field in names}
        if name == "gradcache":
            shared["batch_size"] *= self.gradcache_factor
        given = dict(_parsed(spec, option) for option in options)
        return RunConfig(
            data=self.data, model=self.model, loss=name, output=self.output, epochs=self.epochs, save_steps=None,
            **{**shared, **given},
        )  # fmt: skip

    def job(self, spec: str, rate: float, seed: int) -> Job:
        """One run. That of the last seed has a curve."""
        slug = spec.replace(":", "+")
        config = replace(
            self.config(spec),
            learning_rate=rate,
            seed=seed,
            output=str(Path(self.output) / "runs" / f"{slug}_rate-{rate:g}_seed-{seed}"),
            model=str(self.untrained(seed)) if self.model in LEARNING_RATES else self.model,
        )
        return Job(config, self.query_column, self.positive_column, has_curve=seed == self.seeds - 1)

    def untrained(self, seed: int) -> Path:
        """Where the untrained model of a seed is, if it is one made from scratch."""
        return Path(self.output) / "untrained" / f"seed-{seed}"


_OPTIONS = {field.name for field in fields(RunConfig)} - FIXED_FIELDS


def compare(comparison: Comparison, data: RetrievalData, watcher: Watcher) -> dict[str, Any]:
    """Run what has not been run, and write `compare.json`.

    Args:
        comparison: What to compare.
        data: The data that it names.
        watcher: Is told of every run.

    Returns:
        The content of `compare.json`.

    Raises:
        DataError: The data has no training, dev or test split.
        RunError: The output folder has something else.
        RunFailedError: The process of a run ended, or training failed with every loss. A rate or a seed with which
            training fails is left out, and the result says so.
    """
    about = {"name": data.name, "documents": len(data.corpus), "pairs": len(data.training_columns()["anchor"])}
    for split in ("train", "dev", "test"):
        about[f"{split}_queries"] = len(data.judged(split))
    result = _begin(comparison, about)
    plan = _Plan(comparison, data, watcher)
    for spec in comparison.losses:
        result["losses"][spec] = plan.run(spec)
        write_json(Path(comparison.output) / RESULT, result)
    if not any(loss["runs"] for loss in result["losses"].values()):
        raise RunFailedError(f"Training failed in every run. {failures_of(result)[0]}")
    return result


def failures_of(result: dict[str, Any]) -> list[str]:
    """A sentence for each run that failed."""
    return [
        f"{spec}, rate {run['learning_rate']:g}, seed {run['seed']}: {run['failed']}"
        for spec, loss in result["losses"].items()
        for run in (*loss["sweep"], *loss.get("failed_runs", []))
        if "failed" in run
    ]


def _begin(comparison: Comparison, about: dict[str, Any]) -> dict[str, Any]:
    """A result without losses; `RunError` where the folder has another comparison."""
    output = Path(comparison.output)
    path, losses = output / RESULT, {}
    configuration = json.loads(json.dumps(asdict(comparison)))
    if path.exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
        losses = saved["losses"]
        found, wanted = {**saved["configuration"], **saved["data"]}, {**configuration, **about}
        differing = [
            f"{key} was {found.get(key)!r}, is {value!r}"
            for key, value in wanted.items()
            if key not in ("losses", "seeds", "output") and found.get(key) != value
        ]
        if differing:
            raise RunError(
                f"{comparison.output!r} has another comparison: {'; '.join(differing)}. Give the same options, or "
                "another --output."
            )
    elif output.exists() and any(output.iterdir()):
        raise RunError(f"{comparison.output!r} exists and has no {RESULT}. Choose another --output.")
    output.mkdir(parents=True, exist_ok=True)
    result = {"configuration": configuration, "data": about, "learning_rates": comparison.rates(), "losses": losses}
    write_json(path, result)
    return result


def _make_untrained(comparison: Comparison, data: RetrievalData, seed: int) -> None:
    """The model from scratch with which all losses begin; each text counts once for its tokenizer."""
    folder = comparison.untrained(seed)
    if comparison.model not in LEARNING_RATES or folder.exists():
        return
    columns = data.training_columns()
    texts = list(dict.fromkeys([*columns["anchor"], *columns["positive"]]))
    beside = folder.with_name(f"{folder.name}.partial")
    load_model(comparison.model, texts, seed).save_pretrained(str(beside), create_model_card=False)
    beside.rename(folder)


class _Plan:
    """Runs one loss after the other, and knows how many runs are left."""

    def __init__(self, comparison: Comparison, data: RetrievalData, watcher: Watcher) -> None:
        self.comparison = comparison
        self.data = data
        self.watcher = watcher
        self.num_left = len(comparison.losses) * (len(comparison.rates()) + comparison.seeds - 1)

    def run(self, spec: str) -> dict[str, Any]:
        """Choose the rate of a loss, then train with the other seeds."""
        sweep = {rate: self._record(spec, rate, 0) for rate in self.comparison.rates()}
        for rate in _extensions(sweep):
            self.num_left += 1
            sweep[rate] = self._record(spec, rate, 0)
        rate = _best(sweep)
        result: dict[str, Any] = {
            "configuration": asdict(self.comparison.config(spec)),
            "learning_rate": rate,
            "at_the_edge": rate in (min(sweep), max(sweep)) and len(sweep) > 1,
            "sweep": [_short(sweep[rate]) for rate in sorted(sweep)],
            "runs": [],
            "failed_runs": [],
        }
        if "failed" in sweep[rate]:  # as with all other rates
            return result
        records = [sweep[rate], *(self._record(spec, rate, seed) for seed in range(1, self.comparison.seeds))]
        runs = [record for record in records if "failed" not in record]
        return {
            **result,
            "runs": [_short(record) for record in runs],
            "failed_runs": [_short(record) for record in records if "failed" in record],
            "curve": runs[-1].get("curve", []),
            "summary": summary(runs),
        }

    def _record(self, spec: str, rate: float, seed: int) -> dict[str, Any]:
        job = self.comparison.job(spec, rate, seed)
        name = f"{spec}, rate {rate:g}, seed {seed}"
        self.watcher.begin(name, self.num_left)
        saved = saved_record(job)
        if saved is None:
            _make_untrained(self.comparison, self.data, seed)
        record = saved or measure_apart(job, self.watcher.step)
        self.num_left -= 1
        self.watcher.end(name, record, saved is not None)
        return record


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean and sample standard deviation over seeds: quality on the test split, and costs."""
    values = {name: [record["test"][name] for record in runs] for name in REPORTED}
    values.update({name: [record[name] for record in runs] for name in COSTS})
    return {
        name: {"mean": statistics.fmean(found), "std": statistics.stdev(found) if len(found) > 1 else None}
        for name, found in values.items()
    }


def _extensions(sweep: dict[float, dict[str, Any]]) -> Iterator[float]:
    """Further rates, as long as the best one is at an edge; the caller adds each to `sweep`."""
    if len(sweep) < 2:
        return
    for _ in range(MAX_EXTENSIONS):
        rates = sorted(sweep)
        if (best := _best(sweep)) == rates[-1]:
            yield _rounded(rates[-1] * rates[-1] / rates[-2])
        elif best == rates[0]:
            yield _rounded(rates[0] * rates[0] / rates[1])
        else:
            return


def _best(sweep: dict[float, dict[str, Any]]) -> float:
    """The best rate, of equal ones the smallest; one with which training failed is worse than all others."""
    return max(sorted(sweep), key=lambda rate: -1.0 if "failed" in sweep[rate] else sweep[rate]["dev"][CHOICE])


def _rounded(rate: float) -> float:
    return float(f"{rate:.6g}")


def _short(record: dict[str, Any]) -> dict[str, Any]:
    """What the result keeps of a run."""
    configuration = record["configuration"]
    return {
        "learning_rate": configuration["learning_rate"],
        "seed": configuration["seed"],
        **{
            key: record[key] for key in ("steps", *COSTS, "dev", "test", "device", "threads", "failed") if key in record
        },
    }


def _parsed(spec: str, option: str) -> tuple[str, Any]:
    """(field, value) of `field=value`."""
    name, _, text = option.partition("=")
    if name not in _OPTIONS:
        raise RunError(f"--losses has {spec!r}; options are field=value with the fields {', '.join(sorted(_OPTIONS))}.")
    hint = get_type_hints(RunConfig)[name]
    (kind, *_) = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    try:
        return name, {"true": True, "false": False}[text] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise RunError(f"--losses has {spec!r}; the value of {name} must be {kind.__name__}, got {text!r}.") from None
