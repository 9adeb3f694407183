"""The command line: one module for each command, or for a few related ones.

Imports everything in `negative_cache.workbench`. Importing torch takes a second and sentence-transformers several, so
commands import what needs them in their bodies: `--help` and invalid options import neither, nor numpy or rich.
"""

from __future__ import annotations

from typing import Annotated

import typer

from negative_cache.version import __version__
from negative_cache.workbench.cli.compare_command import compare
from negative_cache.workbench.cli.data_command import data
from negative_cache.workbench.cli.doctor_command import doctor
from negative_cache.workbench.cli.evaluate_command import evaluate
from negative_cache.workbench.cli.examples import EXAMPLES
from negative_cache.workbench.cli.grouped_help import GroupedCommand
from negative_cache.workbench.cli.report_command import report
from negative_cache.workbench.cli.search_command import search
from negative_cache.workbench.cli.significance_command import significance
from negative_cache.workbench.cli.train_command import train

HELP = f"""Train retrieval models with a cache of negatives, evaluate them, and search with them.

The commands are listed in the order of their use. A first model, without data of your own:

\b
  {EXAMPLES["train"][0]}

It takes a minute. The encoder itself, all-MiniLM-L6-v2, is better on this data, and slower.
"""

app = typer.Typer(
    rich_markup_mode=None,  # boxes leave too little room for option names
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(__version__)
        raise typer.Exit


@app.callback(help=HELP)
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train retrieval models with a cache of negatives, evaluate them, and search with them."""


for command in (doctor, data, train, evaluate, search, report, compare, significance):
    app.command(cls=GroupedCommand)(command)
