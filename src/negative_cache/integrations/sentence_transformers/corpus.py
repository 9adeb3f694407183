"""A corpus of texts, of which each rank takes its part: tokenized in batches, equal documents once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from sentence_transformers import util
from torch import Tensor
from tqdm.auto import tqdm

from negative_cache.distributed.ranks import Ranks
from negative_cache.integrations.sentence_transformers.text import TextSide
from negative_cache.integrations.sentence_transformers.tokens import TOKENS, hash_tokens


class Corpus(NamedTuple):
    """Texts, and how they are made into model inputs.

    Attributes:
        documents: The texts, the same on all ranks.
        ids: Their ids; None if a document is known by its tokens.
        side: What makes the inputs into what the cache keeps.
        model: The model itself, out of what a trainer wraps it in.
        batch_size: Texts at once.
        prompt: Stands before each text; or None.
        task: The route of a model that has several; or None.
        shows_progress: Whether to show a progress bar.
    """

    documents: Sequence[str]
    ids: Sequence[int] | None
    side: TextSide
    model: Any
    batch_size: int
    prompt: str | None
    task: str | None
    shows_progress: bool

    def batches(self, ranks: Ranks) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """This rank's documents, as the cache keeps them, and their ids `[n]`."""
        for part, features in self._tokenized(self._own_part(ranks), "Filling the cache"):
            hashes = hash_tokens(features[TOKENS])
            named = hashes if self.ids is None else torch.tensor([self.ids[at] for at in part], device=hashes.device)
            yield features, named

    def _tokenized(self, positions: Sequence[int], what: str) -> Iterator[tuple[Sequence[int], dict[str, Tensor]]]:
        starts = range(0, len(positions), self.batch_size)
        for start in tqdm(starts, desc=what, disable=not self.shows_progress):
            part = positions[start : start + self.batch_size]
            texts = [self.documents[at] for at in part]
            inputs = self.model.preprocess(texts, prompt=self.prompt, task=self.task)
            yield part, self.side.take(util.batch_to_device(inputs, self.model.device))

    def _own_part(self, ranks: Ranks) -> Sequence[int]:
        """Positions of the documents that this rank keeps: those that differ, dealt out in turn."""
        count = len(self.documents)
        if self.ids is None and ranks.size == 1:
            return range(count)  # the cache finds equal ones itself
        names = self._hashes(ranks, count) if self.ids is None else self.ids
        firsts: dict[int, int] = {}
        for position, name in enumerate(names):
            firsts.setdefault(name, position)
        return list(firsts.values())[ranks.rank :: ranks.size]

    def _hashes(self, ranks: Ranks, count: int) -> list[int]:
        """Hashes of the tokens of all documents, of which each rank makes its part."""
        shares = [range(rank, count, ranks.size) for rank in range(ranks.size)]
        tokenized = self._tokenized(shares[ranks.rank], "Looking for equal texts")
        hashes = [hash_tokens(features[TOKENS]) for _, features in tokenized]
        own = torch.cat([torch.empty(0, dtype=torch.int64, device=self.model.device), *hashes])
        (gathered,) = ranks.gather([own], [[len(share)] for share in shares])
        positions = [position for share in shares for position in share]
        return [value for _, value in sorted(zip(positions, gathered.tolist(), strict=True))]
