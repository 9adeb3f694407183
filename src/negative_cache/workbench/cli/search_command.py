"""`negative-cache search`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from negative_cache.workbench.cli import next_steps
from negative_cache.workbench.cli import options as opt
from negative_cache.workbench.cli.terminal import Terminal, escape
from negative_cache.workbench.data.options import DataOptions

if TYPE_CHECKING:
    from negative_cache.workbench.evaluation import Hit

OF_DOCUMENTS = ("corpus", "query_column", "positive_column", "negative_column", "label_column", "encoding", "strict")


@opt.takes_data_options(*OF_DOCUMENTS)
@opt.takes_encoding_options
def search(
    query: Annotated[list[str], typer.Argument(help="One or more queries.")],
    model: opt.TrainedModel,
    data: opt.Data,
    num_results: Annotated[int, typer.Option("--num-results", "-n", min=1, help="Documents per query.")] = 5,
    *,
    encoding_options: dict[str, Any],
    data_options: DataOptions,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Show the best documents of a corpus for a query."""
    terminal = Terminal(quiet, as_json)
    with terminal.running():
        with terminal.waiting("Loading libraries ..."):
            from negative_cache.workbench.cli.progress import counting_bar
            from negative_cache.workbench.evaluation import EncodingOptions
            from negative_cache.workbench.evaluation import search as search_corpus
        if any(not text.strip() for text in query):
            raise ValueError("A query is empty. Give the text to search for.")
        encoding = EncodingOptions(**encoding_options)
        loaded = terminal.load_data(data, data_options)
        trained = terminal.load_model(model)
        with counting_bar(terminal, "Encoding documents") as on_progress:
            hits = search_corpus(trained, loaded, query, num_results, encoding, on_progress)
        found = list(zip(query, hits, strict=True))
        terminal.result([{"query": text, "documents": [hit._asdict() for hit in own]} for text, own in found])
        for text, own in found:
            terminal.out.rule(f"[bold]{escape(_clip(text))}", align="left")
            _show(terminal, own)
        if loaded.qrels:
            terminal.inform(next_steps.after_search(model, data, data_options))


def _show(terminal: Terminal, hits: list[Hit]) -> None:
    for rank, hit in enumerate(hits, start=1):
        heading = f"[bold]{rank}[/]  {hit.score:.3f}  [cyan]{escape(hit.document_id)}"
        terminal.out.print(heading, soft_wrap=True)
        terminal.out.print(_preview(hit.text), style="dim", markup=False, highlight=False, soft_wrap=True)


def _preview(text: str, num_lines: int = 6, width: int = 110) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    shown = ["    " + _clip(line, width) for line in lines[:num_lines]]
    return "\n".join(shown + (["    ..."] if len(lines) > num_lines else []))


def _clip(line: str, width: int = 110) -> str:
    return line if len(line) <= width else line[: width - 3] + "..."
