"""`negative-cache train`."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from negative_cache.workbench.cli import options as opt
from negative_cache.workbench.cli.tables import metrics_table
from negative_cache.workbench.cli.terminal import BAR_WIDTH, Terminal

LOSS_HELP = (
    "negative-cache, in-batch, gradcache (in-batch with a large --batch-size, in little memory; for a static model the "
    "same as in-batch) or memory-bank (in-batch and a queue of --cache-size stale embeddings, none encoded anew)."
)


def train(
    data: opt.Data,
    output: Annotated[str, typer.Option(help="New folder for the trained model and run.json.")],
    model: opt.Model = "static",
    loss: Annotated[str, typer.Option(help=LOSS_HELP)] = "negative-cache",
    cache_size: opt.CacheSize = 16_384,
    batch_size: opt.BatchSize = 64,
    epochs: opt.Epochs = 3.0,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: one that suits the model.")] = None,
    scale: opt.Scale = 20.0,
    top_k: Annotated[int | None, typer.Option(help="Only the best row of each of k groups of the cache.")] = None,
    num_samples: opt.NumSamples = 1,
    in_batch: Annotated[bool, typer.Option(help="Documents of the batch are negatives of its other queries.")] = True,
    shared: opt.Shared = True,
    num_candidates: opt.NumCandidates = None,
    absolute_margin: Annotated[
        float | None, typer.Option(help="No negatives above the positive's similarity less this.")
    ] = None,
    relative_margin: Annotated[
        float | None, typer.Option(help="No negatives above (1 - this) of the positive's similarity.")
    ] = None,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Also documents against cached queries.")] = False,
    refresh_per_step: Annotated[int, typer.Option(help="Cached documents encoded anew per step, no gradient.")] = 0,
    use_lru: Annotated[
        bool, typer.Option(help="Replace the least recently used cached documents; else the first that came.")
    ] = True,
    embedding_dtype: opt.EmbeddingDtype = "float32",
    seed: Annotated[int, typer.Option(help="Seed of weights, data order and draws.")] = 0,
    eval_steps: Annotated[int | None, typer.Option(help="Evaluate on the dev split every so many steps.")] = None,
    save_steps: Annotated[int, typer.Option(min=0, help="Checkpoint every so many steps; 0 for never.")] = 500,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run, if there is one.")] = False,
    query_column: opt.QueryColumn = None,
    positive_column: opt.PositiveColumn = None,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Train a model and show its retrieval quality before and after."""
    given = dict(locals())
    terminal = Terminal(quiet, as_json)
    with terminal.running(when_stopped=lambda: _how_to_go_on(output)):
        with terminal.waiting("Loading libraries ..."):
            from negative_cache.workbench.config import RunConfig
        config = opt.make(RunConfig, given, save_steps=save_steps or None)
        with terminal.waiting("Loading libraries ..."):
            from negative_cache.workbench.data import load_data
            from negative_cache.workbench.training import finished_run, run
        record = finished_run(config, resume)
        if not record:
            with terminal.waiting(f"Reading {data} ..."):
                loaded = load_data(data, query_column, positive_column)
            with _training_bar(terminal, config.loss) as (progress, told):
                record = run(config, loaded, progress, resume, told)
        if not record:
            return  # rank 0 says it
        terminal.result(record)
        before, after = record["before"], record["after"]
        title = f"Test split: {after['num_queries']:,} queries, {after['num_documents']:,} documents"
        terminal.out.print(metrics_table(title, {"before": before, "after": after}))
        said = f"{record['steps']} steps in {record['seconds']:.1f} s. Model and run.json are in {output}"
        terminal.out.print(said, soft_wrap=True, markup=False)
        terminal.out.print(f"See the run: negative-cache report {output}", soft_wrap=True, markup=False)


def _how_to_go_on(output: str) -> str:
    if not Path(output).with_name(f"{Path(output).name}.partial").exists():
        return "There was no checkpoint yet: nothing is left of the run."
    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    return f"Go on with: {shlex.join(['negative-cache', *arguments, '--resume'])}"


@contextlib.contextmanager
def _training_bar(terminal: Terminal, title: str) -> Iterator[tuple[Callable[..., None], Callable[[int, int], None]]]:
    """Yields what hears of the steps, and what hears of the documents that are encoded to evaluate."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=BAR_WIDTH),
        MofNCompleteColumn(),
        TextColumn("{task.fields[metrics]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=terminal.progress) as bar:
        task = bar.add_task(f"{title}: preparing", total=None, metrics="")
        last: dict[str, Any] = {}

        def told(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, metrics="documents", description=f"{title}: evaluating")

        def progress(step: int, steps: int, logs: dict[str, float]) -> None:
            shown = {"loss": "loss", "cache/staleness": "staleness", "cache/fill": "fill"}
            metrics = [f"{name} {logs[key]:.3g}" for key, name in shown.items() if key in logs]
            room = terminal.progress.width - len(f"{title} {steps}/{steps}  0:00:00 ") - BAR_WIDTH
            while len("  ".join(metrics)) > room:
                metrics.pop()
            last.update(completed=step, total=steps, metrics="  ".join(metrics), description=title)
            bar.update(task, **last)

        yield progress, told
        bar.update(task, **last)
