"""Tables that the paper does not have: other datasets, seconds per step, and all runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mass_dpo_jax.reports.paper.blocks import Block, Section, Table, plain
from mass_dpo_jax.reports.paper.cells import Cell
from mass_dpo_jax.reports.paper.layout import TITLES
from mass_dpo_jax.reports.paper.runs import Run

_NAMES = "model dataset method n beta".split()
SECONDS, ALL_RUNS = "Seconds per training step", "All runs"
OTHER_DATA = "Other datasets (%, margins in logits)"
METRICS = {
    "policy/accuracy": "R@1",
    "policy/recall@3": "R@3",
    "policy/ndcg@3": "N@3",
    "policy/mrr": "MRR",
    "reward/accuracy": "R@1 by reward",
    "rewards/margins": "margin",
}


def other_data_table(cells: Sequence[Cell]) -> Table:
    """Returns the metrics of cells whose dataset is none of the paper's."""
    table = Table("other_data", OTHER_DATA, [*_NAMES, *METRICS])
    for model, dataset in dict.fromkeys((c.model, c.dataset) for c in cells):
        members = [c for c in cells if (c.model, c.dataset) == (model, dataset)]
        if dataset in TITLES:
            continue
        rows = []
        for cell in members:
            figures = [_format(cell, metric) for metric in METRICS]
            rows.append([*_labels(cell)[1:], *figures])
            table.add_record(model, *_labels(cell), *figures)
        header = ["method", "n", "beta", *METRICS.values()]
        table.blocks.append(Block(f"{model}, {dataset}", header, [Section(rows)], labels=3))
    return table


def seconds_table(cells: Sequence[Cell], seconds: Mapping[Path, float]) -> Table:
    """Returns the time of a training step: a run's median over its steps, averaged over runs."""
    table = Table("seconds", SECONDS, [*_NAMES, "seconds_per_step", "runs"])
    header = ["data", "method", "n", "beta", "seconds", "runs"]
    for model in dict.fromkeys(cell.model for cell in cells):
        rows = []
        for cell in cells:
            times = [seconds[run.folder] for run in cell.runs if run.folder in seconds]
            if cell.model == model and times:
                mean = sum(times) / len(times)
                rows.append([*_labels(cell), f"{mean:.3g}", str(len(times))])
                table.add_record(model, *_labels(cell), f"{mean:.6g}", len(times))
        if rows:
            table.blocks.append(Block(model, header, [Section(rows)], labels=4))
    return table


def runs_table(runs: Sequence[Run], repeats: Sequence[tuple[Run, Run]]) -> Table:
    """Returns every run that was found, and its state."""
    fields = "folder model dataset method n beta seed state split examples".split()
    table = Table("runs", ALL_RUNS, fields)
    repeated = {run.folder: f"repeats {other.folder.as_posix()}" for run, other in repeats}
    for run in runs:
        state = "; ".join(word for word in (run.state, repeated.get(run.folder, "")) if word)
        seed = run.seed if run.settings else None
        values = (
            run.folder.as_posix(), run.model, run.dataset, run.method, run.n, run.beta, seed,
            state, run.metrics.get("split"), run.metrics.get("examples"),
        )  # fmt: skip
        table.add_record(*map(plain, values))
    rows = [[record[field] for field in fields] for record in table.records]
    table.blocks.append(Block("", [*fields[:-1], "rows"], [Section(rows)], labels=8))
    return table


def _labels(cell: Cell) -> list[str]:
    return [cell.dataset, cell.method, plain(cell.n), plain(cell.beta)]


def _format(cell: Cell, metric: str) -> str:
    estimate = cell.estimate(metric)
    if estimate is None:
        return cell.state
    return estimate.text("logits" if metric == "rewards/margins" else "percent")
