"""Retrieval quality of a model on a split: its queries against the whole corpus."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from torch import Tensor

from negative_cache.workbench.data import RetrievalData

SCORES_AT_ONCE = 1 << 23


def make_evaluator(data: RetrievalData, split: str, batch_size: int = 256) -> InformationRetrievalEvaluator:
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
        batch_size=batch_size,
        write_csv=False,
    )


def evaluate(model: SentenceTransformer, data: RetrievalData, split: str) -> dict[str, Any]:
    """Metrics of a model: mrr@10, ndcg@10, recall@1, @10 and @100 (means over queries), num_queries, num_documents."""
    return evaluate_splits(model, data, [split])[split]


@torch.no_grad()
def evaluate_splits(
    model: SentenceTransformer, data: RetrievalData, splits: Sequence[str], batch_size: int = 256
) -> dict[str, dict[str, Any]]:
    """`evaluate` on several splits; the corpus is encoded once.

    The rank of a relevant document is 1 + the documents with a higher score + those with the same score and a smaller
    id. A score that is not a number counts as higher than all others.
    """
    options = {"batch_size": batch_size, "convert_to_tensor": True, "show_progress_bar": False}
    names = sorted(data.corpus)
    places = {name: place for place, name in enumerate(names)}
    documents = model.encode_document([data.corpus[name] for name in names], **options)
    found = {}
    for split in splits:
        qrels = data.judged(split)
        queries = model.encode_query([data.queries[query] for query in qrels], **options)
        relevant = [sorted(places[document] for document in set(documents)) for documents in qrels.values()]
        per_query = [_metrics(ranks) for ranks in _ranks(model, queries, documents, relevant)]
        means = {name: statistics.fmean(metrics[name] for metrics in per_query) for name in per_query[0]}
        found[split] = {**means, "num_queries": len(qrels), "num_documents": len(names)}
    return found


def _ranks(
    model: SentenceTransformer, queries: Tensor, documents: Tensor, relevant: list[list[int]]
) -> list[list[int]]:
    """For each query the ranks of its relevant documents among `documents [n, dim]`."""
    step = max(1, SCORES_AT_ONCE // len(documents))
    places = torch.arange(len(documents), device=documents.device)
    result: list[list[int]] = []
    for start in range(0, len(queries), step):
        scores = model.similarity(queries[start : start + step], documents)
        for row, own in zip(scores, relevant[start : start + step], strict=True):
            at = torch.tensor(own, device=row.device)
            target = row[at, None]
            is_before = ~(row <= target) | ((row == target) & (places < at[:, None]))
            result.append((1 + is_before.sum(dim=1)).tolist())
    return result


def _metrics(ranks: list[int]) -> dict[str, float]:
    """Of one query with relevant documents at these ranks."""
    gains = sum(1 / math.log2(rank + 1) for rank in ranks if rank <= 10)
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(len(ranks), 10) + 1))
    recall = {f"recall@{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 10, 100)}
    return {"mrr@10": 1 / min(ranks) if min(ranks) <= 10 else 0.0, "ndcg@10": gains / ideal, **recall}
