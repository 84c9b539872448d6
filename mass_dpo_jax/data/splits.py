"""Which rows a split has: those of its own file or, where there is none, of another one."""

from __future__ import annotations

import collections
import functools
import logging
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from ml_collections import ConfigDict

from mass_dpo_jax.errors import UserError

NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}

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


def match_splits(names: Iterable[str], location: str) -> dict[str, str]:
    """Returns by split which of a dataset's own names stands for it, such as "dev".

    Raises:
        UserError: two names stand for one split.
    """
    matches: dict[str, str] = {}
    for name in names:
        split = next((split for split in NAMES if name.lower() in NAMES[split]), "")
        if split in matches:
            raise UserError(
                f"{location}: {matches[split]} and {name} could both be the {split} split; "
                f"expected one of them, or --config.data.splits={split}:{matches[split]}"
            )
        if split:
            matches[split] = name
    return matches


def parse_splits(text: str) -> dict[str, list[str]]:
    """Parses `data.splits`, as in `train:train_prefs+train_gen,test:test_prefs`.

    Returns:
        The data's own names of each split.

    Raises:
        UserError: the text is something else.
    """
    names: dict[str, list[str]] = {}
    for part in text.split(",") if text else []:
        ours, _, theirs = (word.strip() for word in part.partition(":"))
        listed = [name for name in map(str.strip, theirs.split("+")) if name]
        if ours not in NAMES or not listed or ours in names:
            raise UserError(
                f"config.data.splits={text!r}: {part!r}, expected each of {', '.join(NAMES)} at "
                "most once, as in train:train_prefs,test:test_prefs; + joins several of the data's"
            )
        names[ours] = listed
    return names


def suggest_splits(names: Sequence[str]) -> str:
    """Returns advice on `data.splits` for names that begin like splits; "" where none do."""
    theirs = {}
    for split, aliases in NAMES.items():
        theirs[split] = next((n for n in names if n.lower().startswith(aliases)), "")
    setting = ",".join(f"{split}:{name}" for split, name in theirs.items() if name)
    return f"--config.data.splits={setting} takes these" if setting else ""


@functools.cache  # Once, not for every split.
def log_unread(location: str, names: tuple[str, ...], read: tuple[str, ...]) -> None:
    """Logs which files of a folder, or splits of a dataset, are not read, except for notes.

    Warns of a file that is named like a split that is not `read`: `test.csv` beside `train.jsonl`.
    """
    if names := tuple(n for n in names if not n.startswith(("README", "LICENSE"))):
        _log.info("%s: not read: %s", location, list_names(names))
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


def list_names(names: Sequence[str]) -> str:
    """Returns some names as text, and whether there are more."""
    return ", ".join(names[:8]) + (", ..." if names[8:] else "") if names else "nothing"
