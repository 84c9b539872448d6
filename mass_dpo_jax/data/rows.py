"""Rows of files and datasets: opening them, turning each into an item, and handling bad ones.

`data.on_bad_row` decides about a row that cannot be used: "error" refuses the file and says how
many rows are affected; "skip" leaves such rows out and logs how many, by reason.
"""

from __future__ import annotations

import collections
import logging
import re
from collections.abc import Callable, Hashable, Iterable
from types import TracebackType
from typing import Any, NamedTuple, Protocol, TypeVar

from ml_collections import ConfigDict

from mass_dpo_jax.data import splits
from mass_dpo_jax.errors import UserError

LOOK_AHEAD = 1000  # Rows read after a bad one, to know whether skipping is good advice.
MAX_REASONS = 5  # Reasons that get a line of their own in the log.

_log = logging.getLogger(__name__)


class Table(NamedTuple):
    """The rows from which a split is taken.

    Attributes:
        name: for messages: the file, or the dataset and its split.
        source: the split whose rows these are, and the part of them to take.
        rows: pairs (location, row); a row that could not even be parsed is its UserError.
    """

    name: str
    source: splits.Source
    rows: Iterable[tuple[str, Any]]


class Row(Protocol):
    """What `collect` needs to know of an item."""

    @property
    def id(self) -> str:
        """Unique within a table."""

    @property
    def question(self) -> Hashable:
        """Equal for rows that must not be on both sides of a split."""


Item = TypeVar("Item", bound=Row)


def collect(
    table: Table, make: Callable[[Any, int, str], Item], data: ConfigDict, seed: int
) -> list[Item]:
    """Returns the items of the part of a table that its `source` names; see `splits`.

    Args:
        table: the rows.
        make: turns (row, index from 0, location) into an item, or raises UserError.
        data: the configuration's `data`. Reads `on_bad_row`, `validation_share`.
        seed: determines which rows are held out.

    Raises:
        UserError: `make` raised it or an id occurs twice, unless `data.on_bad_row` is "skip"; or no
            row is left.
    """
    return take_part(table, read_items(table, make, data.on_bad_row), data, seed)


def read_items(
    table: Table,
    make: Callable[[Any, int, str], Item],
    on_bad_row: str,
    advice: str = "",
    unique_ids: bool = True,
) -> list[Item]:
    """Returns the items of all rows; `advice` is added to the error about a repeated id."""
    rows = BadRows(table.name, on_bad_row)
    items = []
    for location, row in table.rows:
        with rows:
            if isinstance(row, UserError):
                raise row
            item = make(row, rows.count - 1, location)
            if unique_ids:
                rows.check_id(item.id, location, advice)
            items.append(item)
    rows.done()
    return items


def take_part(table: Table, items: list[Item], data: ConfigDict, seed: int) -> list[Item]:
    """Returns the part of all items that the table's source names."""
    questions = [item.question for item in items]
    return splits.take(items, questions, table.source.part, data.validation_share, seed, table.name)


# What differs between two rows that are wrong in the same way: numbers, and quoted text other than
# the name of a field.
_QUOTED = re.compile(r"""(?<!field )('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")
_NUMBER = re.compile(r"-?\d[\d.]*(?:e[+-]?\d+)?|\b(?:nan|-?inf)\b")


class DuplicateId(UserError):
    """Two rows have the same id; skipping bad rows would not say which one to leave out."""


class Reasons:
    """What was wrong with rows. Messages that differ in numbers and values only count as one."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}  # The first row's message by kind.
        self._counts: collections.Counter[str] = collections.Counter()

    def add(self, message: str) -> None:
        """Counts one more row with this message."""
        pattern = _NUMBER.sub("#", _QUOTED.sub("'...'", message))
        self._first.setdefault(pattern, message)
        self._counts[pattern] += 1

    @property
    def count(self) -> int:
        """The number of rows."""
        return self._counts.total()

    def sort_by_frequency(self) -> list[tuple[str, int]]:
        """Returns each reason's first message and number of rows, the most frequent one first."""
        return [(self._first[kind], count) for kind, count in self._counts.most_common()]

    def log(self, name: str, total: int) -> None:
        """Logs how many of `name`'s `total` rows were skipped, in all and for each reason."""
        reasons = self.sort_by_frequency()
        if len(reasons) > 1:
            _log.info("%s: skipped %d of %d rows in all", name, self.count, total)
        for first, count in reasons[:MAX_REASONS]:
            _log.info("%s: skipped %d of %d rows; first: %s", name, count, total, first)
        if rest := sum(count for _, count in reasons[MAX_REASONS:]):
            _log.info("%s: skipped %d of %d rows for other reasons", name, rest, total)


class BadRows:
    """Catches errors of rows: each is read inside `with rows:`, and `rows.done()` ends the file.

    With `on_bad_row` = "skip" the UserError of a row stays inside the `with`, and `done` logs how
    many there were, by reason. With "error" it is raised a little later, by the `with` of a later
    row or by `done`: the rows in between show how many rows "skip" would leave out, and the message
    says so unless that is most of them.

    Attributes:
        count: the number of rows so far, including bad ones and the one being read.
    """

    def __init__(self, name: str, on_bad_row: str):
        self.count = 0
        self._name = name
        self._skip = on_bad_row == "skip"
        self._reasons = Reasons()
        self._first: UserError | None = None
        self._first_index = 0
        self._locations: dict[str, str] = {}  # By id.

    def __enter__(self) -> None:
        read = self.count - self._first_index
        if self._first is not None and not self._skip and read >= LOOK_AHEAD:
            raise self._make_refusal(self._first)
        self.count += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if not isinstance(error, UserError):
            return False
        if self._first is None:
            self._first, self._first_index = error, self.count
        self._reasons.add(str(error))
        return True

    def check_id(self, name: str, location: str, advice: str = "") -> None:
        """Raises DuplicateId, with `advice` at its end, where an earlier row had this id."""
        if name in self._locations:
            other = self._locations[name]
            raise DuplicateId(f"{location}: id {name!r} is taken by {other}{advice}")
        self._locations[name] = location

    def done(self) -> None:
        """Logs what was skipped; raises UserError for a bad row, or where no row is left."""
        if not self.count:
            raise UserError(f"{self._name}: is empty, expected at least one row")
        if self._first is None:
            return
        if not self._skip:
            raise self._make_refusal(self._first)
        if self._reasons.count == self.count:
            raise UserError(
                f"{self._name}: none of its {self.count} rows can be used; first: {self._first}"
            )
        self._reasons.log(self._name, self.count)

    def _make_refusal(self, error: UserError) -> UserError:
        bad = self._reasons.count
        if isinstance(error, DuplicateId) or self.count == 1:
            return error
        if 2 * bad > self.count:
            return UserError(f"{error}; {bad} of the {self.count} rows read cannot be used")
        return UserError(
            f"{error}; config.data.on_bad_row=skip leaves such rows out ({bad} of the "
            f"{self.count} rows read)"
        )
