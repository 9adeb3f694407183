"""`negative-cache data`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from negative_cache.workbench.cli import next_steps
from negative_cache.workbench.cli import options as opt
from negative_cache.workbench.cli.search_command import OF_DOCUMENTS
from negative_cache.workbench.cli.tables import print_wide
from negative_cache.workbench.cli.terminal import Terminal, escape
from negative_cache.workbench.counting import counted, counted_queries
from negative_cache.workbench.data.options import DataOptions

if TYPE_CHECKING:
    from rich.table import Table

    from negative_cache.workbench.data.describing import Measure

MAX_GRADES = 6  # in the table; --json has all


@opt.takes_data_options()
def data(
    source: Annotated[str, typer.Argument(metavar="DATA", help=opt.DATA_HELP)],
    *,
    data_options: DataOptions,
    model: Annotated[
        str | None, typer.Option(help="Count the tokens of this model; default: count words. A name or path.")
    ] = None,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Show how a dataset is read, and what is wrong with it.

    Also its sizes, the lengths of its texts, and examples.
    """
    terminal = Terminal(quiet, as_json)
    with terminal.running():
        measure = None if model is None else _tokens_of(terminal, model)
        loaded = terminal.load_data(source, data_options)
        from negative_cache.workbench.cli.progress import counting_bar
        from negative_cache.workbench.data.advice import advice
        from negative_cache.workbench.data.describing import WORDS, describe

        with counting_bar(terminal, "Examining texts") as on_progress:
            found = describe(loaded, measure or WORDS, on_progress)
        read = [note.removeprefix("Warning: ") for note in loaded.notes if note.startswith("Warning: ")]
        warnings = [*read, *advice(found)]
        terminal.result({**found, "notes": loaded.notes, "warnings": warnings})
        _print(terminal, found)
        for warning in warnings[len(read) :]:  # the others are printed as notes of the data
            terminal.out.print(f"[bold yellow]Warning:[/] {escape(warning)}", soft_wrap=True, highlight=False)
        terminal.inform(next_steps.after_data(source, data_options, loaded, model, OF_DOCUMENTS))


def _tokens_of(terminal: Terminal, name: str) -> Measure:
    """Lengths in tokens of a model."""
    with terminal.waiting("Loading the model ..."):
        from negative_cache.workbench.data.describing import Measure
        from negative_cache.workbench.models import count_tokens, load_trained, token_limit

        model = load_trained(name)
        return Measure(f"tokens of {name}", lambda texts: count_tokens(model, texts), token_limit(model))


def _print(terminal: Terminal, found: Mapping[str, Any]) -> None:
    sizes = f"{counted(found['documents'], 'document')}, {counted_queries(found['queries'])}"
    terminal.say(f"{found['name']} ({found['form']}): {sizes}" if found["form"] else f"{found['name']}: {sizes}")
    for table in (_splits_table(found["splits"]), _lengths_table(found["lengths"]), _findings_table(found)):
        if table.row_count:
            print_wide(table, terminal.out)
    for number, example in enumerate(found["examples"], start=1):
        terminal.say(f"Example {number}")
        for name, text in example.items():
            terminal.say(f"  {name:8}  {'(none)' if text is None else text}")


def _splits_table(splits: Mapping[str, Mapping[str, Any]]) -> Table:
    headings = ("split", "queries", "positives", "negatives", "documents", "grades", "chance")
    table = _table("Splits", *headings)
    for name, split in splits.items():
        numbers = (f"{split[heading]:,}" for heading in headings[1:5])
        grades = [f"{grade}: {number:,}" for grade, number in split["grades"].items()]
        shown = "  ".join(grades[:MAX_GRADES] + ["..."] * (len(grades) > MAX_GRADES))
        table.add_row(escape(name), *numbers, shown, f"{split['detectable_difference']:.3f}")
    table.caption = "chance: a smaller difference in MRR@10 between two models may be chance"
    return table


def _lengths_table(lengths: Mapping[str, Any]) -> Table:
    table = _table(escape(f"Lengths in {lengths['unit']}"), "", "50 %", "90 %", "99 %", "max")
    for name in ("queries", "documents", "positives"):
        table.add_row(name, *(f"{number:,}" for number in lengths[name].values()))
    return table


def _findings_table(found: Mapping[str, Any]) -> Table:
    """Whatever else was counted, with its share; what was not found is left out."""
    documents, queries, near = found["documents"], found["queries"], found["near_duplicates"]
    rows = [
        ("documents equal to an earlier one", found["duplicates"]["documents"], documents),
        (f"documents that resemble another, of {near['sample']:,}", near["documents"], near["sample"]),
        ("documents without a query", found["documents_without_query"], documents),
        ("  of these, negatives of a query", found["only_negatives"], documents),
        ("queries equal to an earlier one", found["duplicates"]["queries"], queries),
        ("queries equal to a document", found["queries_equal_to_document"], queries),
    ]
    for name, split in found["splits"].items():
        of = split["queries"]
        rows += [
            (f"{name} queries with several positives", split["queries_with_several_positives"], of),
            (f"{name} queries that share a positive with another one", split["queries_that_share_a_positive"], of),
        ]
    for overlap in found["overlap"]:
        first, second = overlap["first"], overlap["second"]
        of = found["splits"][second]
        rows.append((f"{second} queries that are {first} queries", overlap["queries"], of["queries"]))
        rows.append((f"documents that are positives of {first} and {second}", overlap["documents"], documents))
        rows.append((f"{second} positives that resemble a {first} positive", overlap["alike"], of["positives"]))
    rows += [(f"skipped: {reason}", number, None) for reason, number in found["skipped"].items()]
    table = _table("Found", "", "number", "share")
    for name, number, of in rows:
        if number:
            table.add_row(escape(name), f"{number:,}", f"{100 * number / of:.1f} %" if of else "")
    return table


def _table(title: str, *headings: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    return table
