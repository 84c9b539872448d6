"""The experiment on many negatives: its cells, and its tables from results alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import more_negatives


def row(aggregation: str, n: int, seed: int, accuracy: float) -> dict[str, Any]:
    final = dict.fromkeys(more_negatives.FIGURES, 0.25) | {"policy/accuracy": accuracy}
    return {"aggregation": aggregation, "n": n, "seed": seed, "final": final}


def test_cells_differ_in_number_and_aggregation_alone() -> None:
    cells = more_negatives.plan(range(2))
    assert len(cells) == len({*cells}) == 2 * (1 + 4 * 3)
    assert [cell for cell in cells if cell[1] == 1] == [("softmax", 1, 0), ("softmax", 1, 1)]
    assert {cell[2] for cell in cells[:13]} == {0}


def test_tables_are_means_with_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("softmax", 1, s, x) for s, x in enumerate((0.2, 0.3))]
    rows += [row("mean of rewards", 59, 0, 0.125)]
    lines = "".join(f"{json.dumps(r)}\n" for r in rows)
    (tmp_path / "long.jsonl").write_text(lines + '{"aggregation": "cut sho')
    more_negatives.main([f"--results={tmp_path}", "--report"])
    first, *_ = capsys.readouterr().out.split("\n\n")
    error = 100 * np.std([0.2, 0.3], ddof=1) / np.sqrt(2)
    assert first.splitlines()[2:] == [
        f"| softmax | 25.0 ± {error:.1f} |  |  |  |  |",
        # One negative has one loss.
        f"| mean of losses | 25.0 ± {error:.1f} |  |  |  |  |",
        f"| mean of rewards | 25.0 ± {error:.1f} |  |  |  | 12.5 |",
    ]


def test_finished_cells_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, int]] = []

    def measure(_: Any, name: str, n: int, seed: int) -> dict[str, Any]:
        asked.append((name, n, seed))
        return row(name, n, seed, 0.5)

    monkeypatch.setattr(more_negatives, "measure", measure)
    monkeypatch.setattr(more_negatives.batches, "MIN_GAIN", 0.0)
    (tmp_path / "long.jsonl").write_text(json.dumps(row("softmax", 1, 0, 0.5)) + "\n")
    for _ in range(2):
        more_negatives.main([f"--results={tmp_path}", f"--output={tmp_path}/runs"])
    assert asked == more_negatives.plan([0])[1:]
