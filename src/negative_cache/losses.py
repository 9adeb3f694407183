"""The cache losses as users of the earlier implementations know them."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from negative_cache import estimators
from negative_cache.cache.rows import NegativeCache
from negative_cache.distributed.handshake import NUM_TOLD, Meeting, tell
from negative_cache.distributed.many_ranks import draw_from_ranks
from negative_cache.distributed.ranks import Ranks, separate, world
from negative_cache.retrieval import ScoreTransform
from negative_cache.retrieval.randomness import new_generator
from negative_cache.retrieval.search import check_queries
from negative_cache.retrieval_fns import GumbelMaxRetrievalFn
from negative_cache.sampling.draw import (
    DocumentEncoder,
    RetrievalFn,
    check_finite,
    common_specs,
    encode,
    pool_of,
)
from negative_cache.sampling.one_process import Asked, Negatives, Returned, Rules, draw_here

Caches = Mapping[str, NegativeCache]
Reducer = Callable[[Tensor], Tensor]


class CacheLossReturn(NamedTuple):
    """What a cache loss returns.

    Attributes:
        training_loss: Differentiate this; its value means nothing.
        interpretable_loss: `-log` of the positive's probability, without gradient.
        updated_item_data: Per cache, the embedding feature of the drawn rows, encoded anew `[n, dim]`.
        updated_item_indices: Per cache, their rows `[n]` (those of other caches are out of its range).
        updated_item_mask: Per cache, which of them are its own `[n]`.
        staleness: Squared distance of cached and new embedding, relative to the new one's squared norm.
        topk_features: Per query, the features `[k, ...]` of its best rows, best first; None if not asked for.
    """

    training_loss: Any
    interpretable_loss: Any
    updated_item_data: Any
    updated_item_indices: Any
    updated_item_mask: Any
    staleness: Any
    topk_features: Any = None


class RetrievalReturn(NamedTuple):
    """What `_retrieve_from_cache` returns for `batch` queries.

    Attributes:
        retrieved_data: Features of the drawn rows, `[batch, ...]` each.
        scores: `[batch, n]`: any scores whose logsumexp is that of the query's negatives.
        retrieved_indices: int64 `[batch, 1]`, numbered through the caches in the order of their sorted
            names; `[0, 1]` if there is nothing to draw, then the loss is 0.
        retrieved_cache_embeddings: The drawn rows as cached, `[batch, dim]`.
        retrieved_cache_topk_features: See `CacheLossReturn.topk_features`.
        negatives: How the new embeddings get to the ranks that own the rows; None if they are all here.
    """

    retrieved_data: dict[str, Tensor]
    scores: Tensor
    retrieved_indices: Tensor
    retrieved_cache_embeddings: Tensor
    retrieved_cache_topk_features: list[dict[str, Tensor]] | None = None
    negatives: Negatives | None = None


class CacheLoss(abc.ABC):
    """A loss of queries against their positives and cached documents."""

    @abc.abstractmethod
    def __call__(
        self,
        doc_network: DocumentEncoder,
        query_embeddings: Tensor,
        pos_doc_embeddings: Tensor,
        cache: Caches,
        return_topk: int = 0,
    ) -> CacheLossReturn:
        """Calculate the loss and what to update in the caches."""


class AbstractCacheClassificationLoss(CacheLoss):
    """The sampled softmax loss; subclasses say how to score and how to retrieve.

    A subclass defines `_retrieve_from_cache` and `_score_documents`; `embedding_key` and `reducer` are read
    where the subclass has them.
    """

    embedding_key: str = "embedding"
    reducer: Reducer | None = staticmethod(torch.mean)

    @abc.abstractmethod
    def _retrieve_from_cache(self, query_embeddings: Tensor, cache: Caches, return_topk: int = 0) -> RetrievalReturn:
        """Draw one row per query."""

    @abc.abstractmethod
    def _score_documents(self, query_embeddings: Tensor, doc_embeddings: Tensor) -> Tensor:
        """Scores of pairs: `[batch, dim]` and `[batch, dim]` -> `[batch]`, with gradient."""

    def __call__(
        self,
        doc_network: DocumentEncoder,
        query_embeddings: Tensor,
        pos_doc_embeddings: Tensor,
        cache: Caches,
        return_topk: int = 0,
    ) -> CacheLossReturn:
        """Draw one negative per query, encode it anew, and compute the loss.

        Args:
            doc_network: Features `{key: [n, ...]}` -> embeddings `[n, dim]`, with gradient.
            query_embeddings: `[batch, dim]`, with gradient.
            pos_doc_embeddings: `[batch, dim]`, with gradient.
            cache: Name -> `NegativeCache`; all of them are one pool. Nothing is written.
            return_topk: Return the features of so many best rows per query.

        Returns:
            `CacheLossReturn`. With no filled row the loss is 0, and backward works.

        Raises:
            ValueError: Wrong shapes or devices, `top_k` above the number of rows, values that are not finite.
        """
        _check_pairs(query_embeddings, pos_doc_embeddings)
        retrieved = self._retrieve_from_cache(query_embeddings, cache, return_topk)
        return self._loss_return(doc_network, query_embeddings, pos_doc_embeddings, cache, retrieved)

    def _loss_return(
        self,
        doc_network: DocumentEncoder,
        query_embeddings: Tensor,
        pos_doc_embeddings: Tensor,
        cache: Caches,
        retrieved: RetrievalReturn,
        weight: float = 1.0,
    ) -> CacheLossReturn:
        """The loss from what was retrieved; `weight` multiplies a mean training loss."""
        positive_scores = self._score_documents(query_embeddings, pos_doc_embeddings)
        lse = retrieved.scores.logsumexp(dim=1)
        count, dim = len(retrieved.retrieved_indices), query_embeddings.shape[1]
        fresh, error = query_embeddings.new_empty(0, dim), None
        if count:
            try:
                fresh = encode(doc_network, retrieved.retrieved_data, count, dim)
                _check_storable(cache, self.embedding_key, fresh)
            except Exception as caught:
                if retrieved.negatives is None:
                    raise
                error = caught
        data, indices, mask = self._updates(cache, retrieved, lse, fresh.detach(), error)
        if count:
            negative_scores = self._score_documents(query_embeddings, fresh)
            training_loss = estimators.sampled_softmax_loss(positive_scores, negative_scores[:, None], lse)
            staleness = estimators.staleness(retrieved.retrieved_cache_embeddings, fresh)
        else:
            training_loss = positive_scores * 0.0
            staleness = torch.zeros_like(lse)
        interpretable_loss = estimators.interpretable_loss(positive_scores, lse)
        reduce = (lambda values: values) if self.reducer is None else self.reducer
        if self.reducer is torch.mean:
            training_loss = training_loss * weight
        return CacheLossReturn(
            training_loss=reduce(training_loss),
            interpretable_loss=reduce(interpretable_loss),
            updated_item_data=data,
            updated_item_indices=indices,
            updated_item_mask=mask,
            staleness=reduce(staleness),
            topk_features=retrieved.retrieved_cache_topk_features,
        )

    def _updates(
        self, cache: Caches, retrieved: RetrievalReturn, lse: Tensor, fresh: Tensor, error: Exception | None
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
        """Per cache what to write: the drawn rows' new embeddings, the rows, and which of them count."""
        assert error is None
        mask = lse > -torch.inf if len(fresh) else None
        return split_updates(cache, self.embedding_key, retrieved.retrieved_indices[:, 0], fresh, mask)


class CacheClassificationLoss(AbstractCacheClassificationLoss):
    """Softmax cross-entropy against all cached documents, by one sample per query (Lindgren et al., 2021).

    Args:
        embedding_key: The feature that holds the embedding.
        data_keys: The features that the document encoder takes.
        score_transform: Elementwise function of the dot products, such as `lambda s: 20.0 * s`.
        top_k: Restrict the softmax to the best row of each of top_k contiguous groups of rows.
        reducer: Reduces the losses and the staleness `[batch]`; None returns them as they are.

    Attributes:
        generator: The CPU generator of all draws, seeded from torch's global one.
    """

    def __init__(
        self,
        embedding_key: str,
        data_keys: Sequence[str],
        score_transform: ScoreTransform | None = None,
        top_k: int | None = None,
        reducer: Reducer | None = torch.mean,
    ) -> None:
        if isinstance(data_keys, str):
            raise TypeError(f"`data_keys` is the string {data_keys!r}; expected a tuple such as ({data_keys!r},).")
        if top_k is not None and top_k < 1:
            raise ValueError(f"`top_k` is {top_k}; it must be at least 1, or None for all rows.")
        self.embedding_key = embedding_key
        self.data_keys = tuple(data_keys)
        self.score_transform = score_transform
        self.top_k = top_k
        self.reducer = reducer
        self.generator = new_generator()
        self._first_state = self.generator.get_state()
        self._retrieval_fn: RetrievalFn = GumbelMaxRetrievalFn()

    def _retrieve_from_cache(self, query_embeddings: Tensor, cache: Caches, return_topk: int = 0) -> RetrievalReturn:
        caches = sorted_caches(cache, (self.embedding_key, *self.data_keys))
        separate(self.generator, self._first_state)
        drawn = draw_here(self._rules(return_topk), caches, Asked(query_embeddings.detach()))
        return _retrieval_return(drawn, drawn.rows[:, None], None)

    def _rules(self, return_topk: int) -> Rules:
        return Rules(
            self.embedding_key,
            self.data_keys,
            self.generator,
            retrieval_fn=self._retrieval_fn,
            score_transform=self.score_transform,
            top_k=self.top_k,
            num_top=return_topk,
        )

    def _score_documents(self, query_embeddings: Tensor, doc_embeddings: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.float32, torch.promote_types(query_embeddings.dtype, doc_embeddings.dtype))
        scores = (query_embeddings.to(dtype) * doc_embeddings.to(dtype)).sum(dim=1)
        return scores if self.score_transform is None else self.score_transform(scores)


class DistributedCacheClassificationLoss(CacheClassificationLoss):
    """`CacheClassificationLoss` against the caches of all ranks of a process group as one pool.

    Every query sees all rows of all ranks; the drawn rows' features travel to the rank of the query, their new
    embeddings travel back, and `updated_item_data` has those of this rank's rows. All ranks must call it
    together. With the reducer torch.mean, the average of the ranks' losses (and, under DDP, of their gradients) is
    the mean over all queries, also where batches differ in size. Without an initialised process group it is
    `CacheClassificationLoss`.

    In a handler with `use_cross_replica=True`, all ranks hold the same rows, and each scores its part of them.

    Args:
        embedding_key: See `CacheClassificationLoss`.
        data_keys: See there.
        score_transform: See there.
        top_k: See there; each rank has a part of the groups, in proportion to its rows.
        reducer: See there.
        process_group: The ranks that share the pool; None for the default group.
    """

    def __init__(
        self,
        embedding_key: str,
        data_keys: Sequence[str],
        score_transform: ScoreTransform | None = None,
        top_k: int | None = None,
        reducer: Reducer | None = torch.mean,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(embedding_key, data_keys, score_transform, top_k, reducer)
        self.process_group = process_group
        self.is_replicated = False

    @property
    def ranks(self) -> Ranks:
        """The ranks that share the pool."""
        return Ranks(self.process_group or world())

    def __call__(
        self,
        doc_network: DocumentEncoder,
        query_embeddings: Tensor,
        pos_doc_embeddings: Tensor,
        cache: Caches,
        return_topk: int = 0,
    ) -> CacheLossReturn:
        """See `AbstractCacheClassificationLoss`; collective. What is wrong on one rank raises on all of them."""
        ranks = self.ranks
        if ranks.size == 1:
            return super().__call__(doc_network, query_embeddings, pos_doc_embeddings, cache, return_topk)
        separate(self.generator, self._first_state)

        def step() -> int:
            return max((int(part.step) for part in cache.values()), default=0)

        def prepare() -> tuple[tuple[list[NegativeCache], Rules, Asked], list[int]]:
            _check_pairs(query_embeddings, pos_doc_embeddings)
            caches = sorted_caches(cache, (self.embedding_key, *self.data_keys))
            check_queries(query_embeddings, pool_of(caches, self.embedding_key), None)
            rules = replace(self._rules(return_topk), is_replicated=self.is_replicated)
            asked = Asked(query_embeddings.detach())
            return (caches, rules, asked), tell(rules, caches, asked, torch.is_grad_enabled())

        (caches, rules, asked), table = ranks.meet(step, query_embeddings.device, prepare, NUM_TOLD)
        meeting = Meeting(table)
        negatives = draw_from_ranks(ranks, meeting, rules, caches, asked, step)
        elsewhere = torch.full((negatives.count, 1), -1, device=query_embeddings.device)
        retrieved = _retrieval_return(negatives, elsewhere, negatives)
        weight = meeting.weight(ranks.rank)
        return self._loss_return(doc_network, query_embeddings, pos_doc_embeddings, cache, retrieved, weight)

    def _updates(
        self, cache: Caches, retrieved: RetrievalReturn, lse: Tensor, fresh: Tensor, error: Exception | None
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
        if retrieved.negatives is None:
            return super()._updates(cache, retrieved, lse, fresh, error)
        dtype = common_specs(list(cache.values()), [self.embedding_key])[self.embedding_key].dtype
        updated, _ = retrieved.negatives.give_back(fresh.to(dtype), error=error)
        if updated is None:
            rows = torch.empty(0, dtype=torch.int64, device=fresh.device)
            updated = Returned(fresh.to(dtype)[:0], rows)
        return split_updates(cache, self.embedding_key, updated.rows, updated.embeddings, None)


def _retrieval_return(drawn: Negatives, rows: Tensor, negatives: Negatives | None) -> RetrievalReturn:
    return RetrievalReturn(
        retrieved_data=drawn.features,
        scores=drawn.lse[:, None],
        retrieved_indices=rows,
        retrieved_cache_embeddings=drawn.cached,
        retrieved_cache_topk_features=drawn.top_features or None,
        negatives=negatives,
    )


def _check_pairs(query_embeddings: Tensor, pos_doc_embeddings: Tensor) -> None:
    if query_embeddings.dim() != 2 or query_embeddings.shape != pos_doc_embeddings.shape:
        raise ValueError(
            f"Query embeddings have shape {list(query_embeddings.shape)}, those of the positive documents "
            f"{list(pos_doc_embeddings.shape)}; expected the same [batch, dim]."
        )
    if len(query_embeddings) == 0:
        raise ValueError("The batch is empty: no query embeddings.")
    check_finite("query_embeddings", query_embeddings)
    check_finite("pos_doc_embeddings", pos_doc_embeddings)


def _check_storable(cache: Caches, embedding_key: str, fresh: Tensor) -> None:
    """Raise if new embeddings overflow in the dtype in which a cache keeps them."""
    for part in cache.values():
        dtype = part.specs[embedding_key].dtype
        check_finite(f"The new embeddings, as {dtype},", fresh.detach().to(dtype))


def sorted_caches(cache: Caches, keys: Sequence[str]) -> list[NegativeCache]:
    if not cache:
        raise ValueError("`cache` has no caches; expected a dict of name -> NegativeCache.")
    for name, part in cache.items():
        missing = set(keys) - set(part.specs)
        if missing:
            raise ValueError(f"The cache {name!r} has no features {sorted(missing)}; it has {sorted(part.specs)}.")
    caches = [cache[name] for name in sorted(cache)]
    common_specs(caches, keys)
    return caches


def split_updates(
    cache: Caches, embedding_key: str, rows: Tensor, fresh: Tensor, counts: Tensor | None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """Split updates of pool rows by cache; `counts` says which of them count, None for all."""
    data, indices, mask = {}, {}, {}
    start = 0
    for name in sorted(cache):
        data[name] = {embedding_key: fresh}
        indices[name] = rows - start
        mask[name] = (rows >= start) & (rows < start + cache[name].num_rows)
        if counts is not None:
            mask[name] = mask[name] & counts
        start += cache[name].num_rows
    return data, indices, mask
