r"""Which selection of negatives is better than random? Many small equal runs, and tables of them.

    python -m benchmarks.evidence --output=runs/evidence --world=clusters --starts=cold
    python -m benchmarks.evidence --report

A cell is one run: world x start x method x seed. All cells of a world and start have the same
number of updates, batch size, learning rate, beta and n; the methods of one seed train from the
same start on the same examples in the same order, and all cells of a world are tested on the same
rows. A seed draws the start's weights, the training rows, their order and the negatives.

Starts: `cold` has learnt to write names after any history and ranks at chance; `warm` has had a
short supervised training on the task itself. A finished cell is a line in RESULTS/<world>.jsonl
and is not run again, so the results alone are enough to go on; starts are made again (they come
out the same) where their run folders are gone. --report reads nothing but the results.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from configs import tiny
from mass_dpo_jax import cli, metrics
from mass_dpo_jax import config as config_lib
from mass_dpo_jax.compare import read_logps
from mass_dpo_jax.data import batches, load_examples
from mass_dpo_jax.data.examples import Example, History
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.train import train
from mass_dpo_jax.training.report import FINAL_LOGPS, START_LOGPS

WORLDS = ("plain", "clusters", "long", "lastfm")
ENOUGH_SEEDS = 6  # To know by a method's own seeds how much they differ.
RANDOM, ALL = "random-step", "all"  # The baselines that the tables compare with.


def _mass(criterion: str, refresh: str) -> dict[str, Any]:
    return {
        "method": "mass_dpo",
        "selection.criterion": criterion,
        "selection.refresh": refresh,
    }


METHODS: dict[str, dict[str, Any]] = {
    "random-once": {"method": "sdpo", "selection.refresh": "once"},
    RANDOM: {"method": "sdpo"},
    ALL: {"method": "pl_all"},
    "pool_fisher-once": _mass("pool_fisher", "once"),
    "pool_fisher-step": _mass("pool_fisher", "step"),
    "contrast-once": _mass("contrast", "once"),
    "contrast-step": _mass("contrast", "step"),
    "set_fisher-once": _mass("set_fisher", "once"),
    "set_fisher-step": _mass("set_fisher", "step"),
    "hardest-step": _mass("hardest", "step"),
    "sampled": {"method": "pl_sampled"},
    "sampled-replacement": {"method": "pl_sampled", "selection.replacement": True},
    "dpo": {"method": "dpo"},
    "dpo_k": {"method": "dpo_k"},
    "dmpo": {"method": "dmpo"},
}

# So few rows that a run sees each several times: else once and at every step would be the same.
SETTINGS: dict[str, Any] = {
    "beta": 1.0,
    "num_negatives": 3,
    "model.scratch.hidden_size": 64,
    "model.scratch.intermediate_size": 192,
    "model.scratch.num_layers": 2,
    "data.max_train": 2000,
    "data.max_validation": 32,  # Not used.
    "data.max_test": 0,
    "train.steps": 300,
    "train.learning_rate": 3e-3,
    "train.eval_every": 0,
    "train.keep_checkpoints": 1,
    "eval.batch_size": 128,
}
WORLD_SETTINGS: dict[str, dict[str, Any]] = {
    "lastfm": {"data.name": "lastfm", "model.scratch.vocab_size": 4096, "data.max_train": 4000}
}
START_STEPS = {"cold": 300, "warm": 100}
START_RATE = 3e-3

# ---------------------------------------------------------------- running


@dataclasses.dataclass(frozen=True)
class Cell:
    """What one run is; its place in a results file."""

    world: str
    start: str
    method: str
    seed: int


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where runs are kept, where results, and what the command line changed.

    Attributes:
      output: folder of runs, starts and the reference's cache.
      results: folder of results files.
      data: folder of LastFM's files.
      changes: settings by name, on top of `SETTINGS`.
    """

    output: Path
    results: Path
    data: str = ""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def run(self, cells: Sequence[Cell]) -> None:
        """Runs the cells that the results do not hold yet, in their order.

        Raises:
          UserError: a result stands there already and was got with other settings.
        """
        done = {cell_of(row): row for row in read_results(self.results)}
        for cell in cells:
            if cell in done:
                self._same_settings(cell, done[cell])
        todo = [cell for cell in cells if cell not in done]
        print(f"{len(cells) - len(todo)} of {len(cells)} cells are finished", flush=True)
        for cell in todo:
            began = time.perf_counter()
            row = self.measure(cell)
            self.results.mkdir(parents=True, exist_ok=True)
            with (self.results / f"{cell.world}.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            found, seconds = row["final"], time.perf_counter() - began
            print(
                f"{cell.world} {cell.start} {cell.method} {cell.seed}: R@1 by policy "
                f"{100 * found['policy/accuracy']:.1f}, by reward "
                f"{100 * found['reward/accuracy']:.1f} ({seconds:.0f} s)",
                flush=True,
            )

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Trains a cell (and its start, where that is missing): the line of the results file."""
        config = self.config(cell.world, cell.seed)
        config.update_from_flattened_dict(METHODS[cell.method])
        config.model.path = str(self.start(cell))
        folder = self.output / "-".join(map(str, dataclasses.astuple(cell)))
        found = train(config, folder)
        after, valid = read_logps(folder / FINAL_LOGPS)
        # The policy at its start is the reference.
        before, _ = read_logps(folder / START_LOGPS)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        speeds = [line["examples_per_second"] for line in lines if "examples_per_second" in line]
        chosen = [
            {k: v for k, v in line.items() if k.startswith("selection/")}
            for line in lines
            if any(k.startswith("selection/") for k in line)
        ]
        return {
            **dataclasses.asdict(cell),
            "settings": settings_of(config),
            "at_start": found["start"],
            "final": found["final"],
            "seconds_per_step": round(config.train.batch_size / float(np.median(speeds)), 4),
            "selection": chosen[-1] if chosen else {},
            "policy_ranks": pack(metrics.per_example_rank(after, valid)),
            "reward_ranks": pack(metrics.per_example_rank(after - before, valid)),
        }

    def config(self, world: str, seed: int) -> ConfigDict:
        """What all cells of a world and seed share."""
        config = tiny.get_config()
        own = WORLD_SETTINGS.get(world, {})
        path = self.data if world == "lastfm" else world
        config.update_from_flattened_dict({**SETTINGS, "data.path": path, **own, **self.changes})
        config.seed = seed
        config.cache_dir = str(self.output / "cache")
        config.train.checkpoint_every = config.train.steps
        return config

    def start(self, cell: Cell) -> Path:
        """The run folder that all methods of the cell's world, start and seed train from."""
        config = self.config(cell.world, cell.seed)
        steps = START_STEPS[cell.start]
        config.update(method="sft")
        config.train.update(steps=steps, checkpoint_every=steps, learning_rate=START_RATE)
        name = f"{cell.world}-start-{cell.start}-{cell.seed}"
        if cell.start == "cold":
            data = self.output / f"{name}-data"
            data.mkdir(parents=True, exist_ok=True)
            if not (data / "train.jsonl").exists():
                examples = load_examples(config.data, "train", cell.seed)
                cli.write_lines(data / "train.jsonl", cold_rows(examples, cell.seed))
            config.data.update(name="jsonl", path=str(data), validation_share=0.0)
        train(config, self.output / name)
        return self.output / name

    def _same_settings(self, cell: Cell, row: Mapping[str, Any]) -> None:
        config = self.config(cell.world, cell.seed)
        config.update_from_flattened_dict(METHODS[cell.method])
        # How a gradient is computed, and not which: most cells are of a version with another way.
        ours, theirs = (
            {k: v for k, v in settings.items() if k != "model.remat"}
            for settings in (settings_of(config), row["settings"])
        )
        differ = [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)]
        if differ:
            shown = ", ".join(f"{k} (there {theirs.get(k)}, here {ours.get(k)})" for k in differ)
            raise UserError(
                f"{self.results / cell.world}.jsonl has {cell} with other settings: {shown}; "
                "choose another --results or the same settings"
            )


def cold_rows(examples: Sequence[Example], seed: int) -> list[dict[str, Any]]:
    """Preferences without a preference: of each example's candidates, any may be the chosen one."""
    rows = []
    for i, example in enumerate(examples):
        candidates = sorted(str(text) for text in (example.chosen, *example.rejected))
        chosen = candidates.pop(np.random.default_rng([seed, i, 5]).integers(len(candidates)))
        prompt = example.prompt.text if isinstance(example.prompt, History) else example.prompt
        rows.append({"id": example.id, "prompt": prompt, "chosen": chosen, "rejected": candidates})
    return rows


def settings_of(config: ConfigDict) -> dict[str, Any]:
    """By name, those that are not the default, without places of files."""
    default = dict(config_lib.flat(config_lib.default()))
    places = ("cache_dir", "model.path", "data.path", "seed")
    return {k: v for k, v in config_lib.flat(config) if v != default[k] and k not in places}


def cell_of(row: Mapping[str, Any]) -> Cell:
    return Cell(row["world"], row["start"], row["method"], row["seed"])


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The lines of every results file; a line that an interruption cut short is left out."""
    rows = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def pack(ranks: np.ndarray) -> str:
    """Ranks (1 to 255) as text, a byte each."""
    return base64.b64encode(ranks.astype(np.uint8).tobytes()).decode()


def unpack(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.uint8).astype(np.int64)


# ---------------------------------------------------------------- the report


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
        self.runs = {name: Runs(cells[name]) for name in METHODS if name in cells}
        self._between = {
            by: pooled([self._difference(m, RANDOM, by) for m in self.runs if m != RANDOM])
            if RANDOM in self.runs
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
            f"policy minus {RANDOM} | reward minus {RANDOM} | share policy | share reward | ms/step"
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
        if name == RANDOM or not self.has(RANDOM):
            return ""
        mean, error = self.compare(name, RANDOM, by)
        errors.append(error)
        return f"{mean:+.1f} ± {error:.1f}"

    def _share(self, name: str, by: str) -> str:
        """Of the way from random to all negatives; "" where that is too short to be divided by."""
        if name in (RANDOM, ALL) or not self.has(RANDOM, ALL):
            return ""
        whole, error = self.compare(ALL, RANDOM, by)
        if whole < 2.8 * error:
            return ""
        gain, _ = self.compare(name, RANDOM, by)
        return f"{100 * gain / whole:.0f} %" if gain > 0 else "< 0"


# What a log-linear simulation led us to expect of a language model, as differences in R@1:
# number, in words, ours, theirs, what is expected of ours - theirs.
PREDICTIONS = (
    (1, "Algorithm 1 chosen once is no better than random chosen once", "pool_fisher-once",
     "random-once", "not above"),
    (1, "Algorithm 1 at every step loses to random", "pool_fisher-step", RANDOM, "below"),
    (2, "chosen once, `contrast` beats random", "contrast-once", "random-once", "above"),
    (2, "chosen once, `set_fisher` beats random", "set_fisher-once", "random-once", "above"),
    (3, "drawing from the pool weights beats random", "sampled", RANDOM, "above"),
    (3, "... and `contrast` at every step", "sampled", "contrast-step", "above"),
    (3, "... and `set_fisher` at every step", "sampled", "set_fisher-step", "above"),
    (3, "drawing with replacement beats random", "sampled-replacement", RANDOM, "above"),
    (3, "... and `contrast` at every step", "sampled-replacement", "contrast-step", "above"),
    (3, "... and `set_fisher` at every step", "sampled-replacement", "set_fisher-step", "above"),
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
        for start in START_STEPS:
            rows = groups.get((world, start))
            if rows:
                parts.append(f"### {world}, {start} start\n\n{_before(rows)}")
                table = Table(rows)
                parts += [table.markdown(), verdicts(table)]
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


# ---------------------------------------------------------------- the command


def cells_of(
    world: str, starts: Sequence[str], methods: Sequence[str], seeds: Sequence[int]
) -> list[Cell]:
    """In the order they run: start by start, all methods of a seed before the next seed."""
    for kind, names, known in (("start", starts, START_STEPS), ("method", methods, METHODS)):
        for name in names:
            if name not in known:
                raise UserError(f"--{kind}s: no {kind} {name!r}; expected {', '.join(known)}")
    return [Cell(world, s, m, seed) for s in starts for seed in seeds for m in methods]


def main() -> None:
    if _REPORT.value:
        print(report(Path(_RESULTS.value)))
        return
    if not _OUTPUT.value:
        raise UserError("--output is missing: a folder for the runs")
    if _WORLD.value == "lastfm" and not _DATA.value:
        raise UserError("--data is missing: the folder with LastFM's files")
    changes = {"train.steps": _STEPS.value} if _STEPS.value else {}
    seeds = [_number(word) for word in _SEEDS.value]
    cells = cells_of(_WORLD.value, _STARTS.value, _METHODS.value or list(METHODS), seeds)
    # One shape of batches: models this small compile for longer than padding costs.
    batches.LEAST_GAIN = 1.0
    Bench(Path(_OUTPUT.value), Path(_RESULTS.value), _DATA.value, changes).run(cells)


def _number(word: str) -> int:
    if not word.isdecimal():
        raise UserError(f"--seeds: {word!r} is no seed; expected numbers with commas between")
    return int(word)


if __name__ == "__main__":
    _OUTPUT = flags.DEFINE_string("output", "", "Folder for runs, starts and cached references.")
    _RESULTS = flags.DEFINE_string("results", "docs/results", "Folder of the results files.")
    _WORLD = flags.DEFINE_enum("world", "clusters", WORLDS, "Data.")
    _DATA = flags.DEFINE_string("data", "", "Folder with LastFM's files, for --world=lastfm.")
    _STARTS = flags.DEFINE_list("starts", "cold,warm", "Starts, in the order they run.")
    _METHODS = flags.DEFINE_list("methods", [], f"Of {', '.join(METHODS)}; empty: all.")
    _SEEDS = flags.DEFINE_list("seeds", "0,1,2", "Seeds, in the order they run.")
    _STEPS = flags.DEFINE_integer("steps", 0, "Updates of a cell; 0: as many as they have here.")
    _REPORT = flags.DEFINE_bool("report", False, "Print the tables of --results and run nothing.")
    cli.run(main)
