"""`scale`: time against the number of rows, compared with the bare product of the same operands."""

from __future__ import annotations

from functools import partial

import torch
from matplotlib.figure import Figure

from benchmarks.peak import available_bytes
from benchmarks.report import COLOURS, MARKERS, Report, Row, Table, Value, row_ticks, style, verdict
from benchmarks.sizes import SLOPE_TARGET, Size, SizeSet
from benchmarks.timing import median_ms
from benchmarks.workload import make_workload

BLOCK_ROWS = 4096
SHARE_OF_MEMORY = 0.7
SERIES = {
    "step_ms": "step",
    "pass_ms": "pass alone",
    "blocks_ms": f"rows @ queries.T in blocks of {BLOCK_ROWS:,}",
    "product_ms": "queries @ rows.T",
}
COLUMNS = {
    "dtype": "rows",
    "mode": "softmax over",
    "batch": "B",
    "rows": "N",
    "dim": "D",
    **{key: f"{name}, ms" for key, name in SERIES.items()},
    "note": "",
}
SLOPE_COLUMNS = {
    "dtype": "rows",
    "mode": "softmax over",
    **{key.replace("_ms", "_ns"): f"{name}, ns per row" for key, name in SERIES.items()},
    "blocks_ratio": "step / product in blocks",
    "ratio": "step / queries @ rows.T",
    "target": "target",
    "met": "",
    "r_squared": "R2 of the step's line",
}


def run(sizes: SizeSet, device: torch.device) -> Report:
    """Measure each size, and fit lines through the times."""
    rows: list[Row] = []
    groups: dict[Size, list[int | None]] = {}
    for size in sizes.scale:
        key = Size(size.batch, size.rows, size.dim, None, size.dtype, size.length)
        groups.setdefault(key, []).append(size.top_k)
    for size, modes in groups.items():
        rows += _measure(size, modes, sizes.repeats, device)
    target = SLOPE_TARGET if sizes.is_judged else None
    lines = dict.fromkeys((row["dtype"], row["mode"]) for row in rows)
    slopes = [_slopes(dtype, mode, rows, target) for dtype, mode in lines]
    note = (
        "The int8 product is torch._int_mm. On a CPU, the time of `queries @ rows.T` includes the allocation of its "
        "result; `rows @ queries.T` in blocks was the fastest product that was measured, and is what the pass does."
    )
    return Report(
        [
            Table("scale", "Time of a step as the cache grows; encoders excluded", COLUMNS, rows, note),
            Table("scale-slopes", "Time per further row: slopes of least-squares lines", SLOPE_COLUMNS, slopes),
        ],
        partial(_plot, rows),
    )


def _measure(size: Size, modes: list[int | None], repeats: int, device: torch.device) -> list[Row]:
    found: list[Row] = []
    times: dict[str, float] = {}
    note = None
    if size.num_bytes > SHARE_OF_MEMORY * available_bytes(device):
        note = f"not run: the cache would need {size.num_bytes / 1e9:.1f} GB"
    else:
        work = make_workload(size, device)
        calls = {"blocks": work.product(BLOCK_ROWS), "product": work.product()}
        for top_k in modes:
            calls |= {f"step {top_k}": partial(work.step, top_k), f"pass {top_k}": partial(work.retrieve, top_k)}
        times = median_ms(calls, repeats, device, f"{size.dtype} N={size.rows}")
    for top_k in modes:
        found.append(
            {
                "dtype": size.dtype,
                "mode": "all rows" if top_k is None else f"top_k={top_k}",
                "batch": size.batch,
                "rows": size.rows,
                "dim": size.dim,
                "step_ms": times.get(f"step {top_k}"),
                "pass_ms": times.get(f"pass {top_k}"),
                "blocks_ms": times.get("blocks"),
                "product_ms": times.get("product"),
                "note": note,
            }
        )
    return found


def _slopes(dtype: Value, mode: Value, rows: list[Row], target: float | None) -> Row:
    mine = [row for row in rows if (row["dtype"], row["mode"]) == (dtype, mode)]
    fits = {key: fit_line(*_points(mine, key)) for key in SERIES}
    slopes = {key: slope for key, (slope, _) in fits.items()}
    found, blocks = (
        slopes["step_ms"] / slopes[key] if slopes[key] > 0 else None  # a slope that is not positive is noise
        for key in ("product_ms", "blocks_ms")
    )
    return {
        "dtype": dtype,
        "mode": mode,
        **{key.replace("_ms", "_ns"): 1e6 * slope for key, slope in slopes.items()},
        "blocks_ratio": blocks,
        "ratio": found,
        "target": target,
        "met": verdict(found, target),
        "r_squared": fits["step_ms"][1],
    }


def fit_line(xs: list[float], ys: list[float]) -> tuple[float, float]:
    """Slope of the least-squares line, and the fraction of variance it explains; NaN for fewer than two points."""
    if len(xs) < 2:
        return float("nan"), float("nan")
    x, y = torch.tensor(xs, dtype=torch.float64), torch.tensor(ys, dtype=torch.float64)
    x, y = x - x.mean(), y - y.mean()
    slope = (x * y).sum() / (x * x).sum()
    return float(slope), float(1 - ((y - slope * x) ** 2).sum() / (y * y).sum())


def _points(rows: list[Row], key: str) -> tuple[list[float], list[float]]:
    """Numbers of rows and times of the measured sizes."""
    found = [(float(row["rows"] or 0), row[key]) for row in rows]
    kept = [(x, y) for x, y in found if isinstance(y, float)]
    return [x for x, _ in kept], [y for _, y in kept]


def _plot(rows: list[Row], figure: Figure) -> None:
    """Draw a panel per dtype, with the step in each mode and both products."""
    dtypes = list(dict.fromkeys(str(row["dtype"]) for row in rows))
    figure.set_size_inches(max(4.5 * len(dtypes), 6), 5)
    panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    for axes, dtype in zip(panels, dtypes, strict=True):
        mine = [row for row in rows if row["dtype"] == dtype]
        modes = list(dict.fromkeys(str(row["mode"]) for row in mine))
        lines = [(f"step, {mode}", "step_ms", mode) for mode in modes]
        lines += [(SERIES[key], key, modes[0]) for key in ("blocks_ms", "product_ms")]
        for number, (label, key, mode) in enumerate(lines):
            xs, ys = _points([row for row in mine if row["mode"] == mode], key)
            line = "-" if key == "step_ms" else "--"
            axes.plot(xs, ys, line, color=COLOURS[number], marker=MARKERS[number], markersize=5, label=label)
        row_ticks(axes, [int(row["rows"] or 0) for row in mine])
        axes.set_yscale("log")
        style(axes, f"{dtype} rows", "rows of the cache", "time, ms" if axes is panels[0] else "")
    panels[0].legend(frameon=False)
    figure.suptitle(f"Time of a step as the cache grows (B={rows[0]['batch']}, D={rows[0]['dim']})")
