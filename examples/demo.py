"""Demo: train the same model with in-batch negatives and with a negative cache, on code from this environment.

Each run is a `negative-cache train` in its own process, so that peak memory is measured per run. The runs differ only
in the loss.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

QUERIES = (
    "Return the file extension of a path",
    "Compute the inverse of a matrix",
    "Parse a date from a string",
)


def train(loss: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run `negative-cache train`, and return the content of its run.json."""
    output = Path(options.output) / loss
    given = ["--data", options.data, "--model", options.model, "--batch-size", str(options.batch_size)]
    given += ["--epochs", str(options.epochs), "--seed", str(options.seed)]
    if loss == "negative-cache":
        given += ["--cache-size", str(options.cache_size), "--num-samples", str(options.num_samples)]
    given += ["--learning-rate", str(options.learning_rate)] if options.learning_rate else []
    command = [sys.executable, "-m", "negative_cache", "train", "--loss", loss, "--output", str(output), *given]
    subprocess.run(command, check=True)
    return json.loads((output / "run.json").read_text(encoding="utf-8"))


def print_table(runs: dict[str, dict[str, Any]], console: Console) -> None:
    """Print the quality on the test split, time and memory: untrained, in-batch, negative cache."""
    configuration = runs["in-batch"]["configuration"]
    table = Table(
        title=f"{configuration['data']}, batch size {configuration['batch_size']}, "
        f"{configuration['epochs']:g} epochs of {runs['in-batch']['training_pairs']:,} pairs"
    )
    for name in ("training", "MRR@10", "R@100", "seconds", "peak memory"):
        table.add_column(name, justify="left" if name == "training" else "right")
    rows = [("untrained", runs["in-batch"]["before"], None)]
    rows += [(loss.replace("-cache", " cache"), record["after"], record) for loss, record in runs.items()]
    for name, metrics, record in rows:
        cost = (f"{record['seconds']:.0f}", f"{record['peak_memory_bytes'] / 2**30:.2f} GB") if record else ("", "")
        table.add_row(name, f"{metrics['MRR@10']:.3f}", f"{metrics['R@100']:.3f}", *cost)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="python-code")
    parser.add_argument("--model", default="static")
    parser.add_argument("--output", default="demo", help="folder that is emptied first")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--cache-size", type=int, default=16_384)
    parser.add_argument("--num-samples", type=int, default=8, help="number of cached documents to re-encode per query")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-search", action="store_true")
    options = parser.parse_args()
    console = Console()
    shutil.rmtree(options.output, ignore_errors=True)
    runs = {loss: train(loss, options) for loss in ("in-batch", "negative-cache")}
    print_table(runs, console)
    if not options.no_search:
        model = str(Path(options.output) / "negative-cache")
        command = [sys.executable, "-m", "negative_cache", "search", "--model", model, "--data", options.data]
        subprocess.run([*command, "--num-results", "3", *QUERIES], check=True)


if __name__ == "__main__":
    main()
