"""The quality of a model during training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model
from transformers import TrainerCallback

from negative_cache.workbench.data import RetrievalData
from negative_cache.workbench.evaluation import evaluate
from negative_cache.workbench.training.trainer import RunTrainer

POINTS = (0.04, 0.12, 0.25, 0.45, 0.7)
"""Fractions of the steps after which a comparison measures quality. The end of training is always measured."""


class Curve(TrainerCallback):
    """Saves the weights after some steps, and evaluates them after training.

    Args:
        trainer: The trainer of the model.
        folder: Folder for the weights.
        points: Fractions of the steps.
    """

    def __init__(self, trainer: RunTrainer, folder: Path, points: Sequence[float]) -> None:
        self._trainer = trainer
        self._folder = folder
        self._points = points
        self._costs: list[dict[str, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step not in {max(1, round(point * state.max_steps)) for point in self._points}:
            return
        meter = self._trainer.meter
        with meter.paused():
            self._folder.mkdir(exist_ok=True)
            self._costs.append(
                {"step": state.global_step, "seconds": round(meter.seconds, 3), "documents_encoded": meter.documents}
            )
            save_model(self._trainer.model, str(self._weights(state.global_step)))

    def measure(self, data: RetrievalData) -> list[dict[str, Any]]:
        """Metrics on the test split at each point, with the cost of training so far. Changes the model's weights."""
        points = []
        for costs in self._costs:
            load_model(self._trainer.model, self._weights(costs["step"]))
            quality = evaluate(self._trainer.model, data, ("test",))["test"]
            points.append({**costs, "test": quality.metrics()})
        return points

    def _weights(self, step: int) -> Path:
        return self._folder / f"{step}.safetensors"
