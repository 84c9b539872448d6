"""Curves of one or several runs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.reports import style
from mass_dpo_jax.reports.style import COLOURS, DASHES, FAINT, INK
from mass_dpo_jax.runs.metrics_files import Series, read_metrics_log
from mass_dpo_jax.utils.files import write_whole


@dataclasses.dataclass(frozen=True)
class Panel:
    """One picture of a figure.

    Attributes:
        title: the title.
        lines: the metrics shown, and their words in the panel's own legend.
    """

    title: str
    lines: Mapping[str, str]


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
    """Writes a PNG of the runs' curves. Panels that no run has metrics for are left out.

    Args:
        runs: each run's name and `metrics.jsonl`.
        output: the PNG to write.
        in_sequence: whether the runs are stages that continue each other, to be drawn side by
            side on one axis of steps.
        accuracies: names and values of baselines, drawn as level lines beside the accuracy.

    Raises:
        UserError: a file is missing or broken, or none has anything to show.
    """
    metrics = {name: read_metrics_log(path) for name, path in runs.items()}
    panels = [p for p in PANELS if any(name in run for run in metrics.values() for name in p.lines)]
    if not panels:
        raise UserError(f"{', '.join(map(str, runs.values()))}: nothing to draw yet")
    lengths = [
        max((steps[-1] for steps, _ in run.values()), default=0.0) for run in metrics.values()
    ]
    starts = [0.0] * len(runs)
    if in_sequence:
        starts = [0.0, *itertools.accumulate(lengths)][: len(runs)]

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = style.new_figure(4.6 * columns, 2.9 * rows + 0.4)
    for i, panel in enumerate(panels):
        ax = figure.add_subplot(rows, columns, i + 1)
        for run, start, colour in zip(metrics.values(), starts, itertools.cycle(COLOURS)):
            draw_run(ax, panel, run, start, colour)
        finish_panel(ax, panel)
        if in_sequence:
            _mark_stages(ax, panel, [*starts[1:], starts[-1] + lengths[-1]])
        if ACCURACY in panel.lines:
            _draw_levels(ax, accuracies or {})
    if len(runs) > 1:
        lines = [(name, colour, "-") for name, colour in zip(runs, itertools.cycle(COLOURS))]
        style.add_legend(figure, lines, loc="outside upper center", ncols=4, fontsize=10)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, [style.to_png(figure)])


def draw_run(ax: Axes, panel: Panel, run: Mapping[str, Series], start: float, colour: str) -> None:
    """Draws a run's lines of a panel: evaluations as points with errors, other metrics smoothed.

    Args:
        ax: the axes.
        panel: the metrics to draw.
        run: the run's metrics.
        start: steps to move the lines by.
        colour: colour of all lines, which differ in their dashes.
    """
    for name, dashes in zip(panel.lines, DASHES):
        if name not in run:
            continue
        steps, values = run[name]
        steps = steps + start
        if name.startswith("eval/"):
            ax.plot(steps, values, color=colour, linestyle=dashes, marker="o", markersize=3.5)
            if f"{name}_se" in run:
                error = run[f"{name}_se"][1]
                ax.fill_between(
                    steps, values - error, values + error, color=colour, alpha=0.18, linewidth=0
                )
        else:
            ax.plot(steps, values, color=colour, linewidth=0.6, alpha=0.22)
            ax.plot(steps, smooth(values), color=colour, linestyle=dashes, linewidth=1.7)


def smooth(values: np.ndarray) -> np.ndarray:
    """Returns a running mean [M] over a fifteenth of the values, half as many at the ends."""
    half = len(values) // 30
    totals = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    first, last = np.maximum(i - half, 0), np.minimum(i + half + 1, len(values))
    return (totals[last] - totals[first]) / (last - first)


def finish_panel(ax: Axes, panel: Panel, xlabel: str = "step") -> None:
    """Styles the axes of a panel that is drawn, and adds its own legend."""
    style.style_axes(ax, panel.title, xlabel)
    words = [word for word in panel.lines.values() if word]
    if words:
        # Colours stand for runs, so the legend shows dashes only.
        lines = [(word, INK, dashes) for word, dashes in zip(words, DASHES)]
        style.add_legend(ax, lines, fontsize=9, labelcolor=INK, handlelength=2.4)
    if any(name.endswith("/accuracy") for name in panel.lines):
        style.show_percent(ax)


def _mark_stages(ax: Axes, panel: Panel, ends: Sequence[float]) -> None:
    """Gives all panels the same axis of steps, and losses of different kinds a readable scale."""
    ax.set_xlim(-0.02 * ends[-1], 1.02 * ends[-1])
    for end in ends[:-1]:
        ax.axvline(end, color=FAINT, linewidth=0.8, linestyle=":")
    if "loss" in panel.lines:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())


def _draw_levels(ax: Axes, accuracies: Mapping[str, float]) -> None:
    # Setting the bottom has fixed the top too, so make room for every level and its name.
    ax.set_ylim(top=max([ax.get_ylim()[1], *(1.15 * value for value in accuracies.values())]))
    for name, value in accuracies.items():
        ax.axhline(value, color=FAINT, linewidth=1, linestyle=(0, (6, 3)))
        ax.annotate(
            name, (1, value), xycoords=("axes fraction", "data"), xytext=(0, 2),
            textcoords="offset points", ha="right", va="bottom", fontsize=9, color=INK,
        )  # fmt: skip
