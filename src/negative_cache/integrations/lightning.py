"""The cache in the checkpoints and logs of Lightning, on one process or several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from negative_cache.checkpoint import CheckpointError, state_for_rank
from negative_cache.distributed.ranks import Ranks, world
from negative_cache.metrics import cache_losses, tagged_metrics
from negative_cache.negative_cache_loss import NegativeCacheLoss

KEY = "negative_cache"


class NegativeCacheMixin:
    """Lets a LightningModule train with `NegativeCacheLoss`: put it before LightningModule in the class's bases.

    Every `NegativeCacheLoss` that is a submodule, however deep, is found. Its metrics are logged as `cache/...` every
    `log_every_n_steps`. Its rows of all ranks are in each checkpoint, under "negative_cache", and come back with
    `fit(ckpt_path=...)`, also on another number of ranks; `state_dict` in the checkpoint has none. A checkpoint of the
    weights alone has no rows, and leaves the cache as it is.

    A class that overrides `on_save_checkpoint`, `on_load_checkpoint` or `on_train_batch_end` calls `super()`.

    Raises:
        TypeError: When a class is made that has LightningModule before the mixin.
    """

    trainer: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(super(), "on_save_checkpoint"):
            raise TypeError(
                f"{cls.__name__} must have a LightningModule behind NegativeCacheMixin, which would otherwise do "
                f"nothing: class {cls.__name__}(NegativeCacheMixin, LightningModule)."
            )

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Log the caches' metrics, of rank 0 where there are several, in the steps that are logged."""
        super().on_train_batch_end(*args, **kwargs)  # type: ignore[misc]
        if self.trainer._logger_connector.should_update_logs:
            self.log_dict(tagged_metrics(self), batch_size=1)  # type: ignore[attr-defined,arg-type]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Move the rows from the weights to a place of their own, with those of the other ranks; collective."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        is_weights_only = "optimizer_states" not in checkpoint
        saved = {}
        for name, prefix, loss in _named(self):
            _drop_rows(checkpoint["state_dict"], prefix)
            if not is_weights_only:
                saved[name] = {"ranks": _sharing(name, loss), "states": Ranks(world()).collect(loss.state_dict())}
        if not is_weights_only:
            checkpoint[KEY] = saved

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give this rank's rows back to the weights that are about to be loaded.

        Raises:
            CheckpointError: The cache is one of other features, dtypes, embedding size or ranks.
        """
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        saved = checkpoint.get(KEY, {})
        for name, prefix, loss in _named(self):
            if name in saved:
                state = _state_of_rank(name, loss, **saved[name])
                if "cache.filled" not in state:  # from before the first step
                    del loss.cache
            elif f"{prefix}cache.filled" in checkpoint["state_dict"]:
                _check_alone(name)
                continue  # from a module without the mixin
            else:
                state = {key: value for key, value in loss.state_dict().items() if key.startswith("cache.")}
            checkpoint["state_dict"] |= {prefix + key: value for key, value in state.items()}


def _named(module: Any) -> list[tuple[str, str, NegativeCacheLoss]]:
    """Name, prefix in the state dict, and loss."""
    return [(name, f"{name}.", loss) for name, loss in cache_losses(module).items()]


def _drop_rows(state_dict: dict[str, Tensor], prefix: str) -> None:
    for key in [key for key in state_dict if key.startswith(f"{prefix}cache.")]:
        del state_dict[key]


def _sharing(name: str, loss: NegativeCacheLoss) -> int:
    """How many ranks share the rows: all of them, or each has a cache of its own."""
    if loss.ranks.size not in (1, Ranks(world()).size):
        raise ValueError(
            f"The cache of {name!r} is shared by {loss.ranks.size} of {Ranks(world()).size} ranks. In Lightning's "
            "checkpoints it must be shared by all of them (process_group='world') or by none."
        )
    return loss.ranks.size


def _check_alone(name: str) -> None:
    if Ranks(world()).size > 1:
        raise CheckpointError(
            f"The checkpoint has the rows of {name!r} of one rank alone. It was saved without NegativeCacheMixin, or "
            "by an on_save_checkpoint that does not call super()."
        )


def _state_of_rank(
    name: str, loss: NegativeCacheLoss, ranks: int, states: list[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The state for this rank's loss, from all ranks' states, of which so many shared a cache."""
    if ranks == len(states):
        return state_for_rank(loss, states)
    if loss.ranks.size > 1:
        raise CheckpointError(
            f"The checkpoint has {len(states)} caches of {name!r}, one per rank; one that all ranks share cannot be "
            "made of them. Leave process_group out, as in the run that was saved."
        )
    rank = Ranks(world()).rank
    if rank < len(states):
        return state_for_rank(loss, states[rank : rank + 1])
    return dict(loss.state_dict())  # a rank that did not exist begins anew
