"""Which charts a report has, and what they show of its runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from negative_cache.workbench.report_charts import Line, draw, short
from negative_cache.workbench.report_runs import Run

NUM_BINS = 12
MAX_RUNS_WITH_DETAILS = 2


class Kind(NamedTuple):
    """A chart of numbers that were logged.

    Attributes:
        title: What it shows.
        note: How it is to be read.
        keys: The numbers; all but the first only go along with it, where there are few runs.
        factor: Of the numbers.
        is_log: Whether the axis is logarithmic.
    """

    title: str
    note: str
    keys: tuple[str, ...]
    factor: float = 1.0
    is_log: bool = False


class Chart(NamedTuple):
    """A chart as the page shows it.

    Attributes:
        title: What it shows.
        note: How it is to be read.
        svg: The picture.
        last: For each run that it has: the run and its last value.
        words: What it shows, for those who do not see it.
    """

    title: str
    note: str
    svg: Markup
    last: list[tuple[Run, str]]
    words: str


TRAINING = (
    Kind(
        "Loss",
        "What was trained on, the mean since the last point. Losses are cross-entropies over different numbers of "
        "documents: compare runs of one loss.",
        ("loss",),
    ),
    Kind("MRR@10 on the dev split", "Measured every --eval-steps steps.", ("eval_dev_cosine_mrr@10",)),
    Kind("Learning rate", "Its schedule.", ("learning_rate",)),
    Kind("Gradient norm", "Of all parameters together, on a logarithmic axis.", ("grad_norm",), is_log=True),
    Kind("Seconds", "Since training began, without evaluations.", ("seconds",)),
    Kind("Peak memory, GB", "So far: of the GPU's allocator, or of the process.", ("peak_memory_bytes",), 1e-9),
)
CACHE = (
    Kind("Fill", "Share of the cache's rows that hold a document.", ("cache/fill",)),
    Kind(
        "Effective negatives",
        "How many documents of the cache share the weight of the softmax: of one, if a single one has all of it. On a "
        "logarithmic axis.",
        ("cache/effective_negatives",),
        is_log=True,
    ),
    Kind(
        "Staleness",
        "Mean squared distance between the cached and the new embedding of what was encoded, relative to the new one's "
        "length. Thin lines, where few runs are shown: the quarter of these rows that was written last, and longest "
        "ago.",
        ("cache/staleness", "cache/staleness_youngest", "cache/staleness_oldest"),
    ),
    Kind("Age in steps", "Mean age of the rows that were encoded.", ("cache/age",)),
    Kind("Weight of the cache", "Softmax weight of all cached documents together.", ("cache/cache_share",)),
    Kind("Probability of the positive", "Its softmax weight, mean.", ("cache/positive_probability",)),
    Kind(
        "Near-duplicates",
        "Softmax weight of cached documents that are nearly equal to the positive.",
        ("cache/near_duplicates",),
    ),
    Kind("Hidden by margins", "Share of the rows that margins or a guide hide.", ("cache/masked",)),
    Kind(
        "Gradients of queries and documents",
        "Norm of the gradient of the queries' embeddings, by that of the documents'.",
        ("cache/gradient_norm_ratio",),
    ),
)


def charts_of(runs: Sequence[Run]) -> dict[str, list[Chart]]:
    """The charts of `training` and of the `cache`; those without any number are left out."""
    training = [_logged(kind, runs) for kind in TRAINING]
    cache = [*(_logged(kind, runs) for kind in CACHE), _staleness_by_age(runs)]
    training.insert(2, _curve(runs))
    return {
        "training": [chart for chart in training if chart is not None],
        "cache": [chart for chart in cache if chart is not None],
    }


def _logged(kind: Kind, runs: Sequence[Run]) -> Chart | None:
    lines = []
    has_details = len(runs) <= MAX_RUNS_WITH_DETAILS
    for run in runs:
        for number, key in enumerate(kind.keys if has_details else kind.keys[:1]):
            x, y = _series(run.record["history"], key, kind)
            if x:
                lines.append(Line(run.number, x, y, is_faint=number > 0))
    return _chart(kind, lines, runs, kind.is_log)


def _series(history: list[dict[str, Any]], key: str, kind: Kind) -> tuple[list[float], list[float]]:
    """Steps and values. With a cache on either side it is that of the documents."""
    x, y = [], []
    for row in history:
        value = row.get(key, row.get(key.replace("cache/", "cache/cache_loss/")))
        if isinstance(value, int | float) and not isinstance(value, bool):
            is_shown = math.isfinite(value) and not (kind.is_log and value <= 0)
            x.append(float(row.get("step", 0)))
            y.append(value * kind.factor if is_shown else math.nan)
    return (x, y) if any(map(math.isfinite, y)) else ([], [])


def _curve(runs: Sequence[Run]) -> Chart | None:
    """The quality on the way of the runs of a comparison."""
    lines = []
    for run in runs:
        points = run.record.get("curve", [])
        if points:
            quality = [point["test"]["mrr@10"] for point in points]
            lines.append(Line(run.number, [point["step"] for point in points], quality))
    return _chart(
        Kind("MRR@10 on the test split", "Measured after training, with weights kept on the way.", ()), lines, runs
    )


def _staleness_by_age(runs: Sequence[Run]) -> Chart | None:
    """Medians of bins with equally many rows, and the rows."""
    kind = Kind(
        "Staleness against age",
        "Of up to 512 rows of the cache after the last step: points are rows, where few runs are shown; the line has "
        "the medians of twelfths of them.",
        (),
    )
    lines = []
    for run in runs:
        pairs = run.samples.get("staleness_by_age", [])
        if pairs:
            if len(runs) <= MAX_RUNS_WITH_DETAILS:
                lines.append(Line(run.number, [age for age, _ in pairs], [value for _, value in pairs], is_faint=True))
            bins = [part for at in range(NUM_BINS) if (part := _part(pairs, at))]
            medians = [[statistics.median(column) for column in zip(*part, strict=True)] for part in bins]
            lines.append(Line(run.number, [age for age, _ in medians], [value for _, value in medians]))
    return _chart(kind, lines, runs, x_label="age in steps")


def _part(pairs: list[Any], at: int) -> list[Any]:
    return pairs[at * len(pairs) // NUM_BINS : (at + 1) * len(pairs) // NUM_BINS]


def _chart(
    kind: Kind, lines: list[Line], runs: Sequence[Run], is_log: bool = False, x_label: str = "step"
) -> Chart | None:
    if not lines:
        return None
    last, words = [], []
    for line in lines:
        if not line.is_faint:
            shown = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
            (first_x, first_y), (last_x, last_y) = shown[0], shown[-1]
            run = runs[line.run]
            last.append((run, short(last_y)))
            words.append(
                f"{run.letter}, {run.name}: from {short(first_y)} at {x_label} {short(first_x)} to {short(last_y)} at "
                f"{short(last_x)}."
            )
    svg = draw(lines, kind.title, x_label, is_log, as_points=x_label != "step")
    return Chart(kind.title, kind.note, Markup(svg), last, f"{kind.title} by {x_label}. {' '.join(words)}")
