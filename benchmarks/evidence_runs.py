"""The runs of benchmarks.evidence: worlds, starts, methods, and a line of results for each cell."""

from __future__ import annotations

import base64
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from benchmarks.evidence_worlds import (
    PRETRAINED,
    PRETRAINED_RATE,
    START_RATE,
    base_config,
    cold_rows,
    starts_of,
    write_rows,
)
from mass_dpo_jax import cli, metrics
from mass_dpo_jax import config as config_lib
from mass_dpo_jax.data import load_examples
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.export import export
from mass_dpo_jax.reports.comparison import read_logps
from mass_dpo_jax.train import train
from mass_dpo_jax.training.evaluator import FINAL_LOGPS, START_LOGPS

WARM_SEED = 1000  # Added to the seed of a pretrained world's supervised start.
RANDOM, ALL = "random-step", "all"  # The baselines that the tables compare with.


def _mass(criterion: str, refresh: str) -> dict[str, Any]:
    return {
        "method": "mass_dpo",
        "selection.criterion": criterion,
        "selection.refresh": refresh,
    }


def _prompts(by: str, refresh: str) -> dict[str, Any]:
    return {
        "method": "mass_dpo",
        "selection.prompts": by,
        "selection.prompt_budget": 0.25,
        "selection.prompt_refresh": refresh,
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
    "sampled-independent": {"method": "pl_sampled", "selection.draw": "independent"},
    "dpo": {"method": "dpo"},
    "dpo_k": {"method": "dpo_k"},
    "dmpo": {"method": "dmpo"},
}
# Of the world `prompts`: a quarter of the prompts, chosen once or anew every epoch.
PROMPTS_RANDOM, PROMPTS_ALL = "prompts-random", "prompts-all"
PROMPT_METHODS: dict[str, dict[str, Any]] = {
    PROMPTS_ALL: {"method": "mass_dpo"},
    PROMPTS_RANDOM: _prompts("random", "once"),
    "prompts-design": _prompts("design", "once"),
    "prompts-random-epoch": _prompts("random", "epoch"),
    "prompts-design-epoch": _prompts("design", "epoch"),
    "prompts-uncertain-epoch": _prompts("uncertain", "epoch"),
}
# In the results, but no longer offered: the n negatives with the largest log p + Gumbel noise.
RETIRED = ("sampled-gumbel",)


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
      data: folder of the world's files, where it is of real data.
      model: folder of the model that pretrained worlds start from.
      changes: settings by name, on top of the world's.
    """

    output: Path
    results: Path
    data: str = ""
    model: str = ""
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
        config.update_from_flattened_dict(methods_of(cell.world)[cell.method])
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
        config = base_config(world, self.data)
        if world in PRETRAINED:
            config.data.path = str(self.output / f"{world}-data")
        config.update_from_flattened_dict(self.changes)
        config.seed = seed
        config.cache_dir = str(self.output / "cache")
        config.train.checkpoint_every = config.train.steps
        return config

    def start(self, cell: Cell) -> Path:
        """The folder that all methods of the cell's world, start and seed train from."""
        is_pretrained = cell.world in PRETRAINED
        if is_pretrained:
            write_rows(self.output / f"{cell.world}-data", cell.world, self.data)
        steps = starts_of(cell.world)[cell.start]
        if not steps:
            return Path(self.model)
        config = self.config(cell.world, cell.seed)
        rate = PRETRAINED_RATE if is_pretrained else START_RATE
        config.update(method="sft")
        config.train.update(steps=steps, checkpoint_every=steps, learning_rate=rate)
        name = f"{cell.world}-start-{cell.start}-{cell.seed}"
        if cell.start == "cold":
            data = self.output / f"{name}-data"
            data.mkdir(parents=True, exist_ok=True)
            if not (data / "train.jsonl").exists():
                examples = load_examples(config.data, "train", cell.seed)
                cli.write_lines(data / "train.jsonl", cold_rows(examples, cell.seed))
            config.data.update(name="jsonl", path=str(data), validation_share=0.0)
        if not is_pretrained:
            train(config, self.output / name)
            return self.output / name
        # Other rows than the cells train on, and adapters that are merged.
        merged = self.output / f"{name}-model"
        if not merged.exists():
            config.model.path, config.seed = self.model, cell.seed + WARM_SEED
            train(config, self.output / name)
            export(self.output / name, merged, dtype="float32")
        return merged

    def _same_settings(self, cell: Cell, row: Mapping[str, Any]) -> None:
        config = self.config(cell.world, cell.seed)
        config.update_from_flattened_dict(methods_of(cell.world)[cell.method])
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


def settings_of(config: ConfigDict) -> dict[str, Any]:
    """By name, those that are not the default, without places of files and logs."""
    default = dict(config_lib.flatten(config_lib.default()))
    others = ("cache_dir", "model.path", "data.path", "seed", "log.report")
    return {k: v for k, v in config_lib.flatten(config) if v != default[k] and k not in others}


def methods_of(world: str) -> dict[str, dict[str, Any]]:
    """The methods that are compared in a world, and the settings of each."""
    return PROMPT_METHODS if world == "prompts" else METHODS


def baselines_of(world: str) -> tuple[str, str]:
    """The methods that the others are compared with: random choice, and no choice."""
    return (PROMPTS_RANDOM, PROMPTS_ALL) if world == "prompts" else (RANDOM, ALL)


def cells_of(
    world: str, starts: Sequence[str], methods: Sequence[str], seeds: Sequence[int]
) -> list[Cell]:
    """In the order they run: start by start, all methods of a seed before the next seed."""
    for kind, names, known in (
        ("start", starts, starts_of(world)),
        ("method", methods, methods_of(world)),
    ):
        for name in names:
            if name not in known:
                raise UserError(f"--{kind}s: no {kind} {name!r}; expected {', '.join(known)}")
    return [Cell(world, s, m, seed) for s in starts for seed in seeds for m in methods]


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
