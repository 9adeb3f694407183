"""Searching a corpus with a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sentence_transformers import SentenceTransformer
from sentence_transformers.util import semantic_search

from negative_cache.workbench.data import RetrievalData
from negative_cache.workbench.evaluation import CountFn, encode_documents


class Hit(NamedTuple):
    """A document that was found."""

    document_id: str
    score: float
    text: str


def search(
    model: SentenceTransformer, data: RetrievalData, queries: Sequence[str], count: int, told: CountFn | None = None
) -> list[list[Hit]]:
    """The `count` best documents of the corpus for each query, by the model's similarity, best first."""
    names = list(data.corpus)
    documents = encode_documents(model, list(data.corpus.values()), told)
    embedded = model.encode_query(list(queries), convert_to_tensor=True)
    found = semantic_search(embedded, documents, top_k=count, score_function=model.similarity)
    return [
        [Hit(names[hit["corpus_id"]], float(hit["score"]), data.corpus[names[hit["corpus_id"]]]) for hit in hits]
        for hits in found
    ]
