"""The quality of a model on NanoBEIR, by the evaluator of sentence-transformers."""

from __future__ import annotations

import contextlib
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import NanoBEIREvaluator
from sentence_transformers.sentence_transformer.evaluation.nano_beir import DATASET_NAME_TO_HUMAN_READABLE

from negative_cache.workbench.evaluation.encoding import OnProgress, encoding, encoding_arguments
from negative_cache.workbench.evaluation.encoding_options import EncodingOptions

DATASET = "sentence-transformers/NanoBEIR-en"
NAMES = tuple(DATASET_NAME_TO_HUMAN_READABLE)
HUB_TIMEOUT = 10.0  # seconds

# ours -> those of sentence-transformers
_MEASURES = {
    "MRR@10": "mrr@10", "nDCG@10": "ndcg@10", "AP@100": "map@100", "R@1": "recall@1", "R@10": "recall@10",
    "R@100": "recall@100",
}  # fmt: skip


class NanoBeirError(ValueError):
    """A name that is no dataset of NanoBEIR, or datasets that cannot be loaded."""


def parse_names(text: str) -> list[str]:
    """Names of datasets, separated by commas, or "all"."""
    names = list(NAMES) if text == "all" else [name.strip().lower() for name in text.split(",")]
    if unknown := [name for name in names if name not in NAMES]:
        raise NanoBeirError(f"--nanobeir {unknown[0]!r} is no dataset of NanoBEIR; expected all, {', '.join(NAMES)}.")
    return names


def evaluate_nanobeir(
    model: SentenceTransformer,
    names: Sequence[str],
    options: EncodingOptions,
    on_progress: OnProgress | None = None,
    dataset: str = DATASET,
) -> dict[str, dict[str, Any]]:
    """Metrics on datasets of NanoBEIR, of about 50 queries and 5,000 documents each.

    Args:
        model: The model.
        names: See `parse_names`.
        options: How to encode, on one device.
        on_progress: Called with (done, total) datasets.
        dataset: Name on the Hugging Face hub, or a folder of the same layout.

    Returns:
        Name -> MRR@10, nDCG@10, AP@100, R@1, R@10, R@100, num_queries and num_documents; and "mean" -> the means of the
        measures over the datasets.

    Raises:
        NanoBeirError: The datasets cannot be loaded.
    """
    if not Path(dataset).exists():
        _ask_hub(dataset)
    metrics: dict[str, dict[str, Any]] = {}
    with encoding(model, options):
        for number, name in enumerate(names, 1):
            evaluator = _load(name, dataset, model, options)
            found = evaluator(model)
            prefix = f"{evaluator.name}_{model.similarity_fn_name}_"
            metrics[f"Nano{DATASET_NAME_TO_HUMAN_READABLE[name]}"] = {
                **{ours: float(found[prefix + theirs]) for ours, theirs in _MEASURES.items()},
                "num_queries": len(evaluator.queries),
                "num_documents": len(evaluator.corpus),
            }
            if on_progress is not None:
                on_progress(number, len(names))
    mean = {measure: statistics.fmean(of_one[measure] for of_one in metrics.values()) for measure in _MEASURES}
    return {**metrics, "mean": mean}


def _load(name: str, dataset: str, model: SentenceTransformer, options: EncodingOptions) -> Any:
    """The evaluator of one dataset."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
            (evaluator,) = NanoBEIREvaluator(
                [name],
                dataset,
                mrr_at_k=[10],
                ndcg_at_k=[10],
                accuracy_at_k=[1],
                precision_recall_at_k=[1, 10, 100],
                map_at_k=[100],
                batch_size=encoding_arguments(model, options.batch_size)["batch_size"],
                write_csv=False,
                truncate_dim=options.truncate_dim,
                query_prompts=options.query_prompt,
                corpus_prompts=options.document_prompt,
            ).evaluators
    except ValueError as error:
        raise NanoBeirError(f"Cannot load {name} of {dataset}: {error.__cause__ or error}") from error
    return evaluator


def _ask_hub(dataset: str) -> None:
    """Raise unless a dataset is in the local cache or on the hub. Loading it without a network retries for a minute."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(dataset, "README.md", repo_type="dataset"), str):
        return
    try:
        HfApi().dataset_info(dataset, timeout=HUB_TIMEOUT)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise NanoBeirError(
            f"Cannot load {dataset}: it is not in the local cache, and the Hugging Face hub does not have it or cannot "
            f"be reached ({reason}). NanoBEIR is downloaded from the hub; for data of your own, give --data."
        ) from error
