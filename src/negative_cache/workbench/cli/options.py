"""Options that several commands have, each written once."""

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
Model = Annotated[str, typer.Option(help="static, tiny, or a name or path that SentenceTransformer takes.")]
TrainedModel = Annotated[str, typer.Option(help="A name or path that SentenceTransformer takes.")]
QueryColumn = Annotated[str | None, typer.Option(help="Column of the queries in a file of pairs.")]
PositiveColumn = Annotated[str | None, typer.Option(help="Column of the documents in a file of pairs.")]
EmbeddingDtype = Annotated[str, typer.Option(help="Cached embeddings as float32, bfloat16, float16 or int8.")]
CacheSize = Annotated[int, typer.Option(help="Documents in the cache, or in the memory bank's queue.")]
BatchSize = Annotated[int, typer.Option(help="Queries per step, on each rank.")]
Epochs = Annotated[float, typer.Option(help="Passes over the training pairs.")]
Scale = Annotated[float, typer.Option(help="Factor of the similarities (1 / temperature).")]
NumSamples = Annotated[int, typer.Option(help="Cached documents encoded per query.")]
NumCandidates = Annotated[
    int | None, typer.Option(help="Cached documents drawn per query, of which those to encode are chosen.")
]
Shared = Annotated[bool, typer.Option(help="What is encoded serves every query of the batch.")]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors alone, and what --json asks for.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]

_Made = TypeVar("_Made")


def make(kind: type[_Made], options: Mapping[str, Any], **others: Any) -> _Made:
    """A dataclass from those of a command's options that have the names of its fields, and others."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{**{name: value for name, value in options.items() if name in names}, **others})
