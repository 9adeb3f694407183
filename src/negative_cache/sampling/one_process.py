"""One step's negatives: what is asked for, what comes out, and how one process draws them from its own caches."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from negative_cache import estimators
from negative_cache.cache.rows import NegativeCache
from negative_cache.retrieval import Guide, Limits, RowPool, ScoreTransform
from negative_cache.retrieval.randomness import register, uniforms
from negative_cache.sampling.choose import Serving, candidates_of, choose
from negative_cache.sampling.draw import Drawn, RetrievalFn, draw_negatives, pool_of, read_pool


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
        num_samples: Documents to encode per query; 0 for the logsumexp alone.
        num_candidates: Rows drawn per query, which serve all queries, and of which those to encode are chosen; 0 if
            each query is to have `num_samples` of its own.
        num_top: How many of each query's best rows to return beside.
        is_replicated: Every rank holds all rows; each looks at its part of them.
        bias_key: The feature that is added to scores; None for nothing.
        guide_key: The feature that holds embeddings of a guide; None for no guide.
        dims: Truncated dimensions that have losses of their own; where rows are shared.
        settings: What else has to be the same on all ranks.
    """

    embedding_key: str
    data_keys: Sequence[str]
    generator: torch.Generator
    retrieval_fn: RetrievalFn | None = None
    score_transform: ScoreTransform | None = None
    top_k: int | None = None
    num_samples: int = 1
    num_candidates: int = 0
    num_top: int = 0
    is_replicated: bool = False
    bias_key: str | None = None
    guide_key: str | None = None
    dims: tuple[int, ...] = ()
    settings: tuple[Any, ...] = ()

    @property
    def num_draws(self) -> int:
        """Rows drawn per query."""
        return self.num_candidates if self.num_candidates and self.num_samples else self.num_samples


@dataclass(frozen=True)
class Asked:
    """What is drawn for.

    Attributes:
        queries: `[batch, dim]`, without gradient.
        positives: int64 `[batch, n]`: ids of documents that are no negatives of a query, -1 for none; or None.
        new_ids: int64 `[n]`: ids of the documents that will be inserted, -1 for unknown; or None.
        num_withheld: How many of the last `new_ids` no query may see in the cache.
        ids_of_all: int64 `[n]`: `new_ids` of all ranks; None for this process alone.
        positive_scores: `[batch]`; needed where rows are shared.
        fresh_lse: `[batch]`: logsumexp of the scores of negatives that are not in the cache, -inf for none; needed
            where rows are shared.
        has_ceilings: Whether `ceilings` will be given.
        ceilings: `[batch]`: rows with a higher score are no negatives of a query; None for no limit.
        guide_queries: `[batch, guide_dim]`, where there is a guide.
        guide_ceilings: `[batch]`: the same for products with the guide's rows.
    """

    queries: Tensor
    positives: Tensor | None = None
    new_ids: Tensor | None = None
    num_withheld: int = 0
    ids_of_all: Tensor | None = None
    positive_scores: Tensor | None = None
    fresh_lse: Tensor | None = None
    has_ceilings: bool = False
    ceilings: Tensor | None = None
    guide_queries: Tensor | None = None
    guide_ceilings: Tensor | None = None

    def limits(self, guide_rows: RowPool | None) -> Limits | None:
        """What makes a row too good to be a negative."""
        guide = None
        if self.guide_queries is not None and self.guide_ceilings is not None and guide_rows is not None:
            guide = Guide(self.guide_queries, guide_rows, self.guide_ceilings)
        return None if guide is None and self.ceilings is None else Limits(self.ceilings, guide)


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
        count: Documents to encode here; 0 if no query of any rank has a negative.
        features: Their features, `[count, ...]` each.
        cached: Their cached embeddings, `[count, dim]`; empty where documents are shared.
        serving: How the encoded documents, of all ranks, serve each query: for the whole embeddings, and then for each
            of `Rules.dims`. Empty where each query has the mean of `count / batch` documents of its own.
        lse_of_dims: `[batch]` for each of `Rules.dims`: as `lse`, estimated.
        top_features: For each query the features `[k, ...]` of its best rows, best first.
        num_limited: int64 `[batch]`: how many rows the limits hid; None without limits.
        num_filled: int64 `[]`: the filled rows of all ranks; None where those of this process are all.
        document_rows: int64 `[n]`: the rows in which this process's first cache has the documents that will be
            inserted, -1 for none; None without ids.
    """

    lse: Tensor
    is_valid: Tensor
    count: int
    features: dict[str, Tensor]
    cached: Tensor
    serving: list[Serving]
    lse_of_dims: list[Tensor]
    top_features: list[dict[str, Tensor]]
    num_limited: Tensor | None
    num_filled: Tensor | None
    document_rows: Tensor | None

    def of_all(self, fresh: Tensor) -> Tensor:
        """The new embeddings of all ranks, with gradient, in the order of `serving`; `fresh` itself if not shared."""
        return fresh

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
        is_update: bool `[count]`: which of them count; None for all.
    """

    rows: Tensor
    is_update: Tensor | None

    def give_back(
        self, fresh: Tensor, new_embeddings: Tensor | None = None, error: Exception | None = None
    ) -> tuple[Returned | None, Returned | None]:
        if error is not None:
            raise error
        return (Returned(fresh, self.rows, self.is_update) if self.count else None), None


@torch.no_grad()
def draw_here(rules: Rules, caches: Sequence[NegativeCache], asked: Asked) -> HereNegatives:
    """Draw from this process's caches; ids are those of the first one."""
    register(rules.generator)
    document_rows, excluded = _find_ids(caches[0], asked)
    withheld = None if document_rows is None or not asked.num_withheld else document_rows[-asked.num_withheld :]
    pool = pool_of(caches, rules.embedding_key, withheld, rules.bias_key)
    limits = asked.limits(None if rules.guide_key is None else pool_of(caches, rules.guide_key))
    drawn = draw_negatives(
        asked.queries,
        pool,
        any(cache.has_rows() for cache in caches),
        generator=rules.generator,
        retrieval_fn=rules.retrieval_fn,
        score_transform=rules.score_transform,
        excluded=excluded,
        top_k=rules.top_k,
        num_samples=rules.num_draws,
        num_top=rules.num_top,
        limits=limits,
    )
    if rules.num_candidates and len(drawn.rows):
        rows, is_update, serving, lse_of_dims = _share(rules, asked, pool, drawn, excluded, limits)
    else:
        rows = drawn.rows.flatten()
        serving, lse_of_dims = [], [drawn.lse for _ in rules.dims]
        is_update = drawn.is_valid.repeat_interleave(drawn.rows.shape[1])
    return HereNegatives(
        lse=drawn.lse,
        is_valid=drawn.is_valid,
        count=len(rows),
        features=read_pool(caches, rows, rules.data_keys) if len(rows) else {},
        cached=asked.queries[:0] if serving else pool.gather(rows),
        serving=serving,
        lse_of_dims=lse_of_dims,
        top_features=[read_pool(caches, top[top >= 0], rules.data_keys) for top in drawn.top_rows]
        if rules.num_top
        else [],
        num_limited=drawn.num_limited,
        num_filled=None,
        document_rows=document_rows,
        rows=rows,
        is_update=is_update,
    )


def _find_ids(cache: NegativeCache, asked: Asked) -> tuple[Tensor | None, Tensor | None]:
    """The rows of the new documents `[n]` and of the queries' positives `[batch, n]`, looked up together."""
    new_ids, positives = asked.new_ids, asked.positives
    if positives is None:
        return None if new_ids is None else cache.find(new_ids), None
    if new_ids is None:
        return None, cache.find(positives.flatten()).view(positives.shape)
    found = cache.find(torch.cat([new_ids, positives.flatten()]))
    return found[: len(new_ids)], found[len(new_ids) :].view(positives.shape)


def _share(
    rules: Rules, asked: Asked, pool: RowPool, drawn: Drawn, excluded: Tensor | None, limits: Limits | None
) -> tuple[Tensor, Tensor, list[Serving], list[Tensor]]:
    """Rows to encode `[n]`, which of them count, and `Negatives.serving` and `.lse_of_dims`."""
    candidates = candidates_of(
        asked.queries,
        pool,
        drawn.lse,
        drawn.rows.flatten(),
        drawn.is_valid.repeat_interleave(rules.num_candidates),
        rules.num_candidates,
        rules.score_transform,
        excluded,
        limits,
        drawn.group_rows,
        rules.dims,
    )
    assert asked.positive_scores is not None
    assert asked.fresh_lse is not None
    shares = estimators.cache_share(asked.positive_scores, drawn.lse, asked.fresh_lse)
    count = rules.num_samples * len(asked.queries)
    uniform = uniforms((), rules.generator, drawn.lse.device)
    chosen = choose(*candidates.sizes(shares, asked.queries), count, uniform)
    serving = candidates.serve(chosen.at, chosen.factors)
    return candidates.rows[chosen.at], chosen.is_chosen, serving, [level.lse for level in candidates.levels]
