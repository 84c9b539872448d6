"""The benchmark of a few responses at a time: its figures on tiny sizes, and its tables."""

from __future__ import annotations

import pytest

from benchmarks import responses
from benchmarks.workloads import Case, Workload

TINY = Workload(batch=1, prompt=16, response=32, layers=2, width=32, heads=4, mlp=64, vocabulary=99)


@pytest.mark.slow(reason="compiles and runs both sides of a benchmark")
def test_figures_of_a_tiny_shape() -> None:
    case = Case.make(responses.of_pool(TINY, 15, "packed"))
    memory = responses.measure_memory(case, 2)
    time = responses.measure_time(case, 2, rounds=1)
    for at_once, few in (memory[:2], memory[2:]):
        assert few["at_a_time"] == 2 and not at_once["at_a_time"]
        assert few["xla"] < 0.5 * at_once["xla"]
    assert [row["ratio"]["median"] for row in time[::2]] == [1.0, 1.0]
    assert all(row["seconds"] > 0 for row in time)
    lines = responses.describe(memory, time).splitlines()
    assert lines[2].startswith("| 15 | dots | all | ") and "| full | 2 | " in lines[-1]
