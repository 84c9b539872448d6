"""LastFM: which artist does a listener play next? In S-DPO's files or HetRec 2011's.

S-DPO publishes a JSON array of `{"historyList": "A::B::C", "itemList": [20 names], "trueSelection":
name}`, read from a file or from a folder with `lastfm-{train,val,test}.json[.gz]`. The position of
the true artist in `itemList` follows from the artist alone, so a list shown in that order gives the
answer away: every row is put into a new random order.

HetRec 2011, the original, is read from a folder with `artists.dat` (id, name, url, pictureURL) and
`user_taggedartists-timestamps.dat` (userID, artistID, tagID, timestamp), separated by tabs, each
with a line of column names. It has no times of listening: `user_artists.dat` has counts only. What
has a time is when a listener put a tag on an artist, so the order of first tags is the sequence, as
in other work on sequential recommendation. `sequences` says how rows are made; S-DPO's files keep
other users and artists than these rules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mass_dpo_jax.data import sources
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.fields import check_string
from mass_dpo_jax.data.readers import sequences
from mass_dpo_jax.data.rows import collect
from mass_dpo_jax.errors import UserError

HETREC = sequences.Format(
    log=("user_taggedartists-timestamps.dat", "\t"),
    names=("artists.dat", "\t"),
    encoding="utf-8",
    header=True,
    item="artist",
    before="A listener played these artists, oldest first:\n",
    listed="\n\nOne of these comes next:\n{}\n\nNext artist:\n",
    unlisted="\n\nNext artist:\n",
)


def load(data: ConfigDict, split: str, seed: int) -> list[Example]:
    """Loads a split of `data.path`; see `splits` for a single file and missing splits.

    The rejected responses, and with `data.list_candidates` the list of all candidates in the
    prompt, are in an order drawn by seed and row. Reads `path`, `list_candidates`, `on_bad_row` and
    `validation_share` of `data`; for HetRec, what `sequences.load` reads.

    Raises:
        UserError: names the file, the row (from 0) or line, and the field.
    """
    path = Path(data.path)
    if any((path / name).is_file() for name in (HETREC.names[0], HETREC.log[0])):
        if not HETREC.is_in(path):
            raise UserError(f"{path}: HetRec's LastFM needs {HETREC.names[0]} and {HETREC.log[0]}")
        return sequences.load(HETREC, data, split, seed)
    table = sources.open_table(data, split)

    def make(row: Any, i: int, location: str) -> Example:
        return _read_row(row, f"{table.source.name}-{i}", location, (seed, i), data.list_candidates)

    return collect(table, make, data, seed)


def _read_row(
    row: Any, name: str, location: str, seed: tuple[int, int], list_candidates: bool
) -> Example:
    if not isinstance(row, dict):
        raise UserError(f"{location}: expected an object, found {type(row).__name__}")
    for field in ("historyList", "itemList", "trueSelection"):
        if field not in row:
            raise UserError(f"{location}: field {field!r} is missing; found {', '.join(row)}")
    chosen = check_string(row["trueSelection"], "trueSelection", location)
    history = check_string(row["historyList"], "historyList", location).split("::")
    items = row["itemList"]
    if not isinstance(items, list) or len(items) < 2:
        raise UserError(f"{location}: field 'itemList' must be a list of two names or more")
    for i, item in enumerate(items):
        check_string(item, f"itemList[{i}]", location)
    if items.count(chosen) != 1:
        raise UserError(
            f"{location}: field 'itemList' must have the trueSelection {chosen!r} once, "
            f"found it {items.count(chosen)} times"
        )
    # Sorted first, so that nothing of the file's order is left.
    order = np.random.default_rng([*seed, 3]).permutation(len(items))
    shuffled = [sorted(items)[i] for i in order]
    prompt = HETREC.make_prompt(history, shuffled if list_candidates else ())
    rejected = tuple(item for item in shuffled if item != chosen)
    return Example(name, prompt, chosen, rejected, location)
