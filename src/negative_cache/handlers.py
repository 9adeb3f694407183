"""Handlers: a loss, its caches and their updates in one module, one call per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from negative_cache.cache import NegativeCache, module_name
from negative_cache.distributed import Ranks
from negative_cache.features import Features, FeatureSpec, RaggedFeature, check_keys, padding_value
from negative_cache.filter_fns import CacheFilterFn
from negative_cache.losses import CacheLoss, CacheLossReturn, DistributedCacheClassificationLoss
from negative_cache.negative_cache import CacheManager
from negative_cache.negatives import DocumentEncoder, check_finite
from negative_cache.util import cross_replica_concat

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    Writer = SummaryWriter | tuple[SummaryWriter, int]


class MultiCacheLossHandler(nn.Module):
    """Computes a loss against several named caches, which form one pool, and updates each of them.

    The caches and the loss's generator are in `state_dict`. Nothing is written in eval mode or where
    gradients are switched off.

    Args:
        cache_managers: Name -> manager of that cache.
        cache_loss: A `CacheLoss`.
        embedding_key: The feature that holds the embedding.
        data_keys: The features that the document encoder takes.
        use_cross_replica: Insert and update what all ranks of the default process group contribute, so that
            the caches of all ranks stay equal.
        filter_fn: Says which new items may enter.
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
            self._caches[name] = manager.init_cache()
            self.add_module(module_name("cache", name), self._caches[name])

    @property
    def cache(self) -> dict[str, NegativeCache]:
        """Name -> cache."""
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
            writer: A `SummaryWriter`, or one and the global step.
            return_topk: Return the features of so many best rows per query beside the loss.

        Returns:
            The loss, or `(loss, topk_features)` with `return_topk > 0`.

        Raises:
            ValueError: Whatever is wrong with the input; the caches are as they were then.
        """
        is_writing = self.training and torch.is_grad_enabled()
        if is_writing:
            self._check_together(new_item_embeddings, new_item_features, query_embeddings.device)
        generator = getattr(self.cache_loss, "generator", None)
        state = None if is_writing or generator is None else generator.get_state()
        result = self.cache_loss(
            doc_network=item_network,
            query_embeddings=query_embeddings,
            pos_doc_embeddings=pos_item_embeddings,
            cache=self._caches,
            return_topk=return_topk,
        )
        if writer is not None:
            self._log(writer, result)
        if is_writing:
            self._update(new_item_embeddings, new_item_features, result)
        elif state is not None and generator is not None:
            generator.set_state(state)  # an evaluation in between does not change a training run
        return (result.training_loss, result.topk_features) if return_topk > 0 else result.training_loss

    def _check_together(
        self, embeddings: Mapping[str, Tensor], features: Mapping[str, Features], device: torch.device
    ) -> None:
        """Check the new items; where ranks depend on each other, what is wrong on one raises on all of them."""
        ranks = Ranks()
        if isinstance(self.cache_loss, DistributedCacheClassificationLoss):
            ranks = self.cache_loss.ranks
        elif self.use_cross_replica and dist.is_available() and dist.is_initialized():
            ranks = Ranks(dist.group.WORLD)

        def check() -> tuple[None, list[int]]:
            self._check_new_items(embeddings, features)
            return None, []

        ranks.meet(lambda: max(int(cache.step) for cache in self._caches.values()), device, check, 0)

    def _items(self, embeddings: Tensor, features: Features) -> dict[str, Any]:
        return {self.embedding_key: embeddings.detach(), **{key: features[key] for key in self.data_keys}}

    def _check_new_items(self, embeddings: Mapping[str, Tensor], features: Mapping[str, Features]) -> None:
        check_keys("new_item_embeddings", embeddings, list(self._caches))
        check_keys("new_item_features", features, list(self._caches))
        for name, cache in self._caches.items():
            missing = [key for key in self.data_keys if key not in features[name]]
            if missing:
                raise ValueError(f"The features {missing} are missing; got {sorted(features[name])}.")
            items = self._items(embeddings[name], features[name])
            self.cache_managers[name].check_new_items(cache, items)
            for key, value in items.items():  # before any of the caches is written
                if isinstance(value, Tensor):
                    check_finite(f"The new items' {key!r} for the cache {name!r}", value)

    def _update(
        self, embeddings: Mapping[str, Tensor], features: Mapping[str, Features], result: CacheLossReturn
    ) -> None:
        share = _concat_over_ranks if self.use_cross_replica else (lambda value: value)
        for name, cache in self._caches.items():
            new_items = self._items(embeddings[name], features[name])
            if self.use_cross_replica:
                new_items = share({key: _same_width(value, cache.specs[key]) for key, value in new_items.items()})
            has_updates = result.updated_item_data is not None
            self.cache_managers[name].update_cache_(
                cache,
                new_items=new_items,
                new_items_mask=None if self.filter_fn is None else self.filter_fn(cache, new_items),
                updated_item_data=share(result.updated_item_data[name]) if has_updates else None,
                updated_item_indices=share(result.updated_item_indices[name]) if has_updates else None,
                updated_item_mask=share(result.updated_item_mask[name]) if has_updates else None,
            )

    def _log(self, writer: Writer, result: CacheLossReturn) -> None:
        writer, step = writer if isinstance(writer, tuple) else (writer, None)
        for name, cache in self._caches.items():
            rejected = int(cache.num_rejected)
            if rejected:
                raise ValueError(f"{rejected} embeddings that were not finite were kept out of the cache {name!r}.")
        if step is None:
            step = max(int(cache.step) for cache in self._caches.values())
        for tag, value in (
            ("cache/interpretable_prediction_loss", result.interpretable_loss),
            ("cache/staleness", result.staleness),
        ):
            writer.add_scalar(tag, torch.as_tensor(value).float().mean().item(), step)

    def get_extra_state(self) -> Tensor:
        """The state of the loss's generator, uint8."""
        generator = getattr(self.cache_loss, "generator", None)
        return torch.zeros(0, dtype=torch.uint8) if generator is None else generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Continue the random numbers where the saved run stopped."""
        generator = getattr(self.cache_loss, "generator", None)
        if generator is not None and state.numel():
            generator.set_state(state.cpu())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, cache in self._caches.items():  # all of them before anything is changed
            cache.check_loadable(state_dict, f"{prefix}{module_name('cache', name)}.")
        super()._load_from_state_dict(state_dict, prefix, *args)


# The name under which the earlier PyTorch implementation has it.
_MultiCacheLossHandler = MultiCacheLossHandler


class CacheLossHandler(nn.Module):
    """Computes a loss against one cache, and updates the cache.

    Args:
        cache_manager: Manager of the cache.
        cache_loss: A `CacheLoss`.
        embedding_key: The feature that holds the embedding.
        data_keys: The features that the document encoder takes.
        use_cross_replica: See `MultiCacheLossHandler`.
        filter_fn: Says which new items may enter, such as `IsInCacheFilterFn(data_keys)`.
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
            features: Feature name -> `[batch, ...]` of the positive documents.
            writer: A `SummaryWriter`, or one and the global step.
            return_topk: Return the features of so many best rows per query beside the loss.

        Returns:
            The loss, or `(loss, topk_features)` with `return_topk > 0`; `topk_features` has for each query a
            dict of features `[k, ...]`, best row first.

        Raises:
            ValueError: Whatever is wrong with the input; the cache is as it was then.
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


def _same_width(value: Tensor | Sequence[Tensor], spec: FeatureSpec) -> Tensor | Sequence[Tensor]:
    """A ragged feature padded to the longest one of all ranks."""
    if not isinstance(spec, RaggedFeature):
        return value
    padding = padding_value(spec)
    if not isinstance(value, Tensor):
        value = pad_sequence(list(value), batch_first=True, padding_value=padding)
    width = int(cross_replica_concat(torch.tensor([value.shape[1]], device=value.device)).max())
    return torch.nn.functional.pad(value, (0, width - value.shape[1]), value=padding)


def _concat_over_ranks(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {key: cross_replica_concat(value) for key, value in values.items()}
    return cross_replica_concat(values)
