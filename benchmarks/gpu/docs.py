"""Update the tables between marks in the pages of the documentation from `gpu.json`.

A table is between `<!-- gpu: NAME -->` and `<!-- /gpu -->`; the names are the keys of `BLOCKS`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu import markdown
from benchmarks.gpu.results import Row, load

OURS = "negative cache"
MARKED = re.compile(r"(<!-- gpu: (\S+) -->\n).*?(<!-- /gpu -->)", re.DOTALL)


def update(path: Path, docs: Path) -> list[Path]:
    """Rewrite the marked blocks of all pages from a file of results.

    Returns:
        The files that changed.

    Raises:
        ValueError: A page has a mark with an unknown name, or the file is not a result, or is that of a rehearsal.
        OSError: There is no such file or folder.
        ImportError: matplotlib is missing.
    """
    importlib.import_module("matplotlib")  # before anything is written
    found, changed = load(path), []
    if found["machine"]["device"] == "cpu":
        raise ValueError(f"{path} is the result of a rehearsal on a CPU, without meaning. Run the command on a GPU.")
    if not docs.is_dir():
        raise NotADirectoryError(f"{docs} is not a directory; expected the folder of the pages.")
    for page in sorted(docs.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        new = MARKED.sub(partial(_replaced, page, found, path.parent), text)
        if new != text:
            page.write_text(new, encoding="utf-8")
            changed.append(page)
    passes, quality = (found["stages"].get(stage, {}).get("rows", []) for stage in ("passes", "quality"))
    if changed and passes:
        changed.append(_draw(passes, docs / "images" / "gpu-pass.png"))
    of_data = _measured_often(_summary(quality, path.parent)) if changed and quality else []
    if of_data:
        changed.append(draw_quality(of_data, docs / "images" / "gpu-quality.png"))
    return changed


def _draw(rows: list[Row], path: Path) -> Path:
    """Draw the milliseconds of each implementation against the batch, for bfloat16 rows of the most measured size."""
    from matplotlib.figure import Figure

    from benchmarks.report import COLOURS, MARKERS, row_ticks, save_figure, style

    narrow = [row for row in rows if row["dtype"] == "bfloat16" and "ms" in row]
    sizes = [(row["rows"], row["dim"]) for row in narrow]
    num_rows, dim = max(dict.fromkeys(sizes), key=sizes.count)
    shown = [row for row in narrow if (row["rows"], row["dim"]) == (num_rows, dim)]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for number, way in enumerate(dict.fromkeys(str(row["way"]) for row in shown)):
        of_way = [row for row in shown if row["way"] == way]
        batches, times = ([markdown.number(row[key]) for row in of_way] for key in ("batch", "ms"))
        axes.plot(batches, times, color=COLOURS[number], marker=MARKERS[number], label=way)
    style(axes, f"One pass on a GPU, N={num_rows:,}, D={dim}, bfloat16 rows", "queries", "milliseconds")
    row_ticks(axes, [int(markdown.number(row["batch"])) for row in shown])
    axes.set_yscale("log")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_figure(figure, path)


def draw_quality(lines: list[Row], path: Path) -> Path:
    """Draw a panel per data set, and in it each loss in the order of the documents that it encodes.

    Bars are the deviations over seeds. The untrained model, far below the others, is named in the title.
    """
    from matplotlib.figure import Figure

    from benchmarks.report import save_figure

    panels: dict[str, list[Row]] = {}
    for line in sorted(lines, key=lambda line: markdown.number(line["documents_encoded"])):
        panels.setdefault(str(line["data"]), []).append(line)
    most = max(len(panel) for panel in panels.values())
    figure = Figure(figsize=(4.5 * len(panels) + 2.5, 0.5 * most + 1), layout="constrained")
    for axes, (data, panel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _draw_panel(axes, data, panel)
    figure.suptitle("all-MiniLM-L6-v2, fine-tuned with each loss")
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_figure(figure, path)


def _draw_panel(axes: Any, data: str, lines: list[Row]) -> None:
    from benchmarks.report import COLOURS, style

    trained = [line for line in lines if line["documents_encoded"]]
    for at, line in enumerate(trained):
        value, deviation = markdown.number(line["test_MRR@10"]), line["test_MRR@10_std"]
        error = None if deviation is None else markdown.number(deviation)
        is_ours = str(line["loss"]).startswith(OURS)
        colour = COLOURS[1] if is_ours else COLOURS[0]
        axes.errorbar(value, at, xerr=error, color=colour, marker="s" if is_ours else "o", markersize=8, capsize=4)
        axes.annotate(f"{value:.3f}", (value, at), (0, 7), textcoords="offset points", ha="center", color=colour)
    before = [f"{line['test_MRR@10']:.3f}" for line in lines if not line["documents_encoded"]]
    title = f"{data} (not fine-tuned: {before[0]})" if before else data
    style(axes, title, "MRR@10 on the test split", "")
    least = min((markdown.number(line["documents_encoded"]) for line in trained), default=1.0)
    axes.set_yticks(range(len(trained)), [_label(line, least) for line in trained], fontsize="small")
    axes.set_ylim(-0.5, len(trained) - 0.2)


def _label(line: Row, least: float) -> str:
    """The loss, and how many times the documents of the loss that encodes fewest it encodes."""
    loss = f"{OURS} (default)" if line["loss"] == OURS else line["loss"]
    return f"{loss}\n{markdown.number(line['documents_encoded']) / least:.1f} times the documents"


def _measured_often(lines: list[Row]) -> list[Row]:
    """The lines of the data sets where a loss has a deviation."""
    data = {line["data"] for line in lines if line["test_MRR@10_std"] is not None}
    return [line for line in lines if line["data"] in data]


def _replaced(page: Path, found: dict[str, Any], folder: Path, mark: re.Match[str]) -> str:
    if mark[2] not in BLOCKS:
        raise ValueError(f"{page} has a mark for {mark[2]!r}; known are {', '.join(BLOCKS)}.")
    stage, make = BLOCKS[mark[2]]
    rows = found["stages"].get(stage, {}).get("rows")
    if not rows:  # the table of another run stays
        return mark[0]
    machine = found["machine"]
    about = f"{machine['device']}, torch {machine['torch']}, Triton {machine['triton']}, commit {machine['commit']}:"
    lines = [f"`python -m benchmarks gpu` on {about}", "", *make(rows, folder)]
    return f"{mark[1]}\n" + "\n".join(lines).rstrip("\n") + f"\n\n{mark[3]}"


def _pass(rows: list[Row], _: Path) -> list[str]:
    """A line per size, with the fused pass and the other implementations."""
    sizes: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        at = (row["dtype"], row["rows"], row["dim"], row["batch"])
        line = sizes.setdefault(at, {key: row[key] for key in ("dtype", "rows", "dim", "batch")})
        line[str(row["way"])] = row.get("ms") if "ms" in row else "no memory"
        if row["way"] == "fused" and "ms" in row:
            line |= {"of_product": row["of_product"], "teraflops": row["teraflops"], "extra_mb": row["extra_mb"]}
    columns = {"dtype": "rows", "rows": "N", "dim": "D", "batch": "B", "fused": "1 draw, ms", "of_product": "/ product"}
    columns |= {"teraflops": "TFLOP/s", "extra_mb": "extra MB", "fused, 8 draws": "8 draws, ms", "tiled": "tiled, ms"}
    columns |= {"product": "product, ms", markdown.COMPILED: "compiled, ms"}
    return markdown.table(columns | {markdown.PORT: "port, ms"}, list(sizes.values()))


def _step(rows: list[Row], _: Path) -> list[str]:
    columns = {"batch": "B", "loss": "loss", "ms": "ms", "of_in_batch": "/ in-batch", "pairs_per_second": "pairs/s"}
    columns |= {"extra_mb": "extra MB", "launches": "kernels", "busy_ms": "device busy, ms"}
    return markdown.table(columns, rows)


def _quality(rows: list[Row], folder: Path) -> list[str]:
    """A table for each data set."""
    columns = {"loss": "loss", "documents": "documents encoded", "rate": "rate", "mrr": "MRR@10", "ndcg": "nDCG@10"}
    columns |= {"change": "MRR@10 / in-batch", "p": "p"}
    lines: list[str] = []
    summarized = _summary(rows, folder)
    for data in dict.fromkeys(str(line["data"]) for line in summarized):
        of_data = [line for line in summarized if line["data"] == data]
        seeds = max(int(line["seeds"] or 0) for line in of_data)
        if seeds > 1:
            lines += [f"{data}, {seeds} seeds for losses with a deviation:", ""]
            lines += markdown.table(columns, [_quality_line(line) for line in of_data])
        elif len(of_data) > 1:  # the sweep was cut off, so that no rate was chosen
            runs = [row for row in rows if row["data"] == data and "error" not in row]
            lines += [f"{data}, the first runs of the sweep, one seed:", "", *markdown.table(_SWEEP, runs)]
    return lines


def _summary(rows: list[Row], folder: Path) -> list[Row]:
    from benchmarks.gpu.quality import RANKS_FILE
    from benchmarks.gpu.summary import read_ranks, summary

    return summary(rows, read_ranks(folder / RANKS_FILE))


_SWEEP = {"loss": "loss", "documents_encoded": "documents encoded", "rate": "rate", "dev_MRR@10": "dev MRR@10"}
_SWEEP |= {"test_MRR@10": "test MRR@10", "test_nDCG@10": "test nDCG@10"}


def _quality_line(line: Row) -> Row:
    def mean(metric: str) -> str:
        deviation = line[f"{metric}_std"]
        return f"{line[metric]:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")

    difference, p, rate = line["difference"], line["p_value"], line["rate"]
    made: Row = {"loss": line["loss"], "documents": line["documents_encoded"], "mrr": mean("test_MRR@10")}
    made |= {"ndcg": mean("test_nDCG@10"), "rate": None if rate is None else f"{rate:g}"}
    if isinstance(difference, float) and isinstance(value := line["test_MRR@10"], float):
        made["change"] = f"{difference / (value - difference):+.1%}"
    return made | {"p": None if p is None else f"{p:.2g}"}


def _targets(rows: list[Row], _: Path) -> list[str]:
    return markdown.table(markdown.TARGETS, markdown.targets({"passes": rows}))


BLOCKS: dict[str, tuple[str, Callable[[list[Row], Path], list[str]]]] = {
    "pass": ("passes", _pass),
    "targets": ("passes", _targets),
    "step": ("step", _step),
    "quality": ("quality", _quality),
}
