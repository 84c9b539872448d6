"""The short form of tests/torture.py."""

from __future__ import annotations

from pathlib import Path

from torture import EVERY, compare


def test_a_run_that_is_killed_is_the_run_that_is_not(tmp_path: Path) -> None:
    found = compare(tmp_path, kills=3, steps=80, seed=0)
    assert sum(found.kills.values()) >= 2 and found.starts >= 3
    # A step is logged when the next has begun, and a save takes longer than some steps.
    assert max(found.lost) <= 4 * EVERY
