"""`step`: a step of the library, compared with a step of the dense algorithm and with the bare product."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from matplotlib.figure import Figure

from benchmarks.peak import peak_bytes
from benchmarks.report import COLOURS, Report, Row, Table, ratio, style, verdict
from benchmarks.sizes import PASS_TARGET, Size, SizeSet
from benchmarks.timing import median_ms
from benchmarks.workload import Workload, make_dense, make_workload

COLUMNS = {
    "dtype": "rows",
    "mode": "softmax over",
    "batch": "B",
    "rows": "N",
    "dim": "D",
    "step_ms": "step, ms",
    "dense_ms": "dense step, ms",
    "ratio": "step / dense",
    "target": "target",
    "met": "",
    "pass_ms": "pass alone, ms",
    "product_ms": "product, ms",
    "pass_ratio": "pass / product",
    "pass_target": "target",
    "pass_met": "",
    "float32_ms": "float32 product, ms",
    "extra_mb": "extra memory, MB",
}


def run(sizes: SizeSet, device: torch.device) -> Report:
    """Measure each group of sizes that differ only in dtype and mode."""
    groups: dict[tuple[int, ...], list[Size]] = {}
    for size in sizes.step:
        groups.setdefault((size.batch, size.rows, size.dim, size.length), []).append(size)
    rows = [row for group in groups.values() for row in _measure(group, sizes.repeats, device)]
    columns = dict(COLUMNS)
    if device.type != "cuda":  # only the fused pass has a target, and peak memory is not exact after other measurements
        for key in ("pass_target", "pass_met", "extra_mb"):
            del columns[key]
    title = "One step of a full cache: retrieve, write back, insert; encoders excluded, features 2 x int32"
    note = (
        "dense step: the algorithm of the earlier port (float32 rows). product: queries @ rows.T in the rows' dtype. "
        "Medians of calls that take turns."
    )
    return Report([Table("step", title, columns, rows, note)], partial(_plot, rows))


def _measure(group: list[Size], repeats: int, device: torch.device) -> list[Row]:
    first, modes = group[0], dict.fromkeys(size.top_k for size in group)
    works = {dtype: _workload(group, dtype, device) for dtype in dict.fromkeys(size.dtype for size in group)}
    dense = make_dense(first, device)
    batch = next(iter(works.values()))
    operands = batch.queries.detach(), dense.embeddings
    calls: dict[str, Callable[[], object]] = {"float32": lambda: operands[0] @ operands[1].T}
    for top_k in modes:
        calls[f"dense {top_k}"] = partial(dense.step, batch.queries, batch.documents, batch.features, top_k)
    for dtype, work in works.items():
        calls[f"product {dtype}"] = work.product()
    for size in group:
        calls[f"step {size.dtype} {size.top_k}"] = partial(works[size.dtype].step, size.top_k)
        calls[f"pass {size.dtype} {size.top_k}"] = partial(works[size.dtype].retrieve, size.top_k)
    times = median_ms(calls, repeats, device, f"B={first.batch} N={first.rows}")
    return [_row(size, times, works[size.dtype], device) for size in group]


def _workload(group: list[Size], dtype: str, device: torch.device) -> Workload:
    return make_workload(next(size for size in group if size.dtype == dtype), device)


def _row(size: Size, times: dict[str, float], work: Workload, device: torch.device) -> Row:
    step, dense = times.get(f"step {size.dtype} {size.top_k}"), times.get(f"dense {size.top_k}")
    alone, product = times.get(f"pass {size.dtype} {size.top_k}"), times.get(f"product {size.dtype}")
    is_cuda = device.type == "cuda"
    extra = peak_bytes(partial(work.step, size.top_k), device) if is_cuda else None
    pass_target = PASS_TARGET if is_cuda else None
    return {
        "dtype": size.dtype,
        "mode": size.mode,
        "batch": size.batch,
        "rows": size.rows,
        "dim": size.dim,
        "step_ms": step,
        "dense_ms": dense,
        "ratio": ratio(step, dense),
        "target": size.target,
        "met": verdict(ratio(step, dense), size.target),
        "pass_ms": alone,
        "product_ms": product,
        "pass_ratio": ratio(alone, product),
        "pass_target": pass_target,
        "pass_met": verdict(ratio(alone, product), pass_target),
        "float32_ms": times.get("float32"),
        "extra_mb": None if extra is None else extra / 1e6,
    }


def _plot(rows: list[Row], figure: Figure) -> None:
    """Draw the ratio to the dense step as bars, and the targets as lines."""
    axes = figure.subplots()
    shown = [row for row in rows if isinstance(row["ratio"], float)]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    for at, row in enumerate(shown):
        number = dtypes.index(row["dtype"])
        value = row["ratio"]
        assert isinstance(value, float)
        label = f"{row['dtype']} rows" if row["dtype"] not in [r["dtype"] for r in shown[:at]] else None
        axes.bar(at, value, color=COLOURS[number % len(COLOURS)], label=label)
        axes.annotate(f"{value:.2f}", (at, value), (0, 3), textcoords="offset points", ha="center")
        if isinstance(row["target"], float):
            is_first = all(not isinstance(r["target"], float) for r in shown[:at])
            axes.hlines(row["target"], at - 0.45, at + 0.45, color="black", label="target" if is_first else "_")
    is_one_shape = len({(row["batch"], row["rows"]) for row in shown}) == 1
    names = [row["mode"] if is_one_shape else f"{row['mode']}\nB={row['batch']}\nN={row['rows']:,}" for row in shown]
    axes.set_xticks(range(len(shown)), [str(name) for name in names])
    title = "Time of a step relative to the dense algorithm"
    if is_one_shape and shown:
        title += f" (B={shown[0]['batch']}, N={shown[0]['rows']:,}, D={shown[0]['dim']})"
    style(axes, title, "softmax over", "time / time of the dense step")
    axes.grid(False, axis="x")
    axes.margins(y=0.15)
    axes.legend(frameon=False)
