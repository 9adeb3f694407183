"""What to do after a command: a line for each suggestion, which ends with a command to copy."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from negative_cache.workbench.cli.examples import EXAMPLES
from negative_cache.workbench.cli.plan import FEW_PAIRS
from negative_cache.workbench.compare.comparison import BASELINES, FIXED_FIELDS, Comparison
from negative_cache.workbench.data.advice import TOO_FEW_PAIRS
from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.model_names import DISTILLED, distilled_from, is_from_scratch, is_static
from negative_cache.workbench.training.config import RunConfig, arguments_of, flag_of, has_effect
from negative_cache.workbench.training.record import RECORD, RunRecord

if TYPE_CHECKING:
    from negative_cache.workbench.data import RetrievalData

QUERY, NEW_MODEL, MEASURED, OWN_DATA = "your query", "my-model", "baselines", "my-pairs.csv"
PRETRAINED = "all-MiniLM-L6-v2"
_CACHE_WAITED = (
    "The cache did not count in so few steps, which trained as --loss in-batch does: --num-samples auto waits until "
    "in-batch negatives represent the cache badly. Train longer, or give --num-samples 1."
)


def command(name: str, *words: object, **options: object) -> str:
    """A command as text; `options` that are None are left out."""
    given = [word for option, value in options.items() if value is not None for word in (flag_of(option), value)]
    return shlex.join(["negative-cache", name, *map(str, words), *map(str, given)])


def after_data(
    source: str, options: DataOptions, data: RetrievalData, model: str | None, of_documents: Iterable[str]
) -> Iterator[str]:
    """After `data`: measure what a trained model must beat, and train; or what else there is enough data for.

    Args:
        source: See `load_data`.
        options: How it was read.
        data: The data.
        model: The model that the user has named; None for none.
        of_documents: The options of the data that `search` takes.
    """
    given, trained = ("--data", source, *options.arguments()), model or PRETRAINED
    pairs = data.num_pairs("train") if data.has("train") else 0
    if 0 < pairs < TOO_FEW_PAIRS:
        search = command("search", QUERY, "--data", source, *options.arguments(of_documents), model=trained)
        yield f"To search it with a model that needs no training: {search}"
        yield f"To train all the same: {command('train', *given, model=trained, output=NEW_MODEL)}"
    elif pairs:
        if data.has("test"):
            measure = command("compare", *given, model=trained, losses=",".join(BASELINES), output=MEASURED)
            yield f"To measure what a trained model must beat, BM25 and an encoder that is not trained: {measure}"
        if model is None and pairs >= FEW_PAIRS:
            static = command("train", *given, model=f"{DISTILLED}{PRETRAINED}", output=NEW_MODEL)
            yield f"To train a static model in minutes, which may be worse than the encoder it is made from: {static}"
        else:
            yield f"To train on it: {command('train', *given, model=trained, output=NEW_MODEL)}"
    elif data.has("test"):
        yield f"To evaluate a model on it: {command('evaluate', *given, model=trained)}"


def after_train(
    config: RunConfig, record: RunRecord, data: RetrievalData, of_documents: Iterable[str]
) -> Iterator[str]:
    """After `train`.

    Args:
        config: The configuration.
        record: The record of the run.
        data: The data.
        of_documents: The options of the data that `search` takes.
    """
    model, options = ("--model", config.output), config.data_options
    of_data = ("--data", config.data, *options.arguments())
    split = next((split for split in ("test", "dev") if data.has(split)), None)
    if record.before is not None and record.after is not None:
        if record.before["MRR@10"] > 0.995:
            yield f"MRR@10 was {record.before['MRR@10']:.4g} before training: the test is too easy to show a gain."
        elif record.after["MRR@10"] <= record.before["MRR@10"]:
            rate = record.configuration["learning_rate"]
            yield (
                f"Training did not raise MRR@10. Another learning rate, such as {rate / 3:.1g} instead of {rate:g}, "
                "more steps or longer texts may (docs/troubleshooting-quality.md)."
            )
        yield f"To test whether the difference is more than chance: {command('significance', config.output)}"
    elif split is not None:
        yield f"To evaluate it: {command('evaluate', *model, *of_data, split=split)}"
    base = PRETRAINED if is_from_scratch(config.model) else distilled_from(config.model)
    if record.after is not None and base is not None:
        words = ("--model", base, *of_data, "--split", split, "--per-query", f"{Path(base).name}.json")
        yield f"To compare with {base} as it is: {command('evaluate', *words)}"
    if record.cache_waited:
        yield _CACHE_WAITED
    if record.after is not None and config.loss == "negative-cache":
        yield from _what_the_cache_adds(config, record)
    yield f"To see curves and examples: {command('report', config.output)}"
    search = command("search", QUERY, *model, "--data", config.data, *options.arguments(of_documents))
    yield f"To use it: SentenceTransformer({config.output!r}) in Python, or {search}"


def _what_the_cache_adds(config: RunConfig, record: RunRecord) -> Iterator[str]:
    """How to compare a run with in-batch negatives, with its settings.

    A static model trains in minutes, so each loss gets its best learning rate. An encoder is trained once more, at the
    learning rate of the run.
    """
    given = asdict(config)
    words = ["--data", config.data, *config.data_options.arguments(), "--model", config.model]
    if is_static(config.model):
        shared = {field.name for field in fields(Comparison)}
        words += arguments_of(given, shared - {"data", "model", "output", "data_options"})
        own = (field for field in fields(config) if field.name not in shared | FIXED_FIELDS)
        settings = (f"{field.name}={given[field.name]}" for field in own if given[field.name] != field.default)
        losses = f"bm25,zero-shot,in-batch,{':'.join(['negative-cache', *settings])}"
        compare = command("compare", *words, losses=losses, seeds=1, output=f"{_bare(config.output)}-comparison")
        yield f"To see what the cache adds to it, with six to ten trainings like this one: {compare}"
    else:
        used = {field.name for field in fields(config) if has_effect("in-batch", field.name)}
        words += arguments_of(given, used - {"data", "model", "loss", "output", "data_options", "learning_rate"})
        rate, other = f"{record.configuration['learning_rate']:g}", f"{_bare(config.output)}-in-batch"
        again = command("train", *words, loss="in-batch", learning_rate=rate, output=other)
        yield f"To see what the cache adds to it, train without it: {again}"
        yield f"And then compare both: {command('significance', config.output, other)}"


def _bare(output: str) -> str:
    return output.rstrip("/")


def after_evaluate(given: Mapping[str, Any], split: str, of_documents: Iterable[str]) -> Iterator[str]:
    """After `evaluate` with --data.

    Args:
        given: The options of the command.
        split: The split that was evaluated.
        of_documents: The options of the data that `search` takes.
    """
    source, options = given["data"], given["data_options"]
    if given["run"] is not None:
        others = ("significance", given["run"], "OTHER.run", "--data", source, *options.arguments())
        yield f"To test it against another run: {command(*others, split=split)}"
        return
    if given["per_query"] is not None:
        yield f"To test it against another model: {command('significance', given['per_query'], 'OTHER.json')}"
    words = ("--model", given["model"], "--data", source, *options.arguments(of_documents))
    yield f"To search with it: {command('search', QUERY, *words, **given['encoding_options'])}"


def after_nanobeir(model: str) -> Iterator[str]:
    """After `evaluate` with --nanobeir."""
    yield f"To evaluate it on data of your own: {command('evaluate', '--model', model, '--data', OWN_DATA)}"


def after_search(given: Mapping[str, Any]) -> Iterator[str]:
    """After `search` with --data; `given` are the options of the command."""
    from negative_cache.workbench.training.provenance import configuration_of_run_with

    words = ("--model", given["model"], "--data", given["data"], *given["data_options"].arguments())
    training = configuration_of_run_with(given["model"], given["data"]) or {}
    sample = training.get("data_options", {}).get("eval_documents")  # so that the result is comparable with train's
    evaluate = command("evaluate", *words, eval_documents=sample, **given["encoding_options"])
    yield f"To measure how good the results are: {evaluate}"


def after_significance(runs: Sequence[str], of_data: Iterable[str]) -> Iterator[str]:
    """After `significance`: the report of the folders among the runs, or the same test with further seeds of the files.

    Args:
        runs: The runs that were given.
        of_data: The options of the judgements.
    """
    from negative_cache.workbench.report.folders import has_results

    paths = [path for run in runs for path in (run if Path(run).exists() else run.partition("=")[2]).split(",")]
    folders = [path for path in paths if has_results(Path(path))]
    if folders:
        output = "report.html" if len(folders) > 1 else None
        yield f"To see curves and examples: {command('report', *folders, output=output)}"
    elif all(Path(run).is_file() for run in runs):
        names = (Path(run).name.partition(".") for run in runs)
        seeds = (
            f"{name}={run},{name}-seed-1{dot}{suffix}" for run, (name, dot, suffix) in zip(runs, names, strict=True)
        )
        yield f"To test the means over several seeds: {command('significance', *seeds, *of_data)}"


def after_report(written: Path) -> Iterator[str]:
    """After `report`."""
    yield f"To open it: {shlex.join(['python', '-m', 'webbrowser', written.resolve().as_uri()])}"


def after_compare(comparison: Comparison, losses: Mapping[str, Any], best: str, training: str) -> Iterator[str]:
    """After `compare`.

    Args:
        comparison: The comparison.
        losses: The entry `losses` of its result.
        best: The best of the losses; empty if none was trained.
        training: The command that trains with it.
    """
    folders = (Path(comparison.output, "runs", run["folder"]) for loss in losses.values() for run in loss["runs"])
    if any(RunRecord.read(folder).cache_waited for folder in folders if (folder / RECORD).is_file()):
        yield _CACHE_WAITED
    if best:
        yield f"To train with {best}, the best of the losses: {training}"
        yield f"To see curves and examples: {command('report', comparison.output)}"
        return
    words = ["--data", comparison.data, *comparison.data_options.arguments(), "--model", comparison.model]
    shared = {field.name for field in fields(Comparison)}
    words += arguments_of(asdict(comparison), shared - {"data", "model", "output", "data_options"})
    measured = []
    for name, loss in losses.items():
        seeds = [f"{_bare(comparison.output)}/runs/{run['folder']}" for run in loss["runs"]]
        measured += [f"{name}={','.join(seeds)}"] if len(seeds) > 1 else seeds
    shorter = "" if is_static(comparison.model) else " (on a CPU, docs/first-fine-tuning.md has shorter settings)"
    yield f"To train a model that should be better{shorter}: {command('train', *words, output=NEW_MODEL)}"
    yield f"And then to test whether it is: {command('significance', NEW_MODEL, *measured)}"


def after_doctor(missing: Mapping[str, list[str]]) -> Iterator[str]:
    """After `doctor`; `missing` has the missing packages of each extra."""
    if missing.get("train"):
        yield "To install what training needs: pip install 'negative-cache[train]'"
    else:
        yield f"To train a first model, on the functions of the installed packages: {EXAMPLES['train'][0]}"
