"""`negative-cache evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from negative_cache.workbench.cli import next_steps
from negative_cache.workbench.cli import options as opt
from negative_cache.workbench.cli.plan import plan_of_evaluation
from negative_cache.workbench.cli.search_command import OF_DOCUMENTS
from negative_cache.workbench.cli.tables import metrics_table, print_wide
from negative_cache.workbench.cli.terminal import Terminal
from negative_cache.workbench.counting import counted, counted_queries
from negative_cache.workbench.data.advice import shared_positives
from negative_cache.workbench.data.options import DataOptions
from negative_cache.workbench.evaluation.defaults import DEFAULT_MEASURES
from negative_cache.workbench.files import check_output
from negative_cache.workbench.model_names import check_trained
from negative_cache.workbench.training.config import RunError, flag_of

if TYPE_CHECKING:
    from negative_cache.workbench.data import RetrievalData
    from negative_cache.workbench.evaluation import EncodingOptions

_OUTPUTS = ("run_out", "qrels_out", "per_query")


@opt.takes_data_options()
@opt.takes_encoding_options
def evaluate(
    model: Annotated[str | None, typer.Option(help=opt.TRAINED_MODEL_HELP)] = None,
    data: Annotated[str | None, typer.Option(help=opt.DATA_HELP)] = None,
    split: Annotated[
        str | None, typer.Option(help="train, dev, test or all. Default: test; all for a file without splits.")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help=f"Default: {DEFAULT_MEASURES}. Also AP, P@5, Success@5 ...")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Judge the search results in a TREC run, without a model.")] = None,
    run_out: Annotated[Path | None, typer.Option(help="Write the search results, as a TREC run.")] = None,
    qrels_out: Annotated[Path | None, typer.Option(help="Write the judgements of the split, as TREC qrels.")] = None,
    per_query: Annotated[Path | None, typer.Option(help="Write the metrics of each query, as JSON.")] = None,
    nanobeir: Annotated[
        str | None, typer.Option(help="Evaluate on NanoBEIR from the hub: all, or names such as msmarco,nq.")
    ] = None,
    *,
    encoding_options: dict[str, Any],
    data_options: DataOptions,
    quiet: opt.Quiet = False,
    as_json: opt.Json = False,
) -> None:
    """Measure the quality of a model or of a TREC run.

    Each query is searched in the whole corpus, or in a sample of it with --eval-documents.
    """
    given = dict(locals())
    terminal = Terminal(quiet, as_json)
    with terminal.running():
        _check(given)
        from negative_cache.workbench.evaluation import EncodingOptions, parse_measures

        encoding = EncodingOptions(**encoding_options)
        if nanobeir is not None:
            _evaluate_nanobeir(terminal, str(model), nanobeir, encoding)
            return
        measures = parse_measures(DEFAULT_MEASURES if metrics is None else metrics)
        if model is not None:
            check_trained(model)
        _evaluate(terminal, given, measures, encoding)


def _evaluate(
    terminal: Terminal, given: Mapping[str, Any], measures: dict[str, Any], encoding: EncodingOptions
) -> None:
    """Evaluate on a dataset."""
    from negative_cache.workbench.evaluation import trec

    run = None if given["run"] is None else trec.read_run(given["run"])
    data = terminal.load_data(given["data"], given["data_options"])
    with terminal.waiting("Loading libraries ..."):
        from negative_cache.workbench.cli.progress import counting_bar
        from negative_cache.workbench.data.retrieval_data import notes_on_judged
        from negative_cache.workbench.evaluation import depth_of, judge_split, matching_run, search_splits
        from negative_cache.workbench.evaluation.systems import corpus_of
        from negative_cache.workbench.files import write_json
        from negative_cache.workbench.training.provenance import configuration_of_run_with
    training = None if given["model"] is None else configuration_of_run_with(given["model"], given["data"], data)
    split = split_of(terminal, data, given["data"], given["split"], given["model"], training)
    if training is not None:
        _note_other_documents(terminal, training, given["model"], data)
    judged = data.graded(split)
    for note in notes_on_judged(data, split) if split not in ("dev", "test") else ():  # which loading has noted
        terminal.note(note)
    if given["qrels_out"] is not None:
        trec.write_qrels(given["qrels_out"], judged)
    if given["run_out"] is not None:
        trec.check_ids(chain(judged, data.part(split).corpus))
    if run is None:
        terminal.inform([plan_of_evaluation(data, split), *shared_positives(data, [split])])
        model = terminal.load_model(given["model"])
        with counting_bar(terminal, "Encoding documents") as on_progress:
            run = search_splits(model, data, (split,), depth_of(measures), encoding, on_progress)[split]
    else:
        run, notes = matching_run(data, split, run)
        for note in notes:
            terminal.note(note)
    quality = judge_split(data, split, run, measures)
    if given["per_query"] is not None:
        write_json(given["per_query"], {"corpus": corpus_of(data, split), **quality.per_query})
    if given["run_out"] is not None:
        trec.write_run(given["run_out"], run)
    metrics = quality.metrics()
    terminal.result(metrics)
    sizes = f"{counted_queries(metrics['num_queries'])}, {counted(metrics['num_documents'], 'document')}"
    print_wide(metrics_table(f"{data.name}, {split}: {sizes}", {split: metrics}), terminal.out)
    written = [str(given[name]) for name in _OUTPUTS if given[name] is not None]
    if written:
        terminal.say(f"Written: {' '.join(written)}")
    terminal.inform(next_steps.after_evaluate(given, split, OF_DOCUMENTS))


def _evaluate_nanobeir(terminal: Terminal, model: str, names: str, encoding: EncodingOptions) -> None:
    with terminal.waiting("Loading libraries ..."):
        from negative_cache.workbench.cli.progress import counting_bar
        from negative_cache.workbench.evaluation.nanobeir import evaluate_nanobeir, parse_names

    chosen = parse_names(names)
    trained = terminal.load_model(model)
    with counting_bar(terminal, "Evaluating on NanoBEIR") as on_progress:
        result = evaluate_nanobeir(trained, chosen, encoding, on_progress)
    terminal.result(result)
    print_wide(metrics_table("NanoBEIR", result), terminal.out)
    terminal.inform(next_steps.after_nanobeir(model))


def split_of(
    terminal: Terminal,
    data: RetrievalData,
    source: str,
    split: str | None,
    model: str | None = None,
    training: Mapping[str, Any] | None = None,
) -> str:
    """The split to evaluate on.

    Rows without splits of their own are all evaluated, unless the model was trained with them: then those that training
    held out are.

    Args:
        terminal: Where a note says which of the rows are evaluated.
        data: The dataset.
        source: Its name or path.
        split: The split that is given; None if none is.
        model: Name or path of the model; None if there is none.
        training: The configuration with which it was trained on this dataset; None if it was not.
    """
    if split is not None:
        return split
    if not data.splits_by_hash:
        return "test"
    total = data.num_pairs("all")
    if training is None:
        terminal.note(
            f"Measured on all {counted(total, 'pair')} of {source}. --split test measures the tenth that train holds "
            "out."
        )
        return "all"
    if any(training.get("data_options", {}).get(name) is not None for name in ("dev", "test")):
        terminal.note(
            f"Warning: Measured on all {counted(total, 'pair')} of {source}, with which {model} was trained: the "
            "quality is too high. Give other data."
        )
        return "all"
    terminal.note(
        f"Measured on the test split of {source}, {data.num_pairs('test'):,} of its {total:,} pairs, because {model} "
        "was trained with others of them. --split all measures all."
    )
    return "test"


def _note_other_documents(terminal: Terminal, training: Mapping[str, Any], model: str, data: RetrievalData) -> None:
    """Say if the evaluations of the run that trained the model searched another number of documents."""
    all_documents = len(data.corpus)
    limits = [training.get("data_options", {}).get("eval_documents"), data.eval_documents]
    before, now = (all_documents if limit is None else min(limit, all_documents) for limit in limits)
    if before != now:
        said = ["all documents" if limit is None else f"--eval-documents {limit}" for limit in limits]
        terminal.note(
            f"train measured {model} with {said[0]}, and this is with {said[1]}: do not compare the two. In more "
            "documents, values are lower."
        )


def _check(given: Mapping[str, Any]) -> None:
    """Raise RunError unless the options go together and the outputs can be written."""
    used = {name for name in ("model", "data", "run", "nanobeir") if given[name] is not None}
    if used not in ({"model", "data"}, {"run", "data"}, {"model", "nanobeir"}):
        raise RunError(
            "Give --model and --data; or --run and --data for a TREC run; or --model and --nanobeir. Got "
            f"{' and '.join(f'--{name}' for name in sorted(used)) or 'none of them'}."
        )
    without_effect: dict[str, list[str]] = {
        "nanobeir": ["split", "metrics", *_OUTPUTS],
        "run": list(given["encoding_options"]),
    }
    for option, others in without_effect.items():
        values = {**given, **given["encoding_options"]}
        if option in used and (found := [name for name in others if values[name] is not None]):
            raise RunError(f"{flag_of(found[0])} has no effect with --{option}. Leave it out.")
    if "nanobeir" in used and given["data_options"] != DataOptions():
        raise RunError("--nanobeir has data of its own: options of --data have no effect. Leave them out.")
    if "nanobeir" in used and "," in (given["encoding_options"]["device"] or ""):
        raise RunError(f"--nanobeir runs on one device; --device is {given['encoding_options']['device']!r}.")
    _check_files({name: given[name] for name in ("run", *_OUTPUTS) if given[name] is not None})
    for name in _OUTPUTS:
        if given[name] is not None:
            check_output(flag_of(name), given[name], (given["data"], *given["data_options"].sources()))


def _check_files(files: Mapping[str, Path]) -> None:
    """Raise RunError unless `--run` is a file, and the outputs are others."""
    if "run" in files and not files["run"].is_file():
        raise RunError(f"--run {files['run']} is not a file. Give a TREC run, such as evaluate --run-out writes.")
    of_path: dict[Path, str] = {}
    for name, path in files.items():
        if (other := of_path.setdefault(path.resolve(), name)) != name:
            raise RunError(f"{flag_of(name)} and {flag_of(other)} are the same file, {path}. Give another one.")
