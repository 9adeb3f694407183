"""Output of the commands: results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.status import Status

    from negative_cache.workbench.data import DataOptions, RetrievalData
    from negative_cache.workbench.data.texts import Texts

INVALID, FAILURE, STOPPED = 2, 1, 130  # exit codes

# Errors that a user can fix in the command or in the files that it names. Other OS errors are failures.
_USER_ERRORS = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)


class Terminal:
    """The output streams of a command.

    Args:
        quiet: Print only errors, and JSON if `as_json` is given.
        as_json: Print only JSON on stdout.

    Attributes:
        out: Console for results.
        progress: Console for progress.
    """

    def __init__(self, quiet: bool = False, as_json: bool = False) -> None:
        from rich.console import Console

        # With several ranks, only rank 0 prints.
        is_first = all(os.environ.get(name, "0") == "0" for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"))
        self._is_quiet = quiet
        self._is_json = as_json and is_first
        self.out = Console(quiet=quiet or as_json or not is_first)
        self.progress = Console(stderr=True, quiet=quiet or not is_first)

    @contextlib.contextmanager
    def running(self, when_stopped: Callable[[], str] = lambda: "") -> Iterator[None]:
        """Turn user errors, failures and Ctrl-C into a message and an exit code, without a traceback.

        Args:
            when_stopped: Returns the message to print after Ctrl-C, about how to continue.
        """
        from negative_cache.workbench.training.config import RunFailedError

        with _without_noise(self._is_quiet):
            try:
                yield
            except BrokenPipeError:
                raise  # the reader of stdout has closed it
            except _USER_ERRORS as error:
                raise self._exit(INVALID, f"[bold red]Error:[/] {escape(str(error))}") from error
            except (RunFailedError, OSError) as error:
                raise self._exit(FAILURE, f"[bold red]Failed:[/] {escape(str(error))}") from error
            except KeyboardInterrupt as error:
                raise self._exit(STOPPED, f"[bold]Stopped.[/] {escape(when_stopped())}") from error

    def waiting(self, what: str) -> Status:
        """Show that something is in progress."""
        return self.progress.status(escape(what))

    def load_data(self, source: str, options: DataOptions) -> RetrievalData:
        """Load a dataset, and print its notes."""
        with self.waiting("Loading libraries ..."):
            from negative_cache.workbench.data import load_data
        with self.waiting(f"Reading {source} ..."):
            data = load_data(source, options)
            for note in data.notes:
                self.note(note)
        return data

    def load_documents(self, source: str, options: DataOptions) -> Texts:
        """Load documents without queries, and print the notes on them."""
        with self.waiting("Loading libraries ..."):
            from negative_cache.workbench.data import load_documents
        with self.waiting(f"Reading {source} ..."):
            corpus, notes = load_documents(source, options)
            for note in notes:
                self.note(note)
        return corpus

    def load_model(self, name: str) -> Any:
        """Load a trained model."""
        with self.waiting("Loading the model ..."):
            from negative_cache.workbench.models import load_trained

            return load_trained(name)

    def note(self, text: str) -> None:
        """Print a note about what the program decides, or a text that begins with "Warning: ", to stderr."""
        kind = "Warning" if text.startswith("Warning: ") else "Note"
        text = escape(text.removeprefix("Warning: "))
        self.progress.print(f"[bold yellow]{kind}:[/] {text}", soft_wrap=True, highlight=False)

    def inform(self, lines: Iterable[str]) -> None:
        """Print lines to stderr as they are."""
        for line in lines:
            self.progress.print(line, soft_wrap=True, markup=False, highlight=False)

    def result(self, content: Any) -> None:
        """Print the result as JSON, if --json is given."""
        if self._is_json:
            typer.echo(json.dumps(_finite(content), indent=2, allow_nan=False))

    def say(self, text: str) -> None:
        """Print a line to stdout as it is."""
        self.out.print(text, soft_wrap=True, markup=False, highlight=False)

    def _exit(self, code: int, message: str) -> typer.Exit:
        from rich.console import Console

        Console(stderr=True).print(message, soft_wrap=True, highlight=False)
        return typer.Exit(code)


def escape(text: str) -> str:
    """Text that rich prints as it is."""
    return text.replace("[", "\\[")


def _finite(content: Any) -> Any:
    """The content, with None in place of numbers that JSON cannot represent."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


@contextlib.contextmanager
def _without_noise(is_quiet: bool) -> Iterator[None]:
    """Silence progress bars and warnings of other libraries, and with `is_quiet` also warnings of this one."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("negative_cache").setLevel(logging.ERROR if is_quiet else logging.NOTSET)
    with warnings.catch_warnings():
        for message in [".*"] if is_quiet else [".*pin_memory.*", ".*broadcast_buffers.*"]:
            warnings.filterwarnings("ignore", message=message)
        yield
