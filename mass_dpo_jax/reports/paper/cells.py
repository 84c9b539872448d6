"""Cells of the tables: runs of one experiment that differ in the seed only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mass_dpo_jax import metrics
from mass_dpo_jax.reports.paper.runs import Run, experiment

DATASETS = ("lastfm", "movielens", "medmcqa", "qasc")  # In the paper's order; others follow.
METHODS = ("sft", "dpo", "dpo_k", "dmpo", "odpo", "mppo", "sdpo", "pl_sampled", "pl_all")
NOT_TESTED = ("data.max_train", "data.max_validation")
BETA, N = 0.1, 3  # The paper's main setting.


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
      se_seeds: its standard error from the spread over seeds; None for a single one.
      se_rows: the standard error over test rows that the runs state, averaged.
      seeds: how many finished.
    """

    mean: float
    se_seeds: float | None
    se_rows: float
    seeds: int

    @property
    def text(self) -> str:
        if self.se_seeds is None:
            return f"{100 * self.mean:.1f} ± {100 * self.se_rows:.1f}*"
        return f"{100 * self.mean:.1f} ± {100 * self.se_seeds:.1f}"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One experiment. `runs` has one run a seed, finished or not."""

    model: str
    dataset: str
    method: str
    n: int | str | None
    beta: float | None
    runs: tuple[Run, ...]

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]

    @property
    def state(self) -> str:
        """What is the matter with it, in few words; "" when all is well."""
        if len(self.finished) == len(self.runs):
            return ""
        if self.finished or len(self.runs) > 1:
            return f"{len(self.finished)} of {len(self.runs)} seeds finished"
        return self.runs[0].state

    def title(self, others: Sequence[Cell]) -> str:
        """Its method, with n and beta where another of the cells has the same."""
        if sum(other.method == self.method for other in others) == 1:
            return self.method
        return f"{self.method}, n={self.n}, beta={self.beta:g}"

    def estimate(self, metric: str) -> Estimate | None:
        return estimate(self.finished, Run.final, metric)


def estimate(
    runs: Sequence[Run], read: Callable[[Run, str], float | None], metric: str
) -> Estimate | None:
    """The mean of what `read` finds in the runs; None where it finds nothing."""
    found = [(read(run, metric), read(run, f"{metric}_se") or 0.0) for run in runs]
    values = [value for value, _ in found if value is not None]
    if not values:
        return None
    errors = [error for value, error in found if value is not None]
    spread = metrics.standard_error(np.array(values)) if len(values) > 1 else None
    return Estimate(float(np.mean(values)), spread, float(np.mean(errors)), len(values))


def gather(runs: Sequence[Run]) -> tuple[list[Cell], list[tuple[Run, Run]]]:
    """The cells of all runs with a readable configuration, and runs that repeat another.

    Where experiments of one model, data set and method differ in anything but n and beta, the
    method's name says in what; where those of different methods were tested on different examples,
    theirs do too.
    """
    groups: dict[Any, dict[int, Run]] = {}
    repeats = []
    for run in runs:
        if not run.settings:
            continue
        settings = tuple(sorted((k, repr(v)) for k, v in experiment(run).items()))
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
        near = [dict(key[5]) for key in groups if key[:2] == (model, dataset)]
        same = [dict(key[5]) for key in groups if key[:3] == (model, dataset, method)]
        words = []
        for name, value in settings:
            rivals = near if name.startswith("data.") and name not in NOT_TESTED else same
            if any(other.get(name) != value for other in rivals):
                words.append(f"{name}={value.strip(chr(39))}")
        members = tuple(seeds[seed] for seed in sorted(seeds))
        cells.append(Cell(model, dataset, ", ".join([method, *words]), n, beta, members))
    return sorted(cells, key=_order), repeats


def main_setting(cells: Sequence[Cell]) -> list[Cell]:
    """Of each method its cells with the paper's n and beta or, where it has none, all of them."""
    chosen = []
    for cell in cells:
        alike = [c for c in cells if _who(c) == _who(cell)]
        if _is_main(cell) or not any(_is_main(c) for c in alike):
            chosen.append(cell)
    return chosen


def _is_main(cell: Cell) -> bool:
    return cell.beta in (None, BETA) and cell.n in (None, "all", 1 if _name(cell) == "dpo" else N)


def _who(cell: Cell) -> tuple[str, str, str]:
    return cell.model, cell.dataset, cell.method


def _name(cell: Cell) -> str:
    return cell.method.partition(" ")[0].rstrip(",")


def _order(cell: Cell) -> tuple[Any, ...]:
    # The paper's method last, as papers do.
    name = _name(cell)
    place = METHODS.index(name) if name in METHODS else len(METHODS)
    n = cell.n if isinstance(cell.n, int) else 10**9
    return (cell.model, *dataset_order(cell.dataset), place, cell.method, n, cell.beta or 0.0)


def dataset_order(dataset: str) -> tuple[int, str]:
    return (DATASETS.index(dataset) if dataset in DATASETS else len(DATASETS), dataset)
