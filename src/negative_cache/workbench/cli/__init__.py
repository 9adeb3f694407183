"""The command line: one module for each command, or for a few that belong together.

Importing torch and sentence-transformers takes seconds, so commands import them in their bodies: `--help` and mistakes
do without.
"""

from __future__ import annotations

from typing import Annotated

import typer

from negative_cache.version import __version__
from negative_cache.workbench.cli.compare_command import compare
from negative_cache.workbench.cli.machine_commands import doctor, memory
from negative_cache.workbench.cli.model_commands import evaluate, search
from negative_cache.workbench.cli.report_command import report
from negative_cache.workbench.cli.train_command import train

app = typer.Typer(
    rich_markup_mode=None,  # boxes leave too little room for names of options
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train, evaluate and search with retrieval models against a cache of negatives.",
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train, evaluate and search with retrieval models against a cache of negatives."""


for command in (train, compare, evaluate, search, report, memory, doctor):
    app.command()(command)
