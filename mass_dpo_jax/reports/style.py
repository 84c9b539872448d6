"""How figures look: colours, sizes, axes and legends."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

# Okabe and Ito's colours, which are told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")
INK, FAINT, AXIS, GRID = "#333333", "#888888", "#BBBBBB", "#E6E6E6"


def new_figure(width: float, height: float, dpi: int = 130, padded: bool = True) -> Figure:
    """Returns an empty figure that is laid out by itself.

    Args:
        width: inches.
        height: inches.
        dpi: pixels of an inch.
        padded: whether there is space around the axes, as figures of several need.
    """
    layout = ConstrainedLayoutEngine()
    if padded:
        layout.set(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=(width, height), dpi=dpi, layout=layout)
    FigureCanvasAgg(figure)  # Without pyplot, which keeps figures alive and wants a display.
    return figure


def style_axes(ax: Axes, title: str, xlabel: str = "step") -> None:
    """Sets titles, grid and spines, and keeps rounding errors from filling the picture.

    To be called when everything is drawn.
    """
    ax.set_title(title, loc="left", fontsize=11, color=INK)
    ax.set_xlabel(xlabel, fontsize=9, color=INK)
    ax.grid(color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(AXIS)
    ax.tick_params(labelsize=9, color=AXIS, labelcolor=INK)
    ax.margins(x=0.02)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    low, high = ax.get_ylim()
    min_height = 1e-3 * max(abs(low), abs(high))  # Values such as 1 + 2e-7 are all the same.
    if high - low < min_height:
        ax.set_ylim((low + high - min_height) / 2, (low + high + min_height) / 2)


def show_percent(ax: Axes) -> None:
    """Labels the y axis, of shares, in percent from 0."""
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def add_legend(
    target: Axes | Figure, lines: Iterable[tuple[str, str, Any]], **options: Any
) -> None:
    """Adds a legend of lines to axes or a figure.

    Args:
        target: the axes or figure.
        lines: label, colour and dashes of each line.
        options: further ones of `legend`.
    """
    width = 2.0 if isinstance(target, Figure) else 1.5
    handles = [
        Line2D([], [], color=colour, linestyle=dashes, linewidth=width, label=label)
        for label, colour, dashes in lines
    ]
    target.legend(handles=handles, frameon=False, **options)


def to_png(figure: Figure) -> bytes:
    """Draws a figure; the same figure gives the same bytes."""
    file = io.BytesIO()
    # Software: matplotlib's version, which is left out.
    figure.savefig(file, format="png", facecolor="white", metadata={"Software": None})
    return file.getvalue()
