"""The benchmark of memory: its figures on tiny sizes, its tables, and how it refuses."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import pytest

from benchmarks import memory
from benchmarks.workloads import Case, Workload
from tests.support.processes import refused

TINY = Workload(
    batch=2, prompt=48, response=8, pool=5, negatives=2, layers=2, width=32, heads=4, mlp=64,
    vocabulary=200,
)  # fmt: skip


@pytest.mark.slow(reason="compiles both sides of a benchmark")
def test_figures_of_a_tiny_shape() -> None:
    (row,) = memory.small(TINY, ["dots"])
    for name in ("ours", "unshared"):
        assert row[f"{name}/estimate"] == pytest.approx(row[f"{name}/xla"], rel=0.15)
    assert row["unshared/xla"] > 1.5 * row["ours/xla"]
    # By less: one of its two layers is the last, which keeps little of any copy of a prompt.
    assert row["unshared/kept"] > 1.3 * row["ours/kept"]
    table = memory.small_table([row])
    assert table.splitlines()[-1].startswith("| 48, 8, 5, 2, 2 | packed | dots | ")


@pytest.mark.slow(reason="four training steps of PyTorch")
def test_what_pytorch_saves_grows_with_rows_and_layers(torch: ModuleType) -> None:
    """A layer's inputs of products alone are (D + H K + 2 D + F) float32 a token: a lower bound."""
    found = {}
    for layers in (2, 4):
        for batch in (2, 4):
            w = dataclasses.replace(TINY, layers=layers, batch=batch)
            found[layers, batch] = memory.saved_by_torch(Case.make(w))
    assert found[2, 4] == pytest.approx(2 * found[2, 2], rel=0.01)
    layer = (found[4, 2] - found[2, 2]) / 2
    tokens = TINY.batch * (1 + TINY.negatives) * (TINY.prompt + TINY.response)
    least = tokens * (3 * TINY.width + TINY.mlp) * 4
    assert least < layer < 6 * least


def test_the_large_table() -> None:
    rows = memory.large_rows()
    (one, eight) = (row for row in rows if row["moments"] == "float32" and not row["offloaded"])
    assert one["parameters"] == 4 * 3_212_749_824  # Llama 3.2 3B's published count.
    assert one["optimizer"] == 2 * one["parameters"] + 8  # Two counts of updates.
    assert eight["parameters"] == one["parameters"] / 8  # Every matrix has D, which 8 divides.
    lines = memory.large_table(rows).splitlines()
    assert len(lines) == 2 + 6
    assert lines[2].split(" | ")[-2:] == ["fits", "does not fit |"]


def test_mistakes_are_one_line() -> None:
    assert "--change=prompts=64: expected NAME=NUMBER" in refused(
        "benchmarks.memory", "--shape=prompts=64"
    )
    assert "--remat=ful: expected some of dots, full" in refused("benchmarks.memory", "--remat=ful")
    assert "negatives=9, more than pool=5" in refused(
        "benchmarks.memory", "--shape=pool=5,negatives=9"
    )
