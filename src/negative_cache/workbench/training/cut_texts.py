"""How many texts a model cuts, said before training."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from transformers import PreTrainedTokenizerBase

from negative_cache.workbench.counting import counted, counted_queries, percent
from negative_cache.workbench.data import RetrievalData
from negative_cache.workbench.models import count_tokens, prompts_of, token_limit

MAX_TEXTS, MAX_CHARACTERS = 1000, 1_000_000  # of the documents, and of the queries: tokenized in under a second
MIN_SHARE = 0.01  # of the texts that are cut, to be worth a note


def note_on_cut_texts(model: SentenceTransformer, data: RetrievalData, given: int | None) -> str | None:
    """A sentence on the texts that are longer than the model reads, counted in a sample of them.

    Args:
        model: The model, with its prompts and its limit.
        data: The data, which has a training split.
        given: The limit that the user has set; None for the model's own.

    Returns:
        None if the model cuts at most 1 % of the documents and of the training queries, or has no limit in tokens.
    """
    limit = token_limit(model)
    if limit is None or not isinstance(model[0], Transformer):
        return None
    if not isinstance(model.tokenizer, PreTrainedTokenizerBase):
        return None
    prompts, queries = prompts_of(model), list(data.judged("train"))
    samples = {
        "documents": _sample(len(data.corpus), lambda at: prompts.document + data.corpus.text(at)),
        "queries": _sample(len(queries), lambda at: prompts.query + data.queries[queries[at]]),
    }
    lengths = {kind: np.array(count_tokens(model, texts)) for kind, texts in samples.items()}
    shares = {kind: float((of_kind > limit).mean()) for kind, of_kind in lengths.items()}
    cut = [
        f"{percent(share)} of the {kind} (99 % have at most {_most(lengths[kind]):,} tokens)"
        for kind, share in shares.items()
        if share > MIN_SHARE
    ]
    if not cut:
        return None
    subject = f"The model's limit of {limit:,} tokens" if given is None else f"--max-seq-length {given:,}"
    sizes = f"{counted(len(samples['documents']), 'document')} and {counted_queries(len(samples['queries']))}"
    return f"{subject} cuts {' and '.join(cut)}, counted in {sizes}."


def _sample(count: int, text: Callable[[int], str]) -> list[str]:
    """Some of the texts by their numbers, which are always the same. Long texts are fewer, as they take longer."""
    texts: list[str] = []
    num_characters = 0
    for number in random.Random(0).sample(range(count), min(count, MAX_TEXTS)):
        texts.append(text(number))
        num_characters += len(texts[-1])
        if num_characters >= MAX_CHARACTERS:
            break
    return texts


def _most(lengths: np.ndarray) -> int:
    """The length that 99 % of the texts do not exceed."""
    return int(np.percentile(lengths, 99, method="inverted_cdf"))
