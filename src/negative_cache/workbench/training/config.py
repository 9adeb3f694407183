"""The configuration of a training run."""

from __future__ import annotations

import importlib.util
import math
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.model_names import DISTILLED, is_from_scratch
from negative_cache.workbench.suggestions import did_you_mean

LOSSES = ("negative-cache", "in-batch", "gradcache", "memory-bank", "mined", "gist", "cached-gist")
EMBEDDING_DTYPES = ("float32", "bfloat16", "float16", "int8")
SAMPLING_STRATEGIES = ("top", "random")
GUIDED = ("gist", "cached-gist")
MINED_RELATIVE_MARGIN = 0.05  # which the documentation of `mine_hard_negatives` recommends

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt")

# Settings that have no effect on static embeddings, and why.
NOT_STATIC = {
    "max_seq_length": "which have no limit",
    "dropout": "which have none",
    "gradient_checkpointing": "which store no activations",
    "bf16": "which are looked up, not computed",
    "fp16": "which are looked up, not computed",
    "torch_compile": "which have nothing to compile",
    "lora": "which have no linear layers",
}

# Fields that only some losses use.
CACHE_FIELDS = {
    "num_samples", "in_batch", "shared", "absolute_margin", "relative_margin", "symmetric", "refresh_per_step",
    "use_lru", "embedding_dtype", "fill_from_corpus",
}  # fmt: skip
GUIDE_FIELDS = {"guide", "absolute_margin", "relative_margin"}
MINING_FIELDS = {
    "num_negatives", "range_min", "range_max", "relative_margin", "sampling_strategy", "mining_rounds", "mining_start",
}  # fmt: skip
FIELDS_OF = {
    "negative-cache": {*CACHE_FIELDS, "cache_size"},
    "memory-bank": {"cache_size"},
    "mined": MINING_FIELDS,
    "gist": GUIDE_FIELDS,
    "cached-gist": GUIDE_FIELDS,
}


class RunError(ValueError):
    """A configuration that cannot be run."""


class RunFailedError(RuntimeError):
    """A run that started and failed."""


def has_effect(loss: str, field: str) -> bool:
    """Whether a loss uses a field of `RunConfig`."""
    return field in FIELDS_OF.get(loss, ()) or not any(field in of_loss for of_loss in FIELDS_OF.values())


def flag_of(field: str) -> str:
    """The command-line option that sets a field."""
    return f"--{field.replace('_', '-')}"


def arguments_of(configuration: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """Fields of a configuration as words of a command: those among the names that have not the default.

    Args:
        configuration: The fields of a `RunConfig`, as in `run.json`.
        names: The fields.
    """
    words = []
    for option in fields(RunConfig):
        value, flag = configuration.get(option.name, option.default), flag_of(option.name)
        if option.name not in names or value == option.default:
            continue
        if isinstance(option.default, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    return words


def changed_options(saved: Mapping[str, Any], given: Mapping[str, Any], ignored: Collection[str] = ()) -> str:
    """The options that have changed, such as "--scale was 20, is 10; --negatives was all, is ignore".

    Args:
        saved: The fields of an earlier configuration.
        given: The fields of the present one.
        ignored: Fields that may differ.
    """
    before, now = ({**options, **options.get("data_options", {})} for options in (saved, given))
    return "; ".join(
        f"{flag_of(name)} was {_in_words(before.get(name))}, is {_in_words(value)}"
        for name, value in now.items()
        if name not in (*ignored, "data_options") and before.get(name) != value
    )


def _in_words(value: object) -> str:
    if value is None:
        return "not given"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return ",".join(map(_in_words, value))
    return str(value).removesuffix(".0") if isinstance(value, float) else shlex.quote(str(value))


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What a run and a comparison can set alike; the arguments of sentence-transformers have the same names.

    Attributes:
        query_prompt: Text before each query, also in the saved model; None for the model's own prompt.
        document_prompt: Text before each document, also in the saved model; None for the model's own prompt.
        max_seq_length: Tokens after which a text is cut, also in the saved model; None for the model's own limit.
        dropout: Probability of all dropout layers, also in the saved model; None for the model's own.
        warmup_ratio: Share of the steps in which the learning rate rises linearly.
        lr_scheduler_type: One of `SCHEDULES`: the course of the learning rate after the warm-up.
        weight_decay: Of AdamW.
        max_grad_norm: Gradients are scaled down to this norm; 0 for no limit.
        gradient_accumulation_steps: Batches per optimizer step. Each batch has its own loss, so in-batch negatives are
            those of one batch; a cache or queue is updated after each batch.
        gradient_checkpointing: Compute activations again in the backward pass, instead of storing them.
        bf16: Compute in bfloat16, with float32 weights.
        fp16: Compute in float16, with float32 weights. GPU only.
        torch_compile: Compile the model.
        lora: Rank of LoRA adapters of all linear layers. Only they are trained; the saved model has them merged into
            its weights. None to train all weights.
        eval_steps: Steps between evaluations on the dev split; None for no evaluation.
        load_best_model_at_end: Keep the weights of the evaluation with the best MRR@10, instead of the last ones.
        early_stopping_patience: Stop after this number of evaluations in a row without a better one; None to train to
            the end.

    Raises:
        RunError: A value is out of range, or two do not go together.
    """

    query_prompt: str | None = None
    document_prompt: str | None = None
    max_seq_length: int | None = None
    dropout: float | None = None
    warmup_ratio: float = 0.1
    lr_scheduler_type: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    bf16: bool = False
    fp16: bool = False
    torch_compile: bool = False
    lora: int | None = None
    eval_steps: int | None = None
    load_best_model_at_end: bool = False
    early_stopping_patience: int | None = None

    def __post_init__(self) -> None:
        check_choice("lr_scheduler_type", self.lr_scheduler_type, SCHEDULES)
        check_positive(self, ("gradient_accumulation_steps",))
        optional = ("max_seq_length", "lora", "eval_steps", "early_stopping_patience")
        check_positive(self, [name for name in optional if getattr(self, name) is not None])
        if self.lora is not None and importlib.util.find_spec("peft") is None:
            raise RunError("--lora needs the package peft. Install it: pip install peft.")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise RunError(f"--dropout is {self.dropout}; it is a probability, from 0 to below 1.")
        for name in ("weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RunError(f"{flag_of(name)} is {getattr(self, name)}; it must be 0 or positive.")
        if not 0 <= self.warmup_ratio < 1:
            raise RunError(
                f"--warmup-ratio is {self.warmup_ratio}; it is a share of the steps, from 0 to below 1, such as 0.1."
            )
        if self.lr_scheduler_type == "constant" and self.warmup_ratio not in (0, TrainingSettings.warmup_ratio):
            raise RunError(
                "--warmup-ratio has no effect with --lr-scheduler-type constant. Use constant_with_warmup, or leave it "
                "out."
            )
        if self.bf16 or self.fp16:
            self._check_half_precision()
        if self.load_best_model_at_end and self.eval_steps is None:
            raise RunError("--load-best-model-at-end needs --eval-steps: the number of steps between evaluations.")
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            raise RunError(
                "--early-stopping-patience needs --load-best-model-at-end: the last model would be one of the worse "
                "ones."
            )

    def _check_half_precision(self) -> None:
        import torch  # which takes more than a second

        if self.bf16 and self.fp16:
            raise RunError("--bf16 and --fp16 are both given. Choose one; --bf16 needs no scaling of the loss.")
        if self.fp16 and not torch.cuda.is_available():
            raise RunError("--fp16 needs a GPU, and there is none. Use --bf16, or leave it out.")
        if self.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise RunError("--bf16 is not supported by this GPU. Use --fp16, or leave it out.")

    def check_static(self) -> None:
        """Raise RunError if a setting has no effect on static embeddings."""
        for name in NOT_STATIC:
            if getattr(self, name) != getattr(TrainingSettings, name):
                raise RunError(
                    f"{flag_of(name)} has no effect on static embeddings, {NOT_STATIC[name]}. Leave it out, or choose "
                    "a transformer as --model."
                )


@dataclass(frozen=True)
class RunConfig(TrainingSettings):
    """Everything that determines a run, with `TrainingSettings`; validated on construction.

    Attributes:
        data: See `load_data`.
        model: See `load_model`.
        loss: One of `LOSSES`.
        output: Folder for the trained model; must not exist.
        cache_size: Rows of the cache, or of the memory bank's queue.
        batch_size: Queries per batch, on each rank.
        epochs: Passes over the training pairs.
        max_steps: Stop after this number of steps; None for all epochs.
        learning_rate: Peak of the schedule; None for the default of the model.
        scale: Factor that multiplies the similarities, for all losses.
        num_samples: See `NegativeCacheRankingLoss`.
        in_batch: See `NegativeCacheRankingLoss`.
        shared: See `NegativeCacheRankingLoss`; with in_batch=False, shared=False is the estimator of the paper.
        absolute_margin: A document is not a negative if its similarity is above that of the positive minus this
            margin; None for no limit. By the similarity of the model, with gist and cached-gist by that of the guide.
        relative_margin: The same with this fraction of the positive's similarity as the margin. With mined, None is
            0.05: a query whose positives have the similarities 0.8 and 0.6 has no negatives above 0.57.
        symmetric: See `NegativeCacheRankingLoss`.
        refresh_per_step: See `NegativeCacheRankingLoss`.
        use_lru: See `NegativeCacheRankingLoss`.
        embedding_dtype: dtype of cached embeddings: float32, bfloat16, float16 or int8.
        fill_from_corpus: Encode the whole corpus into the cache before training, documents without a query included.
        guide: Name or path of the model that detects false negatives with gist and cached-gist; None for a copy of the
            model before training.
        num_negatives: Negatives to mine per query. See `mine_hard_negatives` of sentence-transformers, as for the next
            three.
        range_min: Number of the most similar documents that are skipped, after the known positives and the documents
            that the margin excludes.
        range_max: Number of the most similar documents that negatives are chosen from.
        sampling_strategy: top for the most similar ones, random for a random choice.
        mining_rounds: How often negatives are mined, at equal distances in training.
        mining_start: Fraction of the steps after which negatives are first mined; None for 0. For a model that is
            trained from scratch, None is 1 / (mining_rounds + 1): it begins with in-batch negatives alone.
        seed: Seed of the weights, the data order and the sampling.
        save_steps: Steps between checkpoints; None for no checkpoints.
        report_to: Where the logs go: names of programs that transformers supports, separated by commas; "none" for
            nowhere but `run.json`.
        data_options: How the data is read.
    """

    data: str
    model: str
    loss: str
    output: str
    cache_size: int = 16_384
    batch_size: int = 64
    epochs: float = 3.0
    max_steps: int | None = None
    learning_rate: float | None = None
    scale: float = 20.0
    num_samples: float | Literal["auto"] = "auto"
    in_batch: bool = True
    shared: bool = True
    absolute_margin: float | None = None
    relative_margin: float | None = None
    symmetric: bool = False
    refresh_per_step: int = 0
    use_lru: bool = True
    embedding_dtype: str = "float32"
    fill_from_corpus: bool = False
    guide: str | None = None
    num_negatives: int = 1
    range_min: int = 0
    range_max: int = 50
    sampling_strategy: str = "top"
    mining_rounds: int = 1
    mining_start: float | None = None
    seed: int = 0
    save_steps: int | None = 500
    report_to: str = "tensorboard"
    data_options: DataOptions = field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.partition(":")[0] == "static":
            self.check_static()
        check_choice("loss", self.loss, LOSSES)
        check_choice("embedding_dtype", self.embedding_dtype, EMBEDDING_DTYPES)
        check_choice("sampling_strategy", self.sampling_strategy, SAMPLING_STRATEGIES)
        check_positive(self, ("cache_size", "batch_size", "epochs", "scale", "num_negatives", "mining_rounds"))
        _checked_num_samples(self.num_samples, self.shared)
        optional = ("max_steps", "learning_rate", "save_steps")
        check_positive(self, [name for name in optional if getattr(self, name) is not None])
        for option in fields(self):
            if not has_effect(self.loss, option.name) and getattr(self, option.name) != option.default:
                losses = " and ".join(loss for loss in LOSSES if option.name in FIELDS_OF.get(loss, ()))
                raise RunError(
                    f"{flag_of(option.name)} has no effect with --loss {self.loss}, only with {losses}. Leave it out."
                )
        if self.loss == "negative-cache" and self.batch_size > self.cache_size:
            raise RunError(
                f"--batch-size {self.batch_size} is larger than --cache-size {self.cache_size}. Use a larger cache, or "
                "a smaller batch."
            )
        if self.fill_from_corpus and self.symmetric:
            raise RunError(
                "--fill-from-corpus fills the cache of documents, --symmetric has one of queries, too. Leave one out."
            )
        self._check_hard_negatives()
        if not 0 <= self.seed < 2**32:
            raise RunError(f"--seed is {self.seed}; it must be from 0 to 2**32 - 1.")

    def _check_hard_negatives(self) -> None:
        if not 0 <= self.range_min <= self.range_max - self.num_negatives:
            raise RunError(
                f"--range-min is {self.range_min} and --range-max {self.range_max}; expected a range that begins at 0 "
                f"or later and has at least --num-negatives, {self.num_negatives}, documents."
            )
        for name in ("relative_margin", "mining_start"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise RunError(f"{flag_of(name)} is {getattr(self, name)}; it must be at least 0 and below 1.")
        if self.loss in GUIDED and self.absolute_margin is not None and self.relative_margin is not None:
            raise RunError(f"--loss {self.loss} takes one margin. Leave --absolute-margin or --relative-margin out.")


def num_steps(config: RunConfig, num_pairs: int, num_ranks: int = 1) -> int:
    """Optimizer steps of a run without early stopping; with several ranks, incomplete batches are left out."""
    if config.max_steps is not None:
        return config.max_steps
    batches = num_pairs / (config.batch_size * num_ranks)
    batches = math.ceil(batches) if num_ranks == 1 else max(math.floor(batches), 1)
    return math.ceil(config.epochs * math.ceil(batches / config.gradient_accumulation_steps))


def mining_start(config: RunConfig) -> float:
    """Fraction of the steps after which negatives are first mined."""
    if config.mining_start is not None:
        return config.mining_start
    return 1 / (config.mining_rounds + 1) if is_from_scratch(config.model) else 0.0


def check_guide(config: RunConfig) -> None:
    """Raise RunError if the loss needs a guide, and the name of the model shows that it cannot be trained with one."""
    if config.loss not in GUIDED:
        return
    if config.model == "static" or config.model.startswith(DISTILLED):
        raise not_for_static(config, config.model)
    if config.guide is None and is_from_scratch(config.model):
        raise RunError(
            f"--loss {config.loss} needs a trained model as its guide, and {config.model} starts with random weights. "
            "Name one with --guide, such as all-MiniLM-L6-v2, or train a pretrained model."
        )


def not_for_static(config: RunConfig, name: str) -> RunError:
    """The error for a static model with a loss that has a guide."""
    return RunError(
        f"--loss {config.loss} needs a model and a guide with a tokenizer of transformers, and {name} is a static "
        "model. Use a transformer, or --loss in-batch."
    )


def check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise RunError unless a value is one of the choices."""
    if value not in choices:
        near = did_you_mean(value, choices)
        raise RunError(f"{flag_of(field)} is {value!r}; expected one of {', '.join(choices)}.{near}")


def parse_num_samples(text: str, shared: bool = True) -> float | Literal["auto"]:
    """The value of --num-samples: a number or "auto". RunError if a loss does not take it."""
    try:
        value: float | str = float(text)
    except ValueError:
        value = text
    return _checked_num_samples(value, shared)


def _checked_num_samples(value: object, shared: bool) -> float | Literal["auto"]:
    if isinstance(value, str) and value == "auto":
        return "auto"
    from negative_cache.sampling.config import check_num_samples  # imports torch

    try:
        return check_num_samples(value, shared)
    except (TypeError, ValueError) as error:
        raise RunError(str(error).replace("`num_samples`", "--num-samples")) from None


def check_positive(config: object, names: tuple[str, ...] | list[str]) -> None:
    """Raise RunError unless these fields of a dataclass are positive and finite."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise RunError(f"{flag_of(name)} is {getattr(config, name)}; it must be positive.")
