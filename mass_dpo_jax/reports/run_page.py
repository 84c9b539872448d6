"""report.html of a run: its curves, what it learnt and what it selected, on one page.

The page needs nothing else. Its pictures are also kept as PNGs in figures/.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from mass_dpo_jax import config as config_lib
from mass_dpo_jax import metrics as metrics_lib
from mass_dpo_jax.data.examples import History, Text, as_text, format_message
from mass_dpo_jax.reports import curves, style, templates
from mass_dpo_jax.reports.curves import Panel
from mass_dpo_jax.reports.format import format_metric, list_headline_metrics
from mass_dpo_jax.reports.style import COLOURS, INK
from mass_dpo_jax.runs.metrics_files import Series, read_metrics_log
from mass_dpo_jax.training.evaluator import EvaluatedSplit
from mass_dpo_jax.utils.files import write_whole

TRAINING = (
    *curves.PANELS,
    Panel("Norm of the gradient, before clipping", {"grad_norm": ""}),
    Panel("Examples per second", {"examples_per_second": ""}),
)
SELECTION = (
    Panel("Log-determinant of the selected sets", {"selection/logdet": ""}),
    Panel("Share of sets that are not the example's last", {"selection/changed": ""}),
    Panel("Share of picks that random would have made", {"selection/random_overlap": ""}),
    Panel("Candidates that a pool's weights are spread over", {"selection/effective_pool": ""}),
    Panel("Share of drawn negatives that are certain", {"selection/certain": ""}),
    Panel("Share of the gradient's noise from the draw", {"selection/draw_noise": ""}),
    Panel("Directions in a pool: effective rank", {"selection/effective_rank": ""}),
    Panel("Largest squared norm over ridge", {"selection/max_norm_ridge": ""}),
    Panel("Value over that of the best set", {"selection/optimality": ""}),
)
MAX_EXAMPLES = 6  # Shown of each direction.
MAX_TEXT_CHARS = 400  # Shown of a prompt or a response.
# Variables of the page's style for a picture's colours, so that it is readable on dark pages too.
PAGE_COLOURS = {
    INK: "currentColor", style.FAINT: "var(--dim)", style.GRID: "var(--grid)",
    style.AXIS: "var(--axis)", COLOURS[0]: "var(--first)", COLOURS[1]: "var(--second)",
    COLOURS[2]: "var(--third)",
}  # fmt: skip


def write(
    workdir: Path, config: ConfigDict, metrics: Mapping[str, Any], split: EvaluatedSplit | None
) -> None:
    """Writes report.html and figures/ into a run folder.

    Args:
        workdir: the folder, which has the run's metrics.jsonl.
        config: the run's configuration.
        metrics: the content of metrics.json.
        split: the rows that the run was tested on; None where there are none.
    """
    series = read_metrics_log(workdir / "metrics.jsonl")
    (workdir / "figures").mkdir(exist_ok=True)
    text = templates.render(
        "run_page.html",
        title=f"{config.method.replace('_', '-')}: {workdir.resolve().name}",
        step=metrics["step"],
        batch_size=config.train.batch_size,
        examples=metrics.get("examples"),
        split=metrics.get("split"),
        ranking=_ranking_table(metrics) if metrics.get("final") else None,
        training=_draw_panels(workdir, TRAINING, series),
        rewards=None if split is None else _draw_rewards(workdir, split),
        selection=_draw_panels(workdir, SELECTION, series),
        changes=None if split is None else _rank_changes(split),
        settings="\n".join(f"{name} = {value!r}" for name, value in config_lib.flatten(config)),
    )
    write_whole(workdir / "report.html", [text])


def _ranking_table(metrics: Mapping[str, Any]) -> dict[str, Any]:
    start, final, gain = (metrics.get(name) or {} for name in ("start", "final", "gain"))
    names = list_headline_metrics((start, final))
    rows = [
        [label, *(format_metric(values, f"{ranking}/{name}") for name in names)]
        for label, values, ranking in (
            ("start, by policy", start, "policy"),
            ("end, by policy", final, "policy"),
            ("difference, same examples", gain, "policy"),
            ("end, by reward", final, "reward"),
        )
        if f"{ranking}/accuracy" in values
    ]
    return {"header": ["", *names], "rows": rows}


def _draw_panels(workdir: Path, panels: Sequence[Panel], series: Mapping[str, Series]) -> list[str]:
    """Draws the panels that the run has metrics for."""
    pictures = []
    for panel in panels:
        if any(name in series for name in panel.lines):
            figure = style.new_figure(4.6, 2.9, padded=False)
            ax = figure.add_subplot()
            curves.draw_run(ax, panel, series, 0.0, COLOURS[0])
            curves.finish_panel(ax, panel)
            pictures.append(_save(figure, workdir, panel.title))
    return pictures


def _draw_rewards(workdir: Path, split: EvaluatedSplit) -> dict[str, Any] | None:
    """Draws a histogram of the final rewards; None where they have none or are all the same."""
    rewards = split.rewards_after
    if rewards is None:
        return None
    if split.selected is None:
        examples = len(rewards)
        groups = {"chosen": rewards[:, 0], "rejected": rewards[:, 1:][split.valid[:, 1:]]}
    else:
        examples = len(split.selected)
        rewards, valid = rewards[:examples], split.valid[:examples, 1:]
        selected = split.selected[:, 1:] & valid
        groups = {
            "chosen": rewards[:, 0],
            "selected": rewards[:, 1:][selected],
            "not selected": rewards[:, 1:][valid & ~selected],
        }
    # In float64, like the edges: a value clipped to the last edge must not lie beyond it.
    groups = {name: values.astype(np.float64) for name, values in groups.items()}
    # A few far-off rewards would leave all others in one bar.
    low, high = np.quantile(np.concatenate(list(groups.values())), [0.005, 0.995])
    bars = int(np.clip(np.sqrt(examples), 8, 40))
    edges = np.linspace(low, high, bars + 1).tolist()
    if edges[0] == edges[-1]:
        return None
    figure = style.new_figure(4.6, 2.9, padded=False)
    ax = figure.add_subplot()
    for (name, values), colour in zip(groups.items(), COLOURS):
        if len(values):
            clipped = np.clip(values, edges[0], edges[-1])
            ax.hist(clipped, edges, density=True, histtype="step", color=colour, linewidth=1.6)
            ax.plot([], [], color=colour, label=f"{name} ({values.mean():.2f})")
    style.style_axes(ax, "Rewards", xlabel="reward")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8, labelcolor=INK)
    return {"svg": _save(figure, workdir, "Rewards at the end"), "examples": examples}


def _save(figure: Figure, workdir: Path, title: str) -> str:
    """Writes a figure to figures/ as a PNG, and returns it as SVG for the page."""
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    write_whole(workdir / "figures" / f"{name}.png", [style.to_png(figure)])
    file = io.StringIO()
    # Text stays text, and ids are the same whenever the same run is drawn.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # A page has several figures, whose ids must differ.
    svg = re.sub(r'(id="|"#|url\(#)', lambda match: f"{match[1]}{name}-", svg)
    for colour, variable in PAGE_COLOURS.items():
        svg = svg.replace(colour.lower(), variable)
    label = f'<svg role="img" aria-label="{escape(title)}" '
    return svg.replace("<svg ", label, 1)


def _rank_changes(split: EvaluatedSplit) -> dict[str, Any]:
    """Returns the examples whose chosen response moved the most, with their candidates."""
    before = metrics_lib.per_example_rank(split.before, split.valid)
    after = metrics_lib.per_example_rank(split.after, split.valid)
    change = after - before
    order = np.argsort(change, kind="stable")
    # Log-probabilities and, where there is a reference, rewards; each before and after.
    header, tables = ["response", "", "log-prob before", "after"], [split.before, split.after]
    for words, table in (("reward before", split.rewards_before), ("after", split.rewards_after)):
        if table is not None:
            header.append(words)
            tables.append(table)

    def describe(row: int) -> dict[str, Any]:
        example = split.examples[row]
        candidates = []
        for i in np.argsort(-split.after[row], kind="stable"):
            if not split.valid[row, i]:
                continue
            response = split.candidate_ids[row, i]
            text = example.responses[response]
            kind = "" if response else "chosen"
            if split.selected is not None and row < len(split.selected) and split.selected[row, i]:
                kind = "selected"
            candidates.append(
                {
                    "text": _shorten(text),
                    "kind": kind,
                    "figures": [f"{table[row, i]:.2f}" for table in tables],
                }
            )
        return {
            "id": example.id,
            "before": before[row],
            "after": after[row],
            "prompt": _shorten(example.prompt),
            "candidates": candidates,
        }

    return {
        "header": header,
        "examples": len(change),
        "better": int((change < 0).sum()),
        "worse": int((change > 0).sum()),
        "up": [describe(row) for row in order[:MAX_EXAMPLES].tolist() if change[row] < 0],
        "down": [describe(row) for row in order[::-1][:MAX_EXAMPLES].tolist() if change[row] > 0],
    }


def _shorten(text: Text | History) -> str:
    text = as_text(text)
    if not isinstance(text, str):
        text = "\n".join(f"{message['role']}: {format_message(message)}" for message in text)
    if len(text) <= MAX_TEXT_CHARS:
        return text
    half = MAX_TEXT_CHARS // 2
    return f"{text[:half]} … {text[-half:]}"
