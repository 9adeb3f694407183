"""The trainer of a run: sentence-transformers' trainer, with time, memory and progress."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from safetensors.torch import load_file, save_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerModelCardData,
    SentenceTransformerTrainingArguments,
)
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from negative_cache.checkpoint import CheckpointError
from negative_cache.integrations.trainer import NegativeCacheTrainer
from negative_cache.workbench.files import write_json
from negative_cache.workbench.model_names import base_on_hub, learning_rate_of
from negative_cache.workbench.models import Prompts, prompts_of
from negative_cache.workbench.training import processes
from negative_cache.workbench.training.best import BestWeights
from negative_cache.workbench.training.config import RunConfig, RunFailedError
from negative_cache.workbench.training.losses import make_loss
from negative_cache.workbench.training.memory_bank import MemoryBankLoss
from negative_cache.workbench.training.meter import Meter, peak_memory_bytes

LOG_STEPS, MIN_LOGS = 10, 30  # steps between logs; fewer in short runs, for this many logs
QUEUE, METER = "memory_bank.safetensors", "meter.json"  # in a checkpoint

OnStep = Callable[[int, int, dict[str, float]], None]
"""Called with the step, the number of steps and the latest logs."""


class RunTrainer(NegativeCacheTrainer):
    """Adds time and memory to the logs, and the meter and a memory bank's queue to checkpoints."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.meter = Meter(self.model, self.loss)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the training time and the peak memory so far to the logs."""
        if "loss" in logs:
            logs["seconds"] = round(self.meter.seconds, 3)
            logs["peak_memory_bytes"] = peak_memory_bytes()
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, with the meter paused."""
        with self.meter.paused():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.meter.paused():  # the model card in a checkpoint has embeddings of some texts
            super()._save_checkpoint(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.is_world_process_zero():
            write_json(Path(output_dir) / METER, self.meter.state())
        if isinstance(self.loss, MemoryBankLoss):
            save_file(self.loss.queue_state(), Path(output_dir) / QUEUE)

    def _restore(self, checkpoint_path: str) -> None:
        super()._restore(checkpoint_path)
        self.meter.load_state(json.loads((Path(checkpoint_path) / METER).read_text(encoding="utf-8")))
        if isinstance(self.loss, MemoryBankLoss):
            self.loss.load_queue_state(load_file(Path(checkpoint_path) / QUEUE))


def make_trainer(
    folder: Path,
    config: RunConfig,
    training_set: Dataset,
    model: SentenceTransformer,
    *,
    on_step: OnStep | None = None,
    evaluator: Any = None,
    report_to: Sequence[str] = (),
    best: BestWeights | None = None,
) -> RunTrainer:
    """The trainer of a run, which writes to `folder`."""
    model.model_card_data.widget = [{}]  # otherwise the trainer takes texts of the data
    disable_progress_bars()
    if config.gradient_checkpointing:
        with warnings.catch_warnings():  # transformers has renamed what sentence-transformers calls
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer = RunTrainer(
        model=model,
        args=_arguments(folder, config, report_to, len(training_set), prompts_of(model)),
        train_dataset=training_set,
        loss=make_loss(config, model),
        evaluator=evaluator,
        callbacks=[*([_StepCallback(on_step)] if on_step else []), *([best] if best else [])],
    )
    _leave_out_texts(model.model_card_data)
    model.model_card_data.base_model = base_on_hub(config.model)  # the trainer knows the folder of the run alone
    trainer.remove_callback(PrinterCallback)  # the command line has its own progress bar
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    return trainer


def _leave_out_texts(card: SentenceTransformerModelCardData) -> None:
    """Remove the texts of the training data from a model card, which may be published with the model."""
    card.widget = []
    for dataset in card.train_datasets:
        for name in ("examples", "examples_table", "_example_columns"):
            dataset.pop(name, None)


def train_to_the_end(
    trainer: RunTrainer, checkpoint: str | None = None, begin: Callable[[], None] = lambda: None
) -> None:
    """Train, from a checkpoint if there is one, with the meter running: with a checkpoint, from the first step on.

    Args:
        trainer: The trainer.
        checkpoint: The folder of the checkpoint.
        begin: Called before the first step, unless there is a checkpoint.

    Raises:
        RunFailedError: Values became infinite or NaN, or the loss rejected a batch.
    """
    stop = _StopBetweenSteps()
    trainer.add_callback(stop)
    trainer.add_callback(_LogNearEnd())
    trainer.add_callback(_StartMeter(trainer.meter))
    try:
        with stop:
            if checkpoint is None:
                trainer.meter.start()
                begin()
            trainer.train(resume_from_checkpoint=checkpoint)
        # The trainer has wrapped the model's `forward`, which would go on to compute in half precision.
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    except CheckpointError:
        raise
    except ValueError as error:
        raise RunFailedError(f"Training failed after step {trainer.state.global_step}: {error}") from error
    finally:
        trainer.meter.stop()


def used_learning_rate(config: RunConfig) -> float:
    """The learning rate of a configuration, or the default of its model."""
    if config.learning_rate is not None:
        return config.learning_rate
    return learning_rate_of(config.model, has_adapters=config.lora is not None)


def _arguments(
    folder: Path, config: RunConfig, report_to: Sequence[str], num_pairs: int, prompts: Prompts
) -> SentenceTransformerTrainingArguments:
    num_ranks = processes.count()
    per_step = config.batch_size * num_ranks
    per_update = per_step * config.gradient_accumulation_steps
    num_steps = config.epochs * num_pairs / per_update if config.max_steps is None else config.max_steps
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    return SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        # The ranks split one batch, which has no duplicates and is the same as the batch of a single process.
        per_device_train_batch_size=per_step,
        accelerator_config={"split_batches": num_ranks > 1},
        num_train_epochs=config.epochs,
        max_steps=-1 if config.max_steps is None else config.max_steps,
        learning_rate=used_learning_rate(config),
        warmup_steps=config.warmup_ratio,  # below 1, it is a ratio
        lr_scheduler_type=config.lr_scheduler_type,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        bf16=config.bf16,
        fp16=config.fp16,
        torch_compile=config.torch_compile,
        seed=config.seed,
        data_seed=config.seed,
        batch_sampler="no_duplicates",
        prompts={"anchor": prompts.query, "positive": prompts.document, "negative": prompts.document},
        save_strategy="no" if config.save_steps is None else "steps",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        eval_strategy="no" if config.eval_steps is None else "steps",
        eval_steps=config.eval_steps,
        logging_steps=max(1, min(LOG_STEPS, int(num_steps) // MIN_LOGS)),
        report_to=list(report_to),
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        dataloader_drop_last=num_ranks > 1,  # the trainer would do the same, with a warning
        ddp_find_unused_parameters=False,
    )


class _StepCallback(TrainerCallback):
    """Reports each step with the latest logs; the trainer logs after a step, which is then reported again."""

    def __init__(self, on_step: OnStep) -> None:
        self.on_step = on_step
        self.latest: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        self.latest.update(logs or {})
        if "loss" in (logs or {}):
            self._report(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._report(state)

    def _report(self, state: Any) -> None:
        self.on_step(state.global_step, state.max_steps, self.latest)


class _StartMeter(TrainerCallback):
    """Starts the meter at the first step, after the batches before a checkpoint are read again and left out."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.start()


class _LogNearEnd(TrainerCallback):
    """Also logs the last step but one, whatever the number of steps between logs.

    The last one may have a small batch, such as a single query, whose values say nothing about the model.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_log |= state.global_step == max(1, state.max_steps - 1)


class _StopBetweenSteps(TrainerCallback):
    """A context manager in which Ctrl-C stops training after the current step. A second Ctrl-C stops immediately.

    An interrupt at an arbitrary moment may look like a failure of the interrupted code, such as writing a checkpoint,
    or be lost in a callback from C.
    """

    def __init__(self) -> None:
        self._is_requested = False
        self._is_installed = False

    def __enter__(self) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        self._is_installed = is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._is_installed:
            signal.signal(signal.SIGINT, self._request)

    def __exit__(self, *_: object) -> None:
        if self._is_installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _request(self, *_: object) -> None:
        if self._is_requested:
            raise KeyboardInterrupt
        self._is_requested = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._is_requested:
            raise KeyboardInterrupt
