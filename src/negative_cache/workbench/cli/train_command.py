"""`negative-cache train`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from negative_cache.workbench.cli import next_steps
from negative_cache.workbench.cli import options as opt
from negative_cache.workbench.cli.config_file import ConfigFile
from negative_cache.workbench.cli.plan import advice_on_data, plan_of_training
from negative_cache.workbench.cli.search_command import OF_DOCUMENTS
from negative_cache.workbench.cli.tables import metrics_table, print_wide
from negative_cache.workbench.cli.terminal import Terminal
from negative_cache.workbench.counting import counted, counted_queries
from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.model_names import LEARNING_RATES, about_begin, check_model, learning_rate_rule
from negative_cache.workbench.suggestions import unfinished_folder
from negative_cache.workbench.training.config import MINED_RELATIVE_MARGIN, RunConfig
from negative_cache.workbench.training.record import check_output_folder

if TYPE_CHECKING:
    from negative_cache.workbench.training.record import RunRecord

LOSS_HELP = (
    "negative-cache, in-batch, gradcache (in-batch with a large --batch-size in little memory; with a static model the "
    "same as in-batch), memory-bank (in-batch and a queue of --cache-size stale embeddings, without re-encoding), "
    "mined (in-batch with negatives that the model finds in the corpus), gist (in-batch without negatives that a guide "
    "finds more similar than the positive) or cached-gist (the same with a large --batch-size in little memory)."
)


@opt.takes_data_options()
@opt.takes_settings
def train(
    data: opt.Data,
    output: Annotated[str, typer.Option(help="New folder for the trained model and run.json.")],
    model: opt.Model = "static",
    loss: Annotated[str, typer.Option(help=LOSS_HELP)] = "negative-cache",
    cache_size: opt.CacheSize = RunConfig.cache_size,
    batch_size: opt.BatchSize = RunConfig.batch_size,
    epochs: opt.Epochs = RunConfig.epochs,
    max_steps: opt.MaxSteps = None,
    learning_rate: Annotated[
        float | None, typer.Option(help=f"Peak of the learning rate of AdamW. Default: {learning_rate_rule()}.")
    ] = None,
    scale: opt.Scale = RunConfig.scale,
    num_samples: opt.NumSamples = str(RunConfig.num_samples),
    in_batch: Annotated[
        bool, typer.Option(help="Use the batch's documents as negatives of its other queries.")
    ] = RunConfig.in_batch,
    shared: opt.Shared = RunConfig.shared,
    absolute_margin: Annotated[
        float | None, typer.Option(help="Exclude documents whose similarity is above the positive's minus this.")
    ] = None,
    relative_margin: Annotated[
        float | None,
        typer.Option(
            help="The same with this fraction of the positive's similarity. Default with mined: "
            f"{MINED_RELATIVE_MARGIN:g}."
        ),
    ] = None,
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="Average with the loss of documents against cached queries.")
    ] = False,
    refresh_per_step: Annotated[
        int, typer.Option(help="Number of cached documents to re-encode without gradient per step.")
    ] = RunConfig.refresh_per_step,
    use_lru: Annotated[
        bool, typer.Option(help="Replace the least recently used cached documents, otherwise those stored first.")
    ] = RunConfig.use_lru,
    embedding_dtype: opt.EmbeddingDtype = RunConfig.embedding_dtype,
    fill_from_corpus: Annotated[
        bool, typer.Option("--fill-from-corpus", help="Encode the whole corpus into the cache before training.")
    ] = False,
    guide: Annotated[
        str | None,
        typer.Option(help="Model that detects false negatives with gist. Default: the model before training."),
    ] = None,
    num_negatives: Annotated[int, typer.Option(help="Negatives to mine per query.")] = RunConfig.num_negatives,
    range_min: Annotated[
        int, typer.Option(help="Skip this number of the most similar documents in mining.")
    ] = RunConfig.range_min,
    range_max: Annotated[
        int, typer.Option(help="Mine from this number of the most similar documents.")
    ] = RunConfig.range_max,
    sampling_strategy: Annotated[
        str, typer.Option(help="Mine the most similar documents (top), or a random choice of the range (random).")
    ] = RunConfig.sampling_strategy,
    mining_rounds: Annotated[
        int, typer.Option(help="How often negatives are mined, evenly over training.")
    ] = RunConfig.mining_rounds,
    mining_start: Annotated[
        float | None,
        typer.Option(
            help="Mine first after this fraction of the steps. Default: 0, or 1 / (rounds + 1) with "
            f"{' and '.join(LEARNING_RATES)}, which begin with random weights."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights, the data order and the sampling.")] = RunConfig.seed,
    no_eval: Annotated[
        bool, typer.Option("--no-eval", help="Do not evaluate before and after training, such as on a huge corpus.")
    ] = False,
    save_steps: Annotated[
        int, typer.Option(min=0, help="Steps between checkpoints; 0 for no checkpoints.")
    ] = RunConfig.save_steps or 0,
    report_to: Annotated[
        str, typer.Option(help="Programs that get the logs: tensorboard, wandb, mlflow ..., or none.")
    ] = RunConfig.report_to,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run, if there is one.")] = False,
    export_negatives: Annotated[
        Path | None, typer.Option(help="Write the training pairs with hard negatives from the cache, as JSON lines.")
    ] = None,
    *,
    settings: dict[str, Any],
    data_options: DataOptions,
    config_file: ConfigFile = None,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Train a model, and measure it before and after training.

    The quality is that of the test split, or of the dev split if there is no test split.
    """
    given = {**locals(), **settings}
    terminal = Terminal(quiet, as_json)
    with terminal.running(when_stopped=lambda: _how_to_continue(output)):
        config = opt.make(RunConfig, given, save_steps=save_steps or None)
        check_output_folder(output, resume)
        if not resume:  # a resumed run has its model
            check_model(model)
        loaded = terminal.load_data(data, data_options)
        with terminal.waiting("Loading libraries ..."):
            from negative_cache.workbench.cli.progress import training_bar
            from negative_cache.workbench.training.driver import RunOptions, finished_run, run
        is_finished = finished_run(config, resume) is not None
        if is_finished:
            record = run(config, loaded, resume=True)  # checks that the data is the same
            if export_negatives is not None:
                terminal.note(f"{export_negatives} is not written: the run was finished before, without its cache.")
        else:
            plan = plan_of_training(config, loaded, measures=not no_eval)
            terminal.inform([plan, *advice_on_data(config, loaded, not no_eval)])
            with training_bar(terminal, config.loss) as (on_step, on_progress):
                options = RunOptions(not no_eval, not no_eval, export_negatives=export_negatives)
                record = run(config, loaded, options, resume=resume, on_step=on_step, on_progress=on_progress)
        if record is not None:
            _show(terminal, record, output)
            if export_negatives is not None and not is_finished:
                terminal.say(f"The training pairs with hard negatives are in {export_negatives}")
            terminal.inform(next_steps.after_train(config, record, loaded, OF_DOCUMENTS))


def _show(terminal: Terminal, record: RunRecord, output: str) -> None:
    terminal.result(asdict(record))
    for split, measured in (
        ("Test", {"before": record.before, "after": record.after}),
        ("Dev", {"after": record.dev}),
    ):
        if rows := {when: metrics for when, metrics in measured.items() if metrics is not None}:
            sizes = rows["after"]
            title = (
                f"{split} split: {counted_queries(sizes['num_queries'])}, {counted(sizes['num_documents'], 'document')}"
            )
            print_wide(metrics_table(title, rows), terminal.out)
    if record.before is not None and (before := about_begin(record.configuration["model"])):
        terminal.say(f"before: {before}")
    if (length := record.configuration["max_seq_length"]) is not None:
        terminal.say(f"Texts are cut at {length} tokens before and after training, and by the saved model.")
    terminal.say(f"{counted(record.steps, 'step')} in {record.seconds:.1f} s. The model and run.json are in {output}")
    if record.best_step is not None:
        terminal.say(f"The model is that of step {record.best_step}, the best on the dev split.")


def _how_to_continue(output: str) -> str:
    if not unfinished_folder(output).exists():
        return "There was no checkpoint yet, so nothing is left of the run."
    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    return f"Continue with: {shlex.join(['negative-cache', *arguments, '--resume'])}"
