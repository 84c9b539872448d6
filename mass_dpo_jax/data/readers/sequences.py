"""What does a user take next? Rows from a log of who took which item when.

A user's items in order of time, ties in the order of the file, each once: the first time counts.
From the fourth on, every item is the chosen one of a row, whose prompt lists the items before it,
the last ten of them. That is S-DPO's format.

The other candidates are drawn by seed from the items of the catalogue that the user had not taken
by then: none of the whole past, also beyond the ten that are shown, and not the chosen one. What is
taken later may be among them: at that time nobody could know. Items with the same name are one.

A user is in one split only: of ten users, drawn in the same way for every seed, eight are in train,
one in validation, one in test.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mass_dpo_jax.data import lines, splits
from mass_dpo_jax.data.bad_rows import BadRows
from mass_dpo_jax.data.checks import check_string
from mass_dpo_jax.data.examples import Example, History
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import shorten

LEAST = 3  # Items before the chosen one.
MOST = 10  # Items that the prompt shows.
# Names have commas in them; and on a line of its own a name in the history or the list is the same
# tokens as in the response.
SEPARATOR = "\n"


class Format(NamedTuple):
    """Two files and the words of the prompt.

    Attributes:
      log: the file with lines of user, item, something and time; what they are separated by.
      names: the file whose lines start with item and name; what they are separated by.
      encoding: of both.
      header: does each file start with a line of column names?
      item: "movie", say.
      before: the prompt up to the items.
      listed: the prompt after them, with {} for the candidates.
      unlisted: the same where the candidates are not listed.
    """

    log: tuple[str, str]
    names: tuple[str, str]
    encoding: str
    header: bool
    item: str
    before: str
    listed: str
    unlisted: str

    def is_in(self, folder: Path) -> bool:
        return (folder / self.log[0]).is_file() and (folder / self.names[0]).is_file()

    def prompt(self, items: Sequence[str], candidates: Sequence[str]) -> History:
        """The prompt after these items; without candidates, none are listed."""
        after = self.unlisted
        if candidates:
            after = self.listed.format(SEPARATOR.join(candidates))
        return History(self.before, tuple(items), after, SEPARATOR)


class Event(NamedTuple):
    time: int
    line: int  # Of the log, from 1.
    name: str  # Of the item.


def load(layout: Format, data: Any, split: str, seed: int) -> list[Example]:
    """The examples of a split, or of "all" users: at most `data.max_*` of them, drawn by seed.

    Candidates and their order are a function of the seed and the chosen item's line.

    Raises:
      UserError: names the file and the line: a field is missing or no number, an item has no name,
        fewer than `data.num_candidates` items are there to choose from. Or there are fewer than
        three users with more than three items.
    """
    folder = Path(data.path)
    names = _read_names(folder, layout, data.on_bad_row)
    log = folder / layout.log[0]
    events = _read_log(log, layout, names, data.on_bad_row)
    catalogue = sorted(set(names.values()))
    rows = BadRows(f"{log} {split}", data.on_bad_row)
    found: list[tuple[int, list[Event], int]] = []
    for user in _users_of(sorted(events), split, log):
        for k in range(LEAST, len(events[user])):
            with rows:
                left = len(catalogue) - k
                if left < data.num_candidates:
                    raise UserError(
                        f"{log}:{events[user][k].line}: user {user} has {left} {layout.item}s left "
                        f"to choose from, config.data.num_candidates={data.num_candidates}"
                    )
                found.append((user, events[user], k))
    rows.done()
    number = {name: i for i, name in enumerate(catalogue)}
    examples = []
    for user, taken, k in splits.limit(found, data, split, seed):
        rng = np.random.default_rng([seed, taken[k].line, 3])
        past = [number[event.name] for event in taken[: k + 1]]
        others = _draw(rng, len(catalogue), past, data.num_candidates - 1)
        chosen = taken[k].name
        candidates = [chosen, *(catalogue[i] for i in others)]
        candidates = [candidates[i] for i in rng.permutation(len(candidates))]
        items = [event.name for event in taken[max(0, k - MOST) : k]]
        examples.append(
            Example(
                id=f"user{user}-{k}",
                prompt=layout.prompt(items, candidates if data.list_candidates else ()),
                chosen=chosen,
                rejected=tuple(name for name in candidates if name != chosen),
                place=f"{log}:{taken[k].line}",
            )
        )
    return examples


def _draw(rng: np.random.Generator, size: int, past: Sequence[int], count: int) -> list[int]:
    """`count` different numbers below `size`, none of the past."""
    excluded = set(past)
    sample = rng.choice(size, size=min(size, count + len(excluded)), replace=False)
    return [i for i in sample.tolist() if i not in excluded][:count]


def _users_of(users: Sequence[int], split: str, log: Path) -> list[int]:
    if len(users) < 3:
        raise UserError(
            f"{log}: {len(users)} user(s) with more than {LEAST} items, expected at least three: "
            "one each for train, validation and test"
        )
    if split == "all":
        return list(users)
    order = np.random.default_rng(0).permutation(len(users))
    tenth = max(1, len(users) // 10)
    first, last = {
        "test": (0, tenth),
        "validation": (tenth, 2 * tenth),
        "train": (2 * tenth, len(users)),
    }[split]
    return [users[i] for i in sorted(order[first:last])]


def _read_names(folder: Path, layout: Format, on_bad_row: str) -> dict[int, str]:
    file, separator = folder / layout.names[0], layout.names[1]
    rows = BadRows(str(file), on_bad_row)
    names = {}
    for number, line in lines.read_lines(file):
        if (number == 1 and layout.header) or not line.strip():
            continue
        place = f"{file}:{number}"
        with rows:
            fields = lines.decode(line, place, layout.encoding).rstrip("\r\n").split(separator)
            if len(fields) < 2:
                raise UserError(
                    f"{place}: expected {layout.item} id and name, separated by {separator!r}, "
                    f"found {len(fields)} field"
                )
            item = _integer(fields[0], f"{layout.item} id", place)
            name = " ".join(check_string(fields[1], f"{layout.item} name", place).split())
            rows.check_id(str(item), place)
            names[item] = name
    rows.done()
    return names


def _read_log(
    file: Path, layout: Format, names: dict[int, str], on_bad_row: str
) -> dict[int, list[Event]]:
    """Every user's items, the oldest first, of users with more than `LEAST` of them."""
    rows = BadRows(str(file), on_bad_row)
    found: dict[int, list[Event]] = {}
    for number, line in lines.read_lines(file):
        if (number == 1 and layout.header) or not line.strip():
            continue
        with rows:
            place = f"{file}:{number}"
            fields = lines.decode(line, place, layout.encoding).rstrip("\r\n").split(layout.log[1])
            if len(fields) != 4:
                raise UserError(
                    f"{place}: expected 4 fields separated by {layout.log[1]!r}, "
                    f"found {len(fields)}"
                )
            user = _integer(fields[0], "user id", place)
            item = _integer(fields[1], f"{layout.item} id", place)
            time = _integer(fields[3], "timestamp", place)
            if item not in names:
                raise UserError(f"{place}: {layout.item} id {item} is not in {layout.names[0]}")
            found.setdefault(user, []).append(Event(time, number, names[item]))
    rows.done()
    for user, events in found.items():
        first: dict[str, Event] = {}
        for event in sorted(events):
            first.setdefault(event.name, event)
        found[user] = list(first.values())
    return {user: events for user, events in found.items() if len(events) > LEAST}


def _integer(text: str, what: str, place: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{place}: {what} must be an integer, found {shorten(text)}") from None
