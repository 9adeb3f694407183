"""The examples in `samples.json`: search results, hard negatives in the cache, staleness by age."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from negative_cache import estimators
from negative_cache.cache.rows import NegativeCache
from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss
from negative_cache.objective.batch import EMBEDDING
from negative_cache.workbench.data import RetrievalData
from negative_cache.workbench.data.splits import hash_of
from negative_cache.workbench.evaluation import Run
from negative_cache.workbench.training.hard_negatives import embed_documents, positions_of, search_cache

SAMPLES = "samples.json"
NUM_QUERIES, NUM_CHANGED, NUM_HITS, NUM_NEGATIVES, NUM_ROWS = 10, 5, 5, 6, 512
MAX_CHARS = 500

Results = dict[str, dict[str, Any]]
"""See `results_of`."""


def results_of(data: RetrievalData, split: str, run: Run) -> Results:
    """What is shown of the search results of a split.

    Args:
        data: The dataset.
        split: The split.
        run: The results of its queries, the best first.

    Returns:
        Query id -> `rank` (of the best relevant document; None if it was not found), `num_results`, and `found`: pairs
        of a document id and a score, the best ones.
    """
    results: Results = {}
    for query, relevant in data.judged(split).items():
        found = list(run[query].items())
        rank = next((rank for rank, (document, _) in enumerate(found, 1) if document in relevant), None)
        results[query] = {"rank": rank, "num_results": len(found), "found": [list(hit) for hit in found[:NUM_HITS]]}
    return results


def before_and_after(data: RetrievalData, split: str, before: Results | None, after: Results) -> dict[str, Any]:
    """Search results of some queries before and after training.

    The queries are those whose rank has changed most, up to `NUM_CHANGED` in each direction; of equal changes, those
    with the lowest hashes of their ids. If no rank is known to have changed, they are evenly spread over the split.

    Args:
        data: The dataset.
        split: The split.
        before: See `results_of`; None if not measured.
        after: See `results_of`.

    Returns:
        `before` and `after`: see `hits`; `changes`: the number of queries whose rank is `better`, `worse` and `equal`
        after training, or None if not measured.
    """
    if before is None:
        queries, changes = spread(list(after), NUM_QUERIES), None
        return {"before": [], "after": hits(data, split, after, queries), "changes": changes}
    change = {query: _octaves(before[query]) - _octaves(after[query]) for query in after}
    order = sorted(change, key=lambda query: (-abs(change[query]), hash_of(query)))
    better = [query for query in order if change[query] > 0]
    worse = [query for query in order if change[query] < 0]
    queries = [*better[:NUM_CHANGED], *worse[:NUM_CHANGED]] or spread(list(after), NUM_QUERIES)
    counts = {"better": len(better), "worse": len(worse), "equal": len(change) - len(better) - len(worse)}
    shown = {"before": hits(data, split, before, queries), "after": hits(data, split, after, queries)}
    return {**shown, "changes": counts}


def _octaves(result: dict[str, Any]) -> float:
    """The logarithm of a rank: from 2 to 1 is as much as from 20 to 10. One that was not found is below the last."""
    return math.log2(result["rank"] or result["num_results"] + 1)


def hits(data: RetrievalData, split: str, results: Results, queries: Sequence[str]) -> list[dict[str, Any]]:
    """Search results of some queries of a split, with texts.

    Returns:
        For each query: `query` (its id), `text`, `relevant` (documents), `rank` (of the best relevant document; None if
        it was not found), `num_results`, and `found` (`document`, `score`, `is_relevant` and `text` of the best
        documents).
    """
    part, judged = data.part(split), data.judged(split)
    return [
        {
            "query": query,
            "text": clip(part.queries[query]),
            "relevant": [_document(part, document) for document in judged[query][:NUM_HITS]],
            **results[query],
            "found": [
                {**_document(part, document), "score": score, "is_relevant": document in judged[query]}
                for document, score in results[query]["found"]
            ],
        }
        for query in queries
    ]


@torch.no_grad()
def of_cache(loss: nn.Module, model: SentenceTransformer, data: RetrievalData) -> dict[str, Any]:
    """Examples from the cache at the end of a run; with several ranks, from the rows of this rank.

    Returns:
        `negatives`: see `_hard_negatives`; `staleness_by_age`: see `_staleness_by_age`. Empty for losses without a
        cache.
    """
    if not isinstance(loss, NegativeCacheRankingLoss) or loss.cache_loss.cache is None:
        return {}
    cache = loss.cache_loss.cache
    return {
        "negatives": _hard_negatives(loss, cache, model, data),
        "staleness_by_age": _staleness_by_age(cache, model, data),
    }


def _hard_negatives(
    loss: NegativeCacheRankingLoss, cache: NegativeCache, model: SentenceTransformer, data: RetrievalData
) -> list[dict[str, Any]]:
    """The cached documents that are most likely to be drawn for some training queries in one more step.

    Returns:
        For each query: `query`, `text`, `positive` (`document`, `text`, `similarity` by the model, `age` of its row or
        None if it is not cached), `num_hidden` (rows that margins hide), and `negatives` (`document`, `text`,
        `similarity` by the cached embedding, `probability` of being drawn, `age`). Known positives are never drawn.
    """
    train = data.judged("train")
    queries = spread(list(train), NUM_QUERIES)
    found = search_cache(loss, cache, model, data, {query: train[query] for query in queries}, NUM_NEGATIVES)
    ages, ids = cache.age.tolist(), positions_of(cache).tolist()
    result = []
    for at, query in enumerate(queries):
        negatives = [
            {
                **_numbered_document(data, ids[row]),
                "similarity": float(found.row_similarities[at, place]),
                "probability": float(found.probabilities[at, place]),
                "age": ages[row],
            }
            for place, row in enumerate(found.rows[at].tolist())
            if row >= 0
        ]
        own_row = int(found.positive_rows[at, 0])
        positive = {
            **_document(data, train[query][0]),
            "similarity": float(found.similarities[at]),
            "age": ages[own_row] if own_row >= 0 else None,
        }
        example = {"query": query, "text": clip(data.queries[query]), "positive": positive}
        result.append({**example, "num_hidden": found.num_hidden[at], "negatives": negatives})
    return result


def _staleness_by_age(cache: NegativeCache, model: SentenceTransformer, data: RetrievalData) -> list[list[float]]:
    """Pairs of the age in steps and the staleness of up to 512 rows, evenly spaced in the order of age."""
    corpus, ids = data.corpus, positions_of(cache)
    rows = (cache.filled & (ids >= 0) & (ids < len(corpus))).nonzero().squeeze(1)
    rows = rows[cache.age[rows].argsort(stable=True)]
    if not len(rows):
        return []
    rows = rows[torch.tensor(spread(range(len(rows)), NUM_ROWS), device=rows.device)]
    encoded = embed_documents(model, [corpus.text(number) for number in ids[rows].tolist()])
    staleness = estimators.staleness(cache.read(rows, [EMBEDDING])[EMBEDDING], encoded)
    pairs = zip(cache.age[rows].tolist(), staleness.tolist(), strict=True)
    return [[age, round(value, 6)] for age, value in pairs]


def clip(text: str) -> str:
    """A text, shortened to at most `MAX_CHARS` characters."""
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 3] + "..."


def spread(values: Sequence[Any], count: int) -> list[Any]:
    """Up to `count` of the values, evenly spaced."""
    count = min(count, len(values))
    return [values[at * len(values) // count] for at in range(count)]


def _document(data: RetrievalData, document: str) -> dict[str, Any]:
    return {"document": document, "text": clip(data.corpus[document])}


def _numbered_document(data: RetrievalData, number: int) -> dict[str, Any]:
    """The document at a position of the corpus; None for an id that is not in the corpus."""
    if not 0 <= number < len(data.corpus):
        return {"document": None, "text": None}
    return _document(data, data.corpus.key(number))
