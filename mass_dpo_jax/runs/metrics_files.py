"""metrics.jsonl and metrics.json: what a run writes into them, and every way to read them.

metrics.jsonl has one JSON object per line, with a `step` and any other figures; metrics.json has
the metrics before and after training. No matplotlib and no JAX here: model cards and the report of
many runs read them too.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import parse_json, read_json, read_text, write_whole

LOG, SUMMARY = "metrics.jsonl", "metrics.json"
Series = tuple[np.ndarray, np.ndarray]  # Steps and values.
# The fields of metrics.json: their types, and what to call them.
_FIELDS: Mapping[str, tuple[Any, str]] = {
    "finished": (bool, "true or false"),
    "step": (int, "an integer"),
    "split": ((str, NoneType), "the name of a split or null"),
    "examples": (int, "an integer"),
    "digest": (str, "a string"),
    "start": ((dict, NoneType), "an object of numbers or null"),
    "final": ((dict, NoneType), "an object of numbers or null"),
}


def read_metrics_json(workdir: Path) -> dict[str, Any] | None:
    """Reads a run's metrics.json; None where it has not been written yet.

    Raises:
        UserError: the file is something else.
    """
    path = workdir / SUMMARY
    if not path.exists():
        return None
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    for name, (kinds, words) in _FIELDS.items():
        if not isinstance(content.get(name), kinds):
            raise UserError(
                f"{path}: field {name!r}: found {content.get(name)!r}, expected {words}"
            )
    for name in ("start", "final"):
        for metric, value in (content.get(name) or {}).items():
            if not isinstance(value, (int, float)):
                raise UserError(f"{path}: {name}: {metric}: found {value!r}, expected a number")
    return content


def read_metrics_log(path: Path) -> dict[str, Series]:
    """Reads the series of every figure in a metrics.jsonl, for curves.

    Raises:
        UserError: there is no such file, or a line is something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; is this the folder of a run?")
    points: dict[str, list[tuple[float, float]]] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            figures = parse_json(line, path, number).items()
            # null: the number was not finite.
            values = {name: float(value) for name, value in figures if value is not None}
            step = values.pop("step")
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError):
            raise UserError(
                f"{path}:{number}: expected an object of numbers, step among them"
            ) from None
        for name, value in values.items():
            points.setdefault(name, []).append((step, value))
    return {name: (np.array(s)[:, 0], np.array(s)[:, 1]) for name, s in points.items()}


def read_complete_lines(workdir: Path) -> list[dict[str, Any]]:
    """Reads a run's metrics.jsonl, up to a line that an interruption cut short."""
    path = workdir / LOG
    rows: list[dict[str, Any]] = []
    if not path.is_file():
        return rows
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            row = parse_json(line, path, number)
        except UserError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), (int, float)):
            break
        rows.append(row)
    return rows


def read_figure(workdir: Path, name: str) -> dict[int, float]:
    """Reads the values of a figure in metrics.jsonl by step, where it is a number."""
    rows = read_complete_lines(workdir)
    return {row["step"]: row[name] for row in rows if isinstance(row.get(name), (int, float))}


def read_evaluated_steps(workdir: Path) -> set[int]:
    """Reads the steps whose evaluation is in metrics.jsonl."""
    rows = read_complete_lines(workdir)
    return {row["step"] for row in rows if any(name.startswith("eval/") for name in row)}


class MetricsLog:
    """Appends to metrics.jsonl.

    Opened at the step a run resumes from; lines of later steps, written before an interruption, are
    removed, since those steps run again.
    """

    def __init__(self, workdir: Path, step: int):
        self._path = workdir / LOG
        rows = [row for row in read_complete_lines(workdir) if step and row["step"] <= step]
        with explain_write_errors(self._path):
            write_whole(self._path, (json.dumps(row) + "\n" for row in rows))
            self._file = self._path.open("a")

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes a line; numbers that are not finite become null, as JSON has none."""
        values = {name: x if math.isfinite(x) else None for name, x in figures.items()}
        with explain_write_errors(self._path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file; a full disk has been reported by `write` already."""
        with contextlib.suppress(OSError):
            self._file.close()


@contextlib.contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turns an OSError from writing a run's file into a UserError that says how to resume."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror}. Checkpoints are left as they are; make "
            "room, and run the same command again to go on"
        ) from None
