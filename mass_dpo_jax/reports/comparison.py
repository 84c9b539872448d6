"""Finished runs in one table, with rankings that need no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mass_dpo_jax import metrics as metrics_lib
from mass_dpo_jax.data import load_examples
from mass_dpo_jax.data.readers import synthetic
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.reports import baselines
from mass_dpo_jax.reports.format import HEADLINE_METRICS, format_metric, format_percent, short_names
from mass_dpo_jax.runs import run_config
from mass_dpo_jax.runs.metrics_files import read_metrics_json
from mass_dpo_jax.training.evaluator import EXIST_LOGPS, FINAL_LOGPS, START_LOGPS
from mass_dpo_jax.utils.files import read_array


def compare(runs: Sequence[Path]) -> str:
    """Implements `mass_dpo_jax.compare.compare`."""
    configs = [run_config.load_config(run) for run in runs]
    metrics = [_read_finished(run) for run in runs]
    for run, own in zip(runs[1:], metrics[1:], strict=True):
        if not own.get("digest") or own["digest"] != metrics[0].get("digest"):
            raise UserError(f"{run}: tested on other examples than {runs[0]} (config.data, seed)")
    names = short_names(runs)
    split, count = metrics[0]["split"], metrics[0]["examples"]
    start = f"{names[0]}, before" if configs[0].model.path else "random weights"
    rows = {start: metrics[0]["start"]}
    rows |= {name: own["final"] for name, own in zip(names, metrics, strict=True)}
    rows |= reference_rankings(configs[0], split)
    lines = [_line(f"{split}: {count} examples, %", [*HEADLINE_METRICS, "by reward"])]
    lines += [_line(name, _cells(row)) for name, row in rows.items()]
    lines += ["", "difference in accuracy by policy, same examples, points:"]
    for i, run in enumerate(runs[1:], 1):
        earlier_logps = {"its start": run / START_LOGPS}
        if i > 1:
            earlier_logps[names[i - 1]] = runs[i - 1] / FINAL_LOGPS
        for name, path in earlier_logps.items():
            label = f"{names[i]} - {name}"
            lines.append(f"{label:40}{_difference(run / FINAL_LOGPS, path)}")
    return "\n".join(lines)


def reference_rankings(config: ConfigDict, split: str) -> dict[str, dict[str, float]]:
    """Returns ranking metrics of the baselines and, for synthetic data, of the true tastes."""
    train = load_examples(config.data, "train", config.seed)
    examples = load_examples(config.data, split, config.seed)
    scores = {
        "popularity in training": baselines.popularity(train, examples),
        "co-occurrence in training": baselines.cooccurrence(train, examples),
    }
    if config.data.name == "synthetic":
        scores["the true tastes"] = synthetic.compute_oracle_scores(examples)
    return {
        name: metrics_lib.ranking(values, np.isfinite(values), "policy")
        for name, values in scores.items()
    }


def read_logps(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads log-probs [M, C] that a run has kept, and which of the candidates exist.

    Raises:
        UserError: a file is missing, or is something else.
    """
    logps = read_array(path)
    if logps.ndim != 2 or 0 in logps.shape:
        raise UserError(f"{path}: an array {list(logps.shape)}, expected log-probs [M, C]")
    if (logps > 0).any():
        raise UserError(f"{path}: has numbers above 0, expected log-probs")
    mask_path = path.with_name(EXIST_LOGPS)
    exists = read_array(mask_path)
    if exists.dtype != bool or exists.shape != logps.shape or not exists[:, 0].all():
        raise UserError(
            f"{mask_path}: an array {exists.dtype}{list(exists.shape)}, expected bool"
            f"{list(logps.shape)}, true in the first column, for {path.name}"
        )
    return logps, exists


def _read_finished(run: Path) -> dict[str, Any]:
    metrics = read_metrics_json(run)
    if not metrics or not metrics["finished"]:
        raise UserError(
            f"{run}: not a finished run (no final metrics.json); python -m mass_dpo_jax.train "
            f"--workdir={run} resumes it"
        )
    if not all(metrics.get(name) for name in ("split", "start", "final")):
        raise UserError(f"{run}: had no test or validation split")
    return metrics


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:28}" + "".join(f"{cell:>13}" for cell in cells)


def _cells(metrics: Mapping[str, float]) -> list[str]:
    names = [*(f"policy/{name}" for name in HEADLINE_METRICS), "reward/accuracy"]
    cells = (format_metric(metrics, name) for name in names)
    return [cell for cell in cells if cell]


def _difference(ours: Path, theirs: Path) -> str:
    """Returns the gain in accuracy of the same examples, and its paired standard error."""
    first = []
    for path in (ours, theirs):
        logps, exists = read_logps(path)
        first.append(metrics_lib.per_example_rank(logps, exists) == 1)
    if len(first[0]) != len(first[1]):
        raise UserError(f"{ours}: {len(first[0])} rows, but {theirs} has {len(first[1])}")
    return f"{format_percent(*metrics_lib.paired_difference(*first), sign='+'):>12}"
