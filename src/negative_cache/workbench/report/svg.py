"""The charts of a report as SVG in the colours of the page, with text that is legible on a phone."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, NullLocator

from negative_cache.workbench.figures import MARKERS, style

SIZE = (4.2, 2.5)  # inches of 72 units: about the width of a phone, where text has its nominal size
NUM_COLOURS = 7  # of the style sheet
DASHES = ("-", "--", "-.", ":")
DASHES_OF_SVG = ("", "5 3", "6 2 1 2", "1 2")
GLYPHS = ("●", "■", "▲", "◆", "▼", "✚", "✖")
MAX_RUNS = NUM_COLOURS * len(DASHES)  # all distinct, because the numbers of colours and dashes are coprime
MAX_POINTS = 300
NUM_MARKERS = 5
MIN_TICKS = 3  # of a logarithmic axis
MIN_SPAN = 0.05  # of a linear axis, relative to its largest value

# Unique placeholder colours, and the variables of the style sheet that replace them, for light and dark mode.
_INK, _GRID = "#0a0b0c", "#0d0e0f"
_SERIES = [f"#f0f0{number:02x}" for number in range(NUM_COLOURS)]
_OF_PAGE = {
    _INK: "currentColor",
    _GRID: "var(--grid)",
    **{colour: f"var(--c{number})" for number, colour in enumerate(_SERIES)},
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


class Line(NamedTuple):
    """A line of a chart.

    Attributes:
        run: Number of the run, which determines colour, dashes and marker.
        x: Increasing.
        y: NaN leaves a gap.
        is_faint: Whether the line is a detail of another line of the same run.
    """

    run: int
    x: Sequence[float]
    y: Sequence[float]
    is_faint: bool = False


def draw(lines: Sequence[Line], name: str, x_label: str = "step", is_log: bool = False, as_points: bool = False) -> str:
    """A chart as an `<svg>` element.

    Args:
        lines: The lines.
        name: Unique on the page. It makes the identifiers in the elements unique.
        x_label: Label of the horizontal axis.
        is_log: Whether the vertical axis is logarithmic.
        as_points: Whether faint lines are drawn as separate points.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        for line in lines:
            _plot(axes, _thinned(line), as_points)
        style(axes)
        axes.grid(True, color=_GRID, linewidth=0.6)
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        if is_log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(_log_locator(*axes.get_ylim()))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            _widen(axes)
            axes.yaxis.set_major_locator(MaxNLocator(5))
            if axes.get_ylim()[0] < 0 and not any(value < 0 for line in lines for value in line.y):
                axes.set_ylim(bottom=0)  # if no value is negative
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        written = io.StringIO()
        figure.savefig(
            written,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
        )
    return _for_page(written.getvalue())


def short(value: float) -> str:
    """A number in a few characters."""
    if not math.isfinite(value):
        return str(value)
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.3g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


def _widen(axes: Axes) -> None:
    """Make the vertical axis so long that the labels of its ticks, which have three digits, differ."""
    low, high = axes.get_ylim()
    least = MIN_SPAN * max(abs(low), abs(high))
    if high - low < least:
        middle = (low + high) / 2
        axes.set_ylim(middle - least / 2, middle + least / 2)


def _log_locator(low: float, high: float) -> Locator:
    """Where a logarithmic axis has ticks: at 1, 2 and 5 times the powers of ten, or evenly if these are too few."""
    locator = LogLocator(subs=(1, 2, 5), numticks=8)
    inside = [tick for tick in locator.tick_values(low, high) if low <= tick <= high]
    return locator if len(inside) >= MIN_TICKS else MaxNLocator(5)


def _plot(axes: Axes, line: Line, as_points: bool) -> None:
    is_cloud = line.is_faint and as_points
    axes.plot(
        line.x,
        line.y,
        color=_SERIES[line.run % NUM_COLOURS],
        linestyle="none" if is_cloud else DASHES[line.run % len(DASHES)],
        linewidth=0.8 if line.is_faint else 1.8,
        alpha=0.45 if line.is_faint else 1.0,
        marker="." if is_cloud else None if line.is_faint else MARKERS[line.run % len(MARKERS)],
        markersize=3.5 if is_cloud else 4.5,
        markevery=None if is_cloud else max(1, len(line.x) // NUM_MARKERS),
        markeredgecolor="none" if is_cloud else None,
    )


def _thinned(line: Line) -> Line:
    """The line with at most `MAX_POINTS` points, including the last one."""
    step = -(-len(line.x) // MAX_POINTS)
    if step <= 1:
        return line
    return line._replace(x=line.x[::-1][::step][::-1], y=line.y[::-1][::step][::-1])


def _for_page(svg: str) -> str:
    """The element alone, with the colours and fonts of the page, and without identifiers that all charts share."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[a-z0-9.]+_\d+"', "", svg)
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    for colour, of_page in _OF_PAGE.items():
        svg = svg.replace(colour, of_page)
    return svg.replace("<svg ", '<svg aria-hidden="true" ', 1)  # the page describes the chart in words
