"""LastFM in the files that S-DPO publishes: which artist does a listener play next?

A JSON array of `{"historyList": "A::B::C", "itemList": [20 names], "trueSelection": name}`, in a
file or in a folder with `lastfm-{train,val,test}.json[.gz]`. A folder with the original HetRec 2011
files is left to `hetrec`.

In those files the place of the true artist in `itemList` follows from the artist alone, so a list
shown in their order gives the answer away: every row's order is drawn again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mass_dpo_jax.data import lines, splits, tables
from mass_dpo_jax.data.checks import check_string
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.readers import hetrec
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import parse_json

PATTERNS = ("lastfm-{}.json", "lastfm-{}.json.gz")


def load(data: Any, split: str, seed: int) -> list[Example]:
    """The examples of a split of `data.path`; see `splits` for a file and missing splits.

    The rejected responses, and with `data.list_candidates` the list of all candidates in the
    prompt, are in an order drawn by seed and row.

    Raises:
      UserError: names the file, the row (from 0) and the field.
    """
    if hetrec.is_here(Path(data.path)):
        return hetrec.load(data, split, seed)
    file, source = splits.find_file(Path(data.path), split, PATTERNS)
    text = "".join(lines.decode(line, f"{file}:{n}") for n, line in lines.read_lines(file))
    if not text.strip():
        raise UserError(f"{file}: is empty, expected a JSON array")
    rows = parse_json(text, file)
    if not isinstance(rows, list):
        raise UserError(f"{file}: expected a JSON array of rows, found {type(rows).__name__}")
    table = tables.Table(
        str(file), source, [(f"{file} row {i}", row) for i, row in enumerate(rows)]
    )

    def make(row: Any, i: int, place: str) -> Example:
        return _example(row, f"{source.name}-{i}", place, (seed, i), data.list_candidates)

    return tables.collect(table, make, data, seed)


def _example(
    row: Any, name: str, place: str, seed: tuple[int, int], list_candidates: bool
) -> Example:
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected an object, found {type(row).__name__}")
    for field in ("historyList", "itemList", "trueSelection"):
        if field not in row:
            raise UserError(f"{place}: field {field!r} is missing; found {', '.join(row)}")
    chosen = check_string(row["trueSelection"], "trueSelection", place)
    history = check_string(row["historyList"], "historyList", place).split("::")
    items = row["itemList"]
    if not isinstance(items, list) or len(items) < 2:
        raise UserError(f"{place}: field 'itemList' must be a list of two names or more")
    for i, item in enumerate(items):
        check_string(item, f"itemList[{i}]", place)
    if items.count(chosen) != 1:
        raise UserError(
            f"{place}: field 'itemList' must have the trueSelection {chosen!r} once, "
            f"found it {items.count(chosen)} times"
        )
    # Sorted first, so that nothing of the file's order is left.
    order = np.random.default_rng([*seed, 3]).permutation(len(items))
    shuffled = [sorted(items)[i] for i in order]
    prompt = hetrec.HETREC.prompt(history, shuffled if list_candidates else ())
    rejected = tuple(item for item in shuffled if item != chosen)
    return Example(name, prompt, chosen, rejected, place)
