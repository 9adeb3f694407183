"""The result of a comparison as text: the table, the verdict and the command to train with the best loss."""

from __future__ import annotations

import shlex
from dataclasses import fields
from typing import Any

from negative_cache.workbench.compare.comparison import FIXED_FIELDS
from negative_cache.workbench.compare.running import REPORTED
from negative_cache.workbench.data import DataOptions
from negative_cache.workbench.training.config import RunConfig, flag_of
from negative_cache.workbench.training.record import RunRecord

COLUMNS = ("loss", "rate", *REPORTED, "seconds", "documents encoded", "peak memory")


def title_of(result: dict[str, Any]) -> str:
    """What was compared, in one line."""
    options, data = result["configuration"], result["data"]
    return (
        f"{data['name']}, {options['model']}: batch size {options['batch_size']}, epochs {options['epochs']:g}, "
        f"{data['pairs']:,} pairs; {data['test_queries']:,} test queries, {data['documents']:,} documents"
    )


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """The cells of the table: a row for each loss, with the headings `COLUMNS`."""
    rows = []
    for name, loss in result["losses"].items():
        if not loss["runs"]:
            rows.append([name, "failed", *[""] * (len(COLUMNS) - 2)])
            continue
        found = loss["summary"]
        rate = f"{loss['learning_rate']:g}" + (" (edge)" if loss["at_the_edge"] else "")
        if loss["failed_runs"]:
            rate += f" ({len(loss['failed_runs'])} seeds failed)"
        qualities = [with_spread(found[key]) for key in REPORTED]
        costs = [f"{found['seconds']['mean']:,.1f}", f"{found['documents_encoded']['mean']:,.0f}"]
        rows.append([name, rate, *qualities, *costs, gigabytes(found["peak_memory_bytes"]["mean"])])
    return rows


def line_of(record: RunRecord) -> str:
    """A run in one line."""
    if record.failed is not None:
        return f"failed: {record.failed}"
    dev, test = ((metrics or {})["MRR@10"] for metrics in (record.dev, record.after))
    return (
        f"MRR@10 dev {dev:.4f} test {test:.4f}, {record.steps:,} steps in {record.seconds:.1f} s, "
        f"{record.documents_encoded:,} documents encoded, peak {gigabytes(record.peak_memory_bytes)}"
    )


def verdict(result: dict[str, Any]) -> str:
    """Which loss is best, and by how much, in one sentence; empty with fewer than two losses."""
    losses = _ranked(result)
    if len(losses) < 2:
        return ""
    (best, first), (second, next_one) = losses[:2]
    found, other = first["summary"]["MRR@10"], next_one["summary"]["MRR@10"]
    lead = found["mean"] - other["mean"]
    spread = ((found["std"] or 0) ** 2 + (other["std"] or 0) ** 2) ** 0.5
    seeds = min(len(first["runs"]), len(next_one["runs"]))
    doubt = ""
    if seeds < 2:
        doubt = "; one seed cannot show whether that is chance"
    elif lead < 2 * spread / seeds**0.5:
        doubt = "; with this spread over the seeds, that may be chance"
    by = f"{lead / other['mean']:.1%}" if other["mean"] else "all"
    return f"Best: {best}, MRR@10 {found['mean']:.4f}, {by} above {second} ({other['mean']:.4f}){doubt}."


def command_of_best(result: dict[str, Any]) -> str:
    """The command that trains with the best loss: its learning rate, and all options that are not the defaults."""
    _, loss = _ranked(result)[0]
    options, comparison = loss["configuration"], result["configuration"]
    words = ["negative-cache", "train", "--data", comparison["data"], "--model", comparison["model"]]
    words += ["--loss", options["loss"], "--learning-rate", f"{loss['learning_rate']:g}"]
    for field in fields(RunConfig):
        value, flag = options.get(field.name, field.default), flag_of(field.name)
        if field.name in FIXED_FIELDS - {"epochs"} or value == field.default:
            continue
        if isinstance(field.default, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    for field in fields(DataOptions):
        if (value := comparison["data_options"][field.name]) != field.default:
            words += [flag_of(field.name)] if value is True else [flag_of(field.name), str(value)]
    return shlex.join([*words, "--output", "MODEL"])


def with_spread(value: dict[str, float | None]) -> str:
    """A mean ± its standard deviation."""
    return f"{value['mean']:.4f}" + ("" if value["std"] is None else f" ± {value['std']:.4f}")


def gigabytes(number: float) -> str:
    """A number of bytes, in GB."""
    return f"{number / 1e9:.2f} GB"


def _ranked(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The losses with complete runs, by their MRR@10 on the test split, the best first."""
    trained = [(name, loss) for name, loss in result["losses"].items() if loss["runs"]]
    return sorted(trained, key=lambda item: -item[1]["summary"]["MRR@10"]["mean"])
