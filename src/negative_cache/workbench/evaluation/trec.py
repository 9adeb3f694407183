"""Search results and judgements as TREC files."""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from negative_cache.workbench.evaluation.measures import Qrels, Run, ranked
from negative_cache.workbench.files import replacing

TAG = "negative-cache"  # the name of the system in a run that is written

_GZIP = b"\x1f\x8b"


class TrecError(ValueError):
    """A file that is no TREC file, or ids that such a file cannot contain."""


def read_run(path: Path) -> Run:
    """Read a TREC run: lines of a query id, Q0, a document id, a rank, a score and a tag, separated by white space.

    The second, fourth and last column are not used: documents are ranked by their scores. The file may be compressed by
    gzip.

    Raises:
        TrecError: A line has another form, or a query has a document twice.
    """
    run: Run = {}
    with _reading(path) as lines:
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words:
                continue
            if len(words) != 6:
                raise TrecError(
                    f"{path}, line {number}: expected 6 columns (query id, Q0, document id, rank, score, tag), got "
                    f"{len(words)}: {line.strip()[:80]!r}."
                )
            query, document, score = words[0], words[2], words[4]
            found = run.setdefault(query, {})
            if document in found:
                raise TrecError(f"{path}, line {number}: the query {query!r} has the document {document!r} twice.")
            try:
                found[document] = float(score)
            except ValueError:
                raise TrecError(f"{path}, line {number}: expected a number as score, got {score!r}.") from None
    if not run:
        raise TrecError(f"{path} has no results. Give a TREC run with six columns.")
    return run


def write_run(path: Path, run: Run) -> None:
    """Write a TREC run, compressed if the name ends with ".gz". The scores are written exactly.

    Raises:
        TrecError: An id is empty or contains white space.
    """

    def lines() -> Iterator[str]:
        for query, found in run.items():
            for rank, document in enumerate(ranked(found), 1):
                yield f"{_id(query)} Q0 {_id(document)} {rank} {found[document]!r} {TAG}\n"

    _write(path, lines())


def write_qrels(path: Path, qrels: Qrels) -> None:
    """Write TREC qrels, compressed if the name ends with ".gz": query id, 0, document id and grade.

    Raises:
        TrecError: An id is empty or contains white space.
    """

    def lines() -> Iterator[str]:
        for query, grades in qrels.items():
            for document, grade in grades.items():
                written = int(grade) if float(grade).is_integer() else grade
                yield f"{_id(query)} 0 {_id(document)} {written!r}\n"

    _write(path, lines())


def check_ids(names: Iterable[str]) -> None:
    """Raise TrecError if an id is empty or contains white space, so that a TREC file cannot contain it."""
    for name in names:
        _id(name)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Iterable[str]]:
    with path.open("rb") as file:
        is_compressed = file.read(2) == _GZIP
    opening: Callable[..., IO[str]] = gzip.open if is_compressed else open
    with opening(path, "rt", encoding="utf-8-sig") as lines:
        try:
            yield lines
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
            raise TrecError(f"{path} is no TREC file in UTF-8: {error}.") from error


def _write(path: Path, lines: Iterable[str]) -> None:
    opening: Callable[..., IO[str]] = gzip.open if path.suffix == ".gz" else open
    with replacing(path) as temporary, opening(temporary, "wt", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)


def _id(name: str) -> str:
    if not name or len(name.split()) != 1 or name != name.strip():
        raise TrecError(f"The id {name!r} is empty or contains white space, so it cannot be written to a TREC file.")
    return name
