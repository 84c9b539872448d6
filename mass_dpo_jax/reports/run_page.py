"""report.html of a run: its curves, what it learnt and what it selected, on one page that needs
nothing else. Its pictures are also kept as PNGs in figures/."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from mass_dpo_jax import config as config_lib
from mass_dpo_jax import metrics
from mass_dpo_jax.data.examples import History, Text
from mass_dpo_jax.reports import curves
from mass_dpo_jax.reports.curves import COLOURS, Panel
from mass_dpo_jax.reports.paper.page import STYLE
from mass_dpo_jax.training.monitor import EvaluatedSplit

CURVES = (
    *curves.PANELS,
    Panel("Norm of the gradient, before clipping", {"grad_norm": ""}),
    Panel("Examples per second", {"examples_per_second": ""}),
)
SELECTION = (
    Panel("Log-determinant of the selected sets", {"selection/logdet": ""}),
    Panel("Share of sets that are not the example's last", {"selection/changed": ""}),
    Panel("Share of picks that random would have made", {"selection/random_overlap": ""}),
    Panel("Directions in a pool: effective rank", {"selection/effective_rank": ""}),
    Panel("Largest squared norm over ridge", {"selection/max_norm_ridge": ""}),
    Panel("Value over that of the best set", {"selection/optimality": ""}),
)
SHOWN = 6  # Examples of each direction.
LONGEST = 400  # Characters of a prompt or a response.
COLUMNS = ("accuracy", "recall@3", "mrr", "ndcg@3")
# Colours that the page's style sets, so that pictures follow light and dark.
FOLLOWING = {
    "#333333": "currentColor", "#888888": "var(--dim)", "#e6e6e6": "var(--grid)",
    "#bbbbbb": "var(--axis)", "#0072b2": "var(--first)", "#d55e00": "var(--second)",
    "#009e73": "var(--third)",
}  # fmt: skip
MORE_STYLE = """
:root { --dim: #888; --grid: #e6e6e6; --axis: #bbb; --first: #0072b2; --second: #d55e00;
  --third: #009e73; }
@media (prefers-color-scheme: dark) { :root { --dim: #999; --grid: #3a3a3a; --axis: #666;
  --first: #56b4e9; --second: #e8853d; --third: #35c79b; } }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr));
  gap: 1rem; }
svg { width: 100%; height: auto; }
.words td { white-space: normal; text-align: left; vertical-align: top; }
.words td.n { white-space: nowrap; text-align: right; }
.prompt { overflow-wrap: anywhere; white-space: pre-wrap; border-left: 3px solid var(--axis);
  padding-left: .8rem; }
.chosen { font-weight: 600; }
details { margin: .5rem 0; }
pre { overflow-x: auto; font-size: .8rem; }
"""


def write(
    workdir: Path, config: ConfigDict, done: Mapping[str, Any], tested: EvaluatedSplit | None
) -> None:
    """Writes report.html and figures/ into a run folder.

    Args:
      workdir: has the run's metrics.jsonl.
      config: the run's.
      done: what metrics.json says.
      tested: None where the run was tested on nothing.
    """
    series = curves.read_metrics_log(workdir / "metrics.jsonl")
    title = f"{config.method.replace('_', '-')}: {workdir.resolve().name}"
    parts = [f"<h1>{escape(title)}</h1>", _summary(config, done)]
    drawn = [_curve(workdir, panel, series) for panel in CURVES if _known(panel, series)]
    parts += ["<h2>Training</h2>", _pictures(drawn)]
    if tested is not None:
        if histogram := _histogram(workdir, tested, config.beta):
            count = len(tested.valid if tested.selected is None else tested.selected)
            parts += [
                "<h2>Rewards at the end</h2>",
                f"<p>Of {count} examples of the {escape(done['split'])} split, at the final "
                "policy: each kind's curve covers the same area; means in brackets.</p>",
                _pictures([histogram]),
            ]
    drawn = [_curve(workdir, panel, series) for panel in SELECTION if _known(panel, series)]
    if drawn:
        parts += ["<h2>Selection</h2>", _pictures(drawn)]
    if tested is not None:
        parts += _examples(tested, config.beta)
    settings = "\n".join(f"{name} = {value!r}" for name, value in config_lib.flatten(config))
    parts += ["<h2>Settings</h2>", f"<details><summary>All</summary><pre>{escape(settings)}</pre>"]
    parts.append("</details>")
    body = "\n".join(parts)
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{MORE_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )
    (workdir / "report.html").write_text(page, encoding="utf-8")


def _summary(config: ConfigDict, done: Mapping[str, Any]) -> str:
    words = f"{done['step']} updates of {config.train.batch_size} prompts."
    if not done.get("final"):
        return f"<p>{words} There was nothing to test on.</p>"
    start, final, gain = (done.get(name) or {} for name in ("start", "final", "gain"))
    rows = {
        "start, by policy": (start, "policy"),
        "end, by policy": (final, "policy"),
        "difference, same examples": (gain, "policy"),
        "end, by reward": (final, "reward"),
    }
    lines = []
    for words_of, (found, ranking) in rows.items():
        if f"{ranking}/accuracy" in found:
            values = [(found[f"{ranking}/{x}"], found[f"{ranking}/{x}_se"]) for x in COLUMNS]
            cells = [f"{100 * value:.1f} ± {100 * error:.1f}" for value, error in values]
            lines.append(_row("td", [words_of, *cells]))
    head = _row("th", ["", *COLUMNS])
    return (
        f"<p>{words} Tested on {done['examples']} examples of the {escape(done['split'])} split: "
        "the rank of the chosen response among all candidates, % ± standard error.</p>\n"
        f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table>'
        "</div>"
    )


def _row(tag: str, words: Sequence[str]) -> str:
    first, *rest = map(escape, words)
    cells = "".join(f"<{tag}>{word}</{tag}>" for word in rest)
    return f"<tr><{tag} class=name>{first}</{tag}>{cells}</tr>"


def _known(panel: Panel, series: Mapping[str, curves.Series]) -> bool:
    return any(name in series for name in panel.lines)


def _pictures(drawn: Sequence[str]) -> str:
    return f'<div class="pictures">{"".join(f"<div>{svg}</div>" for svg in drawn)}</div>'


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, 2.9), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _curve(workdir: Path, panel: Panel, series: Mapping[str, curves.Series]) -> str:
    figure, ax = _figure()
    curves.draw(ax, panel, series, 0.0, COLOURS[0])
    curves.dress(ax, panel)
    return _save(figure, workdir, panel.title)


def _histogram(workdir: Path, tested: EvaluatedSplit, beta: float) -> str | None:
    rewards = tested.rewards(tested.after, beta)
    if rewards is None:
        return None
    kinds = {"chosen": rewards[:, 0]}
    if tested.selected is None:
        kinds["rejected"] = rewards[:, 1:][tested.valid[:, 1:]]
    else:
        count = len(tested.selected)
        rewards, valid = rewards[:count, 1:], tested.valid[:count, 1:]
        selected = tested.selected[:, 1:] & valid
        kinds["chosen"] = kinds["chosen"][:count]
        kinds |= {"selected": rewards[selected], "not selected": rewards[valid & ~selected]}
    # In float64, as edges are: a value clipped to the last one must not lie beyond it.
    kinds = {name: values.astype(np.float64) for name, values in kinds.items()}
    everything = np.concatenate(list(kinds.values()))
    # A few far-off rewards would leave the others in one bar.
    low, high = np.quantile(everything, [0.005, 0.995])
    bars = int(np.clip(np.sqrt(len(kinds["chosen"])), 8, 40))
    edges = np.linspace(low, high, bars + 1).tolist()
    if edges[0] == edges[-1]:
        return None
    figure, ax = _figure()
    for (name, values), colour in zip(kinds.items(), COLOURS):
        if len(values):
            inside = np.clip(values, edges[0], edges[-1])
            ax.hist(inside, edges, density=True, histtype="step", color=colour, linewidth=1.6)
            ax.plot([], [], color=colour, label=f"{name} ({values.mean():.2f})")
    curves.dress(ax, Panel("Rewards", {}))
    ax.set_xlabel("reward", fontsize=9, color=curves.INK)
    figure.legend(
        loc="outside lower center", ncols=3, frameon=False, fontsize=8, labelcolor=curves.INK
    )
    return _save(figure, workdir, "Rewards at the end")


def _save(figure: Figure, workdir: Path, title: str) -> str:
    """The figure as SVG for the page; and as a PNG in figures/."""
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    (workdir / "figures").mkdir(exist_ok=True)
    figure.savefig(workdir / "figures" / f"{name}.png", facecolor="white")
    file = io.StringIO()
    # Text stays text; ids are the figure's own, and the same in every report of the same run.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|"#|url\(#)', lambda m: f"{m[1]}{name}-", svg)  # One page, many figures.
    for colour, follows in FOLLOWING.items():
        svg = svg.replace(colour, follows)
    label = f'<svg role="img" aria-label="{escape(title)}" '
    return svg.replace("<svg ", label, 1)


def _examples(tested: EvaluatedSplit, beta: float) -> list[str]:
    before = metrics.per_example_rank(tested.before, tested.valid)
    after = metrics.per_example_rank(tested.after, tested.valid)
    moved = after - before
    order = np.argsort(moved, kind="stable")
    up = [row for row in order[:SHOWN] if moved[row] < 0]
    down = [row for row in order[::-1][:SHOWN] if moved[row] > 0]
    parts = [
        "<h2>Examples whose ranking changed</h2>",
        f"<p>The chosen response's rank by policy is better than at the start in "
        f"{int((moved < 0).sum())} of {len(moved)} examples, worse in {int((moved > 0).sum())}. "
        "Those that moved the most; log-probabilities in nats, rewards are beta times the "
        "log-ratio to the reference.</p>",
    ]
    for title, rows in (("Up", up), ("Down", down)):
        if rows:
            parts.append(f"<h3>{title}</h3>")
        for i, row in enumerate(rows):
            opened = " open" if i == 0 else ""
            prompt = tested.examples[row].prompt
            parts.append(
                f"<details{opened}><summary>{escape(tested.examples[row].id)}: rank {before[row]} "
                f"→ {after[row]}</summary>\n<p class=prompt>{escape(_short(prompt))}</p>\n"
                f"{_candidates(tested, int(row), beta)}</details>"
            )
    return parts


def _candidates(tested: EvaluatedSplit, row: int, beta: float) -> str:
    """A table of an example's candidates, the best after training first."""
    example = tested.examples[row]
    tables = [(tested.before, tested.after)]
    header = ["log-prob before", "after"]
    first, last = tested.rewards(tested.before, beta), tested.rewards(tested.after, beta)
    if first is not None and last is not None:
        tables.append((first, last))
        header += ["reward before", "after"]
    known = tested.selected is not None and row < len(tested.selected)
    lines = []
    for place in np.argsort(-tested.after[row], kind="stable"):
        if not tested.valid[row, place]:
            continue
        number = tested.candidate_ids[row, place]
        text = example.chosen if number == 0 else example.rejected[number - 1]
        kind = "chosen" if number == 0 else ""
        if known and tested.selected is not None and tested.selected[row, place]:
            kind = "selected"
        cells = [f"{table[row, place]:.2f}" for pair in tables for table in pair]
        lines.append(
            f"<tr{' class=chosen' if number == 0 else ''}><td>{escape(_short(text))}</td>"
            f"<td>{kind}</td>{''.join(f'<td class=n>{cell}</td>' for cell in cells)}</tr>"
        )
    head = "".join(f"<th>{word}</th>" for word in ("response", "", *header))
    return (
        f'<div class="wide"><table class=words><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _short(text: Text | History) -> str:
    if isinstance(text, History):
        text = text.text
    elif not isinstance(text, str):
        text = "\n".join(f"{message['role']}: {message['content']}" for message in text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"
