"""Rows that cannot be used: the first one is an error, or they are left out and counted."""

from __future__ import annotations

import logging
from types import TracebackType

from mass_dpo_jax.errors import UserError

_log = logging.getLogger(__name__)


class BadRows:
    """Every row of a file is read inside `with rows:`, and `rows.done()` ends the file.

    With `on_bad_row` = "error" the UserError of a row goes on, and says what "skip" would do: there
    it stays inside the `with`, and `done` logs how many there were and the first one's message.
    None: there is no such setting, and the UserError goes on as it is.
    """

    def __init__(self, name: str, on_bad_row: str | None):
        self.count = 0  # Rows so far, bad ones too and the one being read.
        self._name = name
        self._on_bad_row = on_bad_row
        self._first = ""
        self._skipped = 0
        self._places: dict[str, str] = {}

    def __enter__(self) -> None:
        self.count += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if not isinstance(error, UserError) or self._on_bad_row is None:
            return False
        if self._on_bad_row == "error":
            raise UserError(f"{error}; config.data.on_bad_row=skip leaves such rows out") from None
        self._first = self._first or str(error)
        self._skipped += 1
        return True

    def check_id(self, name: str, place: str) -> None:
        """Raises UserError where an earlier row had this id."""
        if name in self._places:
            raise UserError(f"{place}: id {name!r} is taken by {self._places[name]}")
        self._places[name] = place

    def done(self) -> None:
        """Says what was skipped; raises UserError where no row is left or there was none."""
        if not self.count:
            raise UserError(f"{self._name}: is empty, expected at least one row")
        if self._skipped == self.count:
            raise UserError(
                f"{self._name}: none of its {self.count} rows can be used; first: {self._first}"
            )
        if self._skipped:
            _log.info(
                "%s: skipped %d of %d rows; first: %s",
                self._name, self._skipped, self.count, self._first,
            )  # fmt: skip
