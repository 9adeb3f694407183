"""Which split a text belongs to, and which documents are in the same split."""

from __future__ import annotations

import hashlib

TEST_PERCENT, DEV_PERCENT = 10, 5


def hash_of(text: str) -> int:
    """A number from 0 to 2**64 - 1 that is the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_of(text: str, dev_percent: int = DEV_PERCENT) -> str:
    """The split that the hash of a text falls into."""
    percentile = hash_of(text) % 100
    return "test" if percentile < TEST_PERCENT else "dev" if percentile < TEST_PERCENT + dev_percent else "train"


class Groups:
    """Disjoint sets of documents."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def root(self, key: str) -> str:
        """The smallest id in the set of a document."""
        while (parent := self._parent.get(key, key)) != key:
            self._parent[key] = self._parent.get(parent, parent)
            key = parent
        return key

    def join(self, a: str, b: str) -> None:
        """Unite the sets of two documents."""
        a, b = self.root(a), self.root(b)
        self._parent[max(a, b)] = min(a, b)
