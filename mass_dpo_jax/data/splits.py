"""Which rows a split has: of its own file or, where it has none, of another."""

from __future__ import annotations

import gzip
import logging
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mass_dpo_jax.errors import UserError

NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test",),
}

Row = TypeVar("Row")

_log = logging.getLogger(__name__)


class Source(NamedTuple):
    """A part of the rows of split `name`: "all" of them, the "held_out" ones or the "rest"."""

    name: str
    part: str


def resolve(split: str, available: Collection[str], place: str) -> Source:
    """Where a split's rows come from, given the splits that there are.

    Without validation rows, some training rows are held out for it. Without test rows, those of
    validation stand in. A single, nameless set of rows counts as "train".

    Raises:
      UserError: there is nothing for this split.
    """
    if split in available:
        rest = split == "train" and "validation" not in available
        return Source(split, "rest" if rest else "all")
    if split == "test" and "validation" in available:
        return Source("validation", "all")
    if split in ("validation", "test") and "train" in available:
        return Source("train", "held_out")
    raise UserError(f"{place}: no split {split!r}; found {', '.join(sorted(available)) or 'none'}")


def take(rows: Sequence[Row], part: str, held_out: float, seed: int, place: str) -> list[Row]:
    """A part of the rows, "all", "held_out" or the "rest", in their order.

    Which ones are held out depends on the seed alone; they are at least one where `held_out`, the
    share, is above 0, and never all. A single row serves as both.
    """
    if part == "all":
        return list(rows)
    if len(rows) == 1 and held_out:
        _log.warning("%s: its only row serves for training and evaluation", place)
        return list(rows)
    count = min(max(1, round(held_out * len(rows))), len(rows) - 1) if held_out else 0
    out = np.zeros(len(rows), bool)
    out[np.random.default_rng([seed, 1]).permutation(len(rows))[:count]] = True
    if part == "rest" and count:
        _log.info("%s: %d of %d rows are held out for evaluation", place, count, len(rows))
    return [row for row, is_out in zip(rows, out, strict=True) if is_out == (part == "held_out")]


def most(data: Any, split: str) -> int:
    """How many rows of a split `data.max_*` allows; 0: all."""
    return 0 if split == "all" else data[f"max_{split}"]


def limit(rows: list[Row], most: int, seed: int) -> list[Row]:
    """At most so many rows, drawn by seed and in their order; 0: all."""
    if not most or len(rows) <= most:
        return rows
    chosen = np.random.default_rng([seed, 2]).permutation(len(rows))[:most]
    return [rows[i] for i in sorted(chosen)]


def find_file(
    path: Path, split: str, patterns: Sequence[str], without: Collection[str] = ()
) -> tuple[Path, Source]:
    """The file a split's rows are in, and its part of them.

    Args:
      path: a file, which holds all rows, or a folder with one file a split.
      split: "train", "validation", "test" or, for a file, "all".
      patterns: names of files in the folder, with {} for the split's name.
      without: splits of a folder that are not looked at.

    Raises:
      UserError: says what was looked for.
    """
    if path.is_file():
        if split == "all":
            return path, Source(path.name.split(".")[0], "all")
        return path, Source(path.name.split(".")[0], resolve(split, ["train"], str(path)).part)
    if not path.is_dir():
        raise UserError(
            f"{path}: no such file or folder (config.data.path); a dataset on the Hugging Face hub "
            "needs --config.data.name=hub"
        )
    files: dict[str, Path] = {}
    for name, aliases in NAMES.items():
        options = [path / p.format(alias) for alias in aliases for p in patterns]
        found = [p for p in options if p.is_file()]
        if len(found) > 1:
            raise UserError(
                f"{path}: {found[0].name} and {found[1].name} could both be the {name} split"
            )
        if found and name not in without:
            files[name] = found[0]
    looked = f"{path} with {' or '.join(patterns)} for {{}} = train, validation (val, dev), test"
    if not files:
        raise UserError(f"{looked}: found none of them, but {_listing(path)}")
    source = resolve(split, files, looked)
    return files[source.name], source


def read_lines(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of a text file, plain or gzip."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                # Some Windows programs start a file with a byte-order mark.
                marked = number == 1 and encoding == "utf-8"
                yield number, line.decode("utf-8-sig" if marked else encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8: {error.reason}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: cannot be read: {error}") from None


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:5]) + (", ..." if names[5:] else "") if names else "nothing"
