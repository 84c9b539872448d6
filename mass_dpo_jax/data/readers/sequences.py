"""Examples from a log of who took which item when: what does a user take next?

A user's items are ordered by time, ties by the order of the file, and each counts once, at its
first time. Every item from the fourth on is the chosen one of a row, whose prompt lists the items
before it, at most the last ten. That is S-DPO's format.

The other candidates are drawn by seed from the items of the catalogue that the user had not taken
by then: none of the whole past, including what is too old to be shown, and not the chosen one. They
may include items taken later, which nobody could know at that time. Items with the same name count
as one.

A user is in one split only: of ten users, drawn in the same way for every seed, eight are in train,
one in validation, one in test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mass_dpo_jax.data import splits, text_files
from mass_dpo_jax.data.examples import Example, History
from mass_dpo_jax.data.fields import check_string
from mass_dpo_jax.data.rows import BadRows
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import shorten

MIN_HISTORY = 3  # Items before the chosen one.
MAX_HISTORY = 10  # Items that the prompt shows.
# Names contain commas. Besides, a name on a line of its own has the same tokens in the history, in
# the list and in the response.
SEPARATOR = "\n"


class Format(NamedTuple):
    """Two files and the words of the prompt.

    Attributes:
        log: the file with lines of user, item, something and time; and what separates these.
        names: the file whose lines start with item and name; and what separates these.
        encoding: the encoding of both files.
        header: whether each file starts with a line of column names.
        item: the word for an item: "movie".
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
        """Whether a folder has both files."""
        return (folder / self.log[0]).is_file() and (folder / self.names[0]).is_file()

    def make_prompt(self, items: Sequence[str], candidates: Sequence[str]) -> History:
        """Makes the prompt after these items; without candidates, it lists none."""
        ending = self.unlisted
        if candidates:
            ending = self.listed.format(SEPARATOR.join(candidates))
        return History(self.before, tuple(items), ending, SEPARATOR)


class Event(NamedTuple):
    """A user took an item.

    Attributes:
        time: when, as in the log.
        line: the line of the log, from 1.
        name: the item's name.
    """

    time: int
    line: int
    name: str


def load(layout: Format, data: ConfigDict, split: str, seed: int) -> list[Example]:
    """Loads a split, or "all" users: at most `data.max_*` examples, drawn by seed.

    Candidates and their order are a function of the seed and the chosen item's line. Reads `path`,
    `num_candidates`, `list_candidates`, `on_bad_row` and `max_*` of `data`.

    Raises:
        UserError: names the file and the line: a field is missing or no number, an item has no
            name, or there are fewer than `data.num_candidates` items to choose from. Or fewer than
            three users have more than three items.
    """
    folder = Path(data.path)
    names = _read_names(folder, layout, data.on_bad_row)
    log = folder / layout.log[0]
    events = _read_log(log, layout, names, data.on_bad_row)
    catalogue = sorted(set(names.values()))
    rows = BadRows(f"{log} {split}", data.on_bad_row)
    choices: list[tuple[int, list[Event], int]] = []  # User, events, index of the chosen one.
    for user in _select_users(sorted(events), split, log):
        for k in range(MIN_HISTORY, len(events[user])):
            with rows:
                num_left = len(catalogue) - k
                if num_left < data.num_candidates:
                    raise UserError(
                        f"{log}:{events[user][k].line}: user {user} has {num_left} {layout.item}s "
                        f"left to choose from, config.data.num_candidates={data.num_candidates}"
                    )
                choices.append((user, events[user], k))
    rows.done()
    index = {name: i for i, name in enumerate(catalogue)}
    examples = []
    for user, taken, k in splits.limit(choices, data, split, seed):
        rng = np.random.default_rng([seed, taken[k].line, 3])
        past = [index[event.name] for event in taken[: k + 1]]
        negatives = _draw(rng, len(catalogue), past, data.num_candidates - 1)
        chosen = taken[k].name
        candidates = [chosen, *(catalogue[i] for i in negatives)]
        candidates = [candidates[i] for i in rng.permutation(len(candidates))]
        items = [event.name for event in taken[max(0, k - MAX_HISTORY) : k]]
        examples.append(
            Example(
                f"user{user}-{k}",
                layout.make_prompt(items, candidates if data.list_candidates else ()),
                chosen,
                tuple(name for name in candidates if name != chosen),
                f"{log}:{taken[k].line}",
            )
        )
    return examples


def _draw(rng: np.random.Generator, size: int, past: Sequence[int], count: int) -> list[int]:
    """Draws `count` different numbers below `size` that are not in `past`."""
    excluded = set(past)
    sample = rng.choice(size, size=min(size, count + len(excluded)), replace=False)
    return [i for i in sample.tolist() if i not in excluded][:count]


def _select_users(users: Sequence[int], split: str, log: Path) -> list[int]:
    if len(users) < 3:
        raise UserError(
            f"{log}: {len(users)} user(s) with more than {MIN_HISTORY} items, expected at least "
            "three: one each for train, validation and test"
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
    for location, _, line in _read_lines(file, layout):
        with rows:
            fields = _split_line(line, location, layout, separator)
            if len(fields) < 2:
                raise UserError(
                    f"{location}: expected {layout.item} id and name, separated by {separator!r}, "
                    f"found {len(fields)} field"
                )
            item = _read_integer(fields[0], f"{layout.item} id", location)
            name = " ".join(check_string(fields[1], f"{layout.item} name", location).split())
            rows.check_id(str(item), location)
            names[item] = name
    rows.done()
    return names


def _read_log(
    file: Path, layout: Format, names: dict[int, str], on_bad_row: str
) -> dict[int, list[Event]]:
    """Reads the events of users with more than `MIN_HISTORY` items, each user's oldest first."""
    rows = BadRows(str(file), on_bad_row)
    log: dict[int, list[Event]] = {}
    for location, number, line in _read_lines(file, layout):
        with rows:
            fields = _split_line(line, location, layout, layout.log[1])
            if len(fields) != 4:
                raise UserError(
                    f"{location}: expected 4 fields separated by {layout.log[1]!r}, "
                    f"found {len(fields)}"
                )
            user = _read_integer(fields[0], "user id", location)
            item = _read_integer(fields[1], f"{layout.item} id", location)
            time = _read_integer(fields[3], "timestamp", location)
            if item not in names:
                raise UserError(f"{location}: {layout.item} id {item} is not in {layout.names[0]}")
            log.setdefault(user, []).append(Event(time, number, names[item]))
    rows.done()
    for user, events in log.items():
        first: dict[str, Event] = {}
        for event in sorted(events):
            first.setdefault(event.name, event)
        log[user] = list(first.values())
    return {user: events for user, events in log.items() if len(events) > MIN_HISTORY}


def _read_lines(file: Path, layout: Format) -> Iterator[tuple[str, int, bytes]]:
    """Yields location, number from 1, and bytes of each line that is neither blank nor header."""
    for number, line in text_files.read_lines(file):
        if line.strip() and not (number == 1 and layout.header):
            yield f"{file}:{number}", number, line


def _split_line(line: bytes, location: str, layout: Format, separator: str) -> list[str]:
    return text_files.decode(line, location, layout.encoding).rstrip("\r\n").split(separator)


def _read_integer(text: str, field: str, location: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{location}: {field} must be an integer, found {shorten(text)}") from None
