"""What to suggest to the user: names that may have been meant, and a command for documents without queries."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

NEEDS_PAIRS = (
    "Training and evaluation need pairs of a query and a document, in columns such as query and positive "
    "(docs/your-data.md says where to get them). Documents alone can be searched: "
)
SEARCH = "negative-cache search 'your query' --model all-MiniLM-L6-v2 --corpus"
DOCUMENTS_ALONE = (
    f"{NEEDS_PAIRS}{SEARCH} PATH, where PATH is a .txt file with a document per line, a table with a column of texts, "
    "or a folder of .txt and .md files, each a document."
)

UNFINISHED = ".partial"  # at the end of the name of a folder whose run is not complete


def unfinished_folder(output: str) -> Path:
    """The folder of a run that is not complete."""
    path = Path(output)
    return path.with_name(f"{path.name}{UNFINISHED}")


def similar(given: str, names: Iterable[str]) -> str | None:
    """The name that is most similar to the given one; None if none is similar."""
    return next(iter(difflib.get_close_matches(given, names, n=1)), None)


def did_you_mean(given: str, names: Iterable[str]) -> str:
    """A sentence, after a blank, with the name that is most similar; empty if none is similar."""
    near = similar(given, names)
    return "" if near is None else f" Did you mean {near}?"


def did_you_mean_path(given: str, *others: str, suits: Callable[[Path], bool] = lambda _: True) -> str:
    """The same for a path: the one of its name here, of the files and folders beside it and of other names, or that its
    run is not finished.

    Args:
        given: The path.
        others: Names that may have been meant, too.
        suits: Whether a file or folder may have been meant. Hidden ones and folders of unfinished runs never are.
    """
    path = Path(given)
    if path.name and (unfinished := unfinished_folder(given)).is_dir():
        return f" Its run, in {unfinished}, is not finished."
    here = Path(path.name)
    if path.name and here != path and here.exists() and suits(here):
        return f" Did you mean {here}?"
    try:
        paths = [path.with_name(name) for name in os.listdir(path.parent) if not name.startswith(".")]
        beside = [str(other) for other in paths if other.suffix != UNFINISHED and suits(other)]
    except (OSError, ValueError):  # no such folder, or no path, such as ".."
        beside = []
    return did_you_mean(str(path), [*others, *beside])
