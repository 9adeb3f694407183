"""Train with early stopping on the ranks of torchrun; each rank writes the step at which it stopped to steps-RANK.

Usage: best_model_job.py FOLDER, with a model in FOLDER/model and the data in FOLDER/set.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from negative_cache.workbench.data import load_data
from negative_cache.workbench.training import driver
from negative_cache.workbench.training.config import RunConfig
from negative_cache.workbench.training.trainer import train_to_the_end


def main(folder: Path) -> None:
    def train_and_write(trainer: Any, *args: Any, **kwargs: Any) -> None:
        train_to_the_end(trainer, *args, **kwargs)
        (folder / f"steps-{os.environ['RANK']}").write_text(str(trainer.state.global_step))

    driver.train_to_the_end = train_and_write
    config = RunConfig(
        data=str(folder / "set"), model=str(folder / "model"), loss="negative-cache", output=str(folder / "out"),
        batch_size=8, cache_size=64, max_steps=40, learning_rate=0.5, eval_steps=2, save_steps=4,
        load_best_model_at_end=True, early_stopping_patience=2, report_to="none",
    )  # fmt: skip
    driver.run(config, load_data(config.data))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
