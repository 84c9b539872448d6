"""Compiling: its time is measured, and what is compiled does not grow with depth."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compiling, machine
from benchmarks.workloads import Case, Workload, trace
from tests.support.processes import refused

TINY = Workload(
    batch=2, prompt=12, response=4, pool=4, negatives=2, layers=2, width=16, heads=2, kv_heads=1,
    mlp=24, vocabulary=40,
)  # fmt: skip


def test_a_deep_model_is_the_same_program() -> None:
    """But for sizes of arrays: as many lines."""

    def lines(layers: int) -> int:
        case = Case.without_weights(dataclasses.replace(TINY, layers=layers))
        program = case.program("mass_dpo", "full")
        return len(trace(case, program).lower().as_text().splitlines())

    assert lines(2) == lines(9)


@pytest.mark.slow(reason="measures compiling: nothing else makes it quick")
def test_measures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(machine, "busy_cores", lambda: 0.0)
    output = tmp_path / "found.json"
    found = compiling.run(TINY, (1, 3), 1, False, str(output))
    assert found["ratio"]["median"] == found["seconds"]["3"][0] / found["seconds"]["1"][0]
    assert "3 layers / 1: " in capsys.readouterr().out
    assert json.loads(output.read_text())["compiling"] == found


@pytest.mark.parametrize("layers", ["4", "4,x", "0,4", "4,4"])
def test_mistakes(layers: str) -> None:
    line = refused("benchmarks.compiling", f"--layers={layers}")
    assert f"--layers={layers}: expected two" in line
