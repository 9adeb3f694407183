"""Search with BM25, the usual baseline without a model."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from negative_cache.workbench.data import RetrievalData
from negative_cache.workbench.evaluation.measures import Run


@contextlib.contextmanager
def _without_jax() -> Iterator[None]:
    """Hide JAX: bm25s starts it where it is installed, and it then takes three quarters of the memory of a GPU."""
    before = sys.modules.get("jax")
    sys.modules["jax"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["jax"]
        if before is not None:
            sys.modules["jax"] = before


with _without_jax():
    import bm25s
    from bm25s.tokenization import Tokenizer

# A word is a run of letters, digits and underscores. An ideograph or a Hiragana character is a word of its own, because
# Chinese and Japanese are written without spaces.
TOKEN = r"[\u3040-\u309f\u3400-\u4dbf\u4e00-\u9fff]|[^\W\u3040-\u309f\u3400-\u4dbf\u4e00-\u9fff]+"
K1, B = 1.5, 0.75
METHOD = "lucene"


def bm25_run(data: RetrievalData, split: str, k: int) -> Run:
    """Search for the judged queries of a split with BM25.

    Lucene's variant as implemented by bm25s, with `K1` and `B`. Texts are lower-cased and divided into words by
    `TOKEN`; there are no stop words and no stemming, so it works in the same way in all languages.

    Args:
        data: The dataset.
        split: Name of a split, or "all".
        k: Maximum number of documents per query.

    Returns:
        Query id -> document id -> score, the best first; equal scores in descending order of the document ids, as
        trec_eval orders them. Documents that share no word with the query, and those that `data` ignores for it, are
        left out.

    Raises:
        DataError: The split has no judgements.
    """
    queries, part = list(data.graded(split)), data.part(split)
    names = sorted(part.corpus, reverse=True)
    tokenizer = Tokenizer(splitter=TOKEN, stopwords=None)
    documents = list(tokenizer.streaming_tokenize((part.corpus[name] for name in names), allow_empty=False))
    if not any(documents):  # of which bm25s cannot make an index
        return {query: {} for query in queries}
    index = bm25s.BM25(k1=K1, b=B, method=METHOD)
    index.index((documents, tokenizer.get_vocab_dict()), show_progress=False)
    run: Run = {}
    for query in queries:
        (words,) = tokenizer.streaming_tokenize([part.queries[query]], update_vocab=False, allow_empty=False)
        scores = index.get_scores_from_ids(words)
        ignored = part.ignored(query)
        best = ((names[place], float(scores[place])) for place in _best(scores, k + 1))
        run[query] = dict([found for found in best if found[0] != ignored][:k])
    return run


def _best(scores: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """The places of the `k` highest scores above 0, the highest first; equal scores in the order of their places."""
    least = np.partition(scores, -k)[-k] if k < len(scores) else 0
    places = np.flatnonzero((scores >= least) & (scores > 0))
    return places[np.argsort(-scores[places], kind="stable")][:k]
