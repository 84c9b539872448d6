r"""Which selection of negatives is better than random? Many small equal runs, and tables of them.

    python -m benchmarks.evidence --output=runs/evidence --world=clusters --starts=cold
    python -m benchmarks.evidence --output=runs/evidence --world=qasc --data=DIR --model=DIR
    python -m benchmarks.evidence --report

A cell is one run: world x start x method x seed. All cells of a world and start have the same
number of updates, batch size, learning rate, beta and n; the methods of one seed train from the
same start on the same examples in the same order, and all cells of a world are tested on the same
rows. A seed draws the start's weights, the training rows, their order and the negatives.

Starts: `cold` has learnt to write names after any history and ranks at chance; `warm` has had a
short supervised training on the task itself. Worlds that start from a pretrained model (--model)
train LoRA adapters of it; their starts are `instruct`, the model as it is, and `warm`.

A finished cell is a line in RESULTS/<world>.jsonl and is not run again, so the results alone are
enough to go on; starts are made again (they come out the same) where their run folders are gone.
--report reads nothing but the results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks.evidence_runs import (
    ALL,
    METHODS,
    PROMPT_METHODS,
    RANDOM,
    RETIRED,
    Bench,
    baselines_of,
    cells_of,
    methods_of,
    read_results,
    unpack,
)
from benchmarks.evidence_worlds import PRETRAINED, WORLDS, starts_of
from mass_dpo_jax import cli
from mass_dpo_jax.data import batches
from mass_dpo_jax.errors import UserError

ENOUGH_SEEDS = 6  # To know by a method's own seeds how much they differ.


@dataclasses.dataclass(frozen=True)
class Runs:
    """The finished cells of one method in one world from one start, by seed."""

    cells: Mapping[int, Mapping[str, Any]]

    def hits(self, by: str, seeds: Sequence[int]) -> np.ndarray:
        """float64 [S, M]: is the chosen response first, `by` policy or reward?"""
        return np.stack([unpack(self.cells[s][f"{by}_ranks"]) == 1 for s in seeds]).astype(float)

    def mean(self, name: str) -> float:
        return float(np.mean([cell["final"][name] for cell in self.cells.values()]))

    @property
    def seconds(self) -> float:
        """Of a step, in the fastest cell: the others shared the machine with something else."""
        return min(cell["seconds_per_step"] for cell in self.cells.values())


@dataclasses.dataclass(frozen=True)
class Difference:
    """Between two methods on the same seeds and test rows.

    rows: variance of the mean difference that comes from the draw of test rows (and the noise of
    single answers). seeds: variance of the difference between seeds, over what the rows explain;
    it can come out negative and means nothing with one seed (None).
    """

    mean: float
    rows: float
    seeds: float | None
    count: int

    def error(self, pooled: float) -> float:
        """Standard error. The variance between seeds is `pooled`'s where there are few of them."""
        seeds = pooled if self.seeds is None or self.count < ENOUGH_SEEDS else self.seeds
        return float(np.sqrt(self.rows + max(0.0, seeds) / self.count))


def difference(ours: np.ndarray, theirs: np.ndarray) -> Difference:
    r"""The mean of d = ours - theirs, [S, M] each, with its variance in two parts.

    d_sm = mean + seed_s + row_m + rest_sm, all but the mean random. The mean over seeds of each row
    varies by var(row) + var(rest) / S, so that over M is the part of the rows; the mean over rows
    of each seed varies by var(seed) + var(rest) / M, and var(rest) is known from what is left.
    """
    d = ours - theirs
    count, num_rows = d.shape
    by_row, by_seed = d.mean(0), d.mean(1)
    rows = by_row.var(ddof=1) / num_rows
    if count == 1:
        return Difference(float(d.mean()), float(rows), None, 1)
    rest = d - by_row - by_seed[:, None] + d.mean()
    rest_variance = (rest**2).sum() / ((count - 1) * (num_rows - 1))
    seeds = by_seed.var(ddof=1) - rest_variance / num_rows
    return Difference(float(d.mean()), float(rows), float(seeds), count)


def pooled(differences: Sequence[Difference]) -> float:
    """The variance between seeds, averaged over the methods of a table: three seeds of one method
    hardly tell it. Not below 0."""
    known = [d.seeds for d in differences if d.seeds is not None]
    return max(0.0, float(np.mean(known))) if known else 0.0


class Table:
    """The methods in one world from one start, compared.

    Means are over all seeds of a method, differences over the seeds that both methods have.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        cells: dict[str, dict[int, Mapping[str, Any]]] = {}
        for row in rows:
            cells.setdefault(row["method"], {})[row["seed"]] = row
        world = rows[0]["world"]
        self.random, self.all = baselines_of(world)
        names = (*methods_of(world), *RETIRED)
        self.runs = {name: Runs(cells[name]) for name in names if name in cells}
        self._between = {
            by: pooled(
                [self._difference(m, self.random, by) for m in self.runs if m != self.random]
            )
            if self.random in self.runs
            else 0.0
            for by in ("policy", "reward")
        }

    def has(self, *names: str) -> bool:
        return all(name in self.runs for name in names)

    def compare(self, name: str, other: str, by: str) -> tuple[float, float]:
        """Difference in R@1 and its standard error, in percentage points."""
        found = self._difference(name, other, by)
        return 100 * found.mean, 100 * found.error(self._between[by])

    def _difference(self, name: str, other: str, by: str) -> Difference:
        ours, theirs = self.runs[name], self.runs[other]
        seeds = sorted(set(ours.cells) & set(theirs.cells))
        return difference(ours.hits(by, seeds), theirs.hits(by, seeds))

    def markdown(self) -> str:
        """A row for each method, and what the table could have seen."""
        head = (
            "method | seeds | R@1 policy | R@1 reward | MRR policy | MRR reward | NDCG@3 policy | "
            f"policy minus {self.random} | reward minus {self.random} | share policy | "
            "share reward | ms/step"
        ).split(" | ")
        lines = [_row(head), _row(["---"] * len(head))]
        errors: dict[str, list[float]] = {"policy": [], "reward": []}
        for name, runs in self.runs.items():
            shown = [f"{100 * runs.mean(f'{by}/accuracy'):.1f}" for by in errors]
            shown += [f"{100 * runs.mean(f'{by}/mrr'):.1f}" for by in errors]
            shown.append(f"{100 * runs.mean('policy/ndcg@3'):.1f}")
            shown += [self._against_random(name, by, errors[by]) for by in errors]
            shown += [self._share(name, by) for by in errors]
            lines.append(_row([name, str(len(runs.cells)), *shown, f"{1000 * runs.seconds:.0f}"]))
        if errors["policy"]:
            least = {by: 2.8 * float(np.median(found)) for by, found in errors.items()}
            lines += [
                "",
                "Smallest difference that this table detects with 80 % power (2.8 of its median "
                f"standard errors): {least['policy']:.1f} points by policy, "
                f"{least['reward']:.1f} by reward.",
            ]
        return "\n".join(lines)

    def _against_random(self, name: str, by: str, errors: list[float]) -> str:
        if name == self.random or not self.has(self.random):
            return ""
        mean, error = self.compare(name, self.random, by)
        errors.append(error)
        return f"{mean:+.1f} ± {error:.1f}"

    def _share(self, name: str, by: str) -> str:
        """Of the way from random to all negatives; "" where that is too short to be divided by."""
        if name in (self.random, self.all) or not self.has(self.random, self.all):
            return ""
        whole, error = self.compare(self.all, self.random, by)
        if whole < 2.8 * error:
            return ""
        gain, _ = self.compare(name, self.random, by)
        return f"{100 * gain / whole:.0f} %" if gain > 0 else "< 0"


# What a log-linear simulation led us to expect of a language model, as differences in R@1:
# number, in words, ours, theirs, what is expected of ours - theirs.
PREDICTIONS = (
    (1, "Algorithm 1 chosen once is no better than random chosen once", "pool_fisher-once",
     "random-once", "not above"),
    (1, "Algorithm 1 at every step loses to random", "pool_fisher-step", RANDOM, "below"),
    (2, "chosen once, `contrast` beats random", "contrast-once", "random-once", "above"),
    (2, "chosen once, `set_fisher` beats random", "set_fisher-once", "random-once", "above"),
    (3, "drawing from the pool weights beats random", "sampled-gumbel", RANDOM, "above"),
    (3, "... and `contrast` at every step", "sampled-gumbel", "contrast-step", "above"),
    (3, "... and `set_fisher` at every step", "sampled-gumbel", "set_fisher-step", "above"),
    (3, "drawing with replacement beats random", "sampled-independent", RANDOM, "above"),
    (3, "... and `contrast` at every step", "sampled-independent", "contrast-step", "above"),
    (3, "... and `set_fisher` at every step", "sampled-independent", "set_fisher-step", "above"),
    (4, "redrawn random negatives beat fixed ones", RANDOM, "random-once", "above"),
    (4, "all negatives beat redrawn random ones", ALL, RANDOM, "above"),
)  # fmt: skip


def verdict(mean: float, error: float, expected: str) -> str:
    """In a word, at two standard errors."""
    sign = 0 if abs(mean) <= 2 * error else (1 if mean > 0 else -1)
    if expected == "not above":
        return "contradicted" if sign > 0 else "holds"
    if sign == 0:
        return "not seen"
    return "holds" if sign == (1 if expected == "above" else -1) else "contradicted"


def verdicts(table: Table) -> str:
    """The predictions against one table. The fifth, that nothing of this carries over to language
    models by itself, is their sum."""
    head = ["", "prediction", "difference", "by policy", "", "by reward", ""]
    lines = [_row(head), _row(["---"] * len(head))]
    counts: dict[str, int] = {}
    for number, words, ours, theirs, expected in PREDICTIONS:
        if not table.has(ours, theirs):
            continue
        shown = []
        for by in ("policy", "reward"):
            mean, error = table.compare(ours, theirs, by)
            word = verdict(mean, error, expected)
            counts[word] = counts.get(word, 0) + 1
            shown += [f"{mean:+.1f} ± {error:.1f}", word]
        lines.append(_row([str(number), words, f"{ours} minus {theirs}", *shown]))
    if not counts:
        return "None of the predictions can be tested yet."
    total = ", ".join(f"{count} {word}" for word, count in sorted(counts.items()))
    return "\n".join(
        [*lines, "", f"5, does the simulation carry over? Of these comparisons: {total}."]
    )


def report(folder: Path) -> str:
    """Markdown: for each world and start the table and the verdicts."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in read_results(folder):
        groups.setdefault((row["world"], row["start"]), []).append(row)
    parts = []
    for world in WORLDS:
        for start in starts_of(world):
            rows = groups.get((world, start))
            if rows:
                parts.append(f"### {world}, {start} start\n\n{_before(rows)}")
                table = Table(rows)
                parts.append(table.markdown())
                parts += [verdicts(table)] if table.random == RANDOM else []
    return "\n\n".join(parts) if parts else f"{folder}: no results"


def _before(rows: Sequence[Mapping[str, Any]]) -> str:
    """Where the runs of a table began."""
    first = {row["seed"]: 100 * row["at_start"]["policy/accuracy"] for row in rows}
    steps = ", ".join(sorted({str(row["settings"]["train.steps"]) for row in rows}))
    starts = ", ".join(f"{first[seed]:.1f}" for seed in sorted(first))
    count = len(unpack(rows[0]["policy_ranks"]))
    return f"{steps} updates, {count} test rows; R@1 by policy of the starts, by seed: {starts} %."


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    if _REPORT.value:
        print(report(Path(_RESULTS.value)))
        return
    if not _OUTPUT.value:
        raise UserError("--output is missing: a folder for the runs")
    world = _WORLD.value
    for needs, flag, what in (
        (world == "lastfm" or world in PRETRAINED, _DATA, "the folder with the data's files"),
        (world in PRETRAINED, _MODEL, "the folder of the model to start from"),
    ):
        if needs and not flag.value:
            raise UserError(f"--{flag.name} is missing: {what}")
    given = {"train.steps": _STEPS.value, "train.learning_rate": _RATE.value}
    changes = {name: value for name, value in given.items() if value}
    seeds = [_number(word) for word in _SEEDS.value]
    cells = cells_of(
        world, _STARTS.value or [*starts_of(world)], _METHODS.value or [*methods_of(world)], seeds
    )
    if world not in PRETRAINED:
        # One shape of batches: models this small compile for longer than padding costs.
        batches.MIN_GAIN = 1.0
    bench = Bench(Path(_OUTPUT.value), Path(_RESULTS.value), _DATA.value, _MODEL.value, changes)
    bench.run(cells)


def _number(word: str) -> int:
    if not word.isdecimal():
        raise UserError(f"--seeds: {word!r} is no seed; expected numbers with commas between")
    return int(word)


if __name__ == "__main__":
    _OUTPUT = flags.DEFINE_string("output", "", "Folder for runs, starts and cached references.")
    _RESULTS = flags.DEFINE_string("results", "docs/results", "Folder of the results files.")
    _WORLD = flags.DEFINE_enum("world", "clusters", WORLDS, "Data.")
    _DATA = flags.DEFINE_string("data", "", "Folder with the data's files, for real data.")
    _MODEL = flags.DEFINE_string("model", "", f"Model's folder, for {', '.join(PRETRAINED)}.")
    _STARTS = flags.DEFINE_list("starts", [], "Starts, in the order they run; empty: all.")
    _METHODS = flags.DEFINE_list(
        "methods",
        [],
        f"Of {', '.join(METHODS)}; in prompts, of {', '.join(PROMPT_METHODS)}; empty: all.",
    )
    _SEEDS = flags.DEFINE_list("seeds", "0,1,2", "Seeds, in the order they run.")
    _STEPS = flags.DEFINE_integer("steps", 0, "Updates of a cell; 0: as many as they have here.")
    _RATE = flags.DEFINE_float("learning_rate", 0.0, "Of the updates; 0: the world's own.")
    _REPORT = flags.DEFINE_bool("report", False, "Print the tables of --results and run nothing.")
    cli.run(main)
