"""Where commands write: results to stdout, progress and mistakes to stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status

MISTAKE, FAILURE, STOPPED = 2, 1, 130
BAR_WIDTH = 20  # columns

# What a user can mend in the command or in the files that it names. All other errors of the system are failures.
_MISTAKES = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)


class Terminal:
    """The streams of one command.

    Args:
        quiet: Whether to print errors alone, and JSON where that is asked for.
        as_json: Whether stdout is for JSON alone.

    Attributes:
        out: For the result as a reader wants it.
        progress: For what goes on.
    """

    def __init__(self, quiet: bool = False, as_json: bool = False) -> None:
        # Of several ranks one speaks.
        is_first = all(os.environ.get(name, "0") == "0" for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"))
        self._is_quiet = quiet
        self._is_json = as_json and is_first
        self.out = Console(quiet=quiet or as_json or not is_first)
        self.progress = Console(stderr=True, quiet=quiet or not is_first)

    @contextlib.contextmanager
    def running(self, when_stopped: Callable[[], str] = lambda: "") -> Iterator[None]:
        """Mistakes of the user, failures and Ctrl-C end with one message and their exit code, without a traceback.

        Args:
            when_stopped: What to say after Ctrl-C: how to go on.
        """
        from negative_cache.workbench.config import RunFailedError

        with _hushed(self._is_quiet):
            try:
                yield
            except BrokenPipeError:
                raise  # the reader of stdout has seen enough
            except _MISTAKES as error:
                raise self._end(MISTAKE, f"[bold red]Error:[/] {escape(str(error))}") from error
            except (RunFailedError, OSError) as error:
                raise self._end(FAILURE, f"[bold red]Failed:[/] {escape(str(error))}") from error
            except ImportError as error:
                message = f"{error}. This command needs: pip install 'negative-cache[train]'"
                raise self._end(FAILURE, f"[bold red]Failed:[/] {escape(message)}") from error
            except KeyboardInterrupt as error:
                raise self._end(STOPPED, f"[bold]Stopped.[/] {escape(when_stopped())}") from error

    def _end(self, code: int, message: str) -> typer.Exit:
        Console(stderr=True).print(message, soft_wrap=True, highlight=False)
        return typer.Exit(code)

    def waiting(self, what: str) -> Status:
        """Shows that something goes on."""
        return self.progress.status(escape(what))

    @contextlib.contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Shows how much of something is done, as it is told."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=BAR_WIDTH),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.progress, transient=True) as bar:
            task = bar.add_task(escape(what), total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    def result(self, content: Any) -> None:
        """Print the result as JSON, if that was asked for."""
        if self._is_json:
            typer.echo(json.dumps(_plain(content), indent=2, allow_nan=False))


def escape(text: str) -> str:
    """Text that rich prints as it is."""
    return text.replace("[", "\\[")


def _plain(content: Any) -> Any:
    """The same with null in place of numbers that JSON does not have."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


@contextlib.contextmanager
def _hushed(is_quiet: bool) -> Iterator[None]:
    """Keep other libraries' bars and warnings out of the way of our own output, or our own warnings too."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("negative_cache").setLevel(logging.ERROR if is_quiet else logging.NOTSET)
    with warnings.catch_warnings():
        for message in [".*"] if is_quiet else [".*pin_memory.*", ".*broadcast_buffers.*"]:
            warnings.filterwarnings("ignore", message=message)
        yield
