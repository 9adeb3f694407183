"""Fingerprints, which tell whether data is the same as before. They are the same in every process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import blake2b

from negative_cache.workbench.data.retrieval_data import RetrievalData
from negative_cache.workbench.data.texts import Texts

_SIZE = 16  # bytes


def of_texts(texts: Texts) -> str:
    """A fingerprint of the texts in any order and with any ids: 32 hexadecimal digits."""
    hashes = (blake2b(text.encode(), digest_size=_SIZE).digest() for text in texts.values())
    total = sum(int.from_bytes(found, "big") for found in hashes)
    return (total % (1 << 8 * _SIZE)).to_bytes(_SIZE, "big").hex()


def of_sequence(texts: Iterable[str]) -> str:
    """A fingerprint of texts in their order: 32 hexadecimal digits."""
    digest = blake2b(digest_size=_SIZE)
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "big"))
        digest.update(encoded)
    return digest.hexdigest()


def of_split(data: RetrievalData, split: str) -> str:
    """A fingerprint of what a split is measured by: 32 hexadecimal digits.

    It depends on the queries, the judgements and the documents that are searched, with their ids and in their order.
    """
    judged, part = data.judged(split), data.part(split)
    queries = {query: part.queries[query] for query in judged}
    digest = blake2b(repr(part.ignores_identical_ids).encode(), digest_size=_SIZE)
    for mapping in (part.corpus, queries, judged, data.graded(split)):
        _add(digest, mapping)
    return digest.hexdigest()


def of_data(data: RetrievalData) -> str:
    """A fingerprint of the texts, their ids, the judgements and the negatives in their order: 32 hexadecimal digits."""
    digest = blake2b(digest_size=_SIZE)
    for name, part in (("", data), *data.elsewhere.items()):
        digest.update(repr((name, part.ignores_identical_ids)).encode())
        mappings: list[Mapping[str, object]] = [part.corpus, part.queries, part.negatives]
        for mapping in (*mappings, *part.qrels.values(), *part.grades.values()):
            _add(digest, mapping)
        digest.update(repr((list(part.qrels), list(part.grades))).encode())
    return digest.hexdigest()


def _add(digest: blake2b, mapping: Mapping[str, object]) -> None:
    """Add the number of items and the items, in their order."""
    digest.update(repr(len(mapping)).encode())
    for item in mapping.items():
        digest.update(repr(item).encode())
