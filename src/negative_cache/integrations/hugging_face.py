"""The cache in the checkpoints and logs of transformers' `Trainer`, and of trainers that are built on it."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from negative_cache.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from negative_cache.distributed.ranks import Ranks, world
from negative_cache.metrics import cache_losses, tagged_metrics
from negative_cache.negative_cache_loss import NegativeCacheLoss

FOLDER = "negative_cache"


class NegativeCacheTrainerMixin:
    """Saves every cache of a trainer in each of its checkpoint folders, and restores it on resume.

    Put it before the trainer's class: `class MyTrainer(NegativeCacheTrainerMixin, Trainer)`, where Trainer is that of
    transformers or one that is built on it. The losses are those in `trainer.loss` (a module or a dict of modules), or
    without such an attribute those in the model. They may be wrapped in others. `save_total_limit` applies to the
    caches as to all else. The caches' metrics are logged beside the loss. A model that has the loss in it is saved
    without the cache.
    """

    args: Any
    model: Any
    state: Any
    control: Any
    callback_handler: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_MendingCallback())  # type: ignore[attr-defined]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; `resume_from_checkpoint=True` takes the last checkpoint that was written to its end.

        Raises:
            ValueError: There is none.
            CheckpointError: The cache in it is damaged or another one.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no complete checkpoint in {self.args.output_dir}.")
        if resume_from_checkpoint:
            self._restore(str(resume_from_checkpoint))  # before the model, which stays as it is if this is refused
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        except _AlreadyTrainedError:
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            return TrainOutput(self.state.global_step, 0.0, {})

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """What the trainer logs while it trains, and the metrics of each cache beside it, as `cache/...`."""
        if "loss" in logs:
            logs |= tagged_metrics(self._has_losses)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    @property
    def _has_losses(self) -> Any:
        """The module, or dict of modules, that the losses are in."""
        loss = getattr(self, "loss", None)
        return self.model if loss is None else loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        in_model = tuple(f"{name}.cache." for name in cache_losses(self.model))
        if in_model:
            state_dict = self.model.state_dict() if state_dict is None else state_dict
            state_dict = {key: value for key, value in state_dict.items() if not key.startswith(in_model)}
        super()._save(output_dir, state_dict)  # type: ignore[misc]

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with _left_alone(cache_losses(self.model).values()):
            super()._load_from_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        with _left_alone(cache_losses(self.model).values()):
            super()._load_best_model()  # type: ignore[misc]

    def _save_rng_state(self, output_dir: str) -> None:
        # The trainer calls this after it has saved the model, before it writes trainer_state.json (by which a
        # checkpoint is known to be complete) and before it deletes older checkpoints.
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        for name, loss in cache_losses(self._has_losses).items():
            save_checkpoint(loss, _folder(output_dir, name, loss))

    def _restore(self, checkpoint_path: str) -> None:
        losses = cache_losses(self._has_losses)
        if losses and not (Path(checkpoint_path) / FOLDER).is_dir():
            raise CheckpointError(f"{checkpoint_path} was saved by a trainer without NegativeCacheTrainerMixin.")
        for name, loss in losses.items():
            try:
                load_checkpoint(loss, _folder(checkpoint_path, name, loss))
            except CheckpointError as error:
                raise CheckpointError(f"{error} Without {checkpoint_path} the one before is taken.") from error
            loss.to(self.args.device)


class _AlreadyTrainedError(Exception):
    """The checkpoint is of the last step."""


class _MendingCallback(TrainerCallback):
    """What the trainer itself does not do when it resumes, or with parameters that are in the loss."""

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        # After a checkpoint of the last step it would make one more.
        if state.global_step >= state.max_steps:
            raise _AlreadyTrainedError
        optimizer.zero_grad()

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        # It clears the model's gradients alone: those of a learnable scale, which is the loss's, would add up.
        optimizer.zero_grad()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        # On several ranks, skipping batches puts one more sampler around the one that shuffles, which it then does not
        # tell the epoch: the order would be that of the first one.
        sampler = getattr(train_dataloader, "batch_sampler", None)
        while sampler is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(int(state.epoch or 0))
            sampler = getattr(sampler, "batch_sampler", None)


@contextlib.contextmanager
def _left_alone(losses: Iterable[NegativeCacheLoss]) -> Iterator[None]:
    """While the weights of the model that they are in are loaded: without their caches, on every rank the same."""
    kept = [(loss, loss.cache, loss.get_extra_state()) for loss in losses]
    for loss, _, _ in kept:
        del loss.cache
    try:
        yield
    finally:
        for loss, cache, generator_state in kept:
            loss.set_extra_state(generator_state)
            if cache is not None:
                loss.cache = cache


def _folder(checkpoint: str, name: str, loss: NegativeCacheLoss) -> Path:
    """The folder of a cache: one for all ranks that share it."""
    is_shared_by_all = loss.ranks.size == Ranks(world()).size
    return Path(checkpoint) / FOLDER / (name if is_shared_by_all else f"{name}-of-rank-{loss.ranks.first}")


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest `checkpoint-N` folder whose last file, trainer_state.json, is whole; None without any."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(folder)
    return None
