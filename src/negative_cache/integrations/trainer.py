"""sentence-transformers' trainer, with the cache in its checkpoints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformerTrainer
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from negative_cache.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from negative_cache.distributed import Ranks, world
from negative_cache.modules import NegativeCacheLoss

FOLDER = "negative_cache"
_TAGS = {"interpretable_loss": "interpretable_prediction_loss"}


class NegativeCacheTrainerMixin:
    """Saves every cache of the trainer's loss in each checkpoint folder, and restores it on resume.

    Put it before the trainer's class: `class MyTrainer(NegativeCacheTrainerMixin, SentenceTransformerTrainer)`. The
    losses may be wrapped in others, or be in a dict. `save_total_limit` applies to the caches as to all else. The
    caches' metrics are logged beside the loss.
    """

    loss: Any
    args: Any
    model: Any
    state: Any
    control: Any
    callback_handler: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_ResumeCallback())  # type: ignore[attr-defined]

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
            losses = cache_losses(self.loss)
            for name, loss in losses.items():
                prefix = "cache" if len(losses) == 1 else f"cache/{name}"
                for metric, value in loss.metrics().items():
                    logs[f"{prefix}/{_TAGS.get(metric, metric)}"] = value
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _save_rng_state(self, output_dir: str) -> None:
        # The trainer calls this after it has saved the model, before it writes trainer_state.json (by which a
        # checkpoint is known to be complete) and before it deletes older checkpoints.
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        for name, loss in cache_losses(self.loss).items():
            save_checkpoint(loss, _folder(output_dir, name, loss))

    def _restore(self, checkpoint_path: str) -> None:
        losses = cache_losses(self.loss)
        if losses and not (Path(checkpoint_path) / FOLDER).is_dir():
            raise CheckpointError(f"{checkpoint_path} was saved by a trainer without NegativeCacheTrainerMixin.")
        for name, loss in losses.items():
            try:
                load_checkpoint(loss, _folder(checkpoint_path, name, loss))
            except CheckpointError as error:
                raise CheckpointError(f"{error} Without {checkpoint_path} the one before is taken.") from error
            loss.to(self.args.device)


class NegativeCacheTrainer(NegativeCacheTrainerMixin, SentenceTransformerTrainer):  # type: ignore[misc]
    """`SentenceTransformerTrainer` with the cache in its checkpoints; see `NegativeCacheTrainerMixin`."""


class _AlreadyTrainedError(Exception):
    """The checkpoint is of the last step."""


class _ResumeCallback(TrainerCallback):
    """What the trainer itself does not do when it resumes."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # After a checkpoint of the last step it would make one more.
        if state.global_step >= state.max_steps:
            raise _AlreadyTrainedError

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        # On several ranks, skipping batches puts one more sampler around the one that shuffles, which it then does not
        # tell the epoch: the order would be that of the first one.
        sampler = getattr(train_dataloader, "batch_sampler", None)
        while sampler is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(int(state.epoch or 0))
            sampler = getattr(sampler, "batch_sampler", None)


def cache_losses(loss: nn.Module | dict[str, nn.Module]) -> dict[str, NegativeCacheLoss]:
    """Every `NegativeCacheLoss` within a loss or a dict of losses, each once, by its first path."""
    roots = loss if isinstance(loss, dict) else {"": loss}
    seen: set[nn.Module] = set()  # one loss may serve several datasets
    return {
        ".".join(part for part in (root, path) if part) or "loss": module
        for root, parent in roots.items()
        for path, module in parent.named_modules(memo=seen)
        if isinstance(module, NegativeCacheLoss)
    }


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
