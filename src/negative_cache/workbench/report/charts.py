"""The charts of a report and their content."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from negative_cache.workbench.report.runs import Run
from negative_cache.workbench.report.svg import Line, draw, short

NUM_BINS = 12
MAX_RUNS_WITH_DETAILS = 2


class Kind(NamedTuple):
    """A chart of logged values.

    Attributes:
        title: What it shows.
        note: How to read it.
        keys: Keys of the logs. All but the first are details, which are shown only for a few runs.
        factor: Factor that multiplies the values.
        is_log: Whether the vertical axis is logarithmic.
    """

    title: str
    note: str
    keys: tuple[str, ...]
    factor: float = 1.0
    is_log: bool = False


class Chart(NamedTuple):
    """A chart on the page.

    Attributes:
        title: What it shows.
        note: How to read it.
        svg: The `<svg>` element.
        last: Each run of the chart, with its last value.
        words: A description for screen readers.
    """

    title: str
    note: str
    svg: Markup
    last: list[tuple[Run, str]]
    words: str


TRAINING = (
    Kind(
        "Loss",
        "The training loss, as the mean since the previous point. It jumps up when the cache begins to count, because "
        "there are more negatives. Different losses are cross-entropies over different "
        "numbers of documents: compare only runs with the same loss.",
        ("loss",),
    ),
    Kind("MRR@10 on the dev split", "Measured every --eval-steps steps.", ("eval_dev_cosine_mrr@10",)),
    Kind("Learning rate", "The schedule of the learning rate.", ("learning_rate",)),
    Kind(
        "Gradient norm", "Norm of the gradient of all parameters, on a logarithmic axis.", ("grad_norm",), is_log=True
    ),
    Kind("Seconds", "Time since training began, without evaluation.", ("seconds",)),
    Kind("Peak memory, GB", "Peak so far of allocated GPU memory, or of the process.", ("peak_memory_bytes",), 1e-9),
)
CACHE = (
    Kind(
        "Fill",
        "Fraction of the cache's rows that hold a document. It stays below 1 if the corpus is smaller than the cache.",
        ("cache/fill",),
    ),
    Kind(
        "Effective negatives",
        "Number of cached documents over which the softmax weight is spread: 1 if a single document has all of it. "
        "On a logarithmic axis.",
        ("cache/effective_negatives",),
        is_log=True,
    ),
    Kind(
        "Staleness",
        "Mean squared distance between the cached and the new embedding of re-encoded documents, relative to the "
        "squared norm of the new one. With at most two runs, thin lines show the quarter of these rows that was "
        "written most recently, and the quarter that was written longest ago.",
        ("cache/staleness", "cache/staleness_youngest", "cache/staleness_oldest"),
    ),
    Kind("Age in steps", "Mean age of the re-encoded rows.", ("cache/age",)),
    Kind("Weight of the cache", "Total softmax weight of all cached documents.", ("cache/cache_share",)),
    Kind(
        "Re-encoded documents",
        "Cached documents that a step re-encodes, per query. 0 while in-batch negatives represent the cache.",
        ("cache/documents_per_query",),
    ),
    Kind(
        "Noise of the gradient",
        "Relative to the noise that it has because it is that of one batch: if in-batch negatives had to represent the "
        "cache; with at most two runs, the thin line shows the noise that the choice of re-encoded documents adds "
        "instead. On a logarithmic axis.",
        ("cache/in_batch_noise", "cache/sampling_noise"),
        is_log=True,
    ),
    Kind("Probability of the positive", "Mean softmax weight of the positive.", ("cache/positive_probability",)),
    Kind(
        "Near-duplicates",
        "Softmax weight of cached documents that are nearly identical to the positive.",
        ("cache/near_duplicates",),
    ),
    Kind("Hidden by margins", "Fraction of the rows that margins or a guide hide.", ("cache/masked",)),
    Kind(
        "Gradients of queries and documents",
        "Norm of the gradient of the query embeddings, divided by that of the document embeddings.",
        ("cache/gradient_norm_ratio",),
    ),
)


def charts_of(runs: Sequence[Run]) -> dict[str, list[Chart]]:
    """The charts of `training` and of the `cache`. Charts without values are left out."""
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
            x, y = _series(run.record.history, key, kind)
            if x:
                lines.append(Line(run.number, x, y, is_faint=number > 0))
    return _chart(kind, lines, runs, kind.is_log)


def _series(history: list[dict[str, Any]], key: str, kind: Kind) -> tuple[list[float], list[float]]:
    """Steps and values. If there are caches of queries and of documents, those of the document cache."""
    x, y = [], []
    for row in history:
        value = row.get(key, row.get(key.replace("cache/", "cache/cache_loss/")))
        if isinstance(value, int | float) and not isinstance(value, bool):
            is_shown = math.isfinite(value) and not (kind.is_log and value <= 0)
            x.append(float(row.get("step", 0)))
            y.append(value * kind.factor if is_shown else math.nan)
    return (x, y) if any(map(math.isfinite, y)) else ([], [])


def _curve(runs: Sequence[Run]) -> Chart | None:
    """The quality during training, for the runs of a comparison."""
    lines = []
    for run in runs:
        if points := run.record.curve:
            quality = [point["test"]["MRR@10"] for point in points]
            lines.append(Line(run.number, [point["step"] for point in points], quality))
    note = "Measured after training, with weights that were saved during training."
    return _chart(Kind("MRR@10 on the test split", note, ()), lines, runs)


def _staleness_by_age(runs: Sequence[Run]) -> Chart | None:
    """Medians over bins with the same number of rows, and the rows themselves."""
    kind = Kind(
        "Staleness against age",
        "Up to 512 rows of the cache after the last step. The line shows the median of each twelfth of the rows. With "
        "at most two runs, points show single rows.",
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
