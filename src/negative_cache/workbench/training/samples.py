"""The examples in `samples.json`: search results, hard negatives in the cache, staleness by age."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from negative_cache import estimators
from negative_cache.cache.rows import NegativeCache
from negative_cache.cache.specs import NO_ID
from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss
from negative_cache.objective.batch import EMBEDDING
from negative_cache.retrieval import Ceilings, RowPool, Scale, Search, retrieve
from negative_cache.workbench.data import RetrievalData
from negative_cache.workbench.evaluation import Run
from negative_cache.workbench.evaluation.encoding import encoding_arguments

SAMPLES = "samples.json"
NUM_QUERIES, NUM_HITS, NUM_NEGATIVES, NUM_ROWS = 10, 5, 6, 512
MAX_CHARS = 500


def hits(data: RetrievalData, split: str, run: Run) -> list[dict[str, Any]]:
    """Search results of some queries of a split. The queries depend only on the data.

    Args:
        data: The dataset.
        split: The split.
        run: The results of its queries, the best first.

    Returns:
        For each query: `query` (its id), `text`, `relevant` (documents), `rank` (of the best relevant document; None if
        it was not found), `num_results`, and `found` (`document`, `score`, `is_relevant` and `text` of the best
        documents).
    """
    part, judged = data.part(split), data.judged(split)
    result = []
    for query in spread(list(judged), NUM_QUERIES):
        relevant, found = judged[query], list(run[query].items())
        ranks = [rank for rank, (document, _) in enumerate(found, 1) if document in relevant]
        result.append(
            {
                "query": query,
                "text": clip(part.queries[query]),
                "relevant": [_document(part, document) for document in relevant[:NUM_HITS]],
                "rank": ranks[0] if ranks else None,
                "num_results": len(found),
                "found": [
                    {**_document(part, document), "score": score, "is_relevant": document in relevant}
                    for document, score in found[:NUM_HITS]
                ],
            }
        )
    return result


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


class _Found(NamedTuple):
    """Rows of the cache for a batch of queries.

    Attributes:
        positive_rows: int64 `[batch, n]`: rows of the known positives, the first one first, and of a document that the
            data ignore; -1 for those that are not cached.
        similarities: `[batch]`: similarity of each query and its first positive, with the model's embeddings.
        rows: int64 `[batch, NUM_NEGATIVES]`: the best rows that can be drawn, padded with -1.
        row_similarities: `[batch, NUM_NEGATIVES]`: their similarities, with the cached embeddings.
        probabilities: `[batch, NUM_NEGATIVES]`: their probabilities of being drawn.
        num_hidden: number of rows that margins hide, per query.
    """

    positive_rows: Tensor
    similarities: Tensor
    rows: Tensor
    row_similarities: Tensor
    probabilities: Tensor
    num_hidden: list[int]


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
    found = _search(loss, cache, model, data, {query: train[query] for query in queries})
    ages, ids = cache.age.tolist(), _positions(cache).tolist()
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


def _search(
    loss: NegativeCacheRankingLoss,
    cache: NegativeCache,
    model: SentenceTransformer,
    data: RetrievalData,
    qrels: dict[str, list[str]],
) -> _Found:
    """Search the cache for the queries of `qrels` as a training step does."""
    queries = embed_queries(model, [data.queries[query] for query in qrels])
    positives = embed_documents(model, [data.corpus[documents[0]] for documents in qrels.values()])
    labels, corpus = torch.from_numpy(data.labels()), data.corpus
    known = [data.never_negative(query, documents) for query, documents in qrels.items()]
    ids = [labels[[corpus.position(document) for document in documents]] for documents in known]
    positive_ids = pad_sequence(ids, batch_first=True, padding_value=NO_ID).to(queries.device)
    positive_rows = cache.find(positive_ids.flatten()).view(positive_ids.shape)
    similarities = estimators.dot(queries, positives)
    ceilings = loss.cache_loss.limits.ceilings(similarities)
    embeddings, scales = cache.stored(EMBEDDING)
    search = Search(
        queries,
        RowPool(embeddings, cache.filled, scales),
        score_transform=Scale(loss.scale),
        excluded=positive_rows,
        ceilings=None if ceilings is None else Ceilings(ceilings * loss.scale),
        num_samples=0,
        num_best=NUM_NEGATIVES,
    )
    found = retrieve(search, torch.Generator().manual_seed(0))
    return _Found(
        positive_rows=positive_rows,
        similarities=similarities,
        rows=found.best_rows,
        row_similarities=found.best_scores / loss.scale,
        probabilities=(found.best_scores - found.lse[:, None]).exp(),
        num_hidden=[0] * len(queries) if found.num_hidden is None else found.num_hidden.tolist(),
    )


def _staleness_by_age(cache: NegativeCache, model: SentenceTransformer, data: RetrievalData) -> list[list[float]]:
    """Pairs of the age in steps and the staleness of up to 512 rows, evenly spaced in the order of age."""
    corpus, ids = data.corpus, _positions(cache)
    rows = (cache.filled & (ids >= 0) & (ids < len(corpus))).nonzero().squeeze(1)
    rows = rows[cache.age[rows].argsort(stable=True)]
    if not len(rows):
        return []
    rows = rows[torch.tensor(spread(range(len(rows)), NUM_ROWS), device=rows.device)]
    encoded = embed_documents(model, [corpus.text(number) for number in ids[rows].tolist()])
    staleness = estimators.staleness(cache.read(rows, [EMBEDDING])[EMBEDDING], encoded)
    pairs = zip(cache.age[rows].tolist(), staleness.tolist(), strict=True)
    return [[age, round(value, 6)] for age, value in pairs]


def _positions(cache: NegativeCache) -> Tensor:
    """The position in the corpus of each row's document, which is its label; -1 for unknown: int64 `[num_rows]`."""
    return cache.document_ids[:, -1] if cache.num_ids > 1 else cache.document_ids


def embed_queries(model: SentenceTransformer, texts: list[str]) -> Tensor:
    """Embeddings of queries, as in training: of unit length, float32 `[n, dim]`."""
    embedded: Tensor = model.encode_query(texts, normalize_embeddings=True, **encoding_arguments(model))
    return embedded.float()


def embed_documents(model: SentenceTransformer, texts: list[str]) -> Tensor:
    """Embeddings of documents, as in training: of unit length, float32 `[n, dim]`."""
    embedded: Tensor = model.encode_document(texts, normalize_embeddings=True, **encoding_arguments(model))
    return embedded.float()


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
