"""Figures 2 and 3: margin, accuracy and chosen reward against steps, one line for each method.

They show the validation split, where all methods are measured on the same candidates. Margins in
the training log are over the negatives that a method chose, and cannot be compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.reports import style
from mass_dpo_jax.reports.curves import ACCURACY, Panel, finish_panel
from mass_dpo_jax.reports.paper.cells import Cell
from mass_dpo_jax.reports.paper.runs import Run
from mass_dpo_jax.runs.metrics_files import Series, read_metrics_log

PANELS = (
    Panel("Reward margin over the mean negative", {"eval/rewards/margins": ""}),
    Panel("Accuracy by policy", {ACCURACY: ""}),
    Panel("Reward of the chosen response", {"eval/rewards/chosen": ""}),
)


def read_logs(runs: Sequence[Run]) -> dict[Path, dict[str, Series]]:
    """Reads metrics.jsonl of every run that has one; a broken file counts as none."""
    logs = {}
    for run in runs:
        try:
            logs[run.folder] = read_metrics_log(run.folder / "metrics.jsonl")
        except UserError:
            continue
    return logs


def seconds_per_step(run: Run, log: Mapping[str, Series]) -> float | None:
    """Returns the median time of a step, which leaves out compiling; None where it is unknown."""
    if "examples_per_second" not in log:
        return None
    speed = float(np.median(log["examples_per_second"][1]))
    return float(run.settings["train.batch_size"]) / speed if speed > 0 else None


def draw(cells: Sequence[Cell], logs: Mapping[Path, Mapping[str, Series]]) -> bytes | None:
    """Draws the curves of cells of one model and dataset.

    A line is the mean over seeds, the band around it goes from the smallest seed to the largest.
    Where no seed has finished, the unfinished ones are drawn as far as all of them got.

    Returns:
        A PNG, or None where there is nothing to draw.
    """
    lines = []
    for cell in cells:
        runs = [logs[run.folder] for run in cell.finished or cell.runs if run.folder in logs]
        if any(name in run for run in runs for panel in PANELS for name in panel.lines):
            lines.append((cell.title(cells), runs))
    if not lines:
        return None
    figure = style.new_figure(12.6, 3.5 + 0.25 * -(-len(lines) // 3), dpi=110)
    looks = [(colour, dashes) for dashes in style.DASHES for colour in style.COLOURS]
    for i, panel in enumerate(PANELS):
        ax = figure.add_subplot(1, len(PANELS), i + 1)
        (metric,) = panel.lines
        for (_, runs), (colour, dashes) in zip(lines, itertools.cycle(looks)):
            band = band_over_seeds([run[metric] for run in runs if metric in run])
            if band is not None:
                steps, low, mean, high = band
                ax.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
                ax.plot(steps, mean, color=colour, linestyle=dashes, marker="o", markersize=3)
        finish_panel(ax, panel)
    legend = [(title, *look) for (title, _), look in zip(lines, itertools.cycle(looks))]
    style.add_legend(figure, legend, loc="outside upper center", ncols=3, fontsize=9)
    return style.to_png(figure)


def band_over_seeds(
    series: Sequence[Series],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Returns the steps that all seeds have, and the smallest, mean and largest value there."""
    # A step that was logged twice has the value that was logged last.
    seeds = [dict(zip(steps.tolist(), values.tolist(), strict=True)) for steps, values in series]
    common = sorted(set.intersection(*map(set, seeds))) if seeds else []
    if not common:
        return None
    values = np.array([[seed[step] for step in common] for seed in seeds])
    return np.array(common), values.min(0), values.mean(0), values.max(0)
