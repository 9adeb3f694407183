"""`negative-cache evaluate` and `negative-cache search`: what is done with a trained model."""

from __future__ import annotations

from typing import Annotated

import typer

from negative_cache.workbench.cli import options as opt
from negative_cache.workbench.cli.tables import metrics_table
from negative_cache.workbench.cli.terminal import Terminal, escape


def evaluate(
    model: opt.TrainedModel,
    data: opt.Data,
    split: Annotated[str, typer.Option(help="train, dev, test or all.")] = "test",
    query_column: opt.QueryColumn = None,
    positive_column: opt.PositiveColumn = None,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Measure a model's retrieval quality on a split. Its queries search the whole corpus."""
    terminal = Terminal(quiet, as_json)
    with terminal.running():
        with terminal.waiting("Loading libraries ..."):
            from negative_cache.workbench.data import load_data
        with terminal.waiting(f"Reading {data} ..."):
            loaded = load_data(data, query_column, positive_column)
            loaded.judged(split)
        with terminal.waiting("Loading the model ..."):
            from negative_cache.workbench.evaluation import evaluate as evaluate_model
            from negative_cache.workbench.models import load_trained

            trained = load_trained(model)
        with terminal.counting("Encoding documents") as told:
            metrics = evaluate_model(trained, loaded, split, told)
        terminal.result(metrics)
        sizes = f"{metrics['num_queries']:,} queries, {metrics['num_documents']:,} documents"
        terminal.out.print(metrics_table(f"{loaded.name}, {split}: {sizes}", {split: metrics}))


def search(
    query: Annotated[list[str], typer.Argument(help="One or more queries.")],
    model: opt.TrainedModel,
    data: opt.Data,
    num_results: Annotated[int, typer.Option("--num-results", "-n", min=1, help="Documents per query.")] = 5,
    query_column: opt.QueryColumn = None,
    positive_column: opt.PositiveColumn = None,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Show the best documents of a corpus for a query."""
    terminal = Terminal(quiet, as_json)
    with terminal.running():
        with terminal.waiting("Loading libraries ..."):
            from negative_cache.workbench.data import load_data
        with terminal.waiting(f"Reading {data} ..."):
            loaded = load_data(data, query_column, positive_column)
        with terminal.waiting("Loading the model ..."):
            from negative_cache.workbench.models import load_trained
            from negative_cache.workbench.searching import search as search_corpus

            trained = load_trained(model)
        with terminal.counting("Encoding documents") as told:
            hits = search_corpus(trained, loaded, query, num_results, told)
        terminal.result(
            [
                {"query": text, "documents": [hit._asdict() for hit in found]}
                for text, found in zip(query, hits, strict=True)
            ]
        )
        for text, found in zip(query, hits, strict=True):
            terminal.out.rule(f"[bold]{escape(text)}", align="left")
            for rank, hit in enumerate(found, start=1):
                named = f"[bold]{rank}[/]  {hit.score:.3f}  [cyan]{escape(hit.document_id)}"
                terminal.out.print(named, soft_wrap=True)
                terminal.out.print(_preview(hit.text), style="dim", markup=False, highlight=False, soft_wrap=True)


def _preview(text: str, num_lines: int = 6, width: int = 110) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    shown = [line if len(line) <= width else line[: width - 3] + "..." for line in lines[:num_lines]]
    return "\n".join(["    " + line for line in shown] + (["    ..."] if len(lines) > num_lines else []))
