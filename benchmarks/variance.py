"""`variance`: distance of the gradient of one step from the exact gradient, for each estimator, on real texts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import estimators_tried as tried
from benchmarks.budget_theory import theory_table
from benchmarks.gradients import Errors, Objective, Tried, encode_all, make_batch, measure, of_library, of_tried
from benchmarks.report import COLOURS, MARKERS, Report, Row, Table, style, verdict
from benchmarks.sizes import VARIANCE_TARGETS, Case, SizeSet, VarianceSizes
from benchmarks.stages import Corpus, Stage, load_corpus, train
from benchmarks.timing import progress
from negative_cache import estimators

LARGEST_SHOWN = 2.0  # in the plot; larger values are written at its edge
PAPER, JUDGED, AUTO = "paper: own draws", "two-phase, 1 per query", "two-phase, auto (default)"


class Estimator(NamedTuple):
    """An estimator to measure.

    Attributes:
        settings: Arguments of `NegativeCacheLoss`; None for an estimator that is not in the library.
        num_candidates: Draws per query of `NegativeCacheLoss`; None for its default.
        tried: An estimator that is not in the library.
        is_main: Whether it is measured in all cases.
    """

    settings: Mapping[str, Any] | None = None
    num_candidates: int | None = None
    tried: Tried | None = None
    is_main: bool = False

    @property
    def in_batch(self) -> bool:
        return self.settings is None or self.settings.get("in_batch", True)


ESTIMATORS: dict[str, Estimator] = {
    PAPER: Estimator({"in_batch": False, "shared": False, "num_samples": 1}, is_main=True),
    "paper, 4 per query": Estimator({"in_batch": False, "shared": False, "num_samples": 4}, is_main=True),
    "own draws + in-batch": Estimator({"shared": False, "num_samples": 1}, is_main=True),
    "shared draws": Estimator({"num_samples": 1}, 1, is_main=True),
    "two-phase, 1/8 per query": Estimator({"num_samples": 1 / 8}, is_main=True),
    "two-phase, 1/4 per query": Estimator({"num_samples": 1 / 4}, is_main=True),
    AUTO: Estimator({"num_samples": "auto"}, is_main=True),
    "two-phase, 1/2 per query": Estimator({"num_samples": 1 / 2}, is_main=True),
    JUDGED: Estimator({"num_samples": 1}, is_main=True),
    "two-phase, 2 per query": Estimator({"num_samples": 2}, is_main=True),
    "two-phase, 4 per query": Estimator({"num_samples": 4}, is_main=True),
    "two-phase, 1 per query, 4 candidates": Estimator({"num_samples": 1}, 4),
    "two-phase, 1 per query, 16 candidates": Estimator({"num_samples": 1}, 16),
    "Gumbel top-1 of each query": Estimator(tried=tried.gumbel_top_k),
    "Gumbel top-4 of each query": Estimator(tried=partial(tried.gumbel_top_k, count=4)),
    "shared draws + expected query": Estimator(tried=tried.shared_draws),
    "two-phase, 1/4, no stand-ins": Estimator(tried=partial(tried.two_phase, num_samples=1 / 4, has_stand_ins=False)),
    "two-phase, 1, no stand-ins": Estimator(tried=partial(tried.two_phase, has_stand_ins=False)),
    "two-phase, 1, no control variate": Estimator(tried=partial(tried.two_phase, control=None)),
    "two-phase, 1, random order": Estimator(tried=partial(tried.two_phase, order=tried.at_random)),
    "two-phase, 1, + expected query": Estimator(tried=partial(tried.two_phase, control="rows"), is_main=True),
    "all rows, 1, + expected query": Estimator(tried=partial(tried.two_phase, num_candidates=None)),
}
KEYS = {"stage": "stage", "batch": "B", "rows": "N", "scale": "scale", "cache": "cache"}
COLUMNS = {
    **KEYS,
    "estimator": "estimator",
    "where": "where",
    "variance": "variance",
    "ratio": "/ paper's",
    "ratio_error": "+-",
    "bias": "bias",
    "documents": "documents",
    "cost_ratio": "x documents / paper's",
    "step_ms": "step, ms",
    "time_ratio": "x ms / paper's",
}
CASE_COLUMNS = {
    **KEYS,
    "step": "training steps",
    "staleness": "staleness",
    "moved": "exact gradient moved by",
    "paper": "variance of the paper's",
    "one": "of 1 per query",
    "auto": "of auto",
    "ratio": "1 per query / paper's",
    "target": "target",
    "met": "",
}
SUMMARY_COLUMNS = {key: COLUMNS[key] for key in COLUMNS if key not in ("stage", "scale", "cache", "ratio_error")}


def run(sizes: SizeSet, device: torch.device) -> Report:
    """Train once, and compare all estimators with the exact gradient at several stages."""
    given = sizes.variance
    corpus = load_corpus(given.data, device)
    stages = {stage.name: stage for stage in train(corpus, given.stages, given.batch, given.rows)}
    seeds = count(1)
    rows: list[Row] = []
    cases: list[Row] = []
    for case in given.cases:
        found = _measure(corpus, stages[case.stage], case, given, seeds)
        rows += found
        cases.append(_judge(corpus, stages[case.stage], case, found, sizes.is_judged))
    return Report(
        [
            Table("variance", f"Errors of gradients, {corpus.name}", COLUMNS, rows, _note(rows, given)),
            Table(
                "variance-cases", "All cases, and the variances of num_samples=1 and auto", CASE_COLUMNS, cases, _CASES
            ),
            Table("variance-summary", "Geometric means over stages, re-encoded rows", SUMMARY_COLUMNS, _sum_up(rows)),
            theory_table(corpus, stages, given),
        ],
        partial(_plot, rows, corpus.name),
    )


_CASES = (
    "Staleness: relative mean squared distance of cached and new embeddings. Moved: relative squared distance of the "
    "exact gradient with the softmax of the stale rows from that of the re-encoded rows; no estimator here removes it."
)


def _note(rows: list[Row], given: VarianceSizes) -> str:
    unbiased = [float(row["bias_error"] or 0) for row in rows if row["estimator"] != AUTO]
    spread = math.sqrt(statistics.mean(error**2 for error in unbiased))
    unclear = "" if spread < 0.5 else " (too few steps to tell)"
    return (
        "Variance: mean squared distance from the exact gradient, relative to the squared norm of that gradient; "
        f"{given.batches} batches x {given.repeats} steps; +- is the standard error of the ratio over batches. Bias: "
        "squared distance of the mean gradient from the exact one, relative to its expectation without bias, so that "
        f"an unbiased estimator has 1, with a standard error of {spread:.2f} per row{unclear}. auto: once the cache "
        "counts in the loss; its weights are biased, and its variance includes the bias. Documents: distinct cached "
        "documents encoded per step. Step: with the encoder, which is cheap here, and the backward pass; only "
        "of the library's estimators, as the others use a dense softmax."
    )


def _measure(corpus: Corpus, stage: Stage, case: Case, given: VarianceSizes, seeds: Iterator[int]) -> list[Row]:
    """A row per estimator."""
    names = [name for name, estimator in ESTIMATORS.items() if case.is_complete or estimator.is_main]
    errors: dict[str, list[Errors]] = {name: [] for name in names}
    for number in range(given.batches):
        progress(f"{_label(case)}: batch {number + 1} of {given.batches}")
        batch = make_batch(corpus, stage, case, seed=number)
        objectives = {in_batch: Objective(batch, in_batch) for in_batch in (False, True)}
        exact = {in_batch: objective.exact_gradient() for in_batch, objective in objectives.items()}
        for name in names:
            estimator, seed = ESTIMATORS[name], next(seeds)
            if estimator.settings is not None:
                estimate = of_library(batch, seed, estimator.settings, estimator.num_candidates)
            else:
                assert estimator.tried is not None
                estimate = of_tried(objectives[estimator.in_batch], seed, estimator.tried)
            errors[name].append(measure(estimate, batch.table, exact[estimator.in_batch], given.repeats))
    return [_row(case, name, errors[name], errors[PAPER]) for name in names]


def _row(case: Case, name: str, errors: list[Errors], paper: list[Errors]) -> Row:
    is_library = ESTIMATORS[name].settings is not None
    variance, ratio = _mean(errors, "variance"), _mean(errors, "variance") / _mean(paper, "variance")
    ratios = [own.variance / other.variance for own, other in zip(errors, paper, strict=True)]
    return {
        **_keys(case),
        "estimator": name,
        "where": "library" if is_library else "tried",
        "variance": variance,
        "ratio": ratio,
        "ratio_error": _standard_error(ratios),
        "bias": _mean(errors, "bias"),
        "bias_error": _standard_error([error.bias for error in errors]),
        "documents": _mean(errors, "documents"),
        "cost_ratio": ratio * _mean(errors, "documents") / _mean(paper, "documents"),
        "step_ms": _median_ms(errors) if is_library else None,
        "time_ratio": ratio * _median_ms(errors) / _median_ms(paper) if is_library else None,
        "is_complete": case.is_complete,
    }


def _judge(corpus: Corpus, stage: Stage, case: Case, rows: list[Row], is_judged: bool) -> Row:
    """The case, and whether the variance with one document per query meets its target."""
    found = {str(row["estimator"]): row for row in rows}
    target = VARIANCE_TARGETS.get(case.batch) if is_judged else None
    paper, one, auto = (float(found[name]["variance"] or 0) for name in (PAPER, JUDGED, AUTO))
    row: Row = {**_keys(case), "step": stage.step, "staleness": None, "moved": None, "paper": paper, "one": one}
    row |= {"auto": auto, "ratio": one / paper, "target": target, "met": verdict(one / paper, target)}
    if case.is_stale:
        stale = make_batch(corpus, stage, case, seed=0)
        encoded = stale._replace(cached=encode_all(stale))
        row["staleness"] = float(estimators.staleness(stale.cached, encoded.cached).mean())
        exact, moved = (Objective(batch, in_batch=True).exact_gradient() for batch in (encoded, stale))
        row["moved"] = float((moved - exact).square().sum() / exact.square().sum())
    return row


def _sum_up(rows: list[Row]) -> list[Row]:
    """A row per batch size and estimator, over the cases in which all estimators were measured."""
    complete = [row for row in rows if row["is_complete"]]
    groups: dict[tuple[object, object], list[Row]] = {}
    for row in sorted(complete, key=lambda row: float(row["batch"] or 0)):
        groups.setdefault((row["batch"], row["estimator"]), []).append(row)
    kept = ("batch", "rows", "estimator", "where")
    return [
        {key: mine[0][key] if key in kept else _geometric(mine, key) for key in SUMMARY_COLUMNS}
        for mine in groups.values()
    ]


def _geometric(rows: list[Row], key: str) -> float | None:
    """Geometric mean of a column; None if a value is missing."""
    values = [value for row in rows if isinstance(value := row[key], float)]
    return statistics.geometric_mean(values) if len(values) == len(rows) else None


def _mean(errors: list[Errors], key: str) -> float:
    return statistics.mean(getattr(error, key) for error in errors)


def _median_ms(errors: list[Errors]) -> float:
    return statistics.median(time for error in errors for time in error.step_ms)


def _standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def _keys(case: Case) -> Row:
    cache = "stale" if case.is_stale else "re-encoded"
    return {"stage": case.stage, "batch": case.batch, "rows": case.rows, "scale": case.scale, "cache": cache}


def _label(case: Case) -> str:
    return ", ".join(f"{key} {value}" for key, value in _keys(case).items())


def _plot(rows: list[Row], name: str, figure: Figure) -> None:
    """Draw a panel per batch size, a line per estimator, a marker per stage."""
    complete = [row for row in rows if row["is_complete"]]
    sizes = sorted({int(row["batch"] or 0) for row in complete})
    stages = list(dict.fromkeys(str(row["stage"]) for row in complete))
    names = list(ESTIMATORS)
    figure.set_size_inches(11, 8)
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=True):
        for stage, colour, marker in zip(stages, COLOURS, MARKERS, strict=False):
            mine = [row for row in complete if (row["batch"], row["stage"]) == (size, stage)]
            xs, ys = [row["variance"] for row in mine], [names.index(str(row["estimator"])) for row in mine]
            axes.plot(xs, ys, marker, color=colour, alpha=0.85, label=stage)
        axes.set_xscale("log")
        axes.set_xlim(right=LARGEST_SHOWN)
        _write_beyond(axes, [row for row in complete if row["batch"] == size], names)
        style(axes, f"B={size}", "variance of the gradient, relative (log scale)", "")
        axes.axhline(_num_library() - 0.5, color="#888888", linewidth=0.8)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    for label in panels[0].get_yticklabels()[: _num_library()]:
        label.set_fontweight("bold")
    panels[-1].legend(title="stage of training", loc="lower right")
    figure.suptitle(
        f"Variance of the gradient of one step around the exact one ({name}, N={complete[0]['rows']:,}); "
        "bold: in the library"
    )


def _write_beyond(axes: Axes, rows: list[Row], names: list[str]) -> None:
    """Write values beyond the end of the axis at its edge."""
    for name in names:
        values = [float(row["variance"] or 0) for row in rows if row["estimator"] == name]
        beyond = ", ".join(f"{value:.2g}" for value in values if value > LARGEST_SHOWN)
        if beyond:
            axes.text(LARGEST_SHOWN, names.index(name), f"{beyond} →", ha="right", va="center", fontsize=8)


def _num_library() -> int:
    return sum(estimator.settings is not None for estimator in ESTIMATORS.values())
