"""MovieLens in GroupLens's own files: which film does a viewer rate next?

Two layouts, told apart by the files in the folder, both in Latin-1:

- `ml-100k`: `u.data` with lines of user, item, rating and timestamp, separated by tabs, and
  `u.item`, whose lines start with `item|title (year)|`.
- `ml-1m`: `ratings.dat` with `UserID::MovieID::Rating::Timestamp` and `movies.dat` with
  `MovieID::Title (year)::Genres`.

Every rating counts as watching, whatever its stars. Titles are as in the files: "Matrix, The
(1999)". `sequences` says how rows are made.
"""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

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


def load(data: ConfigDict, split: str, seed: int) -> list[Example]:
    """Loads a split of the users in the folder `data.path`; see `sequences.load`.

    Raises:
        UserError: the folder has neither layout or both; or names the file and the line.
    """
    folder = Path(data.path)
    layouts = [layout for layout in (ML_100K, ML_1M) if layout.is_in(folder)]
    if len(layouts) != 1:
        raise UserError(
            f"{folder}: has {'both' if layouts else 'neither'} u.data and u.item (ml-100k) "
            f"{'and' if layouts else 'nor'} ratings.dat and movies.dat (ml-1m), expected one pair"
        )
    return sequences.load(layouts[0], data, split, seed)
