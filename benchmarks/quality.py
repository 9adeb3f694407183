"""Compare losses on several data sets and models, each at the learning rate that is best on the dev split.

    python -m benchmarks.quality --data python-code:2 data/nl2bash:3 data/squad:1 --models static --output quality

A data set may be followed by its number of epochs. Runs `negative-cache compare` for each data set and model, each in
its own folder, then prints one table and draws one plot of all. The same command resumes an interrupted comparison.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from negative_cache.workbench.cli.progress import ComparisonBar
from negative_cache.workbench.cli.tables import print_comparison, print_wide
from negative_cache.workbench.compare.comparison import Comparison, parse_losses, parse_rates
from negative_cache.workbench.compare.output import write_output
from negative_cache.workbench.compare.running import compare
from negative_cache.workbench.compare.table import with_spread
from negative_cache.workbench.data import load_data
from negative_cache.workbench.figures import COLOURS, MARKERS, save_figure, style
from negative_cache.workbench.files import write_json

BATCH_SIZES = {"static": 64, "tiny": 32}
EPOCHS = 3.0  # default
METRIC = "MRR@10"
BASELINE = "in-batch"


def main() -> None:
    options = _parser().parse_args()
    losses, rates = parse_losses(options.losses), parse_rates(options.learning_rates)
    console = Console()
    results = []
    for source, epochs in map(source_and_epochs, options.data):
        data = load_data(source)
        for model in options.models:
            comparison = Comparison(
                data=source,
                model=model,
                losses=losses,
                output=str(options.output / f"{data.name}-{Path(model).name}"),
                batch_size=options.batch_size or BATCH_SIZES.get(model, 32),
                epochs=epochs,
                seeds=options.seeds,
                cache_size=options.cache_size,
                learning_rates=rates,
            )
            console.rule(f"{data.name}, {model}", align="left")
            with ComparisonBar(console) as bar:
                results.append(compare(comparison, data, bar))
            print_comparison(results[-1], console)
            write_output(results[-1], shlex.join(["python", "-m", "benchmarks.quality", *sys.argv[1:]]))
    write_json(options.output / "quality.json", {"results": results})
    _show(results, console)
    console.print("Written:", options.output / "quality.json", _draw(results, options.output / "quality.png"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", nargs="+", required=True, help="as for negative-cache compare, optionally with :EPOCHS"
    )
    parser.add_argument("--models", nargs="+", default=["static"])
    parser.add_argument(
        "--losses", default="in-batch,gradcache,memory-bank,negative-cache,negative-cache:num_samples=1"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the results, with one for each data set")
    parser.add_argument("--batch-size", type=int, help="default: 64 for static, else 32")
    parser.add_argument("--cache-size", type=int, default=16_384)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rates", help="separated by commas; default: 0.4, 1 and 2.5 times the usual one")
    return parser


def source_and_epochs(text: str) -> tuple[str, float]:
    source, _, epochs = text.rpartition(":")
    if source and epochs.replace(".", "", 1).isdigit():
        return source, float(epochs)
    return text, EPOCHS


def _show(results: list[dict[str, Any]], console: Console) -> None:
    """Print the MRR@10 of each loss on each data set, and its difference from in-batch in percent."""
    table = Table(title="MRR@10 on the test split, and relative to in-batch", title_justify="left")
    table.add_column("loss", no_wrap=True)
    for result in results:
        table.add_column(f"{_name(result)}\nepochs {result['configuration']['epochs']:g}", justify="right")
    for loss in results[0]["losses"]:
        table.add_row(loss, *(_cell(result["losses"], loss) for result in results))
    print_wide(table, console)


def _cell(losses: dict[str, Any], loss: str) -> str:
    value, baseline = (losses.get(name, {}).get("summary", {}).get(METRIC) for name in (loss, BASELINE))
    if value is None:
        return "failed"
    if loss == BASELINE or baseline is None:
        return with_spread(value)
    return f"{with_spread(value)} {value['mean'] / baseline['mean'] - 1:+.1%}"


def _draw(results: list[dict[str, Any]], path: Path) -> Path:
    """Draw points with error bars, grouped by data set and model."""
    names = list(results[0]["losses"])
    figure = Figure(figsize=(max(7, 2 * len(results) + 3), 5), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(names):
        losses = [result["losses"][name] for result in results]
        values = {place: loss["summary"][METRIC] for place, loss in enumerate(losses) if loss["runs"]}
        axes.errorbar(
            [place + 0.6 * ((number + 0.5) / len(names) - 0.5) for place in values],
            [value["mean"] for value in values.values()],
            yerr=[value["std"] or 0.0 for value in values.values()],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=8,
            capsize=4,
            linestyle="none",
            label=name,
        )
    axes.set_xticks(range(len(results)), [_name(result).replace(", ", "\n") for result in results])
    axes.set_xlim(-0.5, len(results) - 0.5)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("MRR@10 on the test split")
    axes.set_title("Mean and sample standard deviation over seeds")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    style(axes)
    return save_figure(figure, path)


def _name(result: dict[str, Any]) -> str:
    return f"{result['data']['name']}, {Path(result['configuration']['model']).name}"


if __name__ == "__main__":
    main()
