"""The cache losses of the earlier implementations, built on the sampling and the estimators."""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from negative_cache import estimators
from negative_cache.cache.rows import NegativeCache
from negative_cache.cache.several_caches import PooledCaches
from negative_cache.cache.validation import check_finite, reads_without_sync
from negative_cache.distributed import check_picklable, separate, world
from negative_cache.distributed.collectives import Ranks
from negative_cache.distributed.handshake import NUM_INTEGERS, Handshake, summarize
from negative_cache.distributed.many_ranks import ManyRanks
from negative_cache.retrieval import ScoreTransform, log_once
from negative_cache.retrieval.dense import exact_top_k
from negative_cache.retrieval.randomness import new_generator
from negative_cache.retrieval.search import dense_scores
from negative_cache.retrieval.tiled import mine_groups
from negative_cache.retrieval_fns import GumbelMaxRetrievalFn, MaxScoreRetrievalFn
from negative_cache.sampling.config import RowSource, Sample, SamplingConfig, SamplingRequest
from negative_cache.sampling.draw import make_search, replace_missing
from negative_cache.sampling.encode import DocumentEncoder, encode, read_features
from negative_cache.sampling.one_process import OneProcess

if TYPE_CHECKING:
    from typing_extensions import Self

Caches = Mapping[str, NegativeCache]
Reducer = Callable[[Tensor], Tensor]
RetrievalFn = Callable[[Tensor], Tensor]
Updates = tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]


class CacheLossReturn(NamedTuple):
    """What a cache loss returns.

    Attributes:
        training_loss: The loss to differentiate; its value has no meaning.
        interpretable_loss: `-log` of the positive's probability, without gradient.
        updated_item_data: Per cache, a dict with the re-encoded embeddings of the drawn rows, `[n, dim]`.
        updated_item_indices: Per cache, the rows to update, `[n]`; rows of other caches are out of range.
        updated_item_mask: Per cache, which of these rows belong to it, bool `[n]`.
        staleness: Squared distance between cached and new embedding, relative to the new one's squared norm.
        topk_features: Per query, the features `[k, ...]` of its best rows, best first; None if not requested.
    """

    training_loss: Any
    interpretable_loss: Any
    updated_item_data: Any
    updated_item_indices: Any
    updated_item_mask: Any
    staleness: Any
    topk_features: Any = None


class RetrievalReturn(NamedTuple):
    """The result of `_retrieve_from_cache` for `batch` queries.

    Attributes:
        retrieved_data: Features of the drawn rows, `[batch, ...]` each.
        scores: `[batch, n]`: any scores whose logsumexp equals that of the query's negatives.
        retrieved_indices: int64 `[batch, 1]`: the drawn rows, numbered across the caches in sorted order of their
            names; `[0, 1]` if no row can be drawn, and the loss is then 0.
        retrieved_cache_embeddings: The cached embeddings of the drawn rows, `[batch, dim]`.
        retrieved_cache_topk_features: See `CacheLossReturn.topk_features`.
    """

    retrieved_data: dict[str, Tensor]
    scores: Tensor
    retrieved_indices: Tensor
    retrieved_cache_embeddings: Tensor
    retrieved_cache_topk_features: list[dict[str, Tensor]] | None = None


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
        """Compute the loss and the updates of the caches."""


class AbstractCacheClassificationLoss(CacheLoss):
    """The sampled softmax loss; subclasses define how to score and how to retrieve.

    A subclass defines `_retrieve_from_cache` and `_score_documents`. It may set `embedding_key` and `reducer`.
    """

    embedding_key: str = "embedding"
    reducer: Reducer | None = staticmethod(torch.mean)

    @abc.abstractmethod
    def _retrieve_from_cache(self, query_embeddings: Tensor, cache: Caches, return_topk: int = 0) -> RetrievalReturn:
        """Draw one row per query."""

    @abc.abstractmethod
    def _score_documents(self, query_embeddings: Tensor, doc_embeddings: Tensor) -> Tensor:
        """Score pairs: `[batch, dim]` and `[batch, dim]` -> `[batch]`, with gradient."""

    def __call__(
        self,
        doc_network: DocumentEncoder,
        query_embeddings: Tensor,
        pos_doc_embeddings: Tensor,
        cache: Caches,
        return_topk: int = 0,
    ) -> CacheLossReturn:
        """Draw one negative per query, re-encode it, and compute the loss.

        Args:
            doc_network: Features `{key: [n, ...]}` -> embeddings `[n, dim]`, with gradient.
            query_embeddings: `[batch, dim]`, with gradient.
            pos_doc_embeddings: `[batch, dim]`, with gradient.
            cache: Name -> `NegativeCache`. All caches are searched as one. They are not changed.
            return_topk: Number of best rows per query whose features are also returned.

        Returns:
            `CacheLossReturn`. If no row is filled, the loss is 0 and can still be differentiated.

        Raises:
            ValueError: Wrong shapes or devices, `top_k` above the number of rows, values that are not finite.
        """
        _check_pairs(query_embeddings, pos_doc_embeddings)
        retrieved = self._retrieve_from_cache(query_embeddings, cache, return_topk)
        count, dim = len(retrieved.retrieved_indices), query_embeddings.shape[1]
        encoded, counts = query_embeddings.new_empty(0, dim), None
        if count:
            dtype = retrieved.retrieved_cache_embeddings.dtype
            encoder = _storable(doc_network, cache, self.embedding_key, dtype)
            encoded = encode(encoder, retrieved.retrieved_data, (count, dim), dtype)
            counts = retrieved.scores.logsumexp(dim=1) > -torch.inf
        rows = retrieved.retrieved_indices[:, 0]
        updates = split_updates(cache, self.embedding_key, rows, encoded.detach(), counts)
        return self._loss_return(query_embeddings, pos_doc_embeddings, retrieved, encoded, updates)

    def _loss_return(
        self,
        query_embeddings: Tensor,
        pos_doc_embeddings: Tensor,
        retrieved: RetrievalReturn,
        encoded: Tensor,
        updates: Updates,
        *,
        weight: float = 1.0,
    ) -> CacheLossReturn:
        """Compute the loss from the re-encoded documents `[batch, dim]`; `weight` scales a mean training loss."""
        positive_scores = self._score_documents(query_embeddings, pos_doc_embeddings)
        lse = retrieved.scores.logsumexp(dim=1)
        if len(encoded):
            negative_scores = self._score_documents(query_embeddings, encoded)
            training_loss = estimators.sampled_softmax_loss(positive_scores, negative_scores[:, None], lse)
            staleness = estimators.staleness(retrieved.retrieved_cache_embeddings, encoded)
        else:
            training_loss = positive_scores * 0.0
            staleness = torch.zeros_like(lse)
        interpretable_loss = estimators.interpretable_loss(positive_scores, lse)
        reduce = (lambda values: values) if self.reducer is None else self.reducer
        if self.reducer is torch.mean:
            training_loss = training_loss * weight
        return CacheLossReturn(
            reduce(training_loss),
            reduce(interpretable_loss),
            *updates,
            staleness=reduce(staleness),
            topk_features=retrieved.retrieved_cache_topk_features,
        )


class CacheClassificationLoss(AbstractCacheClassificationLoss):
    """Softmax cross-entropy against all cached documents, from one draw per query (Lindgren et al., 2021).

    Args:
        embedding_key: The feature that holds the embedding.
        data_keys: The features that the document encoder takes.
        score_transform: Elementwise function of the dot products, such as `lambda s: 20.0 * s`.
        top_k: Restrict the softmax to the best row of each of top_k contiguous groups of rows.
        reducer: Function that reduces the losses and the staleness `[batch]`; None returns them unreduced.

    Attributes:
        generator: The CPU generator for all draws, seeded from torch's global generator.
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
        rows = search_as_one(cache, (self.embedding_key, *self.data_keys))
        separate(self.generator, self._first_state)
        config, request = self._sampling(return_topk), SamplingRequest(query_embeddings.detach())
        if rows.has_rows() and not _is_built_in(self._retrieval_fn):
            sample = _sample_by_function(rows, config, request, self._retrieval_fn)
        else:
            sample = OneProcess().sample(rows, config, request)
        return _retrieval_return(sample, sample.rows[:, None])

    def _sampling(self, return_topk: int) -> SamplingConfig:
        return SamplingConfig(
            self.embedding_key,
            self.data_keys,
            self.generator,
            score_transform=self.score_transform,
            takes_best=isinstance(self._retrieval_fn, MaxScoreRetrievalFn),
            top_k=self.top_k,
            num_best=return_topk,
        )

    def _score_documents(self, query_embeddings: Tensor, doc_embeddings: Tensor) -> Tensor:
        scores = estimators.dot(query_embeddings, doc_embeddings)
        return scores if self.score_transform is None else self.score_transform(scores)


class DistributedCacheClassificationLoss(CacheClassificationLoss):
    """`CacheClassificationLoss` against the caches of all ranks of a process group, searched as one.

    Every query sees all rows of all ranks. The features of a drawn row are sent to the rank of the query, and its new
    embedding is sent back; `updated_item_data` holds the new embeddings of this rank's rows. All ranks must make each
    call together. With the reducer torch.mean, the average of the ranks' losses (and, under DDP, of their gradients) is
    the mean over all queries, even if batch sizes differ. Without an initialized process group it is equivalent to
    `CacheClassificationLoss`.

    In a handler with `use_cross_replica=True`, all ranks hold the same rows, and each rank scores its part of them.

    Args:
        embedding_key: See `CacheClassificationLoss`.
        data_keys: See `CacheClassificationLoss`.
        score_transform: See `CacheClassificationLoss`.
        top_k: See `CacheClassificationLoss`. Each rank gets a number of groups in proportion to its rows.
        reducer: See `CacheClassificationLoss`.
        process_group: The ranks that share the rows; None for the default group.
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

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the loss; the copy has the same process group."""
        memo[id(self.process_group)] = self.process_group
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    def __getstate__(self) -> dict[str, Any]:
        check_picklable(self, self.process_group, "process_group=None")
        return self.__dict__

    @property
    def ranks(self) -> Ranks:
        """The ranks that share the rows."""
        return Ranks(self.process_group or world())

    def __call__(
        self,
        doc_network: DocumentEncoder,
        query_embeddings: Tensor,
        pos_doc_embeddings: Tensor,
        cache: Caches,
        return_topk: int = 0,
    ) -> CacheLossReturn:
        """See `AbstractCacheClassificationLoss`; collective. An error on one rank is raised on all ranks."""
        ranks = self.ranks
        if ranks.size == 1:
            return super().__call__(doc_network, query_embeddings, pos_doc_embeddings, cache, return_topk)
        separate(self.generator, self._first_state)
        request = SamplingRequest(query_embeddings.detach())

        def step() -> int:
            return max((int(part.step) for part in cache.values()), default=0)

        def prepare() -> tuple[tuple[RowSource, SamplingConfig], list[int]]:
            _check_pairs(query_embeddings, pos_doc_embeddings)
            if not _is_built_in(self._retrieval_fn):
                raise ValueError(
                    f"{type(self._retrieval_fn).__name__} needs the scores of all rows of all ranks, which are not "
                    "sent. Over several ranks use GumbelMaxRetrievalFn() or MaxScoreRetrievalFn()."
                )
            rows = search_as_one(cache, (self.embedding_key, *self.data_keys))
            config = replace(self._sampling(return_topk), is_replicated=self.is_replicated)
            make_search(rows, replace(config, top_k=None), request).check()
            return (rows, config), summarize(config, rows, request, is_writing=torch.is_grad_enabled())

        (rows, config), table = ranks.run_checked(step, query_embeddings.device, prepare, NUM_INTEGERS)
        many = ManyRanks(Handshake(ranks, table), request, step)
        sample = many.sample(rows, config, request)
        encoder = _storable(doc_network, cache, self.embedding_key, sample.cached.dtype)
        encoded = many.encode(encoder, config, sample, query_embeddings.detach(), needs_gradient=False)
        elsewhere = torch.full((sample.count, 1), -1, device=query_embeddings.device)
        data, updated_rows = encoded.own.detach()[:0].to(sample.cached.dtype), elsewhere[:0, 0]
        if encoded.updates is not None:
            embeddings = encoded.updates.items[self.embedding_key]
            assert isinstance(embeddings, Tensor)
            data, updated_rows = embeddings, encoded.updates.rows
        return self._loss_return(
            query_embeddings,
            pos_doc_embeddings,
            _retrieval_return(sample, elsewhere),
            encoded.own,
            split_updates(cache, self.embedding_key, updated_rows, data, None),
            weight=many.weight,
        )


def _retrieval_return(sample: Sample, rows: Tensor) -> RetrievalReturn:
    return RetrievalReturn(sample.features, sample.lse[:, None], rows, sample.cached, sample.best_features or None)


def _is_built_in(retrieval_fn: RetrievalFn) -> bool:
    """Whether the fast passes support a retrieval function: a draw from the softmax, or the best row."""
    is_softmax = isinstance(retrieval_fn, GumbelMaxRetrievalFn) and retrieval_fn.inv_temp == 1.0
    return is_softmax or isinstance(retrieval_fn, MaxScoreRetrievalFn)


@torch.no_grad()
def _sample_by_function(
    cache: RowSource, config: SamplingConfig, request: SamplingRequest, retrieval_fn: RetrievalFn
) -> Sample:
    """Sample with a user-defined retrieval function of scores `[batch, n]`."""
    search = make_search(cache, config, request)
    with torch.autocast(request.queries.device.type, enabled=False):
        if config.top_k is not None:
            scores, rows = mine_groups(search, config.top_k)
        else:
            search.check()
            log_once(
                f"{type(retrieval_fn).__name__} needs the scores of all rows at once: using the dense pass, "
                f"which allocates [batch, {search.pool.num_rows}]. Give top_k to avoid it."
            )
            scores = dense_scores(search)
            rows = torch.arange(search.pool.num_rows, device=scores.device).expand_as(scores)
    picked, batch = retrieval_fn(scores).to(rows.device, torch.int64), len(request.queries)
    if picked.shape != (batch, 1):
        raise ValueError(f"The retrieval function returned shape {list(picked.shape)}; expected [{batch}, 1].")
    best_scores, best = exact_top_k(scores, min(config.num_best, scores.shape[1]))
    best_rows = torch.where(best_scores > -torch.inf, rows.gather(1, best), -1)
    lse = scores.logsumexp(dim=1)
    has_negatives = lse > -torch.inf
    is_empty = reads_without_sync(lse) and not bool(has_negatives.any())
    drawn = replace_missing(rows.gather(1, picked), has_negatives)[: 0 if is_empty else batch, 0]
    return Sample(
        lse=lse,
        num_filled=cache.num_filled,
        cached=search.pool.gather(drawn),
        rows=drawn,
        count=len(drawn),
        features=read_features(cache, drawn, config.data_keys),
        best_features=[read_features(cache, row[row >= 0], config.data_keys) for row in best_rows]
        if config.num_best
        else [],
    )


def _check_pairs(query_embeddings: Tensor, pos_doc_embeddings: Tensor) -> None:
    for name, value in (("query_embeddings", query_embeddings), ("pos_doc_embeddings", pos_doc_embeddings)):
        if not isinstance(value, Tensor):
            raise TypeError(f"`{name}` is {type(value).__name__}; expected a tensor [batch, dim].")
    if query_embeddings.dim() != 2 or query_embeddings.shape != pos_doc_embeddings.shape:
        raise ValueError(
            f"Query embeddings have shape {list(query_embeddings.shape)}, those of the positive documents "
            f"{list(pos_doc_embeddings.shape)}; expected the same [batch, dim]."
        )
    if len(query_embeddings) == 0:
        raise ValueError("The batch is empty: no query embeddings.")
    check_finite("query_embeddings", query_embeddings, is_embedding=True)
    check_finite("pos_doc_embeddings", pos_doc_embeddings, is_embedding=True)


def _storable(doc_network: DocumentEncoder, cache: Caches, embedding_key: str, checked: torch.dtype) -> DocumentEncoder:
    """Wrap the encoder to raise if embeddings overflow in the dtype of any cache; `checked` is checked elsewhere."""
    dtypes = {part.specs[embedding_key].dtype for part in cache.values()} - {checked}

    def encode_storable(features: dict[str, Tensor]) -> Tensor:
        embeddings = doc_network(features)
        for dtype in dtypes if isinstance(embeddings, Tensor) else ():
            check_finite(f"The document encoder's output, stored as {dtype},", embeddings.detach().to(dtype))
        return embeddings

    return encode_storable


def search_as_one(cache: Caches, keys: Sequence[str]) -> RowSource:
    """Combine the rows of all caches, in sorted order of their names."""
    if not cache:
        raise ValueError("`cache` has no caches; expected a dict of name -> NegativeCache.")
    for name, part in cache.items():
        missing = set(keys) - set(part.specs)
        if missing:
            raise ValueError(f"The cache {name!r} has no features {sorted(missing)}; it has {sorted(part.specs)}.")
    caches = [cache[name] for name in sorted(cache)]
    return caches[0] if len(caches) == 1 else PooledCaches(caches, keys)


def split_updates(
    cache: Caches, embedding_key: str, rows: Tensor, embeddings: Tensor, counts: Tensor | None
) -> Updates:
    """Split updates of rows `[n]`, numbered across all caches, into data, rows and mask per cache.

    Args:
        cache: Name -> cache.
        embedding_key: The feature that holds the embedding.
        rows: int64 `[n]`.
        embeddings: `[n, dim]`.
        counts: bool `[n]`: which updates count; None for all.
    """
    data, indices, mask = {}, {}, {}
    start = 0
    for name in sorted(cache):
        data[name] = {embedding_key: embeddings}
        indices[name] = rows - start
        mask[name] = (rows >= start) & (rows < start + cache[name].num_rows)
        if counts is not None:
            mask[name] = mask[name] & counts
        start += cache[name].num_rows
    return data, indices, mask
