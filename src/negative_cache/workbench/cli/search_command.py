"""`negative-cache search`."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from negative_cache.workbench.cli import next_steps
from negative_cache.workbench.cli import options as opt
from negative_cache.workbench.cli.terminal import Terminal, escape
from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.model_names import check_trained

if TYPE_CHECKING:
    from negative_cache.workbench.data.texts import Texts
    from negative_cache.workbench.evaluation import Hit, Index

OF_DOCUMENTS = ("corpus", "query_column", "positive_column", "negative_column", "label_column", "encoding", "strict")
STDIN = "-"

_MOST_LINES, _WIDTH_OF_A_FILE = 6, 110  # of the text of a document


@opt.takes_data_options(*OF_DOCUMENTS)
@opt.takes_encoding_options
def search(
    model: opt.TrainedModel,
    query: Annotated[list[str] | None, typer.Argument(help="One or more queries.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Dataset whose documents are searched; not needed with --corpus. " + opt.DATA_HELP),
    ] = None,
    queries: Annotated[
        str | None, typer.Option(help=f"File with a query per line, or {STDIN} for standard input.")
    ] = None,
    num_results: Annotated[int, typer.Option("--num-results", "-n", min=1, help="Documents per query.")] = 5,
    *,
    encoding_options: dict[str, Any],
    data_options: DataOptions,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Show the best documents of a corpus for a query."""
    given = dict(locals())
    terminal = Terminal(quiet, as_json)
    with terminal.running():
        from negative_cache.workbench.evaluation import EncodingOptions

        texts = [*(query or []), *_queries_in(queries, data_options.encoding)]
        if not texts:
            raise ValueError("There is no query. Give one or more, or a file of queries with --queries.")
        if any(not text.strip() for text in texts):
            raise ValueError("A query is empty. Give the text to search for.")
        encoding = EncodingOptions(**encoding_options)
        check_trained(model)
        corpus, is_judged = _corpus(terminal, data, data_options)
        found = list(zip(texts, _hits(terminal, model, corpus, texts, num_results, encoding), strict=True))
        terminal.result([{"query": text, "documents": [hit._asdict() for hit in own]} for text, own in found])
        for text, own in found:
            terminal.out.rule(f"[bold]{escape(_clip(text, _width(terminal)))}", align="left")
            _show(terminal, own)
        if data is not None and is_judged:
            terminal.inform(next_steps.after_search(given))


def _queries_in(queries: str | None, encoding: str | None) -> list[str]:
    """The lines of a file of queries that are not blank; none without a file."""
    if queries is None:
        return []
    if queries == STDIN:
        found = sys.stdin.read()
    else:
        from negative_cache.workbench.data.files.reading import lines

        if not Path(queries).is_file():
            raise ValueError(f"--queries {queries} is not a file. Give a text file with a query per line, or {STDIN}.")
        return [text.strip() for _, text in lines(Path(queries), encoding, [])]
    return [line.strip() for line in found.splitlines() if line.strip()]


def _corpus(terminal: Terminal, data: str | None, options: DataOptions) -> tuple[Texts, bool]:
    """The documents to search in, and whether there are judgements of them."""
    if data is not None:
        loaded = terminal.load_data(data, options)
        return loaded.corpus, bool(loaded.qrels)
    if options.corpus is None:
        raise ValueError(
            "Give the documents to search in: --corpus FILE (.txt, .csv, .jsonl ...) or FOLDER, or --data."
        )
    for name in ("query_column", "negative_column", "label_column"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} has no effect without --data. Leave it out.")
    return terminal.load_documents(options.corpus, options), False


def _hits(
    terminal: Terminal, model: str, corpus: Texts, queries: list[str], count: int, encoding: Any
) -> list[list[Hit]]:
    """The best documents of each query. A note says whether the embeddings of the corpus are kept."""
    with terminal.waiting("Loading libraries ..."):
        from negative_cache.workbench.cli.progress import counting_bar
        from negative_cache.workbench.evaluation import index_of
        from negative_cache.workbench.evaluation import search as search_corpus
        from negative_cache.workbench.evaluation.index import MAX_BYTES

    trained = terminal.load_model(model)
    with terminal.waiting("Looking for embeddings of an earlier search ..."):
        index = index_of(trained, corpus, encoding)
    if index is not None and index.is_kept:
        terminal.note(f"The embeddings of the documents are those of an earlier search, from {_where(index)}.")
        return search_corpus(trained, corpus, queries, count, options=encoding, index=index)
    with counting_bar(terminal, "Encoding documents") as on_progress:
        hits = search_corpus(trained, corpus, queries, count, options=encoding, on_progress=on_progress, index=index)
    if index is None:
        terminal.note(
            "The embeddings of the documents are not kept for later searches: they are larger than "
            f"{MAX_BYTES / 1e9:g} GB, or there is no home directory."
        )
    elif index.is_kept:
        terminal.note(f"The embeddings of the documents are kept for later searches, in {_where(index)}.")
    return hits


def _where(index: Index) -> str:
    size = f"{index.num_bytes / 1e6:,.0f} MB" if index.num_bytes >= 1e6 else f"{index.num_bytes / 1e3:,.0f} kB"
    return f"{index.path} ({size})"


def _show(terminal: Terminal, hits: list[Hit]) -> None:
    width = _width(terminal)
    for rank, hit in enumerate(hits, start=1):
        heading = f"[bold]{rank:>2}[/]  {hit.score:.3f}  [cyan]{escape(hit.document_id)}"
        terminal.out.print(heading, soft_wrap=True, highlight=False)
        terminal.out.print(_preview(hit.text, width), style="dim", markup=False, highlight=False, soft_wrap=True)


def _width(terminal: Terminal) -> int:
    return terminal.out.width if terminal.out.is_terminal else _WIDTH_OF_A_FILE


def _preview(text: str, width: int) -> str:
    """The first lines of a text, indented; long ones, such as a paragraph, go on in the next line."""
    lines = [part for line in text.splitlines() if line.strip() for part in _wrapped(line, width - 4)]
    shown = ["    " + line for line in lines[:_MOST_LINES]]
    return "\n".join(shown + (["    ..."] if len(lines) > _MOST_LINES else []))


def _wrapped(line: str, width: int) -> list[str]:
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.wrap(line, max(width, len(indent) + 20), subsequent_indent=indent, replace_whitespace=False)


def _clip(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 3] + "..."
