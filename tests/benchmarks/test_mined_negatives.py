from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import mined_negatives
from benchmarks.evidence_runs import pack
from mass_dpo_jax.data.examples import Example, History
from mass_dpo_jax.training.mining import Catalogue
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
    histories = [("a", "b"), ("b", "c"), ("x", "y")]  # Two windows of a user, one of another.
    chosen = ["c", "d", "z"]
    examples = [
        Example(f"{i}", History("", items, "", " "), answer, ("?",), "")
        for i, (items, answer) in enumerate(zip(histories, chosen, strict=True))
    ]
    lists = mined_negatives.find_lists(examples)
    assert lists == [set("abcd"), set("abcd"), set("xyz")]
    rows = [{"id": "0", "rejected": ["d", "x"]}, {"id": "2", "rejected": ["a", "b"]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    by_id = {example.id: found for example, found in zip(examples, lists, strict=True)}
    assert mined_negatives.count_false(tmp_path / "rows.jsonl", by_id) == 0.25


def test_random_negatives_have_the_probability_of_a_uniform_draw() -> None:
    names = [f"item {i}" for i in range(40)]
    catalogue = Catalogue(
        list(range(40)), names, {name: i for i, name in enumerate(names)}, np.ones(40, bool)
    )
    examples = [Example(f"row{i}", "p", names[i], ("x",), "x") for i in range(3)]
    positives = [{names[0]}, {names[1], names[5], "no item"}, {names[2]}]
    rows = list(mined_negatives._draw_random(examples, catalogue, positives, 0))
    probabilities = [row["mined_probabilities"] for row in rows]
    assert probabilities == [pytest.approx([8 / n] * 8) for n in (39, 38, 39)]
    assert not {5, 1} & set(rows[1]["mined_ids"])


def test_the_page_has_the_table_of_the_results() -> None:
    page = (ROOT / "docs" / "mining.md").read_text()
    results = mined_negatives.read_results(ROOT / "docs" / "results" / "mined_negatives")
    assert len(results) == 15 and mined_negatives.report(results) in page
