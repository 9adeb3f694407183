"""Retrieval quality of a model on a split, by sentence-transformers' evaluator."""

from __future__ import annotations

from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from negative_cache.workbench.data import RetrievalData

METRICS = {
    "mrr@10": "mrr@10",
    "ndcg@10": "ndcg@10",
    "recall@1": "recall@1",
    "recall@10": "recall@10",
    "recall@100": "recall@100",
}


def make_evaluator(data: RetrievalData, split: str, batch_size: int = 256) -> InformationRetrievalEvaluator:
    """The evaluator of a split: its queries against the whole corpus."""
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
    evaluator = make_evaluator(data, split)
    scores = evaluator(model)
    prefix = f"{split}_{model.similarity_fn_name}_"
    return {
        **{name: float(scores[prefix + key]) for name, key in METRICS.items()},
        "num_queries": len(evaluator.queries),
        "num_documents": len(data.corpus),
    }
