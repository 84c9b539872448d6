"""Which rows a split has: of its own file or, where it has none, of another."""

from __future__ import annotations

import collections
import functools
import logging
import re
import shlex
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mass_dpo_jax.errors import UserError

NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "val", "valid", "dev", "eval", "evaluation"),
    "test": ("test",),
}

_ALIASES = frozenset(alias for aliases in NAMES.values() for alias in aliases)

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


def take(
    rows: Sequence[Row],
    prompts: Sequence[Hashable],
    part: str,
    held_out: float,
    seed: int,
    place: str,
) -> list[Row]:
    """A part of the rows, "all", "held_out" or the "rest", in their order.

    Rows with equal `prompts` are in one part. Which ones are held out depends on the seed alone;
    they are about the share `held_out` of the rows, at least one prompt where that is above 0, and
    never all. Where there is one prompt only, rows are held out nevertheless, and a single row
    serves as both.
    """
    if part == "all":
        return list(rows)
    if len(rows) == 1 and held_out:
        _log.warning("%s: its only row serves for training and evaluation", place)
        return list(rows)
    count = min(max(1, round(held_out * len(rows))), len(rows) - 1) if held_out else 0
    order = np.random.default_rng([seed, 1]).permutation(len(rows)).tolist()
    sizes = collections.Counter(prompts)
    if len(sizes) == 1 and count:
        _log.warning(
            "%s: all %d rows have the same prompt, which is trained and evaluated on",
            place, len(rows),
        )  # fmt: skip
        chosen = set(order[:count])
        out = [i in chosen for i in range(len(rows))]
    else:
        held = _hold_out([prompts[i] for i in order], sizes, count)
        out = [prompt in held for prompt in prompts]
    if part == "rest" and count:
        of = f" ({len(held)} of {len(sizes)} prompts)" if 1 < len(sizes) < len(rows) else ""
        _log.info("%s: %d of %d rows%s are held out for evaluation", place, sum(out), len(rows), of)
    return [row for row, is_out in zip(rows, out, strict=True) if is_out == (part == "held_out")]


def _hold_out(
    order: Sequence[Hashable], sizes: Mapping[Hashable, int], count: int
) -> set[Hashable]:
    """The first prompts in `order` that together have about `count` rows, and not all rows.

    A prompt that would lead further away from `count` than it is without is passed over. Of prompts
    with one row each, that leaves the first `count`.
    """
    held: set[Hashable] = set()
    missing, left = count, sum(sizes.values())
    for prompt in order:
        if prompt not in held and sizes[prompt] < min(2 * missing, left):
            held.add(prompt)
            missing -= sizes[prompt]
            left -= sizes[prompt]
    if count and not held:
        held.add(min(order, key=sizes.__getitem__))
    return held


def limit(rows: list[Row], data: Any, split: str, seed: int) -> list[Row]:
    """At most as many rows as `data.max_*` allows, drawn by seed and in their order.

    Says how many that leaves out.
    """
    most = 0 if split == "all" else data[f"max_{split}"]
    if not most or len(rows) <= most:
        return rows
    _log.info("%s: %d of %d rows are used (config.data.max_%s)", split, most, len(rows), split)
    chosen = np.random.default_rng([seed, 2]).permutation(len(rows))[:most]
    return [rows[i] for i in sorted(chosen)]


def by_split(words: Mapping[str, str], place: str) -> dict[str, str]:
    """Which name stands for which split, given each name's word for one ("dev", say).

    Raises:
      UserError: two of them stand for one split.
    """
    found: dict[str, str] = {}
    for split, aliases in NAMES.items():
        for name, word in words.items():
            if word.lower() not in aliases:
                continue
            if split in found:
                raise UserError(
                    f"{place}: {found[split]} and {name} could both be the {split} split; expected "
                    "one of them"
                )
            found[split] = name
    return found


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
        raise UserError(_nothing_at(path))
    names = sorted(p.name + "/" * p.is_dir() for p in path.iterdir() if p.name[0] != ".")
    files = by_split({name: _word(name, patterns) for name in names}, str(path))
    if not files:
        raise UserError(_no_split_in(path, names, patterns))
    left = tuple(name for name in names if name not in files.values())
    say_not_read(str(path), left, tuple(files))
    source = resolve(split, [name for name in files if name not in without], str(path))
    return path / files[source.name], source


@functools.cache  # Once, not for every split.
def say_not_read(place: str, names: tuple[str, ...], found: tuple[str, ...]) -> None:
    """Logs which files of a folder, or splits of a dataset, are not read, but for notes on them.

    Warns of a file that is called like a split that was not `found`: `test.csv` beside
    `train.jsonl`, say.
    """
    if names := tuple(n for n in names if not n.startswith(("README", "LICENSE"))):
        _log.info("%s: not read: %s", place, _listing(names))
    for name in names:
        split = split_of(name)
        if split and split not in found:
            _log.warning(
                "%s: %s is in no format that is read there, and no %s split is: convert it, or "
                "take it away", place, name, split,
            )  # fmt: skip


def split_of(name: str) -> str:
    """The split that a file is called like, whatever its format; "" for other names."""
    word = name.split(".")[0].lower()
    return next((split for split, aliases in NAMES.items() if word in aliases), "")


def _word(name: str, patterns: Sequence[str]) -> str:
    """What stands for {} in a name; "" where it is of no pattern."""
    for before, _, behind in (pattern.partition("{}") for pattern in patterns):
        if name.startswith(before) and name.endswith(behind):
            word = name[len(before) : len(name) - len(behind)]
            if "." not in word:
                return word
    return ""


def _nothing_at(path: Path) -> str:
    text = str(path)
    if path.exists():
        return (
            f"{path}: is a pipe or a device, and config.data.path is read several times; write it "
            "to a file, as in zcat FILE.gz > pairs.jsonl"
        )
    if any(sign in text for sign in "*?,["):
        return (
            f"{path}: no such file or folder; config.data.path takes one, no pattern and no list: "
            "cat FILE FILE > all.jsonl joins JSON lines"
        )
    advice = ""
    if re.fullmatch(r"[\w.-]+/?[\w.-]+", text) and not path.suffix.startswith((".json", ".gz")):
        advice = "; a dataset on the Hugging Face hub needs --config.data.name=hub"
    return f"{path}: no such file or folder (config.data.path){advice}"


def _no_split_in(folder: Path, names: Sequence[str], patterns: Sequence[str]) -> str:
    """What to say of a folder without a file for any split."""
    expected = ", ".join(patterns[0].format(split) for split in NAMES)
    endings = [pattern.partition("{}")[2] for pattern in patterns[1:]]
    also = f" (or with {', '.join(endings)})" if endings else ""
    text = f"{folder}: expected files {expected}{also}; found {_listing(names)}"
    if patterns[0] != "{}.jsonl":
        return text
    if is_dataset(folder):
        return f"{text}; a dataset of Hugging Face: set --config.data.name=hub"
    array = next((n for n in names if _word(n, ["{}.json"]).lower() in _ALIASES), "")
    if array:
        file, lines = shlex.quote(str(folder / array)), shlex.quote(str(folder / f"{array}l"))
        return f"{text}; if {array} is a JSON array: jq -c '.[]' {file} > {lines}"
    if any(n.endswith((".jsonl", ".jsonl.gz")) for n in names):
        return f"{text}; name them so, or give one of them as config.data.path"
    return text


def is_dataset(folder: Path) -> bool:
    """Does the folder hold one dataset of Hugging Face: saved by it, or Parquet or Arrow files?

    Arrow files deeper down are of several datasets that were saved beside each other.
    """
    return is_saved(folder) or any(folder.rglob("*.parquet")) or any(folder.glob("*.arrow"))


def is_saved(folder: Path) -> bool:
    """Was the folder written by save_to_disk?"""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if names[8:] else "") if names else "nothing"
