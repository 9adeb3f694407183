"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, TypeVar

import typer

DATA_HELP = (
    "python-code (functions of the installed packages), a folder in BEIR layout, a .jsonl, .csv, .tsv or .parquet file "
    "of pairs, or hf:NAME."
)
Data = Annotated[str, typer.Option(help=DATA_HELP)]
Model = Annotated[str, typer.Option(help="static, tiny, or a name or path that SentenceTransformer loads.")]
TrainedModel = Annotated[str, typer.Option(help="A name or path that SentenceTransformer loads.")]
QueryColumn = Annotated[str | None, typer.Option(help="Column of the queries in a file of pairs.")]
PositiveColumn = Annotated[str | None, typer.Option(help="Column of the documents in a file of pairs.")]
IgnoreIdenticalIds = Annotated[
    bool, typer.Option("--ignore-identical-ids", help="Leave a document with the id of a query out of its results.")
]
EmbeddingDtype = Annotated[str, typer.Option(help="Dtype of cached embeddings: float32, bfloat16, float16 or int8.")]
CacheSize = Annotated[int, typer.Option(help="Number of documents in the cache or in the memory bank's queue.")]
BatchSize = Annotated[int, typer.Option(help="Queries per step, on each rank.")]
Epochs = Annotated[float, typer.Option(help="Passes over the training pairs.")]
Scale = Annotated[float, typer.Option(help="Factor that multiplies the similarities (1 / temperature).")]
NumSamples = Annotated[
    str, typer.Option(help="Number of cached documents to re-encode per query, such as 1 or 0.25, or auto.")
]
Shared = Annotated[bool, typer.Option(help="Use each re-encoded document for all queries in the batch.")]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors, and the result if --json is given.")]
Json = Annotated[bool, typer.Option("--json", help="Print only the result, as JSON, on stdout.")]

_Made = TypeVar("_Made")


def make(kind: type[_Made], options: Mapping[str, Any], **others: Any) -> _Made:
    """An instance of a dataclass, from `others` and from those options of a command that are its fields."""
    from negative_cache.workbench.training.config import parse_num_samples

    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    given = {name: value for name, value in options.items() if name in names}
    return kind(**{**given, "num_samples": parse_num_samples(options["num_samples"]), **others})
