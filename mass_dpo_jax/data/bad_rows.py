"""Rows that cannot be used: the first one is an error, or they are left out and counted."""

from __future__ import annotations

import dataclasses
import logging
import re
from types import TracebackType

from mass_dpo_jax.errors import UserError

LOOK_AHEAD = 1000  # Rows read after a bad one, to know whether skipping is good advice.
SHOWN = 5  # Reasons that get a line of their own.

_log = logging.getLogger(__name__)

# What differs between two rows that are wrong in the same way: numbers, and quoted text that is not
# the name of a field.
_QUOTED = re.compile(r"""(?<!field )('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")
_NUMBER = re.compile(r"-?\d[\d.]*(?:e[+-]?\d+)?|\b(?:nan|-?inf)\b")


class DuplicateId(UserError):
    """Two rows have the same id. Which of them to leave out is no question of bad rows."""


@dataclasses.dataclass
class Reason:
    """Why rows were left out: the message about the first of them, and how many there were."""

    first: str
    count: int = 0


class Reasons:
    """What was wrong with rows, by reason: messages that differ in numbers and values are one."""

    def __init__(self) -> None:
        self._by_kind: dict[str, Reason] = {}

    def add(self, message: str) -> None:
        kind = _NUMBER.sub("#", _QUOTED.sub("'...'", message))
        self._by_kind.setdefault(kind, Reason(message)).count += 1

    @property
    def count(self) -> int:
        """Of rows."""
        return sum(reason.count for reason in self._by_kind.values())

    def most_frequent(self) -> list[Reason]:
        return sorted(self._by_kind.values(), key=lambda reason: -reason.count)

    def log(self, name: str, total: int) -> None:
        """Says how many of `name`'s `total` rows were skipped, and that for each reason."""
        found = self.most_frequent()
        if len(found) > 1:
            _log.info("%s: skipped %d of %d rows in all", name, self.count, total)
        for reason in found[:SHOWN]:
            _log.info(
                "%s: skipped %d of %d rows; first: %s", name, reason.count, total, reason.first
            )
        if rest := sum(reason.count for reason in found[SHOWN:]):
            _log.info("%s: skipped %d of %d rows for other reasons", name, rest, total)


class BadRows:
    """Every row of a file is read inside `with rows:`, and `rows.done()` ends the file.

    With `on_bad_row` = "skip" the UserError of a row stays inside the `with`, and `done` logs how
    many there were, by reason, with the first message of each. With "error" it is raised a little
    later, by the `with` of a later row or by `done`: the rows between tell how many "skip" would
    leave out, which the message says unless that is most of them.
    """

    def __init__(self, name: str, on_bad_row: str):
        self.count = 0  # Rows so far, bad ones too and the one being read.
        self._name = name
        self._skip = on_bad_row == "skip"
        self._reasons = Reasons()
        self._first: UserError | None = None
        self._first_at = 0
        self._places: dict[str, str] = {}

    def __enter__(self) -> None:
        if self._first is not None and not self._skip and self.count - self._first_at >= LOOK_AHEAD:
            raise self._refusal(self._first)
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
            self._first, self._first_at = error, self.count
        self._reasons.add(str(error))
        return True

    def check_id(self, name: str, place: str, advice: str = "") -> None:
        """Raises DuplicateId, with `advice` at its end, where an earlier row had this id."""
        if name in self._places:
            raise DuplicateId(f"{place}: id {name!r} is taken by {self._places[name]}{advice}")
        self._places[name] = place

    def done(self) -> None:
        """Says what was skipped; raises UserError for a bad row, and where no row is left."""
        if not self.count:
            raise UserError(f"{self._name}: is empty, expected at least one row")
        if self._first is None:
            return
        if not self._skip:
            raise self._refusal(self._first)
        if self._reasons.count == self.count:
            raise UserError(
                f"{self._name}: none of its {self.count} rows can be used; first: {self._first}"
            )
        self._reasons.log(self._name, self.count)

    def _refusal(self, error: UserError) -> UserError:
        bad = self._reasons.count
        if isinstance(error, DuplicateId) or self.count == 1:
            return error
        if 2 * bad > self.count:
            return UserError(f"{error}; {bad} of the {self.count} rows read cannot be used")
        return UserError(
            f"{error}; config.data.on_bad_row=skip leaves such rows out ({bad} of the "
            f"{self.count} rows read)"
        )
