"""Handlers: modules that compute a loss against caches and update the caches, in one call per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from negative_cache.cache.rows import CacheHolder, NegativeCache, module_name
from negative_cache.cache.specs import Features
from negative_cache.cache.update import RowUpdates, check_new_items, update_rows
from negative_cache.cache.validation import Items, batch_size, check_keys, check_mask, padded
from negative_cache.distributed import world
from negative_cache.distributed.collectives import Ranks, gather_rows
from negative_cache.filter_fns import CacheFilterFn
from negative_cache.losses import CacheLoss, CacheLossReturn, DistributedCacheClassificationLoss
from negative_cache.negative_cache import CacheManager, check_updates
from negative_cache.objective.diagnostics import raise_for_rejected
from negative_cache.sampling.encode import DocumentEncoder
from negative_cache.util import cross_replica_concat

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    Writer = SummaryWriter | tuple[SummaryWriter, int]


class MultiCacheLossHandler(CacheHolder):
    """Computes a loss against several named caches, searched as one, and updates each of them.

    `state_dict` contains the caches and the state of the loss's generator. Nothing is written in eval mode or with
    gradients disabled.

    Args:
        cache_managers: Name -> manager of that cache.
        cache_loss: A `CacheLoss`.
        embedding_key: The feature that holds the embedding.
        data_keys: The features that the document encoder takes.
        use_cross_replica: Apply the insertions and updates of all ranks, so that all ranks hold equal caches. The ranks
            are those of a `DistributedCacheClassificationLoss`, otherwise those of the default process group.
        filter_fn: Decides which new items may enter. If ranks hold different rows, it sees only those of this rank.
    """

    def __init__(
        self,
        cache_managers: Mapping[str, CacheManager],
        cache_loss: CacheLoss,
        embedding_key: str,
        data_keys: Sequence[str],
        use_cross_replica: bool = False,
        filter_fn: CacheFilterFn | None = None,
    ) -> None:
        super().__init__()
        if isinstance(data_keys, str):
            raise TypeError(f"`data_keys` is the string {data_keys!r}; expected a tuple such as ({data_keys!r},).")
        for manager in cache_managers.values():
            check_keys("specs", manager.specs, [embedding_key, *data_keys])
        self.cache_managers = dict(cache_managers)
        self.cache_loss = cache_loss
        self.embedding_key = embedding_key
        self.data_keys = tuple(data_keys)
        self.use_cross_replica = use_cross_replica
        self.filter_fn = filter_fn
        if isinstance(cache_loss, DistributedCacheClassificationLoss):
            cache_loss.is_replicated = use_cross_replica
        self._caches: dict[str, NegativeCache] = {}
        for name, manager in self.cache_managers.items():
            self._caches[name] = self._held[module_name("cache", name)] = manager.init_cache()

    @property
    def cache(self) -> dict[str, NegativeCache]:
        """The caches by name."""
        return self._caches

    def update_cache_and_compute_loss(
        self,
        item_network: DocumentEncoder,
        query_embeddings: Tensor,
        pos_item_embeddings: Tensor,
        new_item_embeddings: Mapping[str, Tensor],
        new_item_features: Mapping[str, Features],
        writer: Writer | None = None,
        return_topk: int = 0,
    ) -> Any:
        """Compute the loss, write the re-encoded embeddings back, then insert the new items.

        Args:
            item_network: Features `{key: [n, ...]}` -> embeddings `[n, dim]`.
            query_embeddings: `[batch, dim]`, with gradient.
            pos_item_embeddings: `[batch, dim]`, with gradient.
            new_item_embeddings: Per cache, `[n, dim]`.
            new_item_features: Per cache, feature name -> `[n, ...]`; keys beyond `data_keys` are ignored.
            writer: A `SummaryWriter`, or a tuple `(SummaryWriter, global step)`.
            return_topk: Number of best rows per query whose features are also returned.

        Returns:
            The loss, or `(loss, topk_features)` with `return_topk > 0`.

        Raises:
            ValueError: The input is invalid. The caches are left unchanged.
        """
        is_writing = self.training and torch.is_grad_enabled()
        device = query_embeddings.device
        ranks, is_distributed = self._ranks, isinstance(self.cache_loss, DistributedCacheClassificationLoss)
        items = self._check(ranks, is_writing, new_item_embeddings, new_item_features, device)
        generator = getattr(self.cache_loss, "generator", None)
        state = None if is_writing or generator is None else generator.get_state()

        def compute() -> tuple[CacheLossReturn, list[int]]:
            result = self.cache_loss(
                doc_network=item_network,
                query_embeddings=query_embeddings,
                pos_doc_embeddings=pos_item_embeddings,
                cache=self._caches,
                return_topk=return_topk,
            )
            return result, []

        # a distributed loss synchronizes its ranks itself; an evaluation need not run on all ranks
        depends_on_others = is_writing and not is_distributed
        result = ranks.run_checked(self._step, device, compute, 0)[0] if depends_on_others else compute()[0]
        step = 0 if writer is None else self._step()
        if is_writing:
            self._update(items, result, device)
        elif state is not None and generator is not None:
            generator.set_state(state)  # an evaluation does not change the draws of the training run
        if writer is not None:
            self._log(writer, step, result)
        return (result.training_loss, result.topk_features) if return_topk > 0 else result.training_loss

    @property
    def _ranks(self) -> Ranks:
        """The ranks whose steps depend on each other."""
        if isinstance(self.cache_loss, DistributedCacheClassificationLoss):
            return self.cache_loss.ranks
        return Ranks(world() if self.use_cross_replica else None)

    def _step(self) -> int:
        return max(int(cache.step) for cache in self._caches.values())

    def _check(
        self,
        ranks: Ranks,
        is_writing: bool,
        embeddings: Mapping[str, Tensor],
        features: Mapping[str, Features],
        device: torch.device,
    ) -> dict[str, Items]:
        """Validate the new items of each cache; an error on one rank is raised on all ranks that depend on it."""

        def check() -> tuple[dict[str, Items], list[int]]:
            return self._check_new_items(embeddings, features) if is_writing else {}, [is_writing]

        if not is_writing and not isinstance(self.cache_loss, DistributedCacheClassificationLoss):
            return {}
        items, table = ranks.run_checked(self._step, device, check, 1)
        if len({flag for (flag,) in table}) > 1:
            raise ValueError("The ranks differ in training or evaluating. Every rank must make the same call.")
        return items

    def _check_new_items(self, embeddings: Mapping[str, Tensor], features: Mapping[str, Features]) -> dict[str, Items]:
        check_keys("new_item_embeddings", embeddings, list(self._caches))
        check_keys("new_item_features", features, list(self._caches))
        checked: dict[str, Items] = {}
        for name, cache in self._caches.items():
            missing = [key for key in self.data_keys if key not in features[name]]
            if missing:
                raise ValueError(f"The features {missing} are missing; got {sorted(features[name])}.")
            items = {
                self.embedding_key: embeddings[name].detach(),
                **{key: features[name][key] for key in self.data_keys},
            }
            checked[name] = check_new_items(cache, self.cache_managers[name].specs_of(cache), items)
        return checked

    def _update(self, items: Mapping[str, Items], result: CacheLossReturn, device: torch.device) -> None:
        ranks = self._ranks if self.use_cross_replica else Ranks()

        def of_all(values: Any) -> Any:
            if ranks.size == 1:
                return values
            if isinstance(values, Mapping):
                return {key: cross_replica_concat(value, ranks.group) for key, value in values.items()}
            return cross_replica_concat(values, ranks.group)

        specs = {name: self.cache_managers[name].specs_of(cache) for name, cache in self._caches.items()}
        items = {name: gather_rows(ranks, items[name], specs[name], device) for name in self._caches}
        updates: dict[str, RowUpdates | None] = {}
        masks: dict[str, Tensor | None] = {}
        for name, cache in self._caches.items():  # every check comes before the first write
            updates[name] = masks[name] = None
            if ranks.size > 1:  # the items of all ranks may outnumber the rows of the cache
                check_new_items(cache, specs[name], items[name])
            if result.updated_item_data is not None:
                data, indices = of_all(result.updated_item_data[name]), of_all(result.updated_item_indices[name])
                mask = of_all(result.updated_item_mask[name])
                updates[name] = check_updates(cache, specs[name], data, indices, mask)
            if self.filter_fn is not None:
                mask = self.filter_fn(cache, padded(items[name]))
                masks[name] = check_mask("new_items_mask", mask, batch_size(items[name]), cache.device)
        for name, cache in self._caches.items():
            update_rows(
                cache,
                use_lru=self.cache_managers[name].use_lru,
                new_items=items[name],
                new_items_mask=masks[name],
                updates=updates[name],
            )

    def _log(self, writer: Writer, step: int, result: CacheLossReturn) -> None:
        writer, step = writer if isinstance(writer, tuple) else (writer, step)
        for name, cache in self._caches.items():
            raise_for_rejected(cache, f" {name!r}")
        for tag, value in (
            ("cache/interpretable_prediction_loss", result.interpretable_loss),
            ("cache/staleness", result.staleness),
        ):
            writer.add_scalar(tag, torch.as_tensor(value, device="cpu").float().mean().item(), step)

    def get_extra_state(self) -> Tensor:
        """The state of the loss's generator, uint8."""
        generator = getattr(self.cache_loss, "generator", None)
        return torch.zeros(0, dtype=torch.uint8, device="cpu") if generator is None else generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the generator's state, so that the draws continue where the saved run stopped."""
        generator = getattr(self.cache_loss, "generator", None)
        if generator is not None and state.numel():
            generator.set_state(state.cpu())


# The name of the class in the earlier PyTorch implementation.
_MultiCacheLossHandler = MultiCacheLossHandler


class CacheLossHandler(nn.Module):
    """Computes a loss against one cache and updates the cache.

    Args:
        cache_manager: Manager of the cache.
        cache_loss: A `CacheLoss`.
        embedding_key: The feature that holds the embedding.
        data_keys: The features that the document encoder takes.
        use_cross_replica: See `MultiCacheLossHandler`.
        filter_fn: Decides which new items may enter, such as `IsInCacheFilterFn(data_keys)`.
    """

    def __init__(
        self,
        cache_manager: CacheManager,
        cache_loss: CacheLoss,
        embedding_key: str,
        data_keys: Sequence[str],
        use_cross_replica: bool = False,
        filter_fn: CacheFilterFn | None = None,
    ) -> None:
        super().__init__()
        self.cache_manager = cache_manager
        self.cache_loss = cache_loss
        self.embedding_key = embedding_key
        self.data_keys = data_keys
        self.use_cross_replica = use_cross_replica
        self._handler = MultiCacheLossHandler(
            {"cache": cache_manager}, cache_loss, embedding_key, data_keys, use_cross_replica, filter_fn
        )

    @property
    def cache(self) -> NegativeCache:
        """The cache; its `data` and `age` can be read at any time."""
        return self._handler.cache["cache"]

    def update_cache_and_compute_loss(
        self,
        item_network: DocumentEncoder,
        query_embeddings: Tensor,
        pos_item_embeddings: Tensor,
        features: Features,
        writer: Writer | None = None,
        return_topk: int = 0,
    ) -> Any:
        """Compute the loss, write the re-encoded embeddings back, then insert the batch's documents.

        Args:
            item_network: Features `{key: [n, ...]}` -> embeddings `[n, dim]`.
            query_embeddings: `[batch, dim]`, with gradient.
            pos_item_embeddings: `[batch, dim]`, with gradient.
            features: Feature name -> `[batch, ...]`, for the positive documents.
            writer: A `SummaryWriter`, or a tuple `(SummaryWriter, global step)`.
            return_topk: Number of best rows per query whose features are also returned.

        Returns:
            The loss, or `(loss, topk_features)` with `return_topk > 0`; `topk_features` holds one dict
            of features `[k, ...]` per query, best row first.

        Raises:
            ValueError: The input is invalid. The cache is left unchanged.
        """
        return self._handler.update_cache_and_compute_loss(
            item_network,
            query_embeddings,
            pos_item_embeddings,
            new_item_embeddings={"cache": pos_item_embeddings},
            new_item_features={"cache": features},
            writer=writer,
            return_topk=return_topk,
        )
