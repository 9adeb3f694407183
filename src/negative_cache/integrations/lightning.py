"""Saves caches in Lightning checkpoints and logs their metrics, in one process or several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from negative_cache.checkpoint import CheckpointError, state_for_rank
from negative_cache.distributed import world
from negative_cache.distributed.collectives import Ranks
from negative_cache.metrics import cache_losses, tagged_metrics, warn_of_selection
from negative_cache.negative_cache_loss import NegativeCacheLoss

KEY = "negative_cache"


class NegativeCacheMixin:
    """Saves every cache of a LightningModule in its checkpoints, restores it on resume, and logs its metrics.

    Put the mixin before `LightningModule` in the bases of the class. It finds every `NegativeCacheLoss` among the
    submodules, at any depth, and logs its metrics as `cache/...` every `log_every_n_steps`.

    A checkpoint contains the rows of all ranks under "negative_cache"; its `state_dict` contains none.
    `fit(ckpt_path=...)` restores them, also on a different number of ranks if the ranks share the cache. A checkpoint
    with `save_weights_only=True` contains no rows, and loading it does not change the cache.

    Classes that override `on_save_checkpoint`, `on_load_checkpoint` or `on_train_batch_end` must call `super()`.

    Raises:
        TypeError: A class is defined with `LightningModule` before the mixin.
    """

    trainer: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(super(), "on_save_checkpoint"):
            raise TypeError(
                f"The bases of {cls.__name__} must have NegativeCacheMixin before LightningModule; otherwise the mixin "
                f"has no effect. Write class {cls.__name__}(NegativeCacheMixin, LightningModule)."
            )

    def on_fit_start(self) -> None:
        """Warn if a callback, such as ModelCheckpoint or EarlyStopping, monitors the value of a loss."""
        super().on_fit_start()  # type: ignore[misc]
        monitors = [str(getattr(callback, "monitor", None)) for callback in self.trainer.callbacks]
        if _named(self):
            warn_of_selection(monitors, "monitor='val_ndcg@10'")

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Log the metrics of each cache every `log_every_n_steps`; with several ranks, those of rank 0."""
        super().on_train_batch_end(*args, **kwargs)  # type: ignore[misc]
        if self.trainer._logger_connector.should_update_logs and _named(self):
            self.log_dict(tagged_metrics(self), batch_size=1)  # type: ignore[attr-defined,arg-type]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Move the rows from the weights to their own entry, with the rows of all ranks. Call it on all ranks."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        is_weights_only = "optimizer_states" not in checkpoint
        saved = {}
        for name, prefix, loss in _named(self):
            _drop_rows(checkpoint["state_dict"], prefix)
            if not is_weights_only:
                saved[name] = {"ranks": _num_sharing(name, loss), "states": Ranks(world()).collect(loss.state_dict())}
        if not is_weights_only:
            checkpoint[KEY] = saved

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put this rank's rows back into the weights before the weights are loaded.

        Raises:
            CheckpointError: Features, dtypes, embedding size or the sharing of the saved cache differ from those of the
                loss, or rows of other ranks are missing.
        """
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        saved = checkpoint.get(KEY, {})
        for name, prefix, loss in _named(self):
            if name in saved:
                state = _state_of_rank(name, loss, **saved[name])
                if "cache.filled" not in state:  # saved before the first step
                    del loss.cache
            elif f"{prefix}cache.filled" in checkpoint["state_dict"]:
                _check_one_rank(name)
                continue  # saved without the mixin: the rows are among the weights
            else:
                state = {key: value for key, value in loss.state_dict().items() if key.startswith("cache.")}
            checkpoint["state_dict"] |= {prefix + key: value for key, value in state.items()}


def _named(module: Any) -> list[tuple[str, str, NegativeCacheLoss]]:
    """The name, the state dict prefix and the loss of each cache."""
    return [(name, f"{name}.", loss) for name, loss in cache_losses(module).items()]


def _drop_rows(state_dict: dict[str, Tensor], prefix: str) -> None:
    for key in [key for key in state_dict if key.startswith(f"{prefix}cache.")]:
        del state_dict[key]


def _num_sharing(name: str, loss: NegativeCacheLoss) -> int:
    """The number of ranks that share the cache: all of them, or 1 if each has its own."""
    if loss.ranks.size not in (1, Ranks(world()).size):
        raise ValueError(
            f"The cache of {name!r} is shared by {loss.ranks.size} of {Ranks(world()).size} ranks. To be saved in "
            "Lightning's checkpoints, a cache must be shared by all ranks (process_group='world') or by none "
            "(process_group=None)."
        )
    return loss.ranks.size


def _check_one_rank(name: str) -> None:
    if Ranks(world()).size > 1:
        raise CheckpointError(
            f"The checkpoint has the rows of {name!r} of only one rank. It was saved without NegativeCacheMixin, or by "
            "an on_save_checkpoint that does not call super(). Fix that and save again, or load it in one process."
        )


def _state_of_rank(
    name: str, loss: NegativeCacheLoss, ranks: int, states: list[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The state for this rank's loss, from the `states` of all ranks that saved; `ranks` of them shared a cache."""
    if ranks == len(states):
        return state_for_rank(loss, states)
    if loss.ranks.size > 1:
        raise CheckpointError(
            f"The checkpoint has {len(states)} caches of {name!r}, one per rank; a cache that all ranks share cannot "
            "be restored from them. Leave process_group out, as in the run that saved the checkpoint."
        )
    rank = Ranks(world()).rank
    if rank < len(states):
        return state_for_rank(loss, states[rank : rank + 1])
    return dict(loss.state_dict())  # a new rank starts with its own state
