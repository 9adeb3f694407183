"""The weights of the best evaluation on the dev split, and early stopping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback

from negative_cache.workbench.files import replacing
from negative_cache.workbench.training import processes

CHOICE = "mrr@10"  # of the evaluator on the dev split


class BestWeights(TrainerCallback):
    """Keeps the weights with the best MRR@10 on the dev split, the first ones in a tie, and stops early.

    All that it decides by is in the logs of the trainer, which a checkpoint contains, so a resumed run decides alike.

    Args:
        folder: Folder for the weights.
        patience: Stop after this number of evaluations in a row without a better one; None for no early stopping.
    """

    def __init__(self, folder: Path, patience: int | None) -> None:
        self._folder = folder
        self._patience = patience

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._is_out_of_patience(state):  # it was interrupted after it stopped
            state.max_steps = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_evaluate |= state.global_step >= state.max_steps

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        values = _values(state)
        kept = [values[step] for step in self._steps() if step in values and step != state.global_step]
        if state.is_world_process_zero and all(values[state.global_step] > value for value in kept):
            self._folder.mkdir(exist_ok=True)
            with replacing(self._path(state.global_step)) as temporary:
                save_model(model, str(temporary))
            for step in self._steps():
                if step != state.global_step:
                    self._path(step).unlink()
        control.should_training_stop |= self._is_out_of_patience(state)

    def load(self, model: SentenceTransformer) -> int:
        """Load the best weights into the model; return their step."""
        (step,) = self._steps()
        load_model(model, self._path(step))
        return step

    def _is_out_of_patience(self, state: Any) -> bool:
        values = _values(state)
        best = max(values, key=lambda step: (values[step], -step), default=0)
        num_worse = sum(step > best for step in values)
        return processes.of_first(self._patience is not None and num_worse >= self._patience)

    def _steps(self) -> list[int]:
        return [int(path.stem) for path in self._folder.glob("*.safetensors")]

    def _path(self, step: int) -> Path:
        return self._folder / f"{step}.safetensors"


def _values(state: Any) -> dict[int, float]:
    """Step -> value of the evaluation on the dev split."""
    return {
        row["step"]: value
        for row in state.log_history
        for key, value in row.items()
        if key.startswith("eval_dev_") and key.endswith(CHOICE)
    }
