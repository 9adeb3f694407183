"""Search in a corpus, and retrieval metrics of the queries of a split against the whole corpus."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.util import semantic_search
from torch import Tensor

from negative_cache.workbench.data import RetrievalData

MAX_K = 100  # of the metrics
SCORES_PER_CHUNK = 1 << 23
TEXTS_PER_CHUNK = 1024  # between two reports of progress

OnProgress = Callable[[int, int], None]
"""Called with (done, total)."""


class Corpus(NamedTuple):
    """The encoded documents of a dataset.

    Attributes:
        names: Ids, sorted.
        embeddings: `[n, dim]`.
    """

    names: list[str]
    embeddings: Tensor


class Ranking(NamedTuple):
    """The search results of a query.

    Attributes:
        query: Id of the query.
        rank: Rank of the best relevant document, from 1.
        found: Ids and scores of the best documents, the best first.
    """

    query: str
    rank: int
    found: list[tuple[str, float]]


class Hit(NamedTuple):
    """A document that a search found."""

    document_id: str
    score: float
    text: str


def evaluate(
    model: SentenceTransformer, data: RetrievalData, split: str, on_progress: OnProgress | None = None
) -> dict[str, Any]:
    """Metrics of a model: mrr@10, ndcg@10, recall@1, @10 and @100 (means over queries), num_queries, num_documents."""
    data.judged(split)
    return metrics_of(model, data, split, encode_corpus(model, data, on_progress))


@torch.no_grad()
def metrics_of(model: SentenceTransformer, data: RetrievalData, split: str, corpus: Corpus) -> dict[str, Any]:
    """The metrics of `evaluate`, with a corpus that is already encoded.

    The rank of a relevant document is 1 plus the number of documents with a higher score, or with the same score and a
    smaller id. NaN counts as higher than all other scores. A document that `data` ignores for a query is left out.
    """
    ranks = _ranks(model, data, data.judged(split), corpus)
    per_query = [_metrics(ranks_of_query) for ranks_of_query, _ in ranks]
    means = {name: statistics.fmean(metrics[name] for metrics in per_query) for name in per_query[0]}
    return {**means, "num_queries": len(per_query), "num_documents": len(corpus.names)}


@torch.no_grad()
def rankings_of(
    model: SentenceTransformer, data: RetrievalData, qrels: dict[str, list[str]], corpus: Corpus, count: int
) -> list[Ranking]:
    """The `count` best documents of each query of `qrels`, without one that `data` ignores.

    Documents with the same score are ordered by id.
    """
    result = []
    for query, (ranks, scores) in zip(qrels, _ranks(model, data, qrels, corpus), strict=True):
        values, at = scores.sort(descending=True, stable=True)
        best = zip(at[: count + 1].tolist(), values[: count + 1].tolist(), strict=True)
        named = [(corpus.names[place], score) for place, score in best]
        ignored = data.ignored(query)
        result.append(Ranking(query, min(ranks), [found for found in named if found[0] != ignored][:count]))
    return result


def search(
    model: SentenceTransformer,
    data: RetrievalData,
    queries: Sequence[str],
    count: int,
    on_progress: OnProgress | None = None,
) -> list[list[Hit]]:
    """The `count` best documents of the corpus for each query, by the model's similarity, the best first."""
    corpus = encode_corpus(model, data, on_progress)
    embedded = model.encode_query(list(queries), convert_to_tensor=True)
    found = semantic_search(embedded, corpus.embeddings, top_k=count, score_function=model.similarity)
    names = [[corpus.names[hit["corpus_id"]] for hit in hits] for hits in found]
    return [
        [Hit(name, float(hit["score"]), data.corpus[name]) for name, hit in zip(own, hits, strict=True)]
        for own, hits in zip(names, found, strict=True)
    ]


def make_evaluator(model: SentenceTransformer, data: RetrievalData, split: str) -> InformationRetrievalEvaluator:
    """sentence-transformers' evaluator of a split, for its trainer. `evaluate` gives the same results faster."""
    qrels = data.judged(split)
    kind = _IgnoringIdenticalIds if data.ignores_identical_ids else InformationRetrievalEvaluator
    return kind(
        queries={query: data.queries[query] for query in qrels},
        corpus=data.corpus,
        relevant_docs={query: set(documents) for query, documents in qrels.items()},
        mrr_at_k=[10],
        ndcg_at_k=[10],
        accuracy_at_k=[10, MAX_K + 1] if data.ignores_identical_ids else [10],
        precision_recall_at_k=[1, 10, MAX_K],
        map_at_k=[MAX_K],
        name=split,
        batch_size=encoding_options(model)["batch_size"],
        write_csv=False,
    )


class _IgnoringIdenticalIds(InformationRetrievalEvaluator):
    """Leaves out of a query's results the document with the id of the query.

    It must find `MAX_K + 1` documents, so that `MAX_K` are left; only the measure accuracy@(MAX_K + 1) makes it do so.
    """

    def compute_metrics(self, queries_result_list: list[Any]) -> dict[str, dict[int, float]]:
        """The metrics, from the results of each query."""
        kept = [
            [hit for hit in hits if hit["corpus_id"] != query]
            for query, hits in zip(self.queries_ids, queries_result_list, strict=True)
        ]
        metrics: dict[str, dict[int, float]] = super().compute_metrics(kept)
        del metrics["accuracy@k"][MAX_K + 1]
        return metrics


def encode_corpus(model: SentenceTransformer, data: RetrievalData, on_progress: OnProgress | None = None) -> Corpus:
    """Encode all documents of a dataset."""
    names = sorted(data.corpus)
    return Corpus(names, encode_documents(model, [data.corpus[name] for name in names], on_progress))


def encode_documents(model: SentenceTransformer, texts: Sequence[str], on_progress: OnProgress | None = None) -> Tensor:
    """Embeddings `[n, dim]` of documents."""
    order = sorted(range(len(texts)), key=lambda at: -len(texts[at]))  # similar lengths need little padding
    parts = []
    for start in range(0, len(order), TEXTS_PER_CHUNK):
        chunk = order[start : start + TEXTS_PER_CHUNK]
        parts.append(model.encode_document([texts[at] for at in chunk], **encoding_options(model)))
        if on_progress is not None:
            on_progress(start + len(chunk), len(order))
    in_order = torch.cat(parts)
    embeddings = torch.empty_like(in_order)
    embeddings[torch.tensor(order, device=in_order.device)] = in_order
    return embeddings


def encoding_options(model: SentenceTransformer) -> dict[str, Any]:
    """Arguments of the model's `encode` methods."""
    is_static = isinstance(model[0], StaticEmbedding)
    return {"batch_size": 256 if is_static else 32, "convert_to_tensor": True, "show_progress_bar": False}


def _ranks(
    model: SentenceTransformer, data: RetrievalData, qrels: dict[str, list[str]], corpus: Corpus
) -> Iterator[tuple[list[int], Tensor]]:
    """For each query of `qrels`, the ranks of its relevant documents and the scores of all documents `[n]`."""
    queries = model.encode_query([data.queries[query] for query in qrels], **encoding_options(model))
    places_of = {name: place for place, name in enumerate(corpus.names)}
    relevant = [sorted(places_of[document] for document in set(documents)) for documents in qrels.values()]
    ignored = [None if (name := data.ignored(query)) is None else places_of[name] for query in qrels]
    step = max(1, SCORES_PER_CHUNK // len(corpus.names))
    places = torch.arange(len(corpus.names), device=corpus.embeddings.device)
    for start in range(0, len(queries), step):
        scores = model.similarity(queries[start : start + step], corpus.embeddings)
        for number, row in enumerate(scores, start):
            if (place := ignored[number]) is not None:
                row[place] = -torch.inf
            ranks: list[int] = []
            for at in torch.split(torch.tensor(relevant[number], device=row.device), step):  # there may be thousands
                target = row[at, None]
                is_before = ~(row <= target) | ((row == target) & (places < at[:, None]))
                ranks += (1 + is_before.sum(dim=1)).tolist()
            yield ranks, row


def _metrics(ranks: list[int]) -> dict[str, float]:
    """Metrics of one query, from the ranks of its relevant documents."""
    gains = sum(1 / math.log2(rank + 1) for rank in ranks if rank <= 10)
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(len(ranks), 10) + 1))
    recall = {f"recall@{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 10, 100)}
    return {"mrr@10": 1 / min(ranks) if min(ranks) <= 10 else 0.0, "ndcg@10": gains / ideal, **recall}
