"""Small files in the formats that data sets are published in, and how the tests load them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mass_dpo_jax.config import default
from mass_dpo_jax.data import load_examples
from mass_dpo_jax.data.examples import Example, History


def load(name: str, path: Path, split: str = "all", seed: int = 0, **changes: Any) -> list[Example]:
    """Loads all rows of a split of the data set `name`; `changes` are fields of config.data."""
    data = default().data
    data.update(name=name, path=str(path), max_validation=0, max_test=0)
    data.update(changes)
    return load_examples(data, split, seed)


def write_lines(path: Path, rows: Iterable[Any], encoding: str = "utf-8") -> Path:
    """Writes one line per entry: strings as they are, everything else as JSON."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding=encoding)
    return path


def history(example: Example) -> History:
    assert isinstance(example.prompt, History)
    return example.prompt


def candidates(example: Example) -> list[str]:
    return [str(example.chosen), *map(str, example.rejected)]


def listed(example: Example) -> list[str]:
    """Returns the candidates that a prompt lists, in its order."""
    text = example.prompt.after if isinstance(example.prompt, History) else str(example.prompt)
    return text.split("One of these ")[1].split("\n\n")[0].split("\n")[1:]
