"""Figures 2 and 3: margin, accuracy and chosen reward during training.

They show the validation split, where all methods are measured on the same candidates. Margins in
the training log are over the negatives that a method chose, and cannot be compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.reports import style
from mass_dpo_jax.reports.curves import ACCURACY, Panel, finish_panel
from mass_dpo_jax.reports.paper import cells as cells_lib
from mass_dpo_jax.reports.paper.cells import Cell
from mass_dpo_jax.reports.paper.layout import METHODS, TITLES, Figure
from mass_dpo_jax.reports.paper.runs import Run
from mass_dpo_jax.runs.metrics_files import Series, read_metrics_log

PANELS = (
    Panel("Reward margin over the mean negative", {"eval/rewards/margins": ""}),
    Panel("Accuracy by policy", {ACCURACY: ""}),
    Panel("Reward of the chosen response", {"eval/rewards/chosen": ""}),
)
DASHES = {"mass_dpo": "-", "sdpo": "--"}  # The methods of the paper's figures, and their lines.
SHORT_TITLES = ("margin", "accuracy", "chosen reward")  # Of the panels, in the paper's figures.
XLABEL = "Step (number of the evaluation)"  # The paper calls it Step, and says what it counts.
CAPTION = (
    "Figures show the validation split: the reward margin over the mean negative, the accuracy by "
    "policy, and the reward of the chosen response. A line is the mean over seeds, its band goes "
    "from the smallest seed to the largest."
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


def draw_figure(
    figure: Figure, cells: Sequence[Cell], logs: Mapping[Path, Mapping[str, Series]]
) -> bytes | None:
    """Draws a figure of the paper: a row of panels for each dataset, a colour for each model.

    MASS-DPO is solid, S-DPO dashed. The x axis counts evaluations, as the paper's does.

    Returns:
        A PNG, or None where there is nothing to draw.
    """
    rows = [row for row in METHODS if row.method in DASHES]
    models = {title: members for title, _, members in cells_lib.group_by_model(cells)}
    curves = {
        (dataset, model, row): runs
        for dataset in figure.datasets
        for model, members in models.items()
        for row in rows
        if (cell := cells_lib.find_cell(members, dataset, row)) and (runs := _runs(cell, logs))
    }
    if not curves:
        return None
    shown = [dataset for dataset in figure.datasets if any(key[0] == dataset for key in curves)]
    colours = dict(zip(dict.fromkeys(key[1] for key in curves), itertools.cycle(style.COLOURS)))
    picture = style.new_figure(12.6, 3.2 * len(shown) + 0.5, dpi=110)
    for i, dataset in enumerate(shown):
        first: Axes | None = None  # One axis for all: rewards have no point before training.
        for j, (panel, title) in enumerate(zip(PANELS, SHORT_TITLES, strict=True)):
            ax = picture.add_subplot(len(shown), len(PANELS), i * len(PANELS) + j + 1, sharex=first)
            first = first or ax
            for (of, model, row), runs in curves.items():
                if of == dataset:
                    counted = [_count_evaluations(run) for run in runs]
                    _draw_band(ax, panel, counted, colours[model], DASHES[row.method])
            finish_panel(ax, Panel(f"{TITLES[dataset]}: {title}", panel.lines), xlabel=XLABEL)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend = [
        (f"{row.title}, {model}", colour, DASHES[row.method])
        for model, colour in colours.items()
        for row in reversed(rows)
        if any(key[1:] == (model, row) for key in curves)
    ]
    style.add_legend(picture, legend, loc="outside upper center", ncols=4, fontsize=9)
    return style.to_png(picture)


def draw(cells: Sequence[Cell], logs: Mapping[Path, Mapping[str, Series]]) -> bytes | None:
    """Draws the curves of cells of one model and dataset against steps, a colour for each method.

    Where no seed has finished, the unfinished ones are drawn as far as all of them got.

    Returns:
        A PNG, or None where there is nothing to draw.
    """
    lines = [(cell.title(cells), runs) for cell in cells if (runs := _runs(cell, logs))]
    if not lines:
        return None
    figure = style.new_figure(12.6, 3.5 + 0.25 * -(-len(lines) // 3), dpi=110)
    looks = [(colour, dashes) for dashes in style.DASHES for colour in style.COLOURS]
    first: Axes | None = None
    for i, panel in enumerate(PANELS):
        ax = figure.add_subplot(1, len(PANELS), i + 1, sharex=first)
        first = first or ax
        for (_, runs), (colour, dashes) in zip(lines, itertools.cycle(looks)):
            _draw_band(ax, panel, runs, colour, dashes)
        finish_panel(ax, panel)
    legend = [(title, *look) for (title, _), look in zip(lines, itertools.cycle(looks))]
    style.add_legend(figure, legend, loc="outside upper center", ncols=3, fontsize=9)
    return style.to_png(figure)


def _runs(cell: Cell, logs: Mapping[Path, Mapping[str, Series]]) -> list[Mapping[str, Series]]:
    """Returns the logs of a cell's finished runs, else of all; none where there is no curve."""
    runs = [logs[run.folder] for run in cell.finished or cell.runs if run.folder in logs]
    drawn = any(name in run for run in runs for panel in PANELS for name in panel.lines)
    return runs if drawn else []


def _count_evaluations(run: Mapping[str, Series]) -> dict[str, Series]:
    """Returns the series of a run over the number of the evaluation; 0 is before training."""
    steps = sorted({step for panel in PANELS for n in panel.lines for step in run.get(n, [[]])[0]})
    first = 0 if steps and steps[0] == 0 else 1
    numbers = {step: float(i) for i, step in enumerate(steps, start=first)}
    return {
        name: (np.array([numbers[step] for step in run[name][0]]), run[name][1])
        for panel in PANELS
        for name in panel.lines
        if name in run
    }


def _draw_band(
    ax: Axes, panel: Panel, runs: Sequence[Mapping[str, Series]], colour: str, dashes: Any
) -> None:
    (metric,) = panel.lines
    band = band_over_seeds([run[metric] for run in runs if metric in run])
    if band is not None:
        steps, low, mean, high = band
        ax.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        # A ring tells a dashed line from a solid one where there is one point, or both coincide.
        solid = dashes == "-"
        ax.plot(
            steps, mean, color=colour, linestyle=dashes, marker="o",
            markersize=3 if solid else 5.5, markerfacecolor=colour if solid else "none",
        )  # fmt: skip


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
