"""Reads metrics.jsonl, a run's metrics by step. No matplotlib here: model cards read it, too."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import parse_json, read_text

Series = tuple[np.ndarray, np.ndarray]  # Steps and values.


def read_metrics(path: Path) -> dict[str, Series]:
    """Reads the series of every name in a `metrics.jsonl`; a line has `step` and any of the others.

    Raises:
      UserError: there is no such file, or a line is something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; is this the folder of a run?")
    lines = read_text(path).splitlines()
    points: dict[str, list[tuple[float, float]]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            found = parse_json(line, path, number).items()
            # null: the number was not finite.
            values = {name: float(value) for name, value in found if value is not None}
            step = values.pop("step")
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError):
            raise UserError(
                f"{path}:{number}: expected an object of numbers, step among them"
            ) from None
        for name, value in values.items():
            points.setdefault(name, []).append((step, value))
    return {name: (np.array(s)[:, 0], np.array(s)[:, 1]) for name, s in points.items()}
