"""Options that several commands have."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Annotated, Any, TypeVar

import typer

from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.evaluation.defaults import BATCH_SIZE, DTYPES, STATIC_BATCH_SIZE
from negative_cache.workbench.training.config import EMBEDDING_DTYPES, SCHEDULES, TrainingSettings, parse_num_samples


def listed(words: Iterable[str], last: str = "and") -> str:
    """Words as a list in a sentence: "a, b and c"."""
    *first, end = words
    return f"{', '.join(first)} {last} {end}" if first else end


DATA_HELP = (
    "A file of pairs, triplets or lists (.jsonl, .csv, .parquet ...), a folder (BEIR, MS MARCO ...), hf:NAME[:CONFIG], "
    "or python-code (functions of the installed packages)."
)
TRAINED_MODEL_HELP = "A name or path that SentenceTransformer loads, such as all-MiniLM-L6-v2."
Data = Annotated[str, typer.Option(help=DATA_HELP)]
Model = Annotated[
    str, typer.Option(help="static, tiny, static:NAME (a static model of another one), or a name or path to load.")
]
TrainedModel = Annotated[str, typer.Option(help=TRAINED_MODEL_HELP)]
EmbeddingDtype = Annotated[str, typer.Option(help=f"Dtype of cached embeddings: {listed(EMBEDDING_DTYPES, 'or')}.")]
CacheSize = Annotated[int, typer.Option(help="Number of documents in the cache or in the memory bank's queue.")]
BatchSize = Annotated[int, typer.Option(help="Queries per batch, on each rank.")]
Epochs = Annotated[float, typer.Option(help="Passes over the training pairs.")]
MaxSteps = Annotated[int | None, typer.Option(help="Stop after this number of steps.")]
Scale = Annotated[float, typer.Option(help="Factor that multiplies the similarities (1 / temperature).")]
NumSamples = Annotated[
    str,
    typer.Option(
        help="Number of cached documents to re-encode per query, such as 1 or 0.25; auto for none while the batch "
        "represents the cache, then a fraction."
    ),
]
Shared = Annotated[bool, typer.Option(help="Use each re-encoded document for all queries in the batch.")]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors, and the result if --json is given.")]
Json = Annotated[bool, typer.Option("--json", help="Print only the result, as JSON, on stdout.")]

_DATA_OPTIONS: dict[str, Any] = {
    "corpus": Annotated[
        str | None,
        typer.Option(
            help="Documents that rows refer to by id, or that are searched: .txt (one per line), .csv ..., or a folder."
        ),
    ],
    "dev": Annotated[str | None, typer.Option(help="File or dataset of the dev split.")],
    "test": Annotated[str | None, typer.Option(help="File or dataset of the test split.")],
    "query_column": Annotated[str | None, typer.Option(help="Column of the queries.")],
    "positive_column": Annotated[str | None, typer.Option(help="Column of the relevant documents.")],
    "negative_column": Annotated[str | None, typer.Option(help="Column of the negatives.")],
    "label_column": Annotated[
        str | None, typer.Option(help="Column of the relevance: 0 for a negative, 1 or a higher grade if relevant.")
    ],
    "negatives": Annotated[
        str, typer.Option(help="Negatives of the data: all, ignore, or at most a number per query.")
    ],
    "max_train_pairs": Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Keep this number of pairs of the train split, to train or evaluate on; dev and test stay whole.",
        ),
    ],
    "eval_documents": Annotated[
        int | None,
        typer.Option(min=1, help="Evaluate on this number of documents: the judged ones and a sample. Default: all."),
    ],
    "encoding": Annotated[str | None, typer.Option(help="Encoding of text files. Default: UTF-8, or as detected.")],
    "strict": Annotated[bool, typer.Option("--strict", help="Fail at an empty text, instead of skipping it.")],
    "ignore_identical_ids": Annotated[
        bool, typer.Option("--ignore-identical-ids", help="Leave a document with the id of a query out of its results.")
    ],
}

_PROMPTS: dict[str, Any] = {
    "query_prompt": Annotated[str | None, typer.Option(help="Text before each query. Default: the model's prompt.")],
    "document_prompt": Annotated[
        str | None, typer.Option(help="Text before each document. Default: the model's prompt.")
    ],
}

_MaxSeqLength = Annotated[
    int | None, typer.Option(help="Tokens after which a text is cut. Default: the model's limit.")
]

_SETTINGS: dict[str, Any] = {
    **_PROMPTS,
    "max_seq_length": _MaxSeqLength,
    "dropout": Annotated[
        float | None, typer.Option(help="Probability of dropout in training. Default: the model's own.")
    ],
    "warmup_ratio": Annotated[float, typer.Option(help="Share of the steps in which the learning rate rises.")],
    "lr_scheduler_type": Annotated[
        str, typer.Option(help=f"Learning rate after the warm-up: {listed(SCHEDULES, 'or')}.")
    ],
    "weight_decay": Annotated[float, typer.Option(help="Weight decay of AdamW.")],
    "max_grad_norm": Annotated[float, typer.Option(help="Scale gradients down to this norm; 0 for no limit.")],
    "gradient_accumulation_steps": Annotated[
        int, typer.Option(help="Batches per optimizer step. In-batch negatives are those of one batch.")
    ],
    "gradient_checkpointing": Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations twice, to save memory.")
    ],
    "bf16": Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16, with float32 weights.")],
    "fp16": Annotated[bool, typer.Option("--fp16", help="Compute in float16, with float32 weights. GPU only.")],
    "torch_compile": Annotated[bool, typer.Option("--torch-compile", help="Compile the model.")],
    "lora": Annotated[int | None, typer.Option(help="Train only LoRA adapters of this rank, such as 16. Needs peft.")],
    "eval_steps": Annotated[int | None, typer.Option(help="Steps between evaluations on the dev split.")],
    "load_best_model_at_end": Annotated[
        bool,
        typer.Option("--load-best-model-at-end", help="Keep the model of the evaluation with the best MRR@10 on dev."),
    ],
    "early_stopping_patience": Annotated[
        int | None, typer.Option(help="Stop after this number of evaluations in a row without a better one.")
    ],
}

_ENCODING_OPTIONS: dict[str, Any] = {
    **_PROMPTS,
    "max_seq_length": _MaxSeqLength,
    "truncate_dim": Annotated[int | None, typer.Option(help="Use the first dimensions of the embeddings.")],
    "batch_size": Annotated[
        int | None, typer.Option(help=f"Texts per batch. Default: {BATCH_SIZE}, or {STATIC_BATCH_SIZE} if static.")
    ],
    "dtype": Annotated[str | None, typer.Option(help=f"Dtype of the weights: {listed(DTYPES, 'or')}.")],
    "device": Annotated[str | None, typer.Option(help="cpu, cuda:0 ..., or several, such as cuda:0,cuda:1.")],
}

_Made = TypeVar("_Made")
_Command = Callable[..., None]


def takes_data_options(*names: str) -> Callable[[_Command], _Command]:
    """Replace a command's parameter `data_options` by the options that are the fields of `DataOptions`.

    Args:
        names: The fields; all if none is given.
    """

    options = {
        field.name: (_DATA_OPTIONS[field.name], field.default)
        for field in fields(DataOptions)
        if not names or field.name in names
    }
    return functools.partial(_replace_parameter, "data_options", options, DataOptions)


def takes_encoding_options(command: _Command) -> _Command:
    """Replace a command's parameter `encoding_options` by options, and call it with a dict of their values.

    They are the fields of `EncodingOptions`, whose module takes seconds to import.
    """
    options = {name: (annotation, None) for name, annotation in _ENCODING_OPTIONS.items()}
    return _replace_parameter("encoding_options", options, dict, command)


def takes_settings(command: _Command) -> _Command:
    """Replace a command's parameter `settings` by the fields of `TrainingSettings`, and call it with their values."""
    options = {field.name: (_SETTINGS[field.name], field.default) for field in fields(TrainingSettings)}
    return _replace_parameter("settings", options, dict, command)


def _replace_parameter(
    name: str, options: Mapping[str, tuple[Any, Any]], kind: Callable[..., Any], command: _Command
) -> _Command:
    """Replace a parameter of a command by options, each with its annotation and default, that make a `kind`."""
    replaced = [
        inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for option, (annotation, default) in options.items()
    ]

    @functools.wraps(command)
    def call(**given: Any) -> None:
        made = kind(**{option: given.pop(option) for option in options})
        command(**given, **{name: made})

    parameters: list[inspect.Parameter] = []
    for own in inspect.signature(command, eval_str=True).parameters.values():
        parameters += replaced if own.name == name else [own.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def make(kind: type[_Made], options: Mapping[str, Any], **others: Any) -> _Made:
    """An instance of a dataclass, from `others` and from those options of a command that are its fields."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    given = {name: value for name, value in options.items() if name in names}
    return kind(**{**given, "num_samples": parse_num_samples(options["num_samples"]), **others})
