"""A real training run, in a module that a fork server imports only once, so that runs start quickly."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

from negative_cache.workbench.data import RetrievalData, load_data
from negative_cache.workbench.models import load_model
from negative_cache.workbench.training import trainer
from negative_cache.workbench.training.config import RunConfig
from negative_cache.workbench.training.driver import run
from support import random_pairs

STEPS, BATCH, SAVE_STEPS = 40, 8, 3

# The trainer logs means since the last log, and loses the sum when it is killed. With a log of every step, the logs of
# a resumed run are those of a run that was not killed.
trainer.LOG_STEPS = 1


def make_data(folder: Path) -> None:
    """Pairs and an untrained model. (Training the tokenizer again may give a different one.)"""
    random_pairs(folder / "pairs.jsonl", 400)
    data = read(folder)
    texts = data.training_texts()
    load_model("static", texts, 0).save_pretrained(str(folder / "model"))


def configuration(folder: Path, output: str, save_steps: int | None = SAVE_STEPS) -> RunConfig:
    return RunConfig(
        data=str(folder / "pairs.jsonl"),
        model=str(folder / "model"),
        loss="negative-cache",
        output=str(folder / output),
        cache_size=64,
        num_samples=1,
        batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=0.05,
        save_steps=save_steps,
    )


def read(folder: Path) -> RetrievalData:
    return load_data(str(folder / "pairs.jsonl"))


def job(folder: Path, output: str, save_steps: int | None = SAVE_STEPS) -> None:
    """Start or continue the run. `marker_of` is made in the first step after the first checkpoint."""
    torch.set_num_threads(1)
    marker = marker_of(folder, output)

    def on_step(step: int, steps: int, logs: dict[str, float]) -> None:
        if step > SAVE_STEPS:
            marker.touch()

    with open(os.devnull, "w") as silent, contextlib.redirect_stderr(silent):
        run(configuration(folder, output, save_steps), read(folder), resume=True, on_step=on_step)


def marker_of(folder: Path, output: str) -> Path:
    """The file that exists once the process has made a step after the first checkpoint."""
    return folder / f"{output}.steps"
