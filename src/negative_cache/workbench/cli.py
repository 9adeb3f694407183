"""The command line: train, compare, evaluate, search, memory."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

# Importing torch and sentence-transformers takes seconds, so `--help` and mistakes do without them.
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train, evaluate and search with retrieval models against a cache of negatives.",
)
console = Console()

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

LOSS_HELP = (
    "negative-cache, in-batch, gradcache (in-batch with a large --batch-size, in little memory; for a static model the "
    "same as in-batch) or memory-bank (in-batch and a queue of --cache-size stale embeddings, none encoded anew)."
)

METRIC_NAMES = ("mrr@10", "ndcg@10", "recall@1", "recall@10", "recall@100")


@app.command()
def train(
    data: Data,
    output: Annotated[str, typer.Option(help="New folder for the trained model and run.json.")],
    model: Model = "static",
    loss: Annotated[str, typer.Option(help=LOSS_HELP)] = "negative-cache",
    cache_size: Annotated[int, typer.Option(help="Documents in the cache.")] = 16_384,
    batch_size: Annotated[int, typer.Option(help="Queries per step, on each rank.")] = 64,
    epochs: Annotated[float, typer.Option(help="Passes over the training pairs.")] = 3.0,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: one that suits the model.")] = None,
    scale: Annotated[float, typer.Option(help="Factor of the similarities (1 / temperature).")] = 20.0,
    top_k: Annotated[int | None, typer.Option(help="Only the best row of each of k groups of the cache.")] = None,
    num_samples: Annotated[int, typer.Option(help="Cached documents encoded per query.")] = 1,
    in_batch: Annotated[bool, typer.Option(help="Documents of the batch are negatives of its other queries.")] = True,
    shared: Annotated[bool, typer.Option(help="What is encoded serves every query of the batch.")] = True,
    absolute_margin: Annotated[
        float | None, typer.Option(help="No negatives above the positive's similarity less this.")
    ] = None,
    relative_margin: Annotated[
        float | None, typer.Option(help="No negatives above (1 - this) of the positive's similarity.")
    ] = None,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Also documents against cached queries.")] = False,
    refresh_per_step: Annotated[int, typer.Option(help="Cached documents encoded anew per step, no gradient.")] = 0,
    embedding_dtype: EmbeddingDtype = "float32",
    seed: Annotated[int, typer.Option(help="Seed of weights, data order and draws.")] = 0,
    eval_steps: Annotated[int | None, typer.Option(help="Evaluate on the dev split every so many steps.")] = None,
    save_steps: Annotated[int, typer.Option(min=0, help="Checkpoint every so many steps; 0 for never.")] = 500,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run, if there is one.")] = False,
    query_column: QueryColumn = None,
    positive_column: PositiveColumn = None,
) -> None:
    """Train a model and show its retrieval quality before and after."""
    with _errors():
        _quiet()
        with console.status("Loading libraries ..."):
            from negative_cache.workbench.config import RunConfig
            from negative_cache.workbench.data import load_data
            from negative_cache.workbench.training import finished_run, run
        config = RunConfig(
            data=data,
            model=model,
            loss=loss,
            output=output,
            cache_size=cache_size,
            batch_size=batch_size,
            epochs=epochs,
            max_steps=max_steps,
            learning_rate=learning_rate,
            scale=scale,
            top_k=top_k,
            num_samples=num_samples,
            in_batch=in_batch,
            shared=shared,
            absolute_margin=absolute_margin,
            relative_margin=relative_margin,
            symmetric=symmetric,
            refresh_per_step=refresh_per_step,
            embedding_dtype=embedding_dtype,
            seed=seed,
            eval_steps=eval_steps,
            save_steps=save_steps or None,
        )
        record = finished_run(config, resume)
        if not record:
            with console.status(f"Reading {data} ..."):
                loaded = load_data(data, query_column, positive_column)
            with _training_bar(config.loss) as progress:
                record = run(config, loaded, progress, resume)
    if not record:
        return  # rank 0 says it
    _print_before_after(record)
    console.print(
        f"{record['steps']} steps in {record['seconds']:.1f} s. Model and run.json are in {output}", soft_wrap=True
    )


@app.command()
def compare(
    data: Data,
    output: Annotated[str, typer.Option(help="Folder of the results; the same command goes on with what is there.")],
    model: Model = "static",
    losses: Annotated[
        str, typer.Option(help="Separated by commas; NAME:field=value:field=value sets options of one loss.")
    ] = "in-batch,gradcache,memory-bank,negative-cache",
    batch_size: Annotated[int, typer.Option(help="Queries per step.")] = 64,
    epochs: Annotated[float, typer.Option(help="Passes over the training pairs.")] = 3.0,
    seeds: Annotated[int, typer.Option(help="Runs per loss with its best learning rate.")] = 3,
    cache_size: Annotated[int, typer.Option(help="Documents in the cache, or in the memory bank's queue.")] = 16_384,
    scale: Annotated[float, typer.Option(help="Factor of the similarities (1 / temperature).")] = 20.0,
    num_samples: Annotated[int, typer.Option(help="Cached documents that negative-cache encodes per query.")] = 1,
    embedding_dtype: EmbeddingDtype = "float32",
    learning_rates: Annotated[
        str | None, typer.Option(help="Separated by commas. Default: 0.4, 1 and 2.5 times the model's usual one.")
    ] = None,
    gradcache_factor: Annotated[int, typer.Option(help="The batch of gradcache is so many times as large.")] = 16,
    query_column: QueryColumn = None,
    positive_column: PositiveColumn = None,
) -> None:
    """Train with several losses and compare quality, time and memory, each at its best learning rate."""
    with _errors():
        _quiet()
        with console.status("Loading libraries ..."):
            from negative_cache.workbench.compare import Comparison, parse_losses, parse_rates
            from negative_cache.workbench.compare import compare as compare_losses
            from negative_cache.workbench.compare_report import RunBar, show, write_report
            from negative_cache.workbench.data import load_data
        comparison = Comparison(
            data=data,
            model=model,
            losses=parse_losses(losses),
            output=output,
            batch_size=batch_size,
            epochs=epochs,
            seeds=seeds,
            cache_size=cache_size,
            scale=scale,
            num_samples=num_samples,
            embedding_dtype=embedding_dtype,
            learning_rates=parse_rates(learning_rates),
            gradcache_factor=gradcache_factor,
            query_column=query_column,
            positive_column=positive_column,
        )
        with console.status(f"Reading {data} ..."):
            loaded = load_data(data, query_column, positive_column)
        with RunBar(console) as bar:
            result = compare_losses(comparison, loaded, bar)
        written = write_report(result, shlex.join(["negative-cache", *sys.argv[1:]]))
    show(result, console)
    console.print("Written:", *written, soft_wrap=True)


@app.command()
def evaluate(
    model: TrainedModel,
    data: Data,
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "test",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the metrics to this file.")] = None,
    query_column: QueryColumn = None,
    positive_column: PositiveColumn = None,
) -> None:
    """Measure a model's retrieval quality on a split: its queries against the whole corpus."""
    with _errors():
        if json_file is not None and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
            raise ValueError(f"--json {json_file} cannot be written: it is a folder, or its folder does not exist.")
        _quiet()
        with console.status("Loading libraries ..."):
            from negative_cache.workbench.data import load_data
            from negative_cache.workbench.evaluation import evaluate as evaluate_model
            from negative_cache.workbench.models import load_trained
        with console.status(f"Reading {data} ..."):
            loaded = load_data(data, query_column, positive_column)
            loaded.judged(split)
        trained = load_trained(model)
        with console.status(f"Encoding {len(loaded.corpus):,} documents ..."):
            metrics = evaluate_model(trained, loaded, split)
        if json_file is not None:
            beside = json_file.with_name(json_file.name + ".tmp")
            beside.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
            beside.replace(json_file)
    table = Table(
        title=f"{loaded.name}, {split}: {metrics['num_queries']:,} queries, {metrics['num_documents']:,} documents"
    )
    for name in METRIC_NAMES:
        table.add_column(name, justify="right")
    table.add_row(*(f"{metrics[name]:.4f}" for name in METRIC_NAMES))
    console.print(table)


@app.command()
def search(
    query: Annotated[list[str], typer.Argument(help="One or more queries.")],
    model: TrainedModel,
    data: Data,
    num_results: Annotated[int, typer.Option("--num-results", "-n", min=1, help="Documents per query.")] = 5,
    query_column: QueryColumn = None,
    positive_column: PositiveColumn = None,
) -> None:
    """Show the best documents of a corpus for a query."""
    with _errors():
        _quiet()
        with console.status("Loading libraries ..."):
            from negative_cache.workbench.data import load_data
            from negative_cache.workbench.models import load_trained
            from negative_cache.workbench.searching import search as search_corpus
        with console.status(f"Reading {data} ..."):
            loaded = load_data(data, query_column, positive_column)
        trained = load_trained(model)
        with console.status(f"Encoding {len(loaded.corpus):,} documents ..."):
            hits = search_corpus(trained, loaded, query, num_results)
    for text, found in zip(query, hits, strict=True):
        console.rule(f"[bold]{_escape(text)}", align="left")
        for rank, hit in enumerate(found, start=1):
            console.print(f"[bold]{rank}[/]  {hit.score:.3f}  [cyan]{_escape(hit.document_id)}", soft_wrap=True)
            console.print(_preview(hit.text), style="dim", markup=False, highlight=False, soft_wrap=True)


@app.command()
def memory(
    dim: Annotated[int, typer.Option(help="Dimensions of an embedding.")],
    cache_size: Annotated[int, typer.Option(help="Documents in the cache.")] = 131_072,
    batch_size: Annotated[int, typer.Option(help="Queries per step, of all ranks.")] = 64,
    embedding_dtype: EmbeddingDtype = "float32",
    mean_tokens: Annotated[float, typer.Option(help="Mean tokens of a document.")] = 128,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of a document.")] = 512,
    num_samples: Annotated[int, typer.Option(help="Cached documents encoded per query.")] = 1,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that share the cache.")] = 1,
    features_on_disk: Annotated[
        bool, typer.Option("--features-on-disk", help="Tokens are in a feature_folder.")
    ] = False,
) -> None:
    """Predict the memory of a cache of text documents and of a step beside it, on each rank."""
    with _errors():
        import torch

        from negative_cache import RaggedFeature, predict_bytes
        from negative_cache.workbench.config import EMBEDDING_DTYPES, RunError

        if embedding_dtype not in EMBEDDING_DTYPES:
            raise RunError(f"--embedding-dtype is {embedding_dtype!r}; expected one of {', '.join(EMBEDDING_DTYPES)}.")
        predicted = predict_bytes(
            -(-cache_size // ranks),
            dim,
            batch_size,
            embedding_dtype=getattr(torch, embedding_dtype),
            specs={"tokens": RaggedFeature(torch.int32, max_tokens)},
            mean_lengths={"tokens": mean_tokens},
            num_samples=num_samples,
            features_on_disk=features_on_disk,
        )
    table = Table(title=f"{cache_size:,} documents, {dim} x {embedding_dtype}, on each of {ranks} rank(s)")
    table.add_column("")
    table.add_column("MB", justify="right")
    for name, value in zip(predicted._fields, predicted, strict=True):
        table.add_row(name, f"{value / 1e6:,.1f}")
    console.print(table)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Mistakes of the user end with one message and exit code 2, not with a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {_escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from error


@contextlib.contextmanager
def _training_bar(title: str) -> Iterator[Any]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[metrics]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(f"{title}: preparing, evaluating", total=None, metrics="")

        def progress(step: int, steps: int, logs: dict[str, float]) -> None:
            shown = {"loss": "loss", "cache/staleness": "staleness", "cache/fill": "fill"}
            metrics = "  ".join(f"{name} {logs[key]:.3g}" for key, name in shown.items() if key in logs)
            done = step >= steps
            bar.update(
                task,
                completed=step,
                total=steps,
                metrics=metrics,
                description=f"{title}{': evaluating' if done else ''}",
            )

        yield progress
        bar.update(task, description=title)


def _print_before_after(record: dict[str, Any]) -> None:
    before, after = record["before"], record["after"]
    table = Table(title=f"Test split: {after['num_queries']:,} queries, {after['num_documents']:,} documents")
    for name in ("", *METRIC_NAMES):
        table.add_column(name, justify="right" if name else "left")
    for title, metrics in (("before", before), ("after", after)):
        table.add_row(title, *(f"{metrics[name]:.4f}" for name in METRIC_NAMES))
    console.print(table)


def _preview(text: str, num_lines: int = 6, width: int = 110) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    shown = [line if len(line) <= width else line[: width - 3] + "..." for line in lines[:num_lines]]
    return "\n".join(["    " + line for line in shown] + (["    ..."] if len(lines) > num_lines else []))


def _escape(text: str) -> str:
    return text.replace("[", "\\[")


def _quiet() -> None:
    """Keep other libraries' bars and warnings, and all but one rank, out of the way of our own output."""
    console.quiet = any(os.environ.get(name, "0") != "0" for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for message in (".*pin_memory.*", ".*broadcast_buffers.*"):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("transformers").setLevel(logging.ERROR)
