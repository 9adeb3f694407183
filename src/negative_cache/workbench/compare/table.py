"""The result of a comparison as text: the table, the verdict and the command to train with the best loss."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from negative_cache.workbench.compare.comparison import BASELINES, FIXED_FIELDS
from negative_cache.workbench.compare.running import REPORTED, TESTED
from negative_cache.workbench.counting import counted, counted_queries, listed
from negative_cache.workbench.data import DataOptions
from negative_cache.workbench.evaluation.significance import Difference, p_in_words
from negative_cache.workbench.model_names import about_begin
from negative_cache.workbench.training.config import RunConfig, arguments_of
from negative_cache.workbench.training.record import Metrics, RunRecord

COLUMNS = ("loss", "rate", *REPORTED, "seconds", "documents encoded", "peak memory")
NOTE_ON_STARS = f"* marks those that no other is significantly better than, in {' and '.join(TESTED)}."


def title_of(result: dict[str, Any]) -> str:
    """What was compared, in one line."""
    options, data = result["configuration"], result["data"]
    searched = f"{counted_queries(data['test_queries'], 'test')}, {counted(data['documents'], 'document')}"
    if not trained_losses(result):
        return f"{data['name']}, {options['model']}: {searched}"
    steps = options["max_steps"]
    length = f"epochs {options['epochs']:g}" if steps is None else counted(steps, "step")
    return (
        f"{data['name']}, {options['model']}: batch size {options['batch_size']}, {length}, "
        f"{counted(data['pairs'], 'pair')}; {searched}"
    )


def trained_losses(result: dict[str, Any]) -> list[str]:
    """The losses that are no baselines."""
    return [name for name in result["losses"] if name not in BASELINES]


def missing_losses(result: dict[str, Any]) -> list[str]:
    """The losses that a comparison which was stopped, or still runs, has not finished."""
    return [name for name in result["configuration"]["losses"] if name not in result["losses"]]


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """The cells of the table: a row for each loss, with the headings `COLUMNS`."""
    rows = []
    for name, loss in result["losses"].items():
        if not loss["runs"]:
            rows.append([name, "failed", *[""] * (len(COLUMNS) - 2)])
            continue
        found = loss["summary"]
        qualities = [with_spread(found[key]) + (" *" if name in unbeaten(result, key) else "") for key in REPORTED]
        if name in BASELINES:
            rows.append([name, "not trained", *qualities, "-", "0", "-"])
            continue
        rate = f"{loss['learning_rate']:g}" + (" (edge)" if loss["at_the_edge"] else "")
        if loss["failed_runs"]:
            rate += f" ({counted(len(loss['failed_runs']), 'seed')} failed)"
        costs = [f"{found['seconds']['mean']:,.1f}", f"{found['documents_encoded']['mean']:,.0f}"]
        rows.append([name, rate, *qualities, *costs, gigabytes(found["peak_memory_bytes"]["mean"])])
    return rows


def differences_of(result: dict[str, Any], measure: str) -> list[Difference]:
    """The differences between all pairs of losses in a measure; empty if they were not tested."""
    return [Difference(**found) for found in result["significance"].get(measure, {}).get("differences", [])]


def unbeaten(result: dict[str, Any], measure: str) -> set[str]:
    """The losses that no other loss is significantly better than; empty if the losses were not tested."""
    differences = differences_of(result, measure)
    losses = {loss for found in differences for loss in (found.system, found.baseline)}
    return losses - {found.worse for found in differences if found.is_significant()}


def line_of(found: RunRecord | Metrics) -> str:
    """A run, or the metrics of a baseline, in one line."""
    if not isinstance(found, RunRecord):
        return f"MRR@10 test {found['MRR@10']:.4f}, without training"
    if found.failed is not None:
        return f"failed: {found.failed}"
    dev, test = ((metrics or {})["MRR@10"] for metrics in (found.dev, found.after))
    return (
        f"MRR@10 dev {dev:.4f} test {test:.4f}, {counted(found.steps, 'step')} in {found.seconds:.1f} s, "
        f"{counted(found.documents_encoded, 'document')} encoded, peak {gigabytes(found.peak_memory_bytes)}"
    )


def verdict(result: dict[str, Any]) -> str:
    """Which loss is best, by how much, and whether the difference is significant; empty with fewer than two losses.

    Of a comparison that is not finished, what is left.
    """
    if missing := missing_losses(result):
        return (
            f"Not finished, {' and '.join(missing)} left. If it does not run any more, the same compare command "
            "continues it."
        )
    losses = _ranked(result)
    if len(losses) < 2:
        return ""
    (best, first), (second, next_one) = losses[:2]
    mean, other = (loss["summary"]["MRR@10"]["mean"] for loss in (first, next_one))
    by = f"{mean / other - 1:.1%}" if other else "all"
    sentences = [f"Best: {best}, MRR@10 {mean:.4f}, {by} above {second} ({other:.4f})."]
    if tested := _tests_of(best, [name for name, _ in losses[1:]], result):
        sentences.append(tested)
    if best in BASELINES and (trained := best_loss(result)):
        quality = result["losses"][trained]["summary"]["MRR@10"]["mean"]
        above = [name for name, loss in losses if name in BASELINES and loss["summary"]["MRR@10"]["mean"] >= quality]
        sentences.append(f"No loss is above {' and '.join(above)}; the best one is {trained}, {quality:.4f}.")
    if "zero-shot" in result["losses"]:
        sentences += _about_zero_shot(result["configuration"])
    if best not in BASELINES and len(result["learning_rates"]) == 1 and len(trained_losses(result)) > 1:
        sentences.append(
            "All losses have one learning rate, and each may have a better one; --learning-rates finds it."
        )
    if best not in BASELINES and len(first["runs"]) < 2:
        sentences.append("One seed does not show how much training varies.")
    return " ".join(sentences)


def _tests_of(best: str, others: Sequence[str], result: dict[str, Any]) -> str:
    """Which of the others the best one is significantly better than, in a sentence; empty if nothing was tested."""
    differences = {
        (found.systems - {best}).pop(): found for found in differences_of(result, TESTED[0]) if best in found.systems
    }
    tests = [(found, f"{name} ({p_in_words(found.p_holm)})") for name in others if (found := differences.get(name))]
    worse = listed([text for found, text in tests if found.is_significant()])
    close = listed([text for found, text in tests if not found.is_significant()])
    parts = [worse and f"significantly better than {worse}", close and f"not significantly better than {close}"]
    return f"In {TESTED[0]}, it is {', but '.join(filter(None, parts))}." if tests else ""


def _about_zero_shot(configuration: dict[str, Any]) -> list[str]:
    """What the model before training is, and where it cuts texts, if these are not those of the model as it comes."""
    sentences = []
    if about := about_begin(configuration["model"]):
        sentences.append(f"zero-shot: {about}.")
    if (length := configuration.get("max_seq_length")) is not None:
        sentences.append(f"zero-shot cuts texts at {length} tokens, too; the model as it comes may read more.")
    return sentences


def best_loss(result: dict[str, Any]) -> str:
    """The loss with the highest MRR@10, baselines left out; empty if there is none."""
    return next((name for name, _ in _ranked(result) if name not in BASELINES), "")


def command_of_best(result: dict[str, Any]) -> str:
    """The command that trains with `best_loss`: its learning rate, and all options that are not the defaults.

    Empty if there are only baselines.
    """
    if not (best := best_loss(result)):
        return ""
    loss = result["losses"][best]
    options, comparison = loss["configuration"], result["configuration"]
    words = ["negative-cache", "train", "--data", comparison["data"], "--model", comparison["model"]]
    words += ["--loss", options["loss"], "--learning-rate", f"{loss['learning_rate']:g}"]
    names = {field.name for field in fields(RunConfig)} - FIXED_FIELDS | {"max_steps"}
    words += arguments_of(options, names)
    words += DataOptions(**comparison["data_options"]).arguments()
    return shlex.join([*words, "--output", "MODEL"])


def with_spread(value: dict[str, float | None]) -> str:
    """A mean ± its standard deviation."""
    return f"{value['mean']:.4f}" + ("" if value["std"] is None else f" ± {value['std']:.4f}")


def gigabytes(number: float) -> str:
    """A number of bytes, in GB."""
    return f"{number / 1e9:.2f} GB"


def _ranked(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The losses and baselines with complete runs, by their MRR@10 on the test split, the best first."""
    trained = [(name, loss) for name, loss in result["losses"].items() if loss["runs"]]
    return sorted(trained, key=lambda item: -item[1]["summary"]["MRR@10"]["mean"])
