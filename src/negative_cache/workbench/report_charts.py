"""Charts of a report: SVG whose colours are the page's, drawn small enough to be read on a phone."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from negative_cache.workbench.compare_report import MARKERS, style

SIZE = (4.2, 2.5)  # inches, of 72 units each: about as wide as a phone, so that letters keep their size there
NUM_COLOURS = 7  # as the page has
DASHES = ("-", "--", "-.", ":")
DASHES_OF_SVG = ("", "5 3", "6 2 1 2", "1 2")
GLYPHS = ("●", "■", "▲", "◆", "▼", "✚", "✖")
MAX_RUNS = NUM_COLOURS * len(DASHES)  # with the numbers of colours and dashes coprime, no two are alike
MAX_POINTS = 300
NUM_MARKERS = 5

# Colours that nothing else has, and what the page is to show in their place, in light and in dark.
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
    """What a chart shows of a run.

    Attributes:
        run: The number of the run, which has its colour, dashes and marker.
        x: In rising order.
        y: NaN where there is nothing.
        is_faint: Whether it only goes along with another line of the run.
    """

    run: int
    x: Sequence[float]
    y: Sequence[float]
    is_faint: bool = False


def draw(lines: Sequence[Line], name: str, x_label: str = "step", is_log: bool = False, as_points: bool = False) -> str:
    """An `<svg>` element.

    Args:
        lines: What to show.
        name: Another one for each chart of a page, so that what they define has different names.
        x_label: Below the axis.
        is_log: Whether the vertical axis is logarithmic.
        as_points: Whether faint lines are points that are not joined.
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
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
            if axes.get_ylim()[0] < 0 and not any(value < 0 for line in lines for value in line.y):
                axes.set_ylim(bottom=0)  # a share is not negative
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
    """A number in few characters."""
    if not math.isfinite(value):
        return str(value)
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.3g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


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
    """With no more points than can be seen, the last one among them."""
    step = -(-len(line.x) // MAX_POINTS)
    if step <= 1:
        return line
    return line._replace(x=line.x[::-1][::step][::-1], y=line.y[::-1][::step][::-1])


def _for_page(svg: str) -> str:
    """The element alone, with the page's colours and letters, and without names that all charts have."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[a-z0-9.]+_\d+"', "", svg)
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    for colour, of_page in _OF_PAGE.items():
        svg = svg.replace(colour, of_page)
    return svg.replace("<svg ", '<svg aria-hidden="true" ', 1)  # the page has its meaning in words
