"""`negative-cache compare`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from negative_cache.workbench.cli import next_steps
from negative_cache.workbench.cli import options as opt
from negative_cache.workbench.cli.config_file import ConfigFile
from negative_cache.workbench.cli.plan import on_random_weights
from negative_cache.workbench.cli.tables import print_comparison
from negative_cache.workbench.cli.terminal import Terminal
from negative_cache.workbench.compare.comparison import RATE_FACTORS, Comparison, parse_losses, parse_rates
from negative_cache.workbench.data.advice import shared_positives
from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.model_names import check_model, learning_rate_rule

_FACTORS = opt.listed(f"{factor:g}" for factor in RATE_FACTORS)


@opt.takes_data_options()
@opt.takes_settings
def compare(
    data: opt.Data,
    output: Annotated[str, typer.Option(help="Folder of the results. The same command continues a comparison in it.")],
    model: opt.Model = "static",
    losses: Annotated[
        str,
        typer.Option(
            help="Comma-separated; NAME:field=value:field=value sets options of one loss. bm25 and zero-shot (the "
            "model before training) are measured without training."
        ),
    ] = "bm25,zero-shot,in-batch,gradcache,memory-bank,negative-cache",
    batch_size: opt.BatchSize = Comparison.batch_size,
    epochs: opt.Epochs = Comparison.epochs,
    max_steps: opt.MaxSteps = None,
    seeds: Annotated[
        int, typer.Option(help="Number of runs of each loss with its best learning rate.")
    ] = Comparison.seeds,
    cache_size: opt.CacheSize = Comparison.cache_size,
    scale: opt.Scale = Comparison.scale,
    num_samples: opt.NumSamples = str(Comparison.num_samples),
    embedding_dtype: opt.EmbeddingDtype = Comparison.embedding_dtype,
    learning_rates: Annotated[
        str | None,
        typer.Option(help=f"Comma-separated. Default: {_FACTORS} times that of the model: {learning_rate_rule()}."),
    ] = None,
    gradcache_factor: Annotated[
        int, typer.Option(help="Factor that multiplies the batch size for gradcache and cached-gist.")
    ] = Comparison.gradcache_factor,
    *,
    settings: dict[str, Any],
    data_options: DataOptions,
    config_file: ConfigFile = None,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Find the loss that is best for your data.

    Quality, time and memory of several losses are compared, each with its best learning rate.
    """
    given = {**locals(), **settings}
    terminal = Terminal(quiet, as_json)
    with terminal.running(when_stopped=lambda: "Run the same command again to continue after the completed runs."):
        comparison = opt.make(
            Comparison, given, losses=parse_losses(losses), learning_rates=parse_rates(learning_rates)
        )
        if not Path(output).exists():  # otherwise the runs that are done need no model
            check_model(model)
        loaded = terminal.load_data(data, data_options)
        with terminal.waiting("Loading libraries ..."):
            from negative_cache.workbench.cli.progress import ComparisonBar
            from negative_cache.workbench.compare.output import write_output
            from negative_cache.workbench.compare.running import compare as compare_losses
            from negative_cache.workbench.compare.table import best_loss, command_of_best
        num_shown, loaded = len(loaded.notes), loaded.with_dev()
        for note in loaded.notes[num_shown:]:
            terminal.note(note)
        lines = shared_positives(loaded, [split for split in ("train", "test") if loaded.has(split)])
        terminal.inform([*on_random_weights(model, loaded.num_pairs("train")), *lines])
        with ComparisonBar(terminal.progress) as bar:
            result = compare_losses(comparison, loaded, bar)
        written = write_output(result, shlex.join(["negative-cache", *sys.argv[1:]]))
        terminal.result(result)
        print_comparison(result, terminal.out)
        terminal.out.print("Written:", *written, soft_wrap=True)
        terminal.inform(
            next_steps.after_compare(comparison, result["losses"], best_loss(result), command_of_best(result))
        )
