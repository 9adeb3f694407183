"""The effect of document ids on quality: the same training with judged labels, with hashes of tokens, and without ids.

    python -m benchmarks.ids --data python-code:2 data/squad:1

The loss has num_samples=1. Without ids (a new label for each pair), a query's own document, cached in an earlier step,
is one of its negatives, and a document has one row for each time it was seen.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from datasets import Dataset
from rich.console import Console
from rich.table import Table

from benchmarks.quality import METRIC, source_and_epochs
from negative_cache.workbench.data import RetrievalData, load_data
from negative_cache.workbench.evaluation import evaluate
from negative_cache.workbench.models import load_model
from negative_cache.workbench.training.config import RunConfig
from negative_cache.workbench.training.trainer import make_trainer

FORMS = ("all relevant documents", "the tokens' hash", "none")


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.ids", description=__doc__)
    parser.add_argument("--data", nargs="+", required=True, help="as for negative-cache train, optionally with :EPOCHS")
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    console = Console()
    table = Table("data", *FORMS, title=f"{METRIC}, static, B=64, by the source of document ids")
    for source, epochs in map(source_and_epochs, options.data):
        data = load_data(source)
        cells = []
        for form in FORMS:
            found = [_quality(data, form, epochs, options.learning_rate, seed) for seed in range(options.seeds)]
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            cells.append(f"{statistics.fmean(found):.3f} ± {spread:.3f}")
            console.print(f"{data.name}, {form}: {cells[-1]}")
        table.add_row(data.name, *cells)
    console.print(table)


def _quality(data: RetrievalData, form: str, epochs: float, learning_rate: float, seed: int) -> float:
    """Quality on the test split after training with ids of this form."""
    training_set = _training_set(data, form)
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            data=data.name, model="static", loss="negative-cache", num_samples=1, output=folder, epochs=epochs,
            learning_rate=learning_rate, seed=seed, save_steps=None,
        )  # fmt: skip
        model = load_model(config.model, data.training_texts(), seed)
        make_trainer(Path(folder), config, training_set, model).train()
        return float(evaluate(model, data, ("test",))["test"].metrics()[METRIC])


def _training_set(data: RetrievalData, form: str) -> Dataset:
    rows = data.training_set()
    if form == FORMS[0]:
        return rows
    rows = rows.select_columns(["anchor", "positive"])
    return rows if form == FORMS[1] else rows.add_column("label", list(range(len(rows))))


if __name__ == "__main__":
    main()
