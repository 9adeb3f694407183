"""`memory`: peak extra memory of a step against the number of rows, each point in its own process."""

from __future__ import annotations

from functools import partial

import torch
from matplotlib.figure import Figure

from benchmarks import child
from benchmarks.peak import available_bytes, peak_bytes, return_freed_memory_at_once, used_bytes
from benchmarks.report import COLOURS, MARKERS, Report, Row, Table, Value, row_ticks, style, verdict
from benchmarks.scale import SHARE_OF_MEMORY, fit_line
from benchmarks.sizes import MEMORY_TARGET_MB, Size, SizeSet
from benchmarks.timing import progress
from benchmarks.workload import make_workload
from negative_cache import predict_bytes

STEPS = 3
FLAT_MB = 2.0  # from the fewest to the most rows, along a least-squares line
COLUMNS = {
    "dtype": "rows",
    "mode": "softmax over",
    "batch": "B",
    "rows": "N",
    "dim": "D",
    "cache_mb": "cache, MB",
    "extra_mb": "peak extra of a step, MB",
    "predicted_mb": "predicted, MB",
    "target": "target",
    "met": "",
    "kept_mb": "kept after the first steps, MB",
    "note": "",
}
GROWTH_COLUMNS = {
    "dtype": "rows",
    "mode": "softmax over",
    "smallest_mb": "least, MB",
    "largest_mb": "most, MB",
    "bytes_per_row": "bytes per further row",
    "verdict": "",
}


def run(sizes: SizeSet, device: torch.device) -> Report:
    """Measure each size in its own process."""
    rows = []
    for number, size in enumerate(sizes.memory):
        progress(f"{number + 1} of {len(sizes.memory)}: {size.dtype}, {size.mode}, N={size.rows}")
        rows.append(_row(size, MEMORY_TARGET_MB if sizes.is_judged else None, device))
    growth = [_growth(dtype, mode, rows) for dtype, mode in dict.fromkeys((r["dtype"], r["mode"]) for r in rows)]
    note = (
        f"The highest of {STEPS} steps, beyond the memory in use before the step, in a process that has run two steps. "
        "predicted: by negative_cache.predict_bytes, for the tiled pass on a CPU. kept: what the first two steps did "
        "not free, such as work space of the math library."
    )
    return Report(
        [
            Table("memory", "Peak extra memory of a step; encoders excluded", COLUMNS, rows, note),
            Table(
                "memory-growth",
                f"Flat: the least-squares line changes by at most {FLAT_MB:g} MB",
                GROWTH_COLUMNS,
                growth,
            ),
        ],
        partial(_plot, rows),
    )


def measure(size: Size, device: torch.device) -> dict[str, float | None]:
    """Bytes of a step, and bytes that the first two steps kept; called in its own process."""
    work = make_workload(size, device)
    return_freed_memory_at_once()
    step = partial(work.step, size.top_k)
    before = used_bytes(device)
    for _ in range(2):
        step()
    after = used_bytes(device)
    peaks = [peak_bytes(step, device) for _ in range(STEPS)]
    known = [peak for peak in peaks if peak is not None]
    return {
        "extra": max(known) if known else None,
        "kept": None if before is None or after is None else after - before,
    }


def _row(size: Size, target: float | None, device: torch.device) -> Row:
    found: dict[str, float | None] = {"extra": None, "kept": None}
    note = None
    if size.num_bytes > SHARE_OF_MEMORY * available_bytes(device):
        note = f"not run: the cache would need {size.num_bytes / 1e9:.1f} GB"
    else:
        found = child.run(measure, size, device)
        note = "not measured on this system" if found["extra"] is None else None
    extra, kept = (None if value is None else value / 1e6 for value in (found["extra"], found["kept"]))
    return {
        "dtype": size.dtype,
        "mode": size.mode,
        "batch": size.batch,
        "rows": size.rows,
        "dim": size.dim,
        "cache_mb": size.num_bytes / 1e6,
        "extra_mb": extra,
        "predicted_mb": predict_bytes(size.rows, size.dim, size.batch, embedding_dtype=size.torch_dtype).step / 1e6,
        "target": target,
        "met": verdict(extra, target),
        "kept_mb": kept,
        "note": note,
    }


def _growth(dtype: Value, mode: Value, rows: list[Row]) -> Row:
    mine = [row for row in rows if (row["dtype"], row["mode"]) == (dtype, mode)]
    found = [(float(row["rows"] or 0), row["extra_mb"]) for row in mine]
    points = [(x, y) for x, y in found if isinstance(y, float)]
    growth: Row = {"dtype": dtype, "mode": mode}
    if not points:
        return growth
    sizes = [y for _, y in points]
    slope, _ = fit_line([x for x, _ in points], sizes)
    rows_between = max(x for x, _ in points) - min(x for x, _ in points)
    is_flat = abs(slope) * rows_between <= FLAT_MB
    return {
        **growth,
        "smallest_mb": min(sizes),
        "largest_mb": max(sizes),
        "bytes_per_row": 1e6 * slope,
        "verdict": "flat" if is_flat else "NOT FLAT",
    }


def _plot(rows: list[Row], figure: Figure) -> None:
    axes = figure.subplots()
    for number, (dtype, mode) in enumerate(dict.fromkeys((r["dtype"], r["mode"]) for r in rows)):
        mine = [row for row in rows if (row["dtype"], row["mode"]) == (dtype, mode) and row["extra_mb"] is not None]
        xs, ys = [float(row["rows"] or 0) for row in mine], [float(row["extra_mb"] or 0) for row in mine]
        marker, line = MARKERS[number % len(MARKERS)], "--" if mode == "all rows" else "-"
        axes.plot(xs, ys, line, marker=marker, color=COLOURS[number % len(COLOURS)], label=f"{dtype} rows, {mode}")
    axes.axhline(MEMORY_TARGET_MB, color="black", linewidth=1, linestyle=":", label=f"target, {MEMORY_TARGET_MB} MB")
    row_ticks(axes, [int(row["rows"] or 0) for row in rows])
    axes.set_ylim(0, 1.6 * MEMORY_TARGET_MB)
    title = f"Peak extra memory of a step (B={rows[0]['batch']}, D={rows[0]['dim']})"
    style(axes, title, "rows of the cache", "peak extra memory, MB")
    axes.legend(frameon=False, ncol=2, loc="upper center")
