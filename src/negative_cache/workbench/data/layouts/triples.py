"""Training triples of MS MARCO: negatives, and positives if nothing else gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

from negative_cache.workbench.data.files.skipping import Skipped
from negative_cache.workbench.data.layouts.sources import Triples
from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.data.rows import most_negatives
from negative_cache.workbench.data.texts import IdsByText, Texts


def read_triples(
    triples: Sequence[Triples], corpus: Texts, queries: Texts, options: DataOptions, skipped: Skipped
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The positives and the negatives of each query, both in the order of the files.

    Args:
        triples: The triples; each row is a list of a query, a positive and a negative.
        corpus: The documents.
        queries: The queries.
        options: Its `negatives` says how many negatives of a query are kept.
        skipped: Triples of unknown queries and documents are added to it.
    """
    limit = most_negatives(options.negatives)
    positives: dict[str, dict[str, None]] = {}
    negatives: dict[str, dict[str, None]] = {}
    for place, query, positive, negative in _with_ids(triples, corpus, queries):
        if query is None or positive is None or negative is None:
            skipped.add("triples of a query or a document that the folder has no text of", place)
            continue
        positives.setdefault(query, {})[positive] = None
        others = negatives.setdefault(query, {})
        if limit is None or len(others) < limit:
            others[negative] = None
    return _lists(positives), _lists(negatives)


def _with_ids(
    triples: Sequence[Triples], corpus: Texts, queries: Texts
) -> Iterator[tuple[str, str | None, str | None, str | None]]:
    """Place, and ids of the query, the positive and the negative; None for what is not known."""
    for table, are_ids in triples:
        find_query, find_document = (_known(texts) if are_ids else IdsByText(texts).find for texts in (queries, corpus))
        for place, (query, positive, negative) in table.rows():
            yield place, find_query(query), find_document(positive), find_document(negative)


def _lists(found: dict[str, dict[str, None]]) -> dict[str, list[str]]:
    return {query: list(documents) for query, documents in found.items()}


def _known(texts: Texts) -> Callable[[str], str | None]:
    """A function that returns the id itself if there is a text of it, always as the same object to save memory."""
    return lru_cache(maxsize=None)(lambda key: key if key in texts else None)
