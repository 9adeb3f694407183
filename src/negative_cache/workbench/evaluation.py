"""Retrieval quality of a model on a split: its queries against the whole corpus."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import Tensor

from negative_cache.workbench.data import RetrievalData

SCORES_AT_ONCE = 1 << 23
ENCODED_AT_ONCE = 1024  # texts between two words on how it goes on

CountFn = Callable[[int, int], None]
"""Called with how much is done, and of how much."""


def make_evaluator(model: SentenceTransformer, data: RetrievalData, split: str) -> InformationRetrievalEvaluator:
    """sentence-transformers' evaluator of a split, for its trainer; `evaluate` finds the same and is faster."""
    qrels = data.judged(split)
    return InformationRetrievalEvaluator(
        queries={query: data.queries[query] for query in qrels},
        corpus=data.corpus,
        relevant_docs={query: set(documents) for query, documents in qrels.items()},
        mrr_at_k=[10],
        ndcg_at_k=[10],
        accuracy_at_k=[10],
        precision_recall_at_k=[1, 10, 100],
        map_at_k=[100],
        name=split,
        batch_size=encoding_options(model)["batch_size"],
        write_csv=False,
    )


class Corpus(NamedTuple):
    """The documents of a data set, encoded.

    Attributes:
        names: Their ids, sorted.
        embeddings: `[n, dim]`.
    """

    names: list[str]
    embeddings: Tensor


class Ranking(NamedTuple):
    """What a query finds.

    Attributes:
        query: Its id.
        rank: Of the best of its relevant documents, from 1.
        found: Ids and scores of the best documents, best first.
    """

    query: str
    rank: int
    found: list[tuple[str, float]]


def evaluate(
    model: SentenceTransformer, data: RetrievalData, split: str, told: CountFn | None = None
) -> dict[str, Any]:
    """Metrics of a model: mrr@10, ndcg@10, recall@1, @10 and @100 (means over queries), num_queries, num_documents."""
    data.judged(split)
    return metrics_of(model, data, split, encode_corpus(model, data, told))


def encode_corpus(model: SentenceTransformer, data: RetrievalData, told: CountFn | None = None) -> Corpus:
    """Encode all documents, for `metrics_of` and `rankings_of`."""
    names = sorted(data.corpus)
    return Corpus(names, encode_documents(model, [data.corpus[name] for name in names], told))


def encode_documents(model: SentenceTransformer, texts: Sequence[str], told: CountFn | None = None) -> Tensor:
    """Embeddings `[n, dim]` of documents; `told` hears how many there are."""
    order = sorted(range(len(texts)), key=lambda at: -len(texts[at]))  # those of like length are padded alike
    parts = []
    for start in range(0, len(order), ENCODED_AT_ONCE):
        part = order[start : start + ENCODED_AT_ONCE]
        parts.append(model.encode_document([texts[at] for at in part], **encoding_options(model)))
        if told is not None:
            told(start + len(part), len(order))
    in_order = torch.cat(parts)
    embeddings = torch.empty_like(in_order)
    embeddings[torch.tensor(order, device=in_order.device)] = in_order
    return embeddings


def encoding_options(model: SentenceTransformer) -> dict[str, Any]:
    """Of the model's `encode` methods."""
    is_static = isinstance(model[0], StaticEmbedding)
    return {"batch_size": 256 if is_static else 32, "convert_to_tensor": True, "show_progress_bar": False}


@torch.no_grad()
def metrics_of(model: SentenceTransformer, data: RetrievalData, split: str, corpus: Corpus) -> dict[str, Any]:
    """`evaluate` with a corpus that is encoded already.

    The rank of a relevant document is 1 + the documents with a higher score + those with the same score and a smaller
    id. A score that is not a number counts as higher than all others.
    """
    ranks = _ranks(model, data, data.judged(split), corpus)
    per_query = [_metrics(ranks_of_query) for ranks_of_query, _ in ranks]
    means = {name: statistics.fmean(metrics[name] for metrics in per_query) for name in per_query[0]}
    return {**means, "num_queries": len(per_query), "num_documents": len(corpus.names)}


@torch.no_grad()
def rankings_of(
    model: SentenceTransformer, data: RetrievalData, qrels: dict[str, list[str]], corpus: Corpus, count: int
) -> list[Ranking]:
    """The `count` best documents of each query of `qrels`; equal ones in the order of their ids."""
    result = []
    for query, (ranks, scores) in zip(qrels, _ranks(model, data, qrels, corpus), strict=True):
        values, at = scores.sort(descending=True, stable=True)
        best = zip(at[:count].tolist(), values[:count].tolist(), strict=True)
        result.append(Ranking(query, min(ranks), [(corpus.names[place], score) for place, score in best]))
    return result


def _ranks(
    model: SentenceTransformer, data: RetrievalData, qrels: dict[str, list[str]], corpus: Corpus
) -> Iterator[tuple[list[int], Tensor]]:
    """For each query of `qrels` the ranks of its relevant documents, and the scores of all documents `[n]`."""
    queries = model.encode_query([data.queries[query] for query in qrels], **encoding_options(model))
    places_of = {name: place for place, name in enumerate(corpus.names)}
    relevant = [sorted(places_of[document] for document in set(documents)) for documents in qrels.values()]
    step = max(1, SCORES_AT_ONCE // len(corpus.names))
    places = torch.arange(len(corpus.names), device=corpus.embeddings.device)
    for start in range(0, len(queries), step):
        scores = model.similarity(queries[start : start + step], corpus.embeddings)
        for row, own in zip(scores, relevant[start : start + step], strict=True):
            at = torch.tensor(own, device=row.device)
            target = row[at, None]
            is_before = ~(row <= target) | ((row == target) & (places < at[:, None]))
            yield (1 + is_before.sum(dim=1)).tolist(), row


def _metrics(ranks: list[int]) -> dict[str, float]:
    """Of one query with relevant documents at these ranks."""
    gains = sum(1 / math.log2(rank + 1) for rank in ranks if rank <= 10)
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(len(ranks), 10) + 1))
    recall = {f"recall@{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 10, 100)}
    return {"mrr@10": 1 / min(ranks) if min(ranks) <= 10 else 0.0, "ndcg@10": gains / ideal, **recall}
