"""Files and folders that are either complete or absent."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

_BYTES_AT_ONCE = 1 << 20


def cache_folder() -> Path:
    """The user's cache folder of this program, which may not exist; raises RuntimeError if the user has no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "negative-cache"


def kept_file(kind: str, parts: Any, ending: str) -> Path | None:
    """The file of the user's cache folder for what depends on `parts`; None if the user has no home folder.

    Args:
        kind: The subfolder.
        parts: All that the content depends on, as JSON stores it.
        ending: The ending of the name, with its dot.
    """
    try:
        return cache_folder() / kind / f"{digest_of(json.dumps(parts))}{ending}"
    except RuntimeError:
        return None


def digest_of(text: str) -> str:
    """A fingerprint of a text: 32 hexadecimal digits."""
    return blake2b(text.encode(), digest_size=16).hexdigest()


def fingerprint_of_folder(folder: Path) -> str:
    """A fingerprint of the names and the content of all files in a folder and its subfolders: 32 hexadecimal digits."""
    digest = blake2b(digest_size=16)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(repr((path.relative_to(folder).as_posix(), path.stat().st_size)).encode())
        with path.open("rb") as file:
            while part := file.read(_BYTES_AT_ONCE):
                digest.update(part)
    return digest.hexdigest()


@contextlib.contextmanager
def replacing(path: Path, suffix: str = ".tmp") -> Iterator[Path]:
    """Yield a temporary path in the same folder, and rename it to `path` at the end.

    If an error occurs, `path` is unchanged and the temporary path is removed.

    Args:
        path: The file, or a folder that does not exist yet.
        suffix: Appended to the name of `path`. It must be unique if several processes write the same file.
    """
    temporary = path.with_name(path.name + suffix)
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)
        raise


def check_output(option: str, output: Path, sources: Iterable[str | None]) -> None:
    """Raise ValueError if a file cannot be written, is a file of the data, or exists in a folder of the data.

    Args:
        option: The option that names the file.
        output: The file.
        sources: Names and paths of datasets; None for none.
    """
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ValueError(
            f"{option} {output} cannot be written: it is a directory, or its directory does not exist. Give a file in "
            "an existing directory."
        )
    path = output.resolve()
    for source in filter(None, sources):
        data = Path(source).resolve()
        if path == data or (path.exists() and data.is_dir() and data in path.parents):
            raise ValueError(f"{output} is a file of the data {source}, and would be overwritten. Give another file.")


def write_text(path: Path, text: str, suffix: str = ".tmp") -> Path:
    """Write a text file, and return its path."""
    with replacing(path, suffix) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def write_json(path: Path, content: Any) -> Path:
    """Write a JSON file, and return its path."""
    return write_text(path, json.dumps(content, indent=2) + "\n")
