"""Near-duplicates of texts, by MinHash of token trigrams."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable

import numpy as np

NUM_HASHES = 16
MIN_EQUAL = 8  # hashes of two texts that resemble each other

_BAND = 2  # two texts are compared if this number of neighbouring hashes is equal
_ROWS_AT_ONCE = 256
_CJK = "\u3040-\u30ff\u3400-\u9fff"  # scripts without blanks between words: each character is a token
_WORD = re.compile(rf"[{_CJK}]|[^\W\d{_CJK}][^\W{_CJK}]*|\d+|[^\s\w]")
_FACTORS, _ADDENDS = np.random.default_rng(0).integers(2**64, size=(2, NUM_HASHES, 1), dtype=np.uint64)


def signatures(texts: Iterable[str]) -> np.ndarray:
    """MinHash signatures of texts: uint32 `[n, NUM_HASHES]`."""
    rows = [_signature(text) for text in texts]
    return np.array(rows, dtype=np.uint32).reshape(-1, NUM_HASHES)


def resembles_earlier(rows: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Which texts resemble one of an earlier group: at least `MIN_EQUAL` of their hashes are equal.

    Args:
        rows: Signatures of the texts, `[n, NUM_HASHES]`.
        groups: Number of the group of each text, `[n]`, ascending.

    Returns:
        bool `[n]`.
    """
    first = np.searchsorted(groups, groups)  # the first text of the same group
    buckets: dict[tuple[int, int, int], list[int]] = {}
    result = np.zeros(len(rows), dtype=bool)
    for number, row in enumerate(rows):
        keys = [(at, int(row[at]), int(row[at + 1])) for at in range(0, NUM_HASHES, _BAND)]
        result[number] = any(_is_near(row, rows, buckets.get(key, []), first[number]) for key in keys)
        for key in keys:
            buckets.setdefault(key, []).append(number)
    return result


def _is_near(row: np.ndarray, rows: np.ndarray, candidates: list[int], end: int) -> bool:
    """Whether a text resembles one of the candidates whose number is below `end`."""
    for start in range(0, len(candidates), _ROWS_AT_ONCE):  # copies of one text are found in the first part
        part = [number for number in candidates[start : start + _ROWS_AT_ONCE] if number < end]
        if ((rows[part] == row).sum(axis=1) >= MIN_EQUAL).any():
            return True
    return False


def _signature(text: str) -> np.ndarray:
    tokens = _WORD.findall(text)
    trigrams = {" ".join(tokens[i : i + 3]).encode() for i in range(max(len(tokens) - 2, 1))}
    hashes = np.array([zlib.crc32(trigram) for trigram in trigrams], dtype=np.uint64)
    signature: np.ndarray = ((hashes * _FACTORS + _ADDENDS) >> np.uint64(32)).min(axis=1)  # modulo 2**64
    return signature
