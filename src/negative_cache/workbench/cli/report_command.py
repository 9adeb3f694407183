"""`negative-cache report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from negative_cache.workbench.cli import next_steps
from negative_cache.workbench.cli import options as opt
from negative_cache.workbench.cli.terminal import Terminal
from negative_cache.workbench.counting import counted
from negative_cache.workbench.report.folders import check_folders


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders that train or compare wrote.", metavar="DIR...")],
    output: Annotated[Path | None, typer.Option(help="The file. Default, for one folder: report.html in it.")] = None,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Make an HTML page of a run, or of several side by side."""
    terminal = Terminal(quiet, as_json)
    with terminal.running():
        check_folders(folders)
        with terminal.waiting("Loading libraries ..."):
            from negative_cache.workbench.report.page import write_report
        with terminal.waiting("Drawing ..."):
            written, runs = write_report(folders, output)
        terminal.result({"output": str(written), "runs": [run.name for run in runs]})
        terminal.say(f"{counted(len(runs), 'run')} on one page: {written}")
        terminal.inform(next_steps.after_report(written))
