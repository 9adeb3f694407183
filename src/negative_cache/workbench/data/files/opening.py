"""Data files as bytes or text: compression and encoding."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from negative_cache.workbench.data.files import latin
from negative_cache.workbench.data.retrieval_data import DataError

_COMPRESSED: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_ZSTANDARD = ".zst"
_BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_MARKED = {
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
}
_ENCODINGS = [
    "cp1250", "cp1251", "cp1252", "cp1253", "cp1254", "cp1255", "cp1256", "koi8_r", "cp932", "euc_jp", "gb18030",
    "big5", "cp949",
]  # fmt: skip
_LATIN = ("cp1250", "cp1252", "cp1254")
_MARGIN = 0.05  # of charset_normalizer's measure of disorder, below which encodings are as likely as each other
_PIECE, _SAMPLE, _EXCERPT = 1 << 20, 1 << 15, 60
_KINDS = {  # of files, by the bytes that they begin with
    b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz", b"\x28\xb5\x2f\xfd": ".zst",
    b"PK\x03\x04": ".zip or .xlsx", b"\xd0\xcf\x11\xe0": ".xls", b"PAR1": ".parquet", b"ARROW1": ".arrow",
    b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"%PDF": ".pdf",
}  # fmt: skip
_MANY_ZEROS = 0.2  # of the bytes, in UTF-16 and UTF-32


def uncompressed_name(path: Path) -> str:
    """The name of a file in lower case, without the ending of a compression."""
    name = path.name.lower()
    return name.removesuffix(next((end for end in (*_COMPRESSED, _ZSTANDARD) if name.endswith(end)), ""))


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file, which may be compressed as .gz, .bz2, .xz or .zst, to read its bytes."""
    ending = path.suffix.lower()
    if ending == _ZSTANDARD:
        import pyarrow

        return cast(IO[bytes], pyarrow.input_stream(str(path), compression="zstd"))
    return cast(IO[bytes], _COMPRESSED[ending](path) if ending in _COMPRESSED else path.open("rb"))


def open_text(path: Path, encoding: str) -> IO[str]:
    """Open a file, which may be compressed, to read its text. Line breaks stay as they are."""
    return io.TextIOWrapper(open_bytes(path), encoding=encoding, newline="")


@contextlib.contextmanager
def read_errors(path: Path, after: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Turn errors of reading a file into `DataError`.

    Args:
        path: The file.
        after: Returns the number of lines that were read.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not {error.encoding} ({error}). Name its encoding with --encoding.") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        place = f"{path}, after line {after()}" if after() else str(path)
        raise DataError(f"{place}: not readable: {error}.") from error


def encoding_of(path: Path, given: str | None, notes: list[str]) -> str:
    """The encoding of a text file: the given one, UTF-8, or the one that is detected if the file is not UTF-8.

    Args:
        path: The file. The whole file is read if no encoding is given.
        given: The encoding that the user names; None to find it out.
        notes: A note is added if the encoding was detected.

    Raises:
        DataError: There is no encoding of the given name, or the encoding cannot be detected.
    """
    if given is not None:
        try:
            name = codecs.lookup(given).name
        except LookupError:
            raise DataError(
                f"--encoding: there is no encoding {given!r}. Names are utf-8, cp1252, gb18030, ..."
            ) from None
        if name in _MARKED:
            _check_is_marked(path, name)
        return "utf-8-sig" if name == "utf-8" else name
    with read_errors(path), open_bytes(path) as file:
        start = file.read(_PIECE)
        marked = next((encoding for mark, encoding in _BYTE_ORDER_MARKS.items() if start.startswith(mark)), None)
        if marked == "utf-16":
            notes.append(f"{path}: the encoding is UTF-16, according to its byte order mark.")
            return marked
        if marked is None:
            _check_is_text(path, start)
        error = _first_error(start, file)
    if error is None:
        return "utf-8-sig"
    return _detected(path, error, notes)


def _check_is_marked(path: Path, encoding: str) -> None:
    with read_errors(path), open_bytes(path) as file:
        if not file.read(4).startswith(_MARKED[encoding]):
            raise DataError(
                f"{path} has no byte order mark, which {encoding} needs. Name the order of its bytes: --encoding "
                f"{encoding}-le or {encoding}-be."
            )


def _check_is_text(path: Path, start: bytes) -> None:
    """Refuse UTF-16 and UTF-32 without a byte order mark, and files that are not text."""
    kind = next((ending for mark, ending in _KINDS.items() if start.startswith(mark)), None)
    if kind is not None:
        raise DataError(f"{path} is not text: it begins as a {kind} file does. Name it so, or save it as text.")
    if start.count(0) < _MANY_ZEROS * len(start) or not start:
        return
    zeros = [start[at::4].count(0) > len(start) // 8 for at in range(4)]  # of each four bytes, as ASCII has them
    patterns = {
        (False, True, False, True): "utf-16-le", (True, False, True, False): "utf-16-be",
        (False, True, True, True): "utf-32-le", (True, True, True, False): "utf-32-be",
    }  # fmt: skip
    encoding = patterns.get((zeros[0], zeros[1], zeros[2], zeros[3]))
    if encoding is None:
        raise DataError(f"{path} is not text: many of its bytes are 0. Save it as text.")
    raise DataError(
        f"{path} seems to be {encoding} without a byte order mark: many of its bytes are 0. Use --encoding {encoding}, "
        "or save the file as UTF-8."
    )


def _first_error(start: bytes, file: IO[bytes]) -> UnicodeDecodeError | None:
    """Why a file is not UTF-8; None if it is."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while start:
            decoder.decode(start)
            start = file.read(_PIECE)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        return error
    return None


def _detected(path: Path, error: UnicodeDecodeError, notes: list[str]) -> str:
    sample, number, num_utf8 = _lines_beyond_ascii(path)
    where = f"{path}, line {number}: not UTF-8 ({error.reason})"
    if 10 * num_utf8 > len(sample):
        raise DataError(
            f"{where}, although other lines with such characters are. Repair the line, or name the encoding with "
            "--encoding."
        )
    found = latin.readings(sample)
    if len(found) > 1:
        words = ", ".join(
            f"{word!r} in {reading.encoding}" for word, reading in zip(latin.differing_words(found), found, strict=True)
        )
        raise DataError(
            f"{where}, and its encoding is not certain. A word is {words}. Name the right one, for example: "
            f"--encoding {found[0].encoding}."
        )
    name = found[0].encoding if found else _of_other_alphabets(b"".join(sample))
    if name is None:
        raise DataError(
            f"{where}, and its encoding cannot be detected. Name it with --encoding, or save the file as UTF-8."
        )
    excerpt = _excerpt(sample[0].decode(name, "replace"))
    notes.append(
        f"{path}: not UTF-8; read as {name}, in which line {number} is {excerpt!r}. Name another encoding with "
        "--encoding."
    )
    return name


def _of_other_alphabets(sample: bytes) -> str | None:
    """The encoding of a text that is in no Latin alphabet; None if several are likely."""
    import charset_normalizer

    matches = list(charset_normalizer.from_bytes(sample, cp_isolation=_ENCODINGS))
    likely = [match for match in matches if match.chaos <= matches[0].chaos + _MARGIN]
    if len(likely) != 1 or likely[0].encoding in _LATIN:
        return None
    return likely[0].encoding


def _excerpt(line: str) -> str:
    """The part of a line around the first character that is not ASCII."""
    line = line.strip()
    first = next((at for at, character in enumerate(line) if not character.isascii()), 0)
    start = max(0, first - _EXCERPT // 2)
    return line[start : start + _EXCERPT]


def _lines_beyond_ascii(path: Path) -> tuple[list[bytes], int, int]:
    """Lines that are not UTF-8, the number of the first one, and how many other lines are not ASCII."""
    sample: list[bytes] = []
    first = size = num_utf8 = 0
    with open_bytes(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(_SAMPLE), b""), start=1):
            if line.isascii():
                continue
            try:
                line.decode()
                num_utf8 += 1
            except UnicodeDecodeError:
                first = first or number
                sample.append(line)
                size += len(line)
            if size >= _SAMPLE:
                break
    return sample, first, num_utf8
