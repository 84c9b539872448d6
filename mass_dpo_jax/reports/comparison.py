"""Finished runs beside each other, and beside rankings without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mass_dpo_jax import metrics
from mass_dpo_jax.data import load_examples
from mass_dpo_jax.data.readers import synthetic
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.reports import baselines
from mass_dpo_jax.runs import metrics_files, run_config
from mass_dpo_jax.training.monitor import EXIST_LOGPS, FINAL_LOGPS, START_LOGPS
from mass_dpo_jax.utils.files import read_array

COLUMNS = ("accuracy", "recall@3", "mrr", "ndcg@3")


def compare(runs: Sequence[Path]) -> str:
    """Does what `mass_dpo_jax.compare.compare` says."""
    configs = [run_config.load_config(run) for run in runs]
    found = [_read(run) for run in runs]
    for run, metrics_ in zip(runs[1:], found[1:], strict=True):
        if not metrics_.get("digest") or metrics_["digest"] != found[0].get("digest"):
            raise UserError(f"{run}: tested on other examples than {runs[0]} (config.data, seed)")
    names = short_names(runs)
    before = f"{names[0]}, before" if configs[0].model.path else "random weights"
    rows = {before: found[0]["start"]}
    rows |= {name: metrics_["final"] for name, metrics_ in zip(names, found, strict=True)}
    split, count = found[0]["split"], found[0]["examples"]
    lines = [_line(f"{split}: {count} examples, %", (*COLUMNS, "by reward"))]
    lines += [_line(name, _cells(row)) for name, row in rows.items()]
    lines += [
        _line(name, _cells(row)) for name, row in reference_rankings(configs[0], split).items()
    ]
    lines += ["", "difference in accuracy by policy, same examples, points:"]
    for i, run in enumerate(runs[1:], 1):
        lines.append(_difference(f"{names[i]} - its start", run / FINAL_LOGPS, run / START_LOGPS))
        if i > 1:
            name = f"{names[i]} - {names[i - 1]}"
            lines.append(_difference(name, run / FINAL_LOGPS, runs[i - 1] / FINAL_LOGPS))
    return "\n".join(lines)


def short_names(folders: Sequence[Path]) -> list[str]:
    """Returns a name for each folder: the shortest end of its path that no other path shares."""
    paths = [folder.absolute().parts for folder in folders]

    def name(path: tuple[str, ...]) -> str:
        others = [other for other in paths if other != path]
        length = 1
        while any(other[-length:] == path[-length:] for other in others):
            length += 1
        return Path(*path[-length:]).as_posix()

    return [name(path) for path in paths]


def reference_rankings(config: ConfigDict, split: str) -> dict[str, dict[str, float]]:
    """Ranking metrics of the baselines and, in the made-up world, of the true tastes."""
    train = load_examples(config.data, "train", config.seed)
    examples = load_examples(config.data, split, config.seed)
    scores = {
        "popularity in training": baselines.popularity(train, examples),
        "co-occurrence in training": baselines.cooccurrence(train, examples),
    }
    if config.data.name == "synthetic":
        scores["the true tastes"] = synthetic.compute_oracle_scores(examples)
    return {
        name: metrics.ranking(found, np.isfinite(found), "policy") for name, found in scores.items()
    }


def read_logps(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs `[M, C]` that a run has kept, and which of the candidates exist.

    Raises:
      UserError: a file is not there, or is something else.
    """
    logps = read_array(path)
    if logps.ndim != 2 or 0 in logps.shape:
        raise UserError(f"{path}: an array {list(logps.shape)}, expected log-probs [M, C]")
    if (logps > 0).any():
        raise UserError(f"{path}: has numbers above 0, expected log-probs")
    beside = path.with_name(EXIST_LOGPS)
    if not beside.exists():
        # Of an earlier run. Missing candidates are the last ones, with log-prob 0, which that of
        # a response can be too: in float32, where the model has no doubt.
        exists = np.logical_or.accumulate(logps[:, ::-1] != 0, axis=1)[:, ::-1]
        exists[:, 0] = True
        return logps, exists
    exists = read_array(beside)
    if exists.dtype != bool or exists.shape != logps.shape or not exists[:, 0].all():
        raise UserError(
            f"{beside}: an array {exists.dtype}{list(exists.shape)}, expected bool"
            f"{list(logps.shape)}, true in the first column, for {path.name}"
        )
    return logps, exists


def _read(run: Path) -> dict[str, Any]:
    found = metrics_files.read_metrics_json(run)
    if not found or not found["finished"]:
        raise UserError(
            f"{run}: not a finished run (no final metrics.json); python -m mass_dpo_jax.train "
            f"--workdir={run} goes on with it"
        )
    if not all(found.get(name) for name in ("split", "start", "final")):
        raise UserError(f"{run}: had no test or validation split")
    return found


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:28}" + "".join(f"{cell:>13}" for cell in cells)


def _cells(row: dict[str, float]) -> list[str]:
    names = [f"policy/{name}" for name in COLUMNS] + ["reward/accuracy"]
    names = [name for name in names if name in row and f"{name}_se" in row]
    return [f"{100 * row[n]:.1f} ± {100 * row[f'{n}_se']:.1f}" for n in names]


def _difference(name: str, ours: Path, theirs: Path) -> str:
    correct = []
    for path in (ours, theirs):
        logps, exists = read_logps(path)
        correct.append(metrics.per_example_rank(logps, exists) == 1)
    if len(correct[0]) != len(correct[1]):
        raise UserError(f"{ours}: {len(correct[0])} rows, but {theirs} has {len(correct[1])}")
    gain, error = metrics.paired_difference(*correct)
    return f"{name:40}{100 * gain:+6.1f} ± {100 * error:.1f}"
