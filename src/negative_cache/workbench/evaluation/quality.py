"""The quality of a model on a split of a dataset."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from negative_cache.workbench.data import DataError, RetrievalData
from negative_cache.workbench.evaluation.defaults import DEFAULT_MEASURES
from negative_cache.workbench.evaluation.encoding import OnProgress, encoding_arguments
from negative_cache.workbench.evaluation.encoding_options import EncodingOptions
from negative_cache.workbench.evaluation.measures import (
    Run,
    depth_of,
    judge,
    means,
    parse_measures,
)
from negative_cache.workbench.evaluation.searching import search_splits

MAX_K = 100  # of the metrics


class Quality(NamedTuple):
    """Search results of a split, and how good they are.

    Attributes:
        per_query: Name of a measure -> query id -> value, for all judged queries.
        run: The search results.
        num_documents: Size of the corpus.
    """

    per_query: dict[str, dict[str, float]]
    run: Run
    num_documents: int

    def metrics(self) -> dict[str, Any]:
        """The means over the queries, num_queries and num_documents."""
        num_queries = len(next(iter(self.per_query.values())))
        return {**means(self.per_query), "num_queries": num_queries, "num_documents": self.num_documents}


def evaluate(
    model: SentenceTransformer,
    data: RetrievalData,
    splits: tuple[str, ...],
    measures: Mapping[str, Any] | None = None,
    options: EncodingOptions | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Quality]:
    """The quality of a model on each of `splits`; a corpus that several share is encoded once.

    Args:
        model: The model.
        data: The dataset.
        splits: Names of splits; "all" stands for all of them together.
        measures: See `parse_measures`; None for those of BEIR: MRR@10, nDCG@10, AP@100, R@1, R@10 and R@100.
        options: How to encode; None for the defaults.
        on_progress: Called with (done, total) documents while a corpus is encoded.

    Raises:
        DataError: A split has no judgements.
        MeasureError: The grades do not suit a measure.
    """
    measures = measures or parse_measures(DEFAULT_MEASURES)
    runs = search_splits(model, data, splits, depth_of(measures), options, on_progress)
    return {split: judge_split(data, split, run, measures) for split, run in runs.items()}


def judge_split(data: RetrievalData, split: str, run: Run, measures: Mapping[str, Any]) -> Quality:
    """The quality of search results for a split; see `judge`."""
    return Quality(judge(data.graded(split), run, measures), run, len(data.part(split).corpus))


def matching_run(data: RetrievalData, split: str, run: Run) -> tuple[Run, list[str]]:
    """The results of the judged queries of a split, without documents that `data` ignores.

    Args:
        data: The dataset.
        split: The split.
        run: Results of another program.

    Returns:
        The results, and notes on queries without judgements or without results, on documents outside the sample that
        is searched, and on unknown documents.

    Raises:
        DataError: The run has no judged query, or no document of the corpus.
    """
    judged, part, whole = data.graded(split), data.part(split), data.whole(split).corpus
    own = {query: _without(found, {part.ignored(query)}) for query, found in run.items() if query in judged}
    documents = dict.fromkeys(document for found in own.values() for document in found)
    outside = [document for document in documents if document in whole and document not in part.corpus]
    if outside:
        left_out = set(outside)
        own = {query: _without(found, left_out) for query, found in own.items()}
    unjudged = [query for query in run if query not in judged]
    missing = [query for query in judged if query not in own]
    unknown = [document for document in documents if document not in whole]
    for kind, others, every, known in (("query", unjudged, run, judged), ("document", unknown, documents, whole)):
        if others and len(others) == len(every):
            raise DataError(
                f"The run has no {kind} of {data.name}, {split}: it has ids such as {others[0]!r}, the data such as "
                f"{next(iter(known))!r}. Give the data that the run was made for."
            )
    notes = (
        ("Queries of the run without judgements", unjudged, run, "They are not used."),
        ("Judged queries without results in the run", missing, judged, "They count 0."),
        ("Documents of the run outside the sample", outside, documents, "They are left out."),
        ("Documents of the run that the corpus lacks", unknown, documents, "They count as not relevant."),
    )
    return own, [
        f"{what}: {len(found):,} of {len(every):,}, such as {found[0]!r}. {so}"
        for what, found, every, so in notes
        if found
    ]


def _without(found: dict[str, float], left_out: Collection[str | None]) -> dict[str, float]:
    return {document: score for document, score in found.items() if document not in left_out}


def make_evaluator(model: SentenceTransformer, data: RetrievalData, split: str) -> InformationRetrievalEvaluator:
    """sentence-transformers' evaluator of a split, for its trainer. It does not know grades: its nDCG is binary."""
    qrels, part = data.judged(split), data.part(split)
    kind = _IgnoringIdenticalIds if part.ignores_identical_ids else InformationRetrievalEvaluator
    return kind(
        queries={query: part.queries[query] for query in qrels},
        corpus=part.corpus,
        relevant_docs={query: set(documents) for query, documents in qrels.items()},
        mrr_at_k=[10],
        ndcg_at_k=[10],
        accuracy_at_k=[10, MAX_K + 1] if part.ignores_identical_ids else [10],
        precision_recall_at_k=[1, 10, MAX_K],
        map_at_k=[MAX_K],
        name=split,
        batch_size=encoding_arguments(model)["batch_size"],
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
