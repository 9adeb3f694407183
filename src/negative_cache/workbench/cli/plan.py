"""What will take long, in one line before it starts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from negative_cache.workbench.counting import counted, counted_queries
from negative_cache.workbench.data.advice import TOO_FEW_PAIRS, on_too_few_pairs, shared_positives
from negative_cache.workbench.model_names import is_from_scratch
from negative_cache.workbench.training.config import RunConfig, num_steps

if TYPE_CHECKING:
    from negative_cache.workbench.data import RetrievalData

FEW_PAIRS = 1000
FEW_TEST_QUERIES = 100


def plan_of_training(config: RunConfig, data: RetrievalData, measures: bool) -> str:
    """The steps of a run, and the documents that are encoded beside them.

    Args:
        config: The configuration.
        data: The data, which has a training split.
        measures: Whether the quality is measured before and after training.
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    steps = num_steps(config, data.num_pairs("train"), num_ranks)
    queries = config.batch_size * num_ranks * config.gradient_accumulation_steps
    in_evaluation = _documents_in_evaluation(config, data, steps, measures)
    documents = {
        "for evaluation": in_evaluation,
        "to mine negatives": len(data.corpus) * config.mining_rounds if config.loss == "mined" else 0,
        "to fill the cache": len(data.corpus) if config.fill_from_corpus else 0,
    }
    in_a_step = min(queries, data.num_pairs("train"))
    sentences = [f"Training takes {counted(steps, 'step')} of {counted_queries(in_a_step)}."]
    if any(documents.values()):
        listed = ", ".join(f"{number:,} {purpose}" for purpose, number in documents.items() if number)
        sentences.append(f"Documents to encode besides: {listed}.")
    if in_evaluation > steps * queries:
        sentences += _ways_to_shorten(config, measures)
    if config.loss == "negative-cache" and config.num_samples == "auto" and _has_gpu():
        sentences.append("On a GPU, --num-samples 1 is better for small encoders, whose steps take as long.")
    return " ".join(sentences)


def _ways_to_shorten(config: RunConfig, measures: bool) -> list[str]:
    """A sentence on the options that make the evaluation shorter and are not given; none if all are."""
    sample = "--eval-documents N makes the evaluation shorter"
    if config.data_options.eval_documents is not None:
        return ["--no-eval leaves the evaluation out."] if measures else []
    return [f"{sample}, --no-eval leaves it out."] if measures else [f"{sample}."]


def advice_on_data(config: RunConfig, data: RetrievalData, measures: bool) -> list[str]:
    """A line if the training pairs are few, if the model begins with random weights, for each split in which many
    queries share a positive, and if the queries are few on which the quality is measured."""
    pairs, lines = data.num_pairs("train"), []
    if pairs < TOO_FEW_PAIRS:
        lines.append(f"Warning: {on_too_few_pairs(pairs)}")
    lines += on_random_weights(config.model, pairs)
    measured = [split for split in ("test", "dev") if measures and data.has(split)][:1]
    lines += shared_positives(data, ["train", *measured])
    for split in measured:
        queries = len(data.judged(split))
        if queries < FEW_TEST_QUERIES:
            number = f"{counted_queries(queries, split)} {'is' if queries == 1 else 'are'} few"
            lines.append(f"{number}: the result says little about the model. Give more with --test.")
    return lines


def on_random_weights(model: str, pairs: int) -> list[str]:
    """A line if a model begins with random weights, as the default of --model does, and if the pairs are few for it."""
    if not is_from_scratch(model):
        return []
    few = f", for which {counted(pairs, 'pair')} are few" if pairs < FEW_PAIRS else ""
    return [
        f"--model {model} begins with random weights{few}. A pretrained model (--model all-MiniLM-L6-v2), or a static "
        "one made from it (--model static:all-MiniLM-L6-v2), needs fewer pairs."
    ]


def _has_gpu() -> bool:
    import torch  # which the run has imported

    return torch.cuda.is_available()


def _documents_in_evaluation(config: RunConfig, data: RetrievalData, steps: int, measures: bool) -> int:
    """Documents that are encoded in all evaluations, each time counted."""
    num_documents = {split: len(data.part(split).corpus) for split in ("dev", "test") if data.has(split)}
    total = 0
    if measures:
        total += 2 * num_documents["test"] if "test" in num_documents else num_documents.get("dev", 0)
    if config.eval_steps is not None:
        total += -(-steps // config.eval_steps) * num_documents.get("dev", 0)
    return total


def plan_of_evaluation(data: RetrievalData, split: str) -> str:
    """The documents and queries that are encoded."""
    queries, documents = len(data.graded(split)), len(data.part(split).corpus)
    return f"Texts to encode: {counted(documents, 'document')} and {counted_queries(queries)}."
