"""`negative-cache compare`."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

from negative_cache.workbench.cli import options as opt
from negative_cache.workbench.cli.terminal import Terminal


def compare(
    data: opt.Data,
    output: Annotated[str, typer.Option(help="Folder of the results; the same command goes on with what is there.")],
    model: opt.Model = "static",
    losses: Annotated[
        str, typer.Option(help="Separated by commas; NAME:field=value:field=value sets options of one loss.")
    ] = "in-batch,gradcache,memory-bank,negative-cache",
    batch_size: opt.BatchSize = 64,
    epochs: opt.Epochs = 3.0,
    seeds: Annotated[int, typer.Option(help="Runs per loss with its best learning rate.")] = 3,
    cache_size: opt.CacheSize = 16_384,
    scale: opt.Scale = 20.0,
    num_samples: opt.NumSamples = 1,
    embedding_dtype: opt.EmbeddingDtype = "float32",
    learning_rates: Annotated[
        str | None, typer.Option(help="Separated by commas. Default: 0.4, 1 and 2.5 times the model's usual one.")
    ] = None,
    gradcache_factor: Annotated[int, typer.Option(help="The batch of gradcache is so many times as large.")] = 16,
    query_column: opt.QueryColumn = None,
    positive_column: opt.PositiveColumn = None,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Train with several losses and compare quality, time and memory. Each has its best learning rate."""
    given = dict(locals())
    terminal = Terminal(quiet, as_json)
    with terminal.running(when_stopped=lambda: "The same command goes on with the runs that are complete."):
        with terminal.waiting("Loading libraries ..."):
            from negative_cache.workbench.compare import Comparison, parse_losses, parse_rates
            from negative_cache.workbench.compare import compare as compare_losses
            from negative_cache.workbench.compare_report import RunBar, show, write_report
            from negative_cache.workbench.data import load_data
        comparison = opt.make(
            Comparison, given, losses=parse_losses(losses), learning_rates=parse_rates(learning_rates)
        )
        with terminal.waiting(f"Reading {data} ..."):
            loaded = load_data(data, query_column, positive_column)
        with RunBar(terminal.progress) as bar:
            result = compare_losses(comparison, loaded, bar)
        written = write_report(result, shlex.join(["negative-cache", *sys.argv[1:]]))
        terminal.result(result)
        show(result, terminal.out)
        terminal.out.print("Written:", *written, soft_wrap=True)
