"""Which rows a split has: those of its own file or, where there is none, of another one."""

from __future__ import annotations

import collections
import functools
import logging
import re
import shlex
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from ml_collections import ConfigDict

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
    """A part of the rows of split `name`: "all" of them, the "held_out" ones, or the "rest"."""

    name: str
    part: str


def resolve(split: str, available: Collection[str], location: str) -> Source:
    """Returns where a split's rows come from, given the available splits.

    Without validation rows, some training rows are held out for it. Without test rows, those of
    validation stand in. A single, nameless set of rows counts as "train".

    Raises:
        UserError: there are no rows for this split.
    """
    if split in available:
        is_rest = split == "train" and "validation" not in available
        return Source(split, "rest" if is_rest else "all")
    if split == "test" and "validation" in available:
        return Source("validation", "all")
    if split in ("validation", "test") and "train" in available:
        return Source("train", "held_out")
    raise UserError(
        f"{location}: no split {split!r}; found {', '.join(sorted(available)) or 'none'}"
    )


def take(
    rows: Sequence[Row],
    prompts: Sequence[Hashable],
    part: str,
    held_out: float,
    seed: int,
    location: str,
) -> list[Row]:
    """Returns a part of the rows, "all", "held_out" or the "rest", in their order.

    Rows with equal `prompts` are in one part. Which ones are held out depends on the seed alone.
    They are about the share `held_out` of the rows: at least one prompt where that is above 0, and
    never all. If all rows have the same prompt, some are held out nevertheless, and a single row
    is in both parts.
    """
    if part == "all":
        return list(rows)
    if len(rows) == 1 and held_out:
        _log.warning("%s: its only row serves for training and evaluation", location)
        return list(rows)
    count = min(max(1, round(held_out * len(rows))), len(rows) - 1) if held_out else 0
    order = np.random.default_rng([seed, 1]).permutation(len(rows)).tolist()
    sizes = collections.Counter(prompts)
    if len(sizes) == 1 and count:
        _log.warning(
            "%s: all %d rows have the same prompt, which is trained and evaluated on",
            location, len(rows),
        )  # fmt: skip
        chosen = set(order[:count])
        is_held_out = [i in chosen for i in range(len(rows))]
    else:
        held_prompts = _hold_out([prompts[i] for i in order], sizes, count)
        is_held_out = [prompt in held_prompts for prompt in prompts]
    if part == "rest" and count:
        prompt_counts = ""
        if 1 < len(sizes) < len(rows):
            prompt_counts = f" ({len(held_prompts)} of {len(sizes)} prompts)"
        _log.info(
            "%s: %d of %d rows%s are held out for evaluation",
            location,
            sum(is_held_out),
            len(rows),
            prompt_counts,
        )
    return [
        row
        for row, is_held in zip(rows, is_held_out, strict=True)
        if is_held == (part == "held_out")
    ]


def _hold_out(
    order: Sequence[Hashable], sizes: Mapping[Hashable, int], count: int
) -> set[Hashable]:
    """Returns the first prompts in `order` that together have about `count` rows, but not all rows.

    A prompt is passed over if adding it would lead further away from `count`. If every prompt has
    one row, these are the first `count` ones.
    """
    held_prompts: set[Hashable] = set()
    rows_to_hold, free_rows = count, sum(sizes.values())
    for prompt in order:
        if prompt not in held_prompts and sizes[prompt] < min(2 * rows_to_hold, free_rows):
            held_prompts.add(prompt)
            rows_to_hold -= sizes[prompt]
            free_rows -= sizes[prompt]
    if count and not held_prompts:
        held_prompts.add(min(order, key=sizes.__getitem__))
    return held_prompts


def limit(rows: list[Row], data: ConfigDict, split: str, seed: int) -> list[Row]:
    """Returns at most as many rows as `data.max_*` allows, drawn by seed and in their order.

    Logs how many that leaves out.
    """
    max_rows = 0 if split == "all" else data[f"max_{split}"]
    if not max_rows or len(rows) <= max_rows:
        return rows
    _log.info("%s: %d of %d rows are used (config.data.max_%s)", split, max_rows, len(rows), split)
    chosen = np.random.default_rng([seed, 2]).permutation(len(rows))[:max_rows]
    return [rows[i] for i in sorted(chosen)]


def match_splits(words: Mapping[str, str], location: str) -> dict[str, str]:
    """Returns which name stands for which split, given each name's word for one, such as "dev".

    Raises:
        UserError: two names stand for one split.
    """
    matches: dict[str, str] = {}
    for split, aliases in NAMES.items():
        for name, word in words.items():
            if word.lower() not in aliases:
                continue
            if split in matches:
                raise UserError(
                    f"{location}: {matches[split]} and {name} could both be the {split} split; "
                    "expected one of them"
                )
            matches[split] = name
    return matches


def find_file(
    path: Path, split: str, patterns: Sequence[str], without: Collection[str] = ()
) -> tuple[Path, Source]:
    """Finds the file that has a split's rows, and the split's part of them.

    Args:
        path: a file, which holds all rows, or a folder with one file for each split.
        split: "train", "validation", "test" or, for a file, "all".
        patterns: names of files in the folder, with {} for the split's name.
        without: splits of a folder to ignore.

    Raises:
        UserError: says what was looked for.
    """
    if path.is_file():
        if split == "all":
            return path, Source(path.name.split(".")[0], "all")
        return path, Source(path.name.split(".")[0], resolve(split, ["train"], str(path)).part)
    if not path.is_dir():
        raise UserError(_describe_missing_path(path))
    names = sorted(p.name + "/" * p.is_dir() for p in path.iterdir() if p.name[0] != ".")
    files = match_splits({name: _extract_word(name, patterns) for name in names}, str(path))
    if not files:
        raise UserError(_describe_missing_files(path, names, patterns))
    unread = tuple(name for name in names if name not in files.values())
    log_unread(str(path), unread, tuple(files))
    source = resolve(split, [name for name in files if name not in without], str(path))
    return path / files[source.name], source


@functools.cache  # Once, not for every split.
def log_unread(location: str, names: tuple[str, ...], read: tuple[str, ...]) -> None:
    """Logs which files of a folder, or splits of a dataset, are not read, except for notes.

    Warns of a file that is named like a split that is not `read`: `test.csv` beside `train.jsonl`.
    """
    if names := tuple(n for n in names if not n.startswith(("README", "LICENSE"))):
        _log.info("%s: not read: %s", location, _list_names(names))
    for name in names:
        split = name_split(name)
        if split and split not in read:
            _log.warning(
                "%s: %s is in no format that is read there, and no %s split is: convert it, or "
                "take it away", location, name, split,
            )  # fmt: skip


def name_split(name: str) -> str:
    """Returns the split that a file is named like, whatever its format; "" for other names."""
    word = name.split(".")[0].lower()
    return next((split for split, aliases in NAMES.items() if word in aliases), "")


def _extract_word(name: str, patterns: Sequence[str]) -> str:
    """Returns what stands for {} in a name; "" if it matches no pattern."""
    for before, _, behind in (pattern.partition("{}") for pattern in patterns):
        if name.startswith(before) and name.endswith(behind):
            word = name[len(before) : len(name) - len(behind)]
            if "." not in word:
                return word
    return ""


def _describe_missing_path(path: Path) -> str:
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


def _describe_missing_files(folder: Path, names: Sequence[str], patterns: Sequence[str]) -> str:
    """Describes a folder that has no file for any split, with advice."""
    expected = ", ".join(patterns[0].format(split) for split in NAMES)
    endings = [pattern.partition("{}")[2] for pattern in patterns[1:]]
    also = f" (or with {', '.join(endings)})" if endings else ""
    text = f"{folder}: expected files {expected}{also}; found {_list_names(names)}"
    if patterns[0] != "{}.jsonl":
        return text
    if is_dataset(folder):
        return f"{text}; a dataset of Hugging Face: set --config.data.name=hub"
    array = next((n for n in names if _extract_word(n, ["{}.json"]).lower() in _ALIASES), "")
    if array:
        file, lines = shlex.quote(str(folder / array)), shlex.quote(str(folder / f"{array}l"))
        return f"{text}; if {array} is a JSON array: jq -c '.[]' {file} > {lines}"
    if any(n.endswith((".jsonl", ".jsonl.gz")) for n in names):
        return f"{text}; name them so, or give one of them as config.data.path"
    return text


def is_dataset(folder: Path) -> bool:
    """Whether the folder is one Hugging Face dataset: saved by it, or Parquet or Arrow files.

    Arrow files in subfolders belong to several datasets that were saved side by side.
    """
    return is_saved(folder) or any(folder.rglob("*.parquet")) or any(folder.glob("*.arrow"))


def is_saved(folder: Path) -> bool:
    """Whether save_to_disk wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _list_names(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if names[8:] else "") if names else "nothing"
