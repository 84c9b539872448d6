from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import mined_negatives
from benchmarks.evidence_runs import pack
from tests.support.packages import ROOT


def line(arm: str, seed: int, first: int) -> dict[str, Any]:
    """A result in which the chosen response is first in `first` of 10 rows, else second."""
    ranks = pack(np.where(np.arange(10) < first, 1, 2))
    return {"arm": arm, "seed": seed, "ranks": {"given": ranks, "mined": ranks},
            "false_negatives": 0.125}  # fmt: skip


def test_the_table_has_differences_of_the_seeds_that_both_have() -> None:
    results = [line("random", 0, 4), line("top", 0, 6), line("top", 1, 10)]
    table = mined_negatives.report(results).splitlines()
    assert len(table) == 4
    cells = [cell.strip() for cell in table[3].split("|")]
    assert cells[1:6] == ["top", "2", "12.5", "80.0", "90.0"]
    assert cells[6].startswith("+20.0 ± ")


def test_false_negatives_are_what_a_user_has_elsewhere(tmp_path: Path) -> None:
    lists = {"0": frozenset("abcd"), "2": frozenset("xyz")}
    rows = [{"id": "0", "rejected": ["d", "x"]}, {"id": "2", "rejected": ["a", "b"]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert mined_negatives.count_false(tmp_path / "rows.jsonl", lists) == 0.25


def test_the_page_has_the_table_of_the_results() -> None:
    page = (ROOT / "docs" / "mining.md").read_text()
    results = mined_negatives.read_results(ROOT / "docs" / "results" / "mined_negatives")
    assert len(results) == 15 and mined_negatives.report(results) in page
