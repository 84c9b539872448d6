"""LastFM in the original files of HetRec 2011: which artist does a listener turn to next?

`artists.dat` (id, name, url, pictureURL) and `user_taggedartists-timestamps.dat` (userID, artistID,
tagID, timestamp), separated by tabs, each below a line of column names.

The set has no times of listening: `user_artists.dat` has counts only. What has a time is when a
listener put a tag on an artist, so the order of the first tags is the sequence, as in other work on
sequential recommendation, and `user_artists.dat` is not read. `sequences` says what becomes a row.
The published files of S-DPO, which `lastfm` reads, keep other users and artists than these rules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.readers import sequences
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


def is_here(folder: Path) -> bool:
    """Does the folder have the set's files, or some of them?"""
    return any((folder / name).is_file() for name in ("artists.dat", HETREC.log[0]))


def load(data: Any, split: str, seed: int) -> list[Example]:
    """The examples of a split of the users; see `sequences.load` for what is wrong with a row.

    Raises:
      UserError: a file is missing, or names the file and the line.
    """
    folder = Path(data.path)
    if not HETREC.is_in(folder):
        raise UserError(f"{folder}: HetRec's LastFM needs {HETREC.names[0]} and {HETREC.log[0]}")
    return sequences.load(HETREC, data, split, seed)
