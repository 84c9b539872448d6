"""Does training on more negatives collapse? By number of negatives and by aggregation, one table.

    python -m benchmarks.more_negatives --output=runs/more_negatives
    python -m benchmarks.more_negatives --report

Hu et al. (DynamicPO, arXiv 2605.00327) report that accuracy first grows with the number n of
negatives and then collapses. A softmax over the negatives (S-DPO, Plackett-Luce) weighs each by its
reward in the gradient; a mean (DMPO, DPO-k) gives all of them the weight 1/n. Cells differ in n and
aggregation only: same world, start, seed, prompts and number of updates.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence_runs import METHODS, RANDOM, Bench, Cell, read_results, settings_of
from mass_dpo_jax.data import batches
from mass_dpo_jax.reports.comparison import read_logps
from mass_dpo_jax.train import train
from mass_dpo_jax.training.evaluator import FINAL_LOGPS, START_LOGPS

WORLD, START = "long", "cold"  # The world with the largest pools: N = 59.
NUMBERS = (1, 3, 7, 19, 59)
# With one negative, all three losses are DPO's: one cell stands for them.
AGGREGATIONS = {"softmax": RANDOM, "mean of losses": "dpo_k", "mean of rewards": "dmpo"}
RESULTS = Path("docs/results/more_negatives")
FIGURES = {
    "policy/accuracy": "R@1 by policy, %",
    "reward/accuracy": "R@1 by reward, %",
    "chosen_logp": "log-prob of the chosen response, change in nats",
    "rewards/margins": "margin, nats",
    "rewards/margins_hard": "margin to the hardest, nats",
}


def plan(seeds: Sequence[int]) -> list[tuple[str, int, int]]:
    """Lists the cells (aggregation, n, seed), all of a seed before the next."""
    return [
        (name, n, seed)
        for seed in seeds
        for n in NUMBERS
        for name in AGGREGATIONS
        if n > 1 or name == "softmax"
    ]


def measure(bench: Bench, name: str, n: int, seed: int) -> dict[str, Any]:
    """Trains a cell (and its start, where that is missing): the line of the results file."""
    cell = Cell(WORLD, START, AGGREGATIONS[name], seed)
    config = bench.config(WORLD, seed)
    config.update_from_flattened_dict({**METHODS[cell.method], "num_negatives": n})
    config.model.path = str(bench.start(cell))
    folder = bench.output / f"{cell.method}-{n}-{seed}"
    final = train(config, folder)["final"]
    before, after = (read_logps(folder / file)[0][:, 0] for file in (START_LOGPS, FINAL_LOGPS))
    return {
        "aggregation": name,
        "n": n,
        "seed": seed,
        "settings": settings_of(config),
        "final": {**final, "chosen_logp": float((after - before).mean())},
        "chosen_logp_at_start": float(before.mean()),
    }


def key_of(row: Mapping[str, Any]) -> tuple[str, int, int]:
    """Returns a line's cell, as `plan` names it."""
    return row["aggregation"], row["n"], row["seed"]


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Writes a table for each figure: mean over seeds ± its standard error."""
    parts = []
    for figure, title in FIGURES.items():
        head = f"| {title} | " + " | ".join(f"n = {n}" for n in NUMBERS) + " |"
        lines = [head, "|---" * (len(NUMBERS) + 1) + "|"]
        for name in AGGREGATIONS:
            cells = [_cell(rows, name, n, figure) for n in NUMBERS]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cell(rows: Sequence[Mapping[str, Any]], name: str, n: int, figure: str) -> str:
    wanted = "softmax" if n == 1 else name
    scale = 100 if figure.endswith("accuracy") else 1
    found = [scale * r["final"][figure] for r in rows if key_of(r)[:2] == (wanted, n)]
    if not found:
        return ""
    error = f" ± {np.std(found, ddof=1) / len(found) ** 0.5:.1f}" if len(found) > 1 else ""
    return f"{np.mean(found):.1f}{error}"


def main(args: Sequence[str]) -> None:
    """Runs the cells that the results do not hold yet, or prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/more_negatives"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    parser.add_argument("--report", action="store_true", help="print the tables and train nothing")
    options = parser.parse_args(args)
    if options.report:
        print(report(read_results(options.results)))
        return
    batches.MIN_GAIN = 1.0  # One shape of batches, as in benchmarks.evidence.
    bench = Bench(options.output, options.results)
    done = {key_of(row) for row in read_results(options.results)}
    options.results.mkdir(parents=True, exist_ok=True)
    for cell in plan(range(options.seeds)):
        if cell in done:
            continue
        row = measure(bench, *cell)
        with (options.results / f"{WORLD}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(*cell, {k: round(row["final"][k], 3) for k in FIGURES}, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
