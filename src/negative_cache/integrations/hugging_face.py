"""Saves caches in the checkpoints of transformers' `Trainer` and its subclasses, and logs their metrics."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import TrainOutput
from transformers.training_args import ParallelMode

from negative_cache.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from negative_cache.distributed import world
from negative_cache.distributed.collectives import Ranks
from negative_cache.metrics import cache_losses, tagged_metrics, warn_of_selection
from negative_cache.negative_cache_loss import NegativeCacheLoss

FOLDER = "negative_cache"


class NegativeCacheTrainerMixin:
    """Saves every cache of a trainer in each of its checkpoint folders, restores it on resume, and logs its metrics.

    Put the mixin before the trainer's class: `class MyTrainer(NegativeCacheTrainerMixin, Trainer)`, where `Trainer` is
    `transformers.Trainer` or a subclass. The mixin finds every `NegativeCacheLoss`, also inside other losses, in
    `trainer.loss` (a module or a dict of modules) or, if there is no such attribute, in the model.

    A loss that was made without `seed` draws with that of the training arguments.

    Caches are saved in the folder `negative_cache` of each checkpoint, so `save_total_limit` applies to them. If the
    model contains the loss, the model's own file does not contain the cached rows.

    Raises:
        ValueError: There are several ranks, and the trainer would train each of them alone.
    """

    args: Any
    model: Any
    model_init: Any
    state: Any
    control: Any
    callback_handler: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_ranks()
        for number, loss in enumerate(cache_losses(self._loss_root).values()):
            loss._seed_draws(self.args.seed + number)
        self.add_callback(_TrainerFixesCallback())  # type: ignore[attr-defined]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; `resume_from_checkpoint=True` resumes from the last complete checkpoint.

        A checkpoint of the last step is not trained further. With `model_init`, every further call, such as a trial of
        a hyperparameter search, starts with a new model, empty caches, the first draws and the initial scale.

        Raises:
            ValueError: There is no complete checkpoint.
            CheckpointError: The checkpoint has no cache, or the cache is damaged or does not match the loss. The model
                is unchanged.
        """
        if self.model_init is not None and self.state.global_step:
            for loss in cache_losses(self._loss_root).values():
                loss._restart()  # its cache has embeddings of the model before
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"There is no complete checkpoint in {self.args.output_dir}. Call train() without "
                    "resume_from_checkpoint to start from the beginning."
                )
        self._warn_of_selection_by_loss()
        if resume_from_checkpoint:
            self._restore(str(resume_from_checkpoint))  # first, so that an error leaves the model unchanged
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        except _AlreadyTrainedError:
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            return TrainOutput(self.state.global_step, 0.0, {})

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the metrics of each cache as `cache/...` together with the training loss."""
        if "loss" in logs and cache_losses(self._loss_root):
            logs |= tagged_metrics(self._loss_root)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _check_ranks(self) -> None:
        """Raise ValueError if the process group has several ranks and the trainer trains each of them alone."""
        size = Ranks(world()).size
        if size > 1 and self.args.parallel_mode != ParallelMode.DISTRIBUTED:
            mode = self.args.parallel_mode.value
            raise ValueError(
                f"The process group has {size} ranks, and the training arguments have the parallel mode {mode!r}: each "
                "rank would train a model of its own. On CPUs, set use_cpu=True in the training arguments."
            )

    def _warn_of_selection_by_loss(self) -> None:
        """Warn if checkpoints are selected, or training is stopped, by the value of a loss."""
        stops = any(isinstance(each, EarlyStoppingCallback) for each in self.callback_handler.callbacks)
        if (self.args.load_best_model_at_end or stops) and cache_losses(self._loss_root):
            warn_of_selection(
                [self.args.metric_for_best_model or "loss"], "metric_for_best_model='eval_cosine_ndcg@10'"
            )

    @property
    def _loss_root(self) -> Any:
        """The module, or dict of modules, that contains the losses."""
        loss = getattr(self, "loss", None)
        return self.model if loss is None else loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        in_model = tuple(f"{name}.cache." for name in cache_losses(self.model))
        if in_model:
            state_dict = self.model.state_dict() if state_dict is None else state_dict
            state_dict = {key: value for key, value in state_dict.items() if not key.startswith(in_model)}
        super()._save(output_dir, state_dict)  # type: ignore[misc]

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with _without_caches(cache_losses(self.model).values()):
            super()._load_from_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        with _without_caches(cache_losses(self.model).values()):
            super()._load_best_model()  # type: ignore[misc]

    def _save_rng_state(self, output_dir: str) -> None:
        # The trainer calls this after it saves the model. It then writes trainer_state.json, which marks the checkpoint
        # as complete, and deletes older checkpoints.
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        for name, loss in cache_losses(self._loss_root).items():
            save_checkpoint(loss, _folder(output_dir, name, loss))

    def _restore(self, checkpoint_path: str) -> None:
        losses = cache_losses(self._loss_root)
        if losses and not (Path(checkpoint_path) / FOLDER).is_dir():
            raise CheckpointError(
                f"{checkpoint_path} has no folder {FOLDER!r}: it was saved with save_only_model=True, or by a trainer "
                "without NegativeCacheTrainerMixin. Resume from a checkpoint with a cache, or start from the beginning."
            )
        for name, loss in losses.items():
            try:
                load_checkpoint(loss, _folder(checkpoint_path, name, loss))
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error} If {checkpoint_path} is damaged, delete it to resume from the checkpoint before it."
                ) from error
            loss.to(self.args.device)


class _AlreadyTrainedError(Exception):
    """The checkpoint was saved after the last step."""


class _TrainerFixesCallback(TrainerCallback):
    """Fixes for the trainer: resuming after the last step, gradients of the loss's parameters, epochs of samplers."""

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        # When resumed from a checkpoint of the last step, the trainer would train one more step.
        if state.global_step >= state.max_steps:
            raise _AlreadyTrainedError
        optimizer.zero_grad()

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        # The trainer clears only the model's gradients. Those of a learnable scale in the loss would accumulate.
        optimizer.zero_grad()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        # To skip batches on several ranks, the trainer wraps the shuffling sampler in another one, but does not set the
        # epoch of the inner sampler: every epoch would have the order of the first.
        sampler = getattr(train_dataloader, "batch_sampler", None)
        while sampler is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(int(state.epoch or 0))
            sampler = getattr(sampler, "batch_sampler", None)


@contextlib.contextmanager
def _without_caches(losses: Iterable[NegativeCacheLoss]) -> Iterator[None]:
    """Remove the caches from the losses while the weights of the model that contains the losses are loaded."""
    saved = [(loss, loss.cache, loss.get_extra_state()) for loss in losses]
    for loss, _, _ in saved:
        del loss.cache
    try:
        yield
    finally:
        for loss, cache, generator_state in saved:
            loss.set_extra_state(generator_state)
            if cache is not None:
                loss.cache = cache


def _folder(checkpoint: str, name: str, loss: NegativeCacheLoss) -> Path:
    """The folder of a cache within a checkpoint: one for all ranks that share the cache."""
    is_shared_by_all = loss.ranks.size == Ranks(world()).size
    return Path(checkpoint) / FOLDER / (name if is_shared_by_all else f"{name}-of-rank-{loss.ranks.first}")


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete `checkpoint-N` folder in `output_dir`, or None.

    A checkpoint is complete if its trainer_state.json, the file that the trainer writes last, is valid JSON.
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(folder)
    return None
