"""The tables of benchmarks.gradients, from its lines alone."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.estimators import (
    LABELS,
    UNBIASED,
    Error,
    Prompt,
    effective_rank,
    exp_entropy,
    measure,
    pool_weights,
    rank_correlation,
)
from mass_dpo_jax.errors import UserError

SIZES = (1, 3, 5)


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; one that an interruption cut short is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def as_prompt(line: dict[str, Any]) -> Prompt:
    size = len(line["logps"])

    def matrix(name: str) -> np.ndarray:
        values = np.frombuffer(base64.b64decode(line[name]), "<f4").reshape(size, size)
        return values.astype(np.float64)

    logps, ref_logps = (np.array(line[name]) for name in ("logps", "ref_logps"))
    return Prompt(logps, ref_logps, matrix("gradients"), matrix("features"))


def with_error(figure: Callable[[np.ndarray], float], count: int) -> tuple[float, float]:
    """A figure of all prompts, and its standard error by leaving out one at a time (jackknife).

    Args:
        figure: from the numbers of the prompts to use.
        count: how many there are.
    """
    everyone = np.arange(count)
    without = np.array([figure(np.delete(everyone, i)) for i in everyone])
    spread = (count - 1) / count * ((without - without.mean()) ** 2).sum()
    return figure(everyone), float(np.sqrt(spread))


def ratio(above: np.ndarray, below: np.ndarray) -> str:
    """The ratio of two sums over prompts, with its standard error."""
    found, error = with_error(lambda i: above[i].sum() / below[i].sum(), len(above))
    return f"{found:.2f} ± {error:.2f}"


def mean(values: Sequence[float]) -> str:
    found, error = with_error(lambda i: float(np.mean(np.array(values)[i])), len(values))
    return f"{found:.2f} ± {error:.2f}"


def tables(path: Path, beta: float) -> str:
    """Markdown.

    Raises:
        UserError: fewer than two prompts.
    """
    lines = read_prompts(path)
    if len(lines) < 2:
        raise UserError(f"{path}: {len(lines)} prompts; expected two or more")
    prompts = [as_prompt(line) for line in lines]
    errors = {n: [measure(x, beta, n, seed=i) for i, x in enumerate(prompts)] for n in SIZES}
    parts = [f"{len(lines)} prompts, beta {beta:g}", _facts(prompts, lines, beta)]
    biases = [_biases(found, n) for n, found in errors.items()]
    return "\n\n".join([*parts, _variances(errors), *biases, _noise(errors)])


def _facts(prompts: Sequence[Prompt], lines: Sequence[dict[str, Any]], beta: float) -> str:
    weights = [pool_weights(prompt.scores(beta))[0] for prompt in prompts]
    grams = [prompt.gram(1.0) for prompt in prompts]
    seen = [prompt.features[1:, 1:] for prompt in prompts]
    exact = np.array([line["norms"] for line in lines])
    sketched = np.array([np.diagonal(prompt.gradients) for prompt in prompts])
    off = np.sqrt(np.mean((sketched / exact - 1) ** 2))
    rows = [
        ["exp(entropy of p)", mean([exp_entropy(p) for p in weights])],
        ["effective rank of the gradients, at most N - 1",
         mean([effective_rank(k) for k in grams])],
        ["rank correlation of distances, features and gradients",
         mean([rank_correlation(a, b) for a, b in zip(seen, grams)])],
        ["error of the sketch, of a squared length (root mean square)", f"{100 * off:.2f} %"],
    ]  # fmt: skip
    return machine.table(["", "mean over prompts"], rows)


def _pick(errors: Sequence[dict[str, Error]], name: str, field: str) -> np.ndarray:
    return np.array([getattr(one[name], field) for one in errors])


def _variances(errors: dict[int, list[dict[str, Error]]]) -> str:
    """Variances of the unbiased draws over that of independent ones."""
    units = {n: _pick(found, "independent", "variance") for n, found in errors.items()}
    rows = [
        [LABELS[name], *(ratio(_pick(errors[n], name, "variance"), units[n]) for n in errors)]
        for name in UNBIASED
    ]
    head = [f"n = {n}" for n in errors]
    return machine.table(["variance / that of independent draws", *head], rows)


def _biases(found: list[dict[str, Error]], n: int) -> str:
    """Of what is biased: variance and bias, and both after a factor common to all prompts.

    A learning rate is such a factor; the one here makes the mean estimates as right as it can.
    """
    unit, full = (_pick(found, "independent", field) for field in ("variance", "length"))
    rows = []
    for name in LABELS:
        if name in UNBIASED:
            continue
        variance, bias, overlap, length = (
            _pick(found, name, field) for field in ("variance", "bias", "overlap", "length")
        )
        factor = overlap.sum() / length.sum()
        left = np.maximum(full - 2 * factor * overlap + factor**2 * length, 0.0)
        columns = (variance, bias, factor**2 * variance, left)
        rows.append([LABELS[name], *(ratio(column, unit) for column in columns)])
    head = [
        f"n = {n}, in the same unit",
        "variance",
        "bias²",
        "rescaled variance",
        "rescaled bias²",
    ]
    return machine.table(head, rows)


def _noise(errors: dict[int, list[dict[str, Error]]]) -> str:
    """The variance of a draw over the mean squared length of a prompt's whole gradient."""
    rows = []
    for name in ("independent", "pivotal"):
        cells = [
            ratio(_pick(found, name, "variance"), _pick(found, name, "length"))
            for found in errors.values()
        ]
        rows.append([LABELS[name], *cells])
    head = [f"n = {n}" for n in errors]
    return machine.table(["variance / squared length of the pool's gradient", *head], rows)
