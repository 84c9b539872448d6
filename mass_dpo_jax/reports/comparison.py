"""Finished runs in one table, with rankings that need no model."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mass_dpo_jax import metrics as metrics_lib
from mass_dpo_jax.config_values import parse_cutoffs
from mass_dpo_jax.data import load_examples
from mass_dpo_jax.data.readers import synthetic
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.metrics import Lists
from mass_dpo_jax.reports import baselines
from mass_dpo_jax.reports.format import (
    BY_GRADE,
    HEADLINE_METRICS,
    format_metric,
    format_percent,
    short_names,
)
from mass_dpo_jax.runs import run_config
from mass_dpo_jax.runs.metrics_files import read_metrics_json
from mass_dpo_jax.training.evaluator import EXIST_LOGPS, FINAL_LOGPS, GRADES, START_LOGPS
from mass_dpo_jax.utils.files import read_array

_log = logging.getLogger(__name__)


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
    headline = [x for x in HEADLINE_METRICS if any(f"policy/{x}" in row for row in rows.values())]
    rows |= reference_rankings(configs[0], split)
    lines = [_line(f"{split}: {count} examples, %", [*headline, "by reward"])]
    columns = [*(f"policy/{name}" for name in headline), "reward/accuracy"]
    lines += [_line(name, _cells(row, columns)) for name, row in rows.items()]

    graded, cutoffs = _have_grades(runs), parse_cutoffs(configs[0].eval.cutoffs)
    read = functools.cache(functools.partial(_read_values, graded=graded, cutoffs=cutoffs))
    by_grade: list[str] = []
    if graded:
        logps = {start: runs[0] / START_LOGPS}
        logps |= {name: run / FINAL_LOGPS for name, run in zip(names, runs, strict=True)}
        common = set.intersection(*(set(read(path)) for path in logps.values()))
        by_grade = [x for x in read(logps[start]) if x in common and x.startswith(BY_GRADE)]
        lines += ["", _line("by policy and grade, %", by_grade)]
        columns = [f"policy/{name}" for name in by_grade]
        for name, path in logps.items():
            lines.append(_line(name, _cells(metrics_lib.summarize(read(path), "policy"), columns)))
    lines += ["", "difference in accuracy by policy, same examples, points:"]
    pairs = _pair_logps(runs, names)
    for label, pair in pairs.items():
        lines.append(f"{label:40}{_difference(*pair, read, 'accuracy'):>12}")
    if by_grade and pairs:
        lines += ["", _line("difference by grade, points:", by_grade, 40)]
        for label, pair in pairs.items():
            cells = [_difference(*pair, read, name) for name in by_grade]
            lines.append(_line(label, cells, 40))
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
    width = max(len(example.responses) for example in examples)
    is_relevant = [[rank == 0 for rank in example.order] for example in examples]
    relevant = np.array([row + [False] * (width - len(row)) for row in is_relevant])
    return {
        name: metrics_lib.summarize(
            metrics_lib.per_example_metrics(values, Lists(np.isfinite(values), relevant)), "policy"
        )
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


def _have_grades(runs: Sequence[Path]) -> bool:
    """Whether all runs keep grades of their examples; logs which do not, if only some do."""
    without = [run for run in runs if not (run / GRADES).exists()]
    if without and len(without) < len(runs):
        _log.warning(
            f"{without[0]}: has no {GRADES}, as runs of earlier versions: no metrics by grade are "
            "compared, and of several chosen responses the first alone counts in differences"
        )
    return not without


def _read_values(path: Path, graded: bool, cutoffs: Sequence[int]) -> dict[str, np.ndarray]:
    """Returns the ranking metrics of every example, by the log-probs that a run has kept."""
    logps, compared = read_logps(path)
    lists = Lists(compared)
    if graded:
        grades_path = path.with_name(GRADES)
        grades = read_array(grades_path)
        exists = np.isfinite(grades)
        if grades.shape != logps.shape or (compared & ~exists).any():
            raise UserError(
                f"{grades_path}: an array {grades.dtype}{list(grades.shape)}, expected "
                f"{list(logps.shape)}, a number for every candidate in {EXIST_LOGPS}"
            )
        relevant = exists & ~compared  # What is as good as the chosen response is not below it.
        relevant[:, 0] = True
        lists = Lists(exists, relevant, grades)
    return metrics_lib.per_example_metrics(logps, lists, cutoffs)


def _pair_logps(runs: Sequence[Path], names: Sequence[str]) -> dict[str, tuple[Path, Path]]:
    """Returns the files of log-probs that are compared: every later run's with those before.

    The second run's start is the first run where it went on from that.
    """
    pairs = {}
    for i, run in enumerate(runs[1:], 1):
        pairs[f"{names[i]} - its start"] = run / FINAL_LOGPS, run / START_LOGPS
        before = runs[i - 1] / FINAL_LOGPS
        if i > 1 or not _are_close(run / START_LOGPS, before):
            pairs[f"{names[i]} - {names[i - 1]}"] = run / FINAL_LOGPS, before
    return pairs


def _are_close(path: Path, other: Path) -> bool:
    """Whether two files have the same log-probs, up to the rounding of another program's pass."""
    ours, theirs = (read_logps(one)[0] for one in (path, other))
    return ours.shape == theirs.shape and np.allclose(ours, theirs, atol=0.01, equal_nan=True)


def _difference(
    ours: Path, theirs: Path, read: Callable[[Path], dict[str, np.ndarray]], name: str
) -> str:
    """Returns the gain in a metric of the same examples, and its paired standard error."""
    first = [read(path)[name] for path in (ours, theirs)]
    if len(first[0]) != len(first[1]):
        raise UserError(f"{ours}: {len(first[0])} rows, but {theirs} has {len(first[1])}")
    return format_percent(*metrics_lib.paired_difference(*first), sign="+")


def _line(name: str, cells: Sequence[str], width: int = 28) -> str:
    return (f"{name:{width}}" + "".join(f"{cell:>13}" for cell in cells)).rstrip()


def _cells(metrics: Mapping[str, float], columns: Sequence[str]) -> list[str]:
    return [format_metric(metrics, name) for name in columns]
