"""Search in a corpus: the best documents of each query, in memory that does not grow with the corpus."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from negative_cache.workbench.data import RetrievalData
from negative_cache.workbench.data.texts import Texts
from negative_cache.workbench.evaluation.encoding import Encoder, OnProgress, encoding
from negative_cache.workbench.evaluation.encoding_options import EncodingOptions
from negative_cache.workbench.evaluation.index import Index
from negative_cache.workbench.evaluation.measures import Run

DOCUMENTS_PER_CHUNK = 16_384  # whose embeddings are in memory at the same time
SCORES_PER_BLOCK = 1 << 22

_LOW = (1 << 32) - 1
_NONE = -(1 << 63)  # below the key of any score

logger = logging.getLogger("negative_cache")


class Hit(NamedTuple):
    """A document that a search found."""

    document_id: str
    score: float
    text: str


def search(
    model: SentenceTransformer,
    corpus: Texts,
    queries: Sequence[str],
    count: int,
    *,
    options: EncodingOptions | None = None,
    on_progress: OnProgress | None = None,
    index: Index | None = None,
) -> list[list[Hit]]:
    """The `count` best documents of a corpus for each query, by the model's similarity, the best first.

    See `search_corpus` for the arguments.
    """
    numbered = {str(number): text for number, text in enumerate(queries)}
    run = search_corpus(model, corpus, numbered, count, options=options, on_progress=on_progress, index=index)
    return [[Hit(document, score, corpus[document]) for document, score in run[key].items()] for key in numbered]


def search_splits(
    model: SentenceTransformer,
    data: RetrievalData,
    splits: Sequence[str],
    depth: int,
    options: EncodingOptions | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Run]:
    """Search for the judged queries of splits. Each corpus is encoded once, and documents that `data` ignores are left
    out.

    Returns:
        Split -> its results, see `search_corpus`.

    Raises:
        DataError: A split has no judgements.
    """
    judged = {split: list(data.graded(split)) for split in splits}
    parts = {id(part): part for part in map(data.part, splits)}
    runs: dict[str, Run] = {}
    for part in parts.values():
        own = [split for split in splits if data.part(split) is part]
        queries = {query: part.queries[query] for split in own for query in judged[split]}
        ignored = {query: document for query in queries if (document := part.ignored(query)) is not None}
        run = search_corpus(
            model, part.corpus, queries, depth, ignored=ignored, options=options, on_progress=on_progress
        )
        runs.update({split: {query: run[query] for query in judged[split]} for split in own})
    return runs


@torch.no_grad()
def search_corpus(
    model: SentenceTransformer,
    corpus: Mapping[str, str],
    queries: Mapping[str, str],
    depth: int,
    *,
    ignored: Mapping[str, str] | None = None,
    options: EncodingOptions | None = None,
    on_progress: OnProgress | None = None,
    index: Index | None = None,
) -> Run:
    """The best documents of each query, by the model's similarity.

    Documents are ordered as trec_eval orders them: by score in float32, the highest first, then by id, the last one
    first. NaN counts as higher than all other scores.

    Args:
        model: The model.
        corpus: Document id -> text.
        queries: Query id -> text.
        depth: Number of documents per query.
        ignored: Query id -> id of a document that is not a result of the query.
        options: How to encode; None for the defaults.
        on_progress: Called with (done, total) documents, unless their embeddings are in the index.
        index: Where the embeddings of the corpus are kept, see `index_of`; None to keep none.

    Returns:
        Query id -> document id -> score, the best first.
    """
    texts, ignored = Texts.of(corpus), ignored or {}
    positions = [texts.position(ignored[query]) if query in ignored else -1 for query in queries]
    with encoding(model, options or EncodingOptions()) as encoder:
        embedded = encoder.queries(list(queries.values()))
        places = torch.from_numpy(texts.places_of_ids())
        best = BestDocuments(embedded, model.similarity, min(depth, len(texts)), torch.tensor(positions))
        start = 0
        for embeddings in _embeddings(encoder, texts, on_progress, index):
            embeddings = embeddings.to(embedded.device)
            best.add(embeddings, places[start : start + len(embeddings)], start)
            start += len(embeddings)
    return best.run(list(queries), texts, places)


def _embeddings(
    encoder: Encoder, texts: Texts, on_progress: OnProgress | None, index: Index | None
) -> Iterator[Tensor]:
    """The embeddings of the texts, chunk by chunk; those of the index, which is written before if it is empty."""
    if index is not None and not index.is_kept:
        try:
            index.keep(_chunks(encoder, texts, on_progress))
        except OSError as error:
            logger.warning("The embeddings cannot be kept for later searches: %s.", error)
    if index is not None and index.is_kept:
        return index.read(DOCUMENTS_PER_CHUNK)
    return _chunks(encoder, texts, on_progress)


def _chunks(encoder: Encoder, texts: Texts, on_progress: OnProgress | None) -> Iterator[Tensor]:
    """The embeddings of the texts, chunk by chunk."""
    done, values = 0, iter(texts.values())

    def report(count: int) -> None:
        if on_progress is not None:
            on_progress(done + count, len(texts))

    while chunk := list(itertools.islice(values, DOCUMENTS_PER_CHUNK)):
        yield encoder.documents(chunk, report)
        done += len(chunk)


class BestDocuments:
    """The best documents so far of each query, as keys.

    A key is an int64 that orders documents as results are ordered: the bits of the score, then those of the document's
    place among the ids in descending order. Keys differ, so the order is the same on all devices.

    Args:
        queries: Embeddings `[num_queries, dim]`.
        similarity: Similarities `[n, m]` of embeddings `[n, dim]` and `[m, dim]`.
        depth: Number of documents per query.
        ignored: int64 `[num_queries]`: position of a document that is left out, or -1.
    """

    def __init__(
        self, queries: Tensor, similarity: Callable[[Tensor, Tensor], Tensor], depth: int, ignored: Tensor
    ) -> None:
        self._queries = queries
        self._similarity = similarity
        self._ignored = ignored.to(queries.device)
        self._keys = torch.full((len(queries), depth), _NONE, dtype=torch.int64, device=queries.device)

    def add(self, embeddings: Tensor, places: Tensor, start: int) -> None:
        """Add the documents at the positions from `start`, with their places among the ids."""
        places = _LOW - places.to(self._keys.device)
        step = max(1, SCORES_PER_BLOCK // len(embeddings))
        for first in range(0, len(self._queries), step):
            rows = slice(first, first + step)
            keys = _ordered_bits(self._similarity(self._queries[rows], embeddings)).long()
            keys <<= 32
            keys |= places
            at = self._ignored[rows] - start
            queries = ((at >= 0) & (at < len(embeddings))).nonzero().squeeze(1)
            keys[queries, at[queries]] = _NONE
            best = keys.topk(min(self._keys.shape[1], len(embeddings))).values
            self._keys[rows] = torch.cat([self._keys[rows], best], dim=1).topk(self._keys.shape[1]).values

    def run(self, names: Sequence[str], texts: Texts, places: Tensor) -> Run:
        """The results: the best documents and their scores."""
        positions = torch.empty_like(places)
        positions[places] = torch.arange(len(places))
        keys = self._keys.cpu()
        scores = _scores(keys >> 32)
        found = positions[_LOW - (keys & _LOW).where(keys != _NONE, _LOW)]
        ids = {position: texts.key(position) for position in set(found.flatten().tolist())}
        run: Run = {}
        for name, row, own, of_row in zip(names, keys, found, scores, strict=True):
            count = int((row != _NONE).sum())  # keys are sorted
            run[name] = {
                ids[position]: score
                for position, score in zip(own[:count].tolist(), of_row[:count].tolist(), strict=True)
            }
        return run


def _ordered_bits(scores: Tensor) -> Tensor:
    """int32 values in the order of scores in float32; NaN is the highest."""
    scores = scores.float() + 0.0  # without -0.0
    bits = scores.masked_fill_(scores.isnan(), torch.nan).view(torch.int32)  # NaN may have a sign
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _scores(ordered: Tensor) -> Tensor:
    """The inverse of `_ordered_bits`, from int64."""
    bits = ordered.to(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
