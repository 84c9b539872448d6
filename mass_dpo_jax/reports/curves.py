"""Pictures of training: the curves of one or several runs, and how axes look."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.runs.metrics_files import Series, read_metrics_log

# Okabe and Ito's colours, told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES: tuple[Literal["-", "--"], ...] = ("-", "--")
INK, FAINT = "#333333", "#888888"


@dataclasses.dataclass(frozen=True)
class Panel:
    """One picture of the figure: which metrics it shows and what they are called there."""

    title: str
    lines: Mapping[str, str]  # Metric name -> its word in the panel's own legend.


ACCURACY = "eval/policy/accuracy"
PANELS = (
    Panel("Loss", {"loss": ""}),
    Panel("Accuracy on the validation split, by policy", {ACCURACY: ""}),
    Panel(
        "Reward margin of the chosen response",
        {
            "rewards/margins": "over the mean negative",
            "rewards/margins_hard": "over the best negative",
        },
    ),
    Panel("Rewards", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
)


def plot(
    runs: Mapping[str, Path],
    output: Path,
    *,
    in_sequence: bool = False,
    accuracies: Mapping[str, float] | None = None,
) -> None:
    """Writes a PNG of the runs' curves. Panels that no run has anything for are left out.

    Args:
      runs: what to call each run, and its `metrics.jsonl`.
      output: the PNG to write.
      in_sequence: the runs are stages, each going on from the one before: they are drawn one after
        the other, not on top of each other.
      accuracies: names and values of baselines, drawn as level lines beside the accuracy.

    Raises:
      UserError: a file is missing or broken, or none has anything to show.
    """
    found = {name: read_metrics_log(path) for name, path in runs.items()}
    ends = [max((steps[-1] for steps, _ in run.values()), default=0.0) for run in found.values()]
    starts = [0.0, *itertools.accumulate(ends)][: len(ends)] if in_sequence else [0.0] * len(ends)
    panels = [p for p in PANELS if any(name in run for run in found.values() for name in p.lines)]
    if not panels:
        raise UserError(f"{', '.join(map(str, runs.values()))}: nothing to draw yet")

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=(4.6 * columns, 2.9 * rows + 0.4), dpi=130, layout=layout)
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(len(panels))]
    for panel, ax in zip(panels, axes, strict=True):
        for run, start, colour in zip(found.values(), starts, itertools.cycle(COLOURS)):
            draw(ax, panel, run, start, colour)
        dress(ax, panel)
        if in_sequence:
            _put_in_sequence(ax, panel, [*starts[1:], starts[-1] + ends[-1]])
        if ACCURACY in panel.lines:
            _levels(ax, accuracies or {})
    if len(runs) > 1:
        handles = [
            Line2D([], [], color=colour, linewidth=2, label=name)
            for name, colour in zip(runs, itertools.cycle(COLOURS))
        ]
        figure.legend(
            handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=10
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, facecolor="white")


def draw(ax: Axes, panel: Panel, run: Mapping[str, Series], start: float, colour: str) -> None:
    """A run's lines, moved by `start` steps: validation as points with errors, others smoothed."""
    for name, style in zip(panel.lines, STYLES):
        if name not in run:
            continue
        steps, values = run[name]
        steps = steps + start
        if name.startswith("eval/"):
            ax.plot(steps, values, color=colour, linestyle=style, marker="o", markersize=3.5)
            if f"{name}_se" in run:
                error = run[f"{name}_se"][1]
                ax.fill_between(
                    steps, values - error, values + error, color=colour, alpha=0.18, linewidth=0
                )
        else:
            ax.plot(steps, values, color=colour, linewidth=0.6, alpha=0.22)
            ax.plot(steps, smooth(values), color=colour, linestyle=style, linewidth=1.7)


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean [M] of the values around each of the M: a fifteenth of all, half of that at the ends."""
    half = len(values) // 30
    totals = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    first, last = np.maximum(i - half, 0), np.minimum(i + half + 1, len(values))
    return (totals[last] - totals[first]) / (last - first)


def dress(ax: Axes, panel: Panel) -> None:
    """Title, axes, grid and the panel's own legend."""
    ax.set_title(panel.title, loc="left", fontsize=11, color=INK)
    ax.set_xlabel("step", fontsize=9, color=INK)
    ax.grid(color="#E6E6E6", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#BBBBBB")
    ax.tick_params(labelsize=9, color="#BBBBBB", labelcolor=INK)
    ax.margins(x=0.02)
    low, high = ax.get_ylim()
    least = 1e-3 * max(abs(low), abs(high))
    if high - low < least:  # Else rounding errors fill the picture, as 1 + 2e-7.
        ax.set_ylim((low + high - least) / 2, (low + high + least) / 2)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    words = [word for word in panel.lines.values() if word]
    if words:
        # The runs have the colours, so the words here stand for the kinds of line.
        handles = [
            Line2D([], [], color=INK, linestyle=style, linewidth=1.5, label=word)
            for word, style in zip(words, STYLES)
        ]
        ax.legend(handles=handles, frameon=False, fontsize=9, labelcolor=INK, handlelength=2.4)
    if any(name.endswith("/accuracy") for name in panel.lines):
        ax.set_ylim(bottom=0)
        ax.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _put_in_sequence(ax: Axes, panel: Panel, edges: Sequence[float]) -> None:
    """One axis of steps for all panels; a scale on which losses of different kinds can be read."""
    ax.set_xlim(-0.02 * edges[-1], 1.02 * edges[-1])
    for edge in edges[:-1]:
        ax.axvline(edge, color=FAINT, linewidth=0.8, linestyle=":")
    if "loss" in panel.lines:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())


def _levels(ax: Axes, accuracies: Mapping[str, float]) -> None:
    # Setting the bottom has fixed the top too: make room for every level and its name.
    ax.set_ylim(top=max([ax.get_ylim()[1], *(1.15 * value for value in accuracies.values())]))
    for name, value in accuracies.items():
        ax.axhline(value, color=FAINT, linewidth=1, linestyle=(0, (6, 3)))
        ax.annotate(
            name,
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=9,
            color=INK,
        )
