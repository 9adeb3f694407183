"""What a run leaves to look at beside its numbers: what queries find, hard negatives in the cache, staleness by age."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from negative_cache import estimators
from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss
from negative_cache.objective.batch import EMBEDDING
from negative_cache.retrieval import Limits, Scale, retrieve
from negative_cache.sampling.draw import pool_of
from negative_cache.workbench.data import RetrievalData
from negative_cache.workbench.evaluation import Corpus, encoding_options, rankings_of

SAMPLES = "samples.json"
NUM_QUERIES, NUM_HITS, NUM_NEGATIVES, NUM_ROWS = 10, 5, 6, 512
TEXT_LENGTH = 500


def hits(model: SentenceTransformer, data: RetrievalData, split: str, corpus: Corpus) -> list[dict[str, Any]]:
    """What some queries of a split find, always the same queries of the same data.

    Returns:
        For each query: `query` (its id), `text`, `relevant` (ids), `rank` (of the best relevant document), `found`
        (`document`, `score`, `is_relevant` and `text` of the best documents).
    """
    qrels = {query: data.judged(split)[query] for query in _spread(list(data.judged(split)), NUM_QUERIES)}
    return [
        {
            "query": ranking.query,
            "text": clip(data.queries[ranking.query]),
            "relevant": [_document(data, document) for document in qrels[ranking.query][:NUM_HITS]],
            "rank": ranking.rank,
            "found": [
                {**_document(data, document), "score": score, "is_relevant": document in qrels[ranking.query]}
                for document, score in ranking.found
            ],
        }
        for ranking in rankings_of(model, data, qrels, corpus, NUM_HITS)
    ]


@torch.no_grad()
def of_cache(loss: nn.Module, model: SentenceTransformer, data: RetrievalData) -> dict[str, Any]:
    """What is in the cache of a run that has ended, on several ranks in this one's part; empty for other losses.

    Returns:
        `negatives`: see `_hard_negatives`; `staleness_by_age`: `[age in steps, staleness]` of up to 512 rows.
    """
    if not isinstance(loss, NegativeCacheRankingLoss) or loss.cache_loss.cache is None:
        return {}
    return {
        "negatives": _hard_negatives(loss, model, data),
        "staleness_by_age": _staleness_by_age(loss, model, data),
    }


def _hard_negatives(
    loss: NegativeCacheRankingLoss, model: SentenceTransformer, data: RetrievalData
) -> list[dict[str, Any]]:
    """The cached documents that some training queries would draw most likely, had they one more step.

    Returns:
        For each query: `query`, `text`, `positive` (`document`, `text`, `similarity` by the model, `age` of its row
        or None if it is not cached: a known positive is never drawn), `num_hidden` (rows that margins hide), and
        `negatives` (`document`, `text`, `similarity` by the cached embedding, `chance` of being drawn, `age`).
    """
    cache_loss = loss.cache_loss
    cache, train = cache_loss.cache, data.judged("train")
    assert cache is not None
    names, numbers = list(data.corpus), {name: number for number, name in enumerate(data.corpus)}
    queries = _spread(list(train), NUM_QUERIES)
    embedded = embed(model, [data.queries[query] for query in queries])
    positives = embed(model, [data.corpus[train[query][0]] for query in queries])
    width = max(len(train[query]) for query in queries)
    ids = [[numbers[document] for document in train[query]] for query in queries]
    known = torch.tensor([row + [-1] * (width - len(row)) for row in ids], device=embedded.device)
    rows_of_known = cache.find(known.flatten()).view(known.shape)
    similarities = estimators.dot(embedded, positives)
    ceilings = cache_loss.margins.ceilings(similarities)
    found = retrieve(
        embedded,
        pool_of([cache], EMBEDDING),
        generator=torch.Generator().manual_seed(0),
        score_transform=Scale(loss.scale),
        excluded=rows_of_known,
        num_top=NUM_NEGATIVES,
        num_samples=0,
        limits=None if ceilings is None else Limits(ceilings * loss.scale),
    )
    chances, age = (found.top_scores - found.lse[:, None]).exp(), cache.age
    result = []
    for at, query in enumerate(queries):
        negatives = [
            {
                **_row(data, names, int(cache.document_ids[row])),
                "similarity": float(found.top_scores[at, place]) / loss.scale,
                "chance": float(chances[at, place]),
                "age": int(age[row]),
            }
            for place, row in enumerate(found.top_rows[at].tolist())
            if row >= 0
        ]
        own_row = int(rows_of_known[at, 0])
        positive = {
            **_document(data, train[query][0]),
            "similarity": float(similarities[at]),
            "age": int(age[own_row]) if own_row >= 0 else None,
        }
        hidden = 0 if found.num_limited is None else int(found.num_limited[at])
        result.append(
            {
                "query": query,
                "text": clip(data.queries[query]),
                "positive": positive,
                "num_hidden": hidden,
                "negatives": negatives,
            }
        )
    return result


def _staleness_by_age(
    loss: NegativeCacheRankingLoss, model: SentenceTransformer, data: RetrievalData
) -> list[list[float]]:
    """`[age, staleness]` of rows of all ages: of the cached embedding and the one that the model makes now."""
    cache = loss.cache_loss.cache
    assert cache is not None
    names, ids = list(data.corpus), cache.document_ids
    is_known = cache.filled & (ids >= 0) & (ids < len(names))
    rows = is_known.nonzero().squeeze(1)
    rows = rows[cache.age[rows].argsort(stable=True)]
    if not len(rows):
        return []
    rows = rows[torch.tensor(_spread(range(len(rows)), NUM_ROWS), device=rows.device)]
    fresh = embed(model, [data.corpus[names[number]] for number in ids[rows].tolist()])
    staleness = estimators.staleness(cache.read(rows, [EMBEDDING])[EMBEDDING], fresh)
    pairs = zip(cache.age[rows].tolist(), staleness.tolist(), strict=True)
    return [[age, round(value, 6)] for age, value in pairs]


def embed(model: SentenceTransformer, texts: list[str]) -> Tensor:
    """Embeddings `[n, dim]` of unit length as training makes them, without the prompts that evaluation uses."""
    embedded = model.encode(texts, prompt="", normalize_embeddings=True, **encoding_options(model))
    return embedded.float()


def clip(text: str) -> str:
    """A text of bounded length."""
    return text if len(text) <= TEXT_LENGTH else text[: TEXT_LENGTH - 3] + "..."


def _document(data: RetrievalData, document: str) -> dict[str, Any]:
    return {"document": document, "text": clip(data.corpus[document])}


def _row(data: RetrievalData, names: Sequence[str], number: int) -> dict[str, Any]:
    """The document of a row that has the id `number`."""
    if not 0 <= number < len(names):
        return {"document": None, "text": None}
    return _document(data, names[number])


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    """Up to `count` of the values, evenly spread."""
    count = min(count, len(values))
    return [values[at * len(values) // count] for at in range(count)]
