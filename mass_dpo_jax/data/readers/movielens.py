"""MovieLens in GroupLens's own files: which film does a viewer rate next?

Two layouts, told apart by the files in the folder, both in Latin-1:

- `ml-100k`: `u.data` with lines of user, item, rating and timestamp, separated by tabs, and
  `u.item`, whose lines start with `item|title (year)|`.
- `ml-1m`: `ratings.dat` with `UserID::MovieID::Rating::Timestamp` and `movies.dat` with
  `MovieID::Title (year)::Genres`.

Every rating counts as watching, whatever its stars. Titles are as in the files: "Matrix, The
(1999)". `sequences` says what becomes a row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.readers import sequences
from mass_dpo_jax.errors import UserError

ML_100K = sequences.Format(
    log=("u.data", "\t"),
    names=("u.item", "|"),
    encoding="latin-1",
    header=False,
    item="movie",
    before="A viewer watched these films, oldest first:\n",
    listed="\n\nOne of these comes next:\n{}\n\nNext film:\n",
    unlisted="\n\nNext film:\n",
)
ML_1M = ML_100K._replace(log=("ratings.dat", "::"), names=("movies.dat", "::"))


def load(data: Any, split: str, seed: int) -> list[Example]:
    """The examples of a split of the users; see `sequences.load` for what is wrong with a row.

    Raises:
      UserError: `data.path` has neither layout or both, or names the file and the line.
    """
    folder = Path(data.path)
    found = [layout for layout in (ML_100K, ML_1M) if layout.is_in(folder)]
    if len(found) != 1:
        raise UserError(
            f"{folder}: has {'both' if found else 'neither'} u.data and u.item (ml-100k) "
            f"{'and' if found else 'nor'} ratings.dat and movies.dat (ml-1m), expected one pair"
        )
    return sequences.load(found[0], data, split, seed)
