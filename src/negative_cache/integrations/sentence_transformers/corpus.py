"""A corpus that fills the cache: tokenized in batches, without duplicates, distributed over the ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from sentence_transformers import util
from torch import Tensor
from tqdm.auto import tqdm

from negative_cache.distributed.collectives import Ranks
from negative_cache.integrations.sentence_transformers.labels import number_of
from negative_cache.integrations.sentence_transformers.text import CachedTexts
from negative_cache.integrations.sentence_transformers.tokens import TOKENS, hash_tokens

logger = logging.getLogger(__name__)


def check_corpus_ids(ids: Sequence[int | str], documents: Sequence[str]) -> None:
    """Raise ValueError unless there is one id per document and one text per id; warn of texts with several ids."""
    if len(ids) != len(documents):
        raise ValueError(f"`ids` has {len(ids)} ids for {len(documents)} documents; expected one for each.")
    texts: dict[int | str, str] = {}
    for document_id, text in zip(ids, documents, strict=True):
        if texts.setdefault(document_id, text) != text:
            raise ValueError(
                f"`ids` has the id {document_id!r} for two texts: {texts[document_id][:60]!r} and {text[:60]!r}. Give "
                "each text an id of its own."
            )
    num_lost = len(texts) - len(set(texts.values()))
    if num_lost:
        logger.warning(
            "%d ids name a text that has another id, too. A text is one document with one of its ids: labels that name "
            "the others do not find it. Give equal texts the same id.",
            num_lost,
        )


class Corpus(NamedTuple):
    """Documents, and how to tokenize them.

    Attributes:
        documents: Texts, the same on all ranks.
        ids: Their ids; None to identify a document by the hash of its tokens.
        texts: Converts model inputs to cached features.
        model: The model without wrappers.
        batch_size: Documents per batch.
        prompt: Text that precedes each document; or None.
        task: The route of the documents in a model with several routes; or None.
        shows_progress: Whether to show a progress bar.
    """

    documents: Sequence[str]
    ids: Sequence[int | str] | None
    texts: CachedTexts
    model: Any
    batch_size: int
    prompt: str | None
    task: str | None
    shows_progress: bool

    def batches(self, ranks: Ranks) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield features and ids of this rank's documents; call it on all ranks.

        The ids are hashes, int64 `[n]`; or, with `ids`, hash and id, int64 `[n, 2]`.
        """
        for positions, features in self._tokenized(self._positions_of_rank(ranks), "Filling the cache"):
            ids = hash_tokens(features[TOKENS])
            if self.ids is not None:
                labels = torch.tensor([number_of(self.ids[i]) for i in positions], device=ids.device)
                ids = torch.stack([ids, labels], dim=1)
            yield features, ids

    def _tokenized(
        self, positions: Sequence[int], description: str
    ) -> Iterator[tuple[Sequence[int], dict[str, Tensor]]]:
        starts = range(0, len(positions), self.batch_size)
        for start in tqdm(starts, desc=description, disable=not self.shows_progress):
            batch = positions[start : start + self.batch_size]
            strings = [self.documents[position] for position in batch]
            inputs = util.batch_to_device(
                self.model.preprocess(strings, prompt=self.prompt, task=self.task), self.model.device
            )
            yield batch, self.texts.from_inputs(inputs, is_cached=True)

    def _positions_of_rank(self, ranks: Ranks) -> Sequence[int]:
        """Positions of the documents that this rank stores: the first of each text, assigned to ranks in turn."""
        if ranks.size == 1:
            return range(len(self.documents))  # the cache stores equal hashes in one row
        first: dict[int, int] = {}
        for position, text_hash in enumerate(self._all_hashes(ranks)):
            first.setdefault(text_hash, position)
        return list(first.values())[ranks.rank :: ranks.size]

    def _all_hashes(self, ranks: Ranks) -> list[int]:
        """The hash of each document. Each rank tokenizes a part of the documents."""
        parts = [range(rank, len(self.documents), ranks.size) for rank in range(ranks.size)]
        tokenized = self._tokenized(parts[ranks.rank], "Finding duplicates")
        hashes = [hash_tokens(features[TOKENS]) for _, features in tokenized]
        own = torch.cat([torch.empty(0, dtype=torch.int64, device=self.model.device), *hashes])
        (gathered,) = ranks.gather([own], [[len(part)] for part in parts])
        positions = [position for part in parts for position in part]
        return [value for _, value in sorted(zip(positions, gathered.tolist(), strict=True))]
