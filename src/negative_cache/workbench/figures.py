"""The style that all plots share."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from negative_cache.workbench.files import replacing

# Okabe and Ito's colours, which are distinct with any colour vision; each series also has its own marker.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def style(axes: Axes) -> None:
    """Draw the grid behind the data, and remove the frame at the top and on the right."""
    axes.grid(True, color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG file, and return its path."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    return path
