"""Rows that cannot be used: which are counted together, and when skipping them is advised."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest

from mass_dpo_jax.data.rows import LOOK_AHEAD, BadRows, Reasons
from mass_dpo_jax.errors import UserError


def read(messages: Sequence[str], on_bad_row: str = "error") -> None:
    """Reads a row for each message, which is what is wrong with it; "": nothing."""
    rows = BadRows("file", on_bad_row)
    for message in messages:
        with rows:
            if message:
                raise UserError(message)
    rows.done()


@pytest.mark.parametrize(
    ("messages", "count"),
    [
        (["f:1: field 'a' is empty", "f:20: field 'a' is empty"], 1),
        (["f:1: field 'a' is empty", "f:2: field 'b' is empty"], 2),
        (["f:1: field 'a[3]' is empty", "f:2: field 'a[12]' is empty"], 1),
        (["f:1: found the string 'x'", "f:2: found the string \"it's 'y'\""], 1),
        (["f:1: found the number 3", "f:2: found the number 1.5e+300"], 1),
        (["f:1: found the number nan", "f:2: found the number -2"], 1),
        (["f:1: found the string 'x'", "f:1: found null"], 2),
        (["f:1: at column 3, in '{'", "f:9: at column 78, in '{\"it\\'s\": '"], 1),
        (["f:1: id 'a' is taken by f:0", "f:4: id 'it\\'s 9' is taken by f:3"], 1),
    ],
)
def test_messages_that_differ_in_values_are_one_reason(messages: list[str], count: int) -> None:
    reasons = Reasons()
    for message in messages:
        reasons.add(message)
    found = reasons.sort_by_frequency()
    assert (len(found), reasons.count) == (count, 2)
    assert found[0][0] == messages[0]


def test_skipped_rows_are_counted_by_reason_the_most_frequent_first(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "mass_dpo_jax"):
        read(["f:1: is a", "", "f:3: is b", "f:4: is b", "", "", ""], "skip")
        read(["", "f:2: is a", ""], "skip")
        read([*[""] * 20, *(f"is {letter}" for letter in "abcdefg")], "skip")
    said = [record.getMessage() for record in caplog.records]
    assert said[:3] == [
        "file: skipped 3 of 7 rows in all",
        "file: skipped 2 of 7 rows; first: f:3: is b",
        "file: skipped 1 of 7 rows; first: f:1: is a",
    ]
    assert said[3] == "file: skipped 1 of 3 rows; first: f:2: is a"
    assert said[-1] == "file: skipped 2 of 27 rows for other reasons"


def test_skipping_is_advised_unless_it_would_lose_most_rows() -> None:
    with pytest.raises(UserError, match=r"^f:2: is a; .*=skip leaves .* \(1 of the 4 rows read\)$"):
        read(["", "f:2: is a", "", ""])
    with pytest.raises(UserError, match=r"^f:2: is a; .*=skip leaves .* \(2 of the 4 rows read\)$"):
        read(["", "f:2: is a", "f:3: is b", ""])
    with pytest.raises(UserError, match=r"^f:2: is a; 3 of the 4 rows read cannot be used$"):
        read(["", "f:2: is a", "f:3: is b", "f:4: is b"])
    with pytest.raises(UserError, match=r"^f:1: is a$"):
        read(["f:1: is a"])
    with pytest.raises(UserError, match=r"^file: none of its 2 rows can be used; first: f:1: is a"):
        read(["f:1: is a", "f:2: is b"], "skip")


def test_the_first_bad_row_ends_the_file_some_rows_later() -> None:
    rows = BadRows("file", "error")
    with rows:
        raise UserError("f:1: is a")
    for _ in range(LOOK_AHEAD):
        with rows:
            pass
    with pytest.raises(UserError, match=rf"^f:1: is a; .*\(1 of the {LOOK_AHEAD + 1} rows"), rows:
        pytest.fail("another row is read")


@pytest.mark.parametrize("others", [1, 9, 99])
def test_skipping_is_no_advice_on_an_id_that_is_there_twice(others: int) -> None:
    rows = BadRows("file", "error")
    for i in range(others):
        with rows:
            rows.check_id(str(i), f"f:{i}")
    with rows:
        rows.check_id("0", "f:100", "; several rows of one prompt?")
    message = r"^f:100: id '0' is taken by f:0; several rows of one prompt\?$"
    with pytest.raises(UserError, match=message):
        rows.done()
