"""Figures 2 and 3: margin, accuracy and chosen reward against steps, methods on top of each other.

They show the validation split, where all methods are measured on the same candidates; margins in
the training log are over the negatives that a method chose, and cannot be compared.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.reports.curves import ACCURACY, COLOURS, Panel, dress
from mass_dpo_jax.reports.paper.cells import Cell
from mass_dpo_jax.reports.paper.runs import Run
from mass_dpo_jax.runs.metrics_files import Series, read_metrics_log

PANELS = (
    Panel("Reward margin over the mean negative", {"eval/rewards/margins": ""}),
    Panel("Accuracy by policy", {ACCURACY: ""}),
    Panel("Reward of the chosen response", {"eval/rewards/chosen": ""}),
)
DASHES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")


def read_logs(runs: Sequence[Run]) -> dict[Path, dict[str, Series]]:
    """metrics.jsonl of every run that has one; a broken file counts as none."""
    found = {}
    for run in runs:
        try:
            found[run.folder] = read_metrics_log(run.folder / "metrics.jsonl")
        except UserError:
            continue
    return found


def seconds_per_step(run: Run, log: Mapping[str, Series]) -> float | None:
    """The median over the steps, so that compiling does not count; None where it is not known."""
    if "examples_per_second" not in log:
        return None
    speed = float(np.median(log["examples_per_second"][1]))
    return float(run.settings["train.batch_size"]) / speed if speed > 0 else None


def draw(cells: Sequence[Cell], logs: Mapping[Path, Mapping[str, Series]]) -> bytes | None:
    """A PNG of the curves of cells of one model and data set; None where there is nothing to draw.

    A line is the mean over seeds, the band around it goes from the smallest seed to the largest.
    Where no seed has finished, those on their way are drawn as far as all of them got.
    """
    drawn = []
    for cell in cells:
        runs = [logs[run.folder] for run in cell.finished or cell.runs if run.folder in logs]
        if any(name in run for run in runs for panel in PANELS for name in panel.lines):
            drawn.append((cell.title(cells), runs))
    if not drawn:
        return None
    rows = -(-len(drawn) // 3)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=(12.6, 3.5 + 0.25 * rows), dpi=110, layout=layout)
    FigureCanvasAgg(figure)
    styles = [(colour, dash) for dash in DASHES for colour in COLOURS]
    for i, panel in enumerate(PANELS):
        ax = figure.add_subplot(1, len(PANELS), i + 1)
        (metric,) = panel.lines
        for (_, runs), (colour, dash) in zip(drawn, itertools.cycle(styles)):
            band = over_seeds([run[metric] for run in runs if metric in run])
            if band is None:
                continue
            steps, low, mean, high = band
            ax.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            ax.plot(steps, mean, color=colour, linestyle=dash, marker="o", markersize=3)
        dress(ax, panel)
    handles = [
        Line2D([], [], color=colour, linestyle=dash, linewidth=2, label=name)
        for (name, _), (colour, dash) in zip(drawn, itertools.cycle(styles))
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    png = io.BytesIO()
    # Without matplotlib's version in the file, the same runs give the same bytes.
    figure.savefig(png, format="png", facecolor="white", metadata={"Software": None})
    return png.getvalue()


def over_seeds(
    series: Sequence[Series],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Steps that all seeds have, and the smallest, mean and largest value there."""
    if not series:
        return None
    common = sorted(set.intersection(*(set(steps.tolist()) for steps, _ in series)))
    if not common:
        return None
    # A step that was logged twice counts as logged last.
    values = np.array([[dict(zip(*map(np.ndarray.tolist, s)))[i] for i in common] for s in series])
    return np.array(common), values.min(0), values.mean(0), values.max(0)
