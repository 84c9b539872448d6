"""Cells of the tables: runs of one experiment that differ in the seed only."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mass_dpo_jax import metrics
from mass_dpo_jax.config import LIST_METHODS
from mass_dpo_jax.reports.format import format_percent
from mass_dpo_jax.reports.paper.layout import BETA, MODELS, TITLES, N, Row
from mass_dpo_jax.reports.paper.runs import Run, experiment_settings, paper_differences

DATASETS = tuple(TITLES)  # In the paper's order; others follow.
# The paper's, in its order; then ours.
METHODS = (
    "dpo", "dmpo", "dpo_k", "sdpo", "mass_dpo", "pl_sampled", "pl_all", "odpo", "mppo",
    *LIST_METHODS, "sft",
)  # fmt: skip
# Which of the variants of a method is the paper's: Algorithm 1 with the current policy, and S-DPO's
# negatives drawn anew at every step.
PAPER_VARIANTS = {"mass_dpo": "mass_dpo (pool_fisher, step)", "sdpo": "sdpo (redrawn)"}
NOT_TESTED_ON = ("data.max_train", "data.max_validation")  # Data settings of other splits.


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: the mean.
        se_seeds: its standard error from the spread over seeds; None for a single one.
        se_rows: the standard error over test rows that the runs report, averaged; None where they
            report none.
        seeds: number of seeds that have finished.
    """

    mean: float
    se_seeds: float | None
    se_rows: float | None
    seeds: int

    def text(self, unit: str = "percent") -> str:
        """Formats it in percent or, with any other unit, as it is; a star: an error over rows."""
        star = "*" if self.se_seeds is None else ""
        error = self.se_rows if self.se_seeds is None else self.se_seeds
        if unit == "percent":
            return format_percent(self.mean, error or 0.0) + star
        return f"{self.mean:.2f}" if error is None else f"{self.mean:.2f} ± {error:.2f}{star}"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One experiment.

    Attributes:
        model: the model that training first started from.
        dataset: the dataset.
        method: the method's name, with the settings that tell its experiments apart.
        n: negatives of a prompt; None where the method has none.
        beta: the factor from log-ratios to rewards; None where the method has none.
        runs: a run for each seed, finished or not.
        variant: the method's name without these settings.
        differences: number of settings that are not the paper's.
    """

    model: str
    dataset: str
    method: str
    n: int | str | None
    beta: float | None
    runs: tuple[Run, ...]
    variant: str
    differences: int

    @property
    def finished(self) -> list[Run]:
        """The finished runs."""
        return [run for run in self.runs if run.finished]

    @property
    def state(self) -> str:
        """What is missing, in a few words; "" when all runs are finished."""
        if len(self.finished) == len(self.runs):
            return ""
        if self.finished or len(self.runs) > 1:
            return f"{len(self.finished)} of {len(self.runs)} seeds finished"
        return re.split("[,:]", self.runs[0].state)[0]

    def title(self, others: Sequence[Cell]) -> str:
        """Returns its method, with n and beta if the method is there several times in `others`."""
        if sum(other.method == self.method for other in others) == 1:
            return self.method
        return f"{self.method}, n={self.n}, beta={self.beta:g}"

    def estimate(self, metric: str) -> Estimate | None:
        """Returns the mean of a final metric over finished seeds; None where no run has it."""
        return estimate(self.finished, Run.final, metric)


def estimate(
    runs: Sequence[Run], read: Callable[[Run, str], float | None], metric: str
) -> Estimate | None:
    """Returns the mean of what `read` finds in the runs; None where it finds nothing."""
    measured = [run for run in runs if read(run, metric) is not None]
    if not measured:
        return None
    values = np.array([read(run, metric) for run in measured])
    errors = [read(run, f"{metric}_se") for run in measured]
    known = [error for error in errors if error is not None]
    spread = metrics.standard_error(values) if len(values) > 1 else None
    return Estimate(
        float(values.mean()),
        spread,
        float(np.mean(known)) if len(known) == len(errors) else None,
        len(values),
    )


def average(estimates: Sequence[Estimate]) -> Estimate:
    """Returns the mean of estimates on different datasets, whose errors are independent."""

    def combine(errors: Sequence[float | None]) -> float | None:
        known = [error for error in errors if error is not None]
        return float(np.hypot.reduce(known)) / len(known) if len(known) == len(errors) else None

    return Estimate(
        float(np.mean([estimate.mean for estimate in estimates])),
        combine([estimate.se_seeds for estimate in estimates]),
        combine([estimate.se_rows for estimate in estimates]),
        min(estimate.seeds for estimate in estimates),
    )


def gather(runs: Sequence[Run]) -> tuple[list[Cell], list[tuple[Run, Run]]]:
    """Groups all runs with a readable configuration into cells.

    Where experiments of one model, dataset and method differ in anything but n and beta, the
    method's name says in what. Where experiments of different methods were tested on different
    examples, their names say so too.

    Returns:
        The cells in the order of tables, and pairs of a run and another one that it repeats.
    """
    groups: dict[Any, dict[int, Run]] = {}
    repeats = []
    for run in runs:
        if not run.settings:
            continue
        settings = tuple(sorted((k, repr(v)) for k, v in experiment_settings(run).items()))
        key = (run.model, run.dataset, run.method, run.n, run.beta, settings)
        seeds = groups.setdefault(key, {})
        if run.seed not in seeds:
            seeds[run.seed] = run
        elif run.finished and not seeds[run.seed].finished:
            repeats.append((seeds[run.seed], run))
            seeds[run.seed] = run
        else:
            repeats.append((run, seeds[run.seed]))
    cells = []
    for (model, dataset, method, n, beta, settings), seeds in groups.items():
        same_data = [dict(key[5]) for key in groups if key[:2] == (model, dataset)]
        same_method = [dict(key[5]) for key in groups if key[:3] == (model, dataset, method)]
        name = [method]
        for setting, value in settings:
            tested_on = setting.startswith("data.") and setting not in NOT_TESTED_ON
            rivals = same_data if tested_on else same_method
            if any(other.get(setting) != value for other in rivals):
                name.append(f"{setting}={value.strip(chr(39))}")
        members = tuple(seeds[seed] for seed in sorted(seeds))
        cells.append(
            Cell(
                model, dataset, ", ".join(name), n, beta, members, method,
                len(paper_differences(members[0])),
            )
        )  # fmt: skip
    return sorted(cells, key=_order), repeats


def group_by_model(cells: Sequence[Cell]) -> list[tuple[str, str, list[Cell]]]:
    """Groups cells by model: the paper's models in its order, then ours.

    Returns:
        The heading of each model, its name in numbers.csv ("" where it is not the paper's), and its
        cells. The paper's models are there without cells too.
    """
    ours = {cell.model: [c for c in cells if c.model == cell.model] for cell in cells}
    groups = []
    for model in MODELS:
        name = next((name for name in ours if name.lower() == model.folder), "")
        groups.append((model.title, model.name, ours.pop(name, [])))
    return [*groups, *((name, "", members) for name, members in ours.items())]


def find_cell(cells: Sequence[Cell], dataset: str, row: Row) -> Cell | None:
    """Returns the cell of a row of the paper, the one with the fewest settings of its own.

    Args:
        cells: cells of one model.
        dataset: the dataset.
        row: what the paper did.
    """
    found = [
        cell
        for cell in cells
        if (cell.dataset, cell.n, cell.beta) == (dataset, row.n, row.beta) and is_variant(cell, row)
    ]
    return min(found, key=lambda cell: cell.differences, default=None)


def is_variant(cell: Cell, row: Row) -> bool:
    """Whether a cell's method is that of a row of the paper."""
    return cell.variant == PAPER_VARIANTS.get(row.method, row.method)


def main_setting(cells: Sequence[Cell]) -> list[Cell]:
    """Returns each method's cells with the paper's n and beta; all of them where it has none."""

    def method(cell: Cell) -> tuple[str, str, str]:
        return cell.model, cell.dataset, cell.method

    with_main = {method(cell) for cell in cells if _is_main(cell)}
    return [cell for cell in cells if _is_main(cell) or method(cell) not in with_main]


def main_n(cell: Cell) -> int:
    """Returns how many negatives the paper gives a cell's method."""
    return 1 if cell.variant == "dpo" else N


def _is_main(cell: Cell) -> bool:
    return cell.beta in (None, BETA) and cell.n in (None, "all", main_n(cell))


def _order(cell: Cell) -> tuple[Any, ...]:
    name = cell.variant.partition(" ")[0]
    index = METHODS.index(name) if name in METHODS else len(METHODS)
    n = cell.n if isinstance(cell.n, int) else 10**9
    return (cell.model, *dataset_order(cell.dataset), index, cell.method, n, cell.beta or 0.0)


def dataset_order(dataset: str) -> tuple[int, str]:
    """Returns the key that sorts datasets in the paper's order."""
    return (DATASETS.index(dataset) if dataset in DATASETS else len(DATASETS), dataset)
