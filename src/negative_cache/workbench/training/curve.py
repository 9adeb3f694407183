"""The quality of a model during training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model
from transformers import TrainerCallback

from negative_cache.workbench.data import RetrievalData
from negative_cache.workbench.evaluation import evaluate
from negative_cache.workbench.files import write_json
from negative_cache.workbench.training.record import read_json
from negative_cache.workbench.training.trainer import RunTrainer

POINTS = (0.04, 0.12, 0.25, 0.45, 0.7)
"""Fractions of the steps after which a comparison measures quality. The end of training is always measured."""


class Curve(TrainerCallback):
    """Saves the weights after some steps, and evaluates them after training.

    Args:
        trainer: The trainer of the model.
        folder: Folder for the weights.
        points: Fractions of the steps. Points that were saved before a restart are measured, too.
    """

    def __init__(self, trainer: RunTrainer, folder: Path, points: Sequence[float] = ()) -> None:
        self._trainer = trainer
        self._folder = folder
        self._points = points

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step not in {max(1, round(point * state.max_steps)) for point in self._points}:
            return
        meter = self._trainer.meter
        with meter.paused():
            self._folder.mkdir(exist_ok=True)
            costs = {
                "step": state.global_step,
                "seconds": round(meter.seconds, 3),
                "documents_encoded": meter.documents,
            }
            save_model(self._trainer.model, str(self._folder / f"{state.global_step}.safetensors"))
            write_json(self._folder / f"{state.global_step}.json", costs)

    def measure(self, data: RetrievalData, end: int) -> list[dict[str, Any]]:
        """Metrics on the test split at each point before the step `end`, with the cost of training so far.

        Changes the model's weights.
        """
        points = []
        paths = {int(path.stem): path for path in self._folder.glob("*.json")}
        for path in [paths[step] for step in sorted(paths) if step < end]:
            load_model(self._trainer.model, path.with_suffix(".safetensors"))
            quality = evaluate(self._trainer.model, data, ("test",))["test"]
            points.append({**read_json(path), "test": quality.metrics()})
        return points
