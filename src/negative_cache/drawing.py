"""One step's negatives: what is asked for, what comes out, and how one process draws them from its own caches."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from negative_cache.cache import NegativeCache
from negative_cache.negatives import RetrievalFn, draw_negatives, pool_of, read_pool
from negative_cache.randomness import register
from negative_cache.retrieval import ScoreTransform


@dataclass(frozen=True)
class Rules:
    """How to draw; the same on all ranks.

    Attributes:
        embedding_key: The feature that is scored.
        data_keys: The features that the document encoder takes.
        generator: Source of randomness.
        retrieval_fn: Picks rows from scores; None for draws from the softmax.
        score_transform: Elementwise function of the dot products.
        top_k: Restrict the softmax to the best row of each of top_k groups.
        num_samples: Draws per query; 0 for the logsumexp alone.
        num_top: How many of each query's best rows to return beside.
        is_replicated: Every rank holds all rows; each looks at its part of them.
    """

    embedding_key: str
    data_keys: Sequence[str]
    generator: torch.Generator
    retrieval_fn: RetrievalFn | None = None
    score_transform: ScoreTransform | None = None
    top_k: int | None = None
    num_samples: int = 1
    num_top: int = 0
    is_replicated: bool = False


@dataclass(frozen=True)
class Asked:
    """What is drawn for.

    Attributes:
        queries: `[batch, dim]`, without gradient.
        positives: int64 `[batch, n]`: ids of documents that are no negatives of a query, -1 for none; or None.
        new_ids: int64 `[n]`: ids of the documents that will be inserted, -1 for unknown; or None.
        num_withheld: How many of the last `new_ids` no query may see in the cache.
    """

    queries: Tensor
    positives: Tensor | None = None
    new_ids: Tensor | None = None
    num_withheld: int = 0


@dataclass(frozen=True)
class Returned:
    """What the owner of rows has to write.

    Attributes:
        embeddings: `[n, dim]`.
        rows: int64 `[n]`, numbered through this process's caches.
        mask: bool `[n]`: which of them count; None for all.
    """

    embeddings: Tensor
    rows: Tensor
    mask: Tensor | None = None


@dataclass
class Negatives(abc.ABC):
    """What was drawn for this process's queries.

    Attributes:
        lse: `[batch]`: logsumexp of the scores of each query's negatives, -inf where it has none.
        is_valid: bool `[batch]`: whether the query has any; the documents of one without are another's.
        count: Drawn documents, `batch * num_samples`; 0 if no query of any rank has a negative.
        features: Their features, `[count, ...]` each.
        cached: Their cached embeddings, `[count, dim]`.
        top_features: For each query the features `[k, ...]` of its best rows, best first.
        withheld_ids: int64 `[m]`: ids of the given negatives, of all ranks; None where they are unknown.
    """

    lse: Tensor
    is_valid: Tensor
    count: int
    features: dict[str, Tensor]
    cached: Tensor
    top_features: list[dict[str, Tensor]]
    withheld_ids: Tensor | None

    @abc.abstractmethod
    def give_back(
        self, fresh: Tensor, new_embeddings: Tensor | None = None, error: Exception | None = None
    ) -> tuple[Returned | None, Returned | None]:
        """Bring new embeddings to the owners of the rows.

        Args:
            fresh: `[count, dim]`, without gradient, in the dtype of the cache.
            new_embeddings: `[n, dim]` of the documents that will be inserted, where ids were given.
            error: Why this rank could not encode; then all ranks raise.

        Returns:
            Drawn rows of this process and their embeddings, and inserted documents of other ranks that have a row
            here; None where there are none.
        """

    def new_items_mask(self) -> Tensor | None:
        """Which of the new documents this process inserts; None for all."""
        return None


@dataclass
class HereNegatives(Negatives):
    """Drawn from this process's own caches.

    Attributes:
        rows: int64 `[count]`: the drawn rows, numbered through them.
    """

    rows: Tensor

    def give_back(
        self, fresh: Tensor, new_embeddings: Tensor | None = None, error: Exception | None = None
    ) -> tuple[Returned | None, Returned | None]:
        if error is not None:
            raise error
        if not self.count:
            return None, None
        return Returned(fresh, self.rows, self.is_valid.repeat_interleave(self.count // len(self.lse))), None


@torch.no_grad()
def draw_here(rules: Rules, caches: Sequence[NegativeCache], asked: Asked) -> HereNegatives:
    """Draw from this process's caches; ids are those of the first one."""
    register(rules.generator)
    withheld_ids = None
    if asked.num_withheld and asked.new_ids is not None:
        withheld_ids = asked.new_ids[-asked.num_withheld :]
    withheld = None if withheld_ids is None else caches[0].find(withheld_ids)
    pool = pool_of(caches, rules.embedding_key, withheld)
    positives = asked.positives
    drawn = draw_negatives(
        asked.queries,
        pool,
        any(cache.has_rows() for cache in caches),
        generator=rules.generator,
        retrieval_fn=rules.retrieval_fn,
        score_transform=rules.score_transform,
        excluded=None if positives is None else caches[0].find(positives.flatten()).view(positives.shape),
        top_k=rules.top_k,
        num_samples=rules.num_samples,
        num_top=rules.num_top,
    )
    rows = drawn.rows.flatten()
    return HereNegatives(
        lse=drawn.lse,
        is_valid=drawn.is_valid,
        count=len(rows),
        features=read_pool(caches, rows, rules.data_keys) if len(rows) else {},
        cached=pool.gather(rows),
        top_features=[read_pool(caches, top[top >= 0], rules.data_keys) for top in drawn.top_rows]
        if rules.num_top
        else [],
        withheld_ids=withheld_ids,
        rows=rows,
    )
