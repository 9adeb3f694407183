"""The hard negatives that the cache knows: the cached documents that are most likely to be drawn for a query."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from negative_cache import estimators
from negative_cache.cache.rows import NegativeCache
from negative_cache.cache.specs import NO_ID
from negative_cache.integrations.sentence_transformers import NegativeCacheRankingLoss
from negative_cache.objective.batch import EMBEDDING
from negative_cache.retrieval import Ceilings, RowPool, Scale, Search, retrieve
from negative_cache.workbench.data import RetrievalData
from negative_cache.workbench.evaluation.encoding import encoding_arguments
from negative_cache.workbench.files import replacing

NUM_EXPORTED = 5
QUERIES_AT_ONCE = 4096


class Found(NamedTuple):
    """Rows of the cache for a batch of queries.

    Attributes:
        positive_rows: int64 `[batch, n]`: rows of the known positives, the first one first, and of a document that the
            data ignore; -1 for those that are not cached.
        similarities: `[batch]`: similarity of each query and its first positive, with the model's embeddings.
        rows: int64 `[batch, num_best]`: the best rows that can be drawn, padded with -1.
        row_similarities: `[batch, num_best]`: their similarities, with the cached embeddings.
        probabilities: `[batch, num_best]`: their probabilities of being drawn.
        num_hidden: number of rows that margins hide, per query.
    """

    positive_rows: Tensor
    similarities: Tensor
    rows: Tensor
    row_similarities: Tensor
    probabilities: Tensor
    num_hidden: list[int]


def search_cache(
    loss: NegativeCacheRankingLoss,
    cache: NegativeCache,
    model: SentenceTransformer,
    data: RetrievalData,
    qrels: dict[str, list[str]],
    num_best: int,
) -> Found:
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
        num_best=num_best,
    )
    found = retrieve(search, torch.Generator().manual_seed(0))
    return Found(
        positive_rows=positive_rows,
        similarities=similarities,
        rows=found.best_rows,
        row_similarities=found.best_scores / loss.scale,
        probabilities=(found.best_scores - found.lse[:, None]).exp(),
        num_hidden=[0] * len(queries) if found.num_hidden is None else found.num_hidden.tolist(),
    )


def positions_of(cache: NegativeCache) -> Tensor:
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


@torch.no_grad()
def write_hard_negatives(
    path: Path, loss: NegativeCacheRankingLoss, model: SentenceTransformer, data: RetrievalData
) -> None:
    """Write the training pairs with the hard negatives that the cache knows, as JSON lines.

    The keys are query, positive, negative_1, negative_2, ..., as for losses and rerankers that take n-tuples. The
    negatives are the cached documents that are most similar to the query, the most similar first, without the known
    positives and without those that margins hide. All lines have the same number, at most `NUM_EXPORTED`.

    Args:
        path: The file. It is complete or unchanged.
        loss: The loss after training, in one process.
        model: Its model.
        data: The data of the training.

    Raises:
        ValueError: There was no training step.
    """
    cache, train = loss.cache_loss.cache, data.judged("train")
    if cache is None:
        raise ValueError(f"{path} is not written: there was no training step, so the cache is empty.")
    positions, queries = positions_of(cache), list(train)
    negatives: dict[str, list[str]] = {}
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        part = {query: train[query] for query in queries[start : start + QUERIES_AT_ONCE]}
        rows = search_cache(loss, cache, model, data, part, NUM_EXPORTED).rows
        documents = torch.where(rows < 0, NO_ID, positions[rows.clamp(min=0)]).tolist()
        for query, found in zip(part, documents, strict=True):
            negatives[query] = [data.corpus.text(position) for position in found if 0 <= position < len(data.corpus)]
    number = min(map(len, negatives.values()))
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for query, relevant in train.items():
            others = {f"negative_{at}": text for at, text in enumerate(negatives[query][:number], start=1)}
            for document in relevant:
                row = {"query": data.queries[query], "positive": data.corpus[document], **others}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
