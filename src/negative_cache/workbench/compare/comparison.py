"""The configuration of a comparison."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints
from urllib.parse import quote

from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.model_names import DISTILLED, is_from_scratch, learning_rate_of
from negative_cache.workbench.suggestions import did_you_mean
from negative_cache.workbench.training.config import (
    LOSSES,
    RunConfig,
    RunError,
    TrainingSettings,
    check_guide,
    check_positive,
    has_effect,
    mining_start,
    parse_num_samples,
)

RATE_FACTORS = (0.4, 1.0, 2.5)
BASELINES = ("bm25", "zero-shot")
"""What is measured without training, under `--losses`."""

# Fields of `RunConfig` that all runs of a comparison share, or that the comparison sets.
FIXED_FIELDS = {
    "data", "model", "loss", "output", "max_steps", "learning_rate", "seed", "save_steps", "report_to", "data_options",
}  # fmt: skip
_OPTIONS = {option.name for option in fields(RunConfig)} - FIXED_FIELDS


def parse_losses(text: str) -> tuple[str, ...]:
    """Losses from a comma-separated list."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_rates(text: str | None) -> tuple[float, ...] | None:
    """Learning rates from a comma-separated list."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RunError(f"--learning-rates is {text!r}; expected numbers, separated by commas.") from None


@dataclass(frozen=True)
class Comparison(TrainingSettings):
    """What to compare, with `TrainingSettings`; validated on construction.

    Attributes:
        data: See `load_data`.
        model: See `load_model`.
        losses: Names of losses, each with optional settings: `NAME:field=value:field=value`, fields of `RunConfig`; or
            of `BASELINES`: bm25, which has no model, and zero-shot, the model before training.
        output: Folder of the results. The same comparison, also with more losses or seeds, is continued there.
        batch_size: Queries per step.
        epochs: Passes over the training pairs.
        max_steps: Stop each run after this number of steps; None for all epochs. For gradcache and cached-gist, it and
            `eval_steps` are divided by `gradcache_factor`.
        seeds: Number of seeds. The learning rate is chosen with seed 0, and used with seeds 0 to `seeds - 1`.
        cache_size: Rows of the cache, or of the memory bank's queue.
        scale: Factor that multiplies the similarities.
        num_samples: Cached documents that the negative cache re-encodes per query.
        embedding_dtype: dtype of the negative cache's embeddings.
        learning_rates: In increasing order; None for 0.4, 1 and 2.5 times the default of the model.
        gradcache_factor: Factor that multiplies the batch size for gradcache and cached-gist.
        data_options: How the data is read.
    """

    data: str
    model: str
    losses: tuple[str, ...]
    output: str
    batch_size: int = RunConfig.batch_size
    epochs: float = RunConfig.epochs
    max_steps: int | None = None
    seeds: int = 3
    cache_size: int = RunConfig.cache_size
    scale: float = RunConfig.scale
    num_samples: float | Literal["auto"] = RunConfig.num_samples
    embedding_dtype: str = RunConfig.embedding_dtype
    learning_rates: tuple[float, ...] | None = None
    gradcache_factor: int = 16
    data_options: DataOptions = field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.partition(":")[0] == "static":
            self.check_static()
        check_positive(self, ("seeds", "gradcache_factor", *(["max_steps"] if self.max_steps is not None else [])))
        rates = self.rates()
        if not rates or any(not 0 < rate < math.inf for rate in rates) or sorted(set(rates)) != list(rates):
            raise RunError(f"--learning-rates is {list(rates)}; expected positive numbers in increasing order.")
        if not self.losses or len(set(self.losses)) < len(self.losses):
            raise RunError(f"--losses is {list(self.losses)}; expected at least one loss, and none twice.")
        for spec in self.losses:
            if spec not in BASELINES:
                check_guide(self.config(spec))

    def rates(self) -> list[float]:
        """The learning rates that the sweep starts with."""
        if self.learning_rates is not None:
            return list(self.learning_rates)
        usual = learning_rate_of(self.model, has_adapters=self.lora is not None)
        return [rounded(factor * usual) for factor in RATE_FACTORS]

    def config(self, spec: str) -> RunConfig:
        """The configuration of a loss, without the learning rate and seed of a run."""
        name, *settings = spec.split(":")
        if name in BASELINES:
            raise RunError(f"--losses has {spec!r}; {name} is not trained and has no settings.")
        if name not in LOSSES:
            known = (*LOSSES, *BASELINES)
            raise RunError(
                f"--losses has {name!r}; expected {', '.join(known)}, separated by commas.{did_you_mean(name, known)}"
            )
        names = [option.name for option in fields(self) if option.name in _OPTIONS and has_effect(name, option.name)]
        shared = {option: getattr(self, option) for option in names}
        shared["max_steps"] = self.max_steps
        if name in ("gradcache", "cached-gist"):
            shared["batch_size"] *= self.gradcache_factor
            for option in ("max_steps", "eval_steps"):
                if shared[option] is not None:
                    shared[option] = math.ceil(shared[option] / self.gradcache_factor)
        own = dict(_parsed(spec, setting) for setting in settings)
        if "epochs" in own and self.max_steps is not None:
            raise RunError(f"--losses has {spec!r}; epochs have no effect with --max-steps. Leave one of them out.")
        options = {**shared, **own}
        return RunConfig(
            data=self.data,
            model=self.model,
            loss=name,
            output=self.output,
            save_steps=None,
            data_options=self.data_options,
            **options,
        )

    def run_config(self, spec: str, rate: float, seed: int) -> RunConfig:
        """The configuration of one run."""
        name = f"{quote(spec.replace(':', '+'), safe='+=,')}_rate-{rate:g}_seed-{seed}"  # a guide may be a path
        config = self.config(spec)
        return replace(
            config,
            learning_rate=rate,
            seed=seed,
            output=str(Path(self.output) / "runs" / name),
            model=self.initial_model(seed),
            mining_start=mining_start(config) if config.loss == "mined" else None,
        )

    @property
    def is_from_scratch(self) -> bool:
        """Whether the weights before training are random, so that each seed has an untrained model of its own."""
        return is_from_scratch(self.model)

    def initial_model(self, seed: int) -> str:
        """Name or path of the model before training."""
        return str(self.untrained(seed) or self.model)

    def untrained(self, seed: int) -> Path | None:
        """The folder of the model before training, if the comparison builds it: one for each seed if it is random."""
        if self.is_from_scratch:
            return Path(self.output) / "untrained" / f"seed-{seed}"
        return Path(self.output) / "untrained" / "static" if self.model.startswith(DISTILLED) else None


def rounded(rate: float) -> float:
    """A learning rate with six significant digits."""
    return float(f"{rate:.6g}")


def _parsed(spec: str, setting: str) -> tuple[str, Any]:
    """Field and value of `field=value`."""
    name, _, text = setting.partition("=")
    if name not in _OPTIONS:
        raise RunError(f"--losses has {spec!r}; expected field=value, with one of {', '.join(sorted(_OPTIONS))}.")
    if name == "num_samples":
        return name, parse_num_samples(text)
    hint = get_type_hints(RunConfig)[name]
    (kind, *_) = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    try:
        return name, {"true": True, "false": False}[text] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise RunError(f"--losses has {spec!r}; the value of {name} must be {kind.__name__}, got {text!r}.") from None
