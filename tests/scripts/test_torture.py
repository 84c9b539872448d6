"""The short form of tests/scripts/torture.py, and a signal to one process of several."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.scripts.torture import EVERY, Run, compare
from tests.support.helpers import write_jsonl


@pytest.mark.slow(reason="starts a run five times")
def test_a_run_that_is_killed_is_the_run_that_is_not(tmp_path: Path) -> None:
    found = compare(tmp_path, kills=3, steps=80, seed=0)
    assert sum(found.kills.values()) >= 2 and found.starts >= 3
    # A step is logged when the next has begun, and a save takes longer than some steps.
    assert max(found.lost) <= 4 * EVERY


@pytest.mark.slow(reason="two processes that train for long")
def test_sigterm_to_one_process_ends_both_with_the_state_saved(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", write_jsonl(tmp_path / "data.jsonl", examples=40), 5000)
    started = run.start((2, {"data": 2}))
    try:
        while run.step() < 3 and all(process.poll() is None for process in started):
            time.sleep(0.05)
        started[1].send_signal(signal.SIGTERM)
        assert [process.wait(timeout=120) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    said = (tmp_path / "run.log").read_text()
    assert f"stopped by SIGTERM and saved at step {run.saved()}; run the same command again" in said
    assert run.step() == run.saved() >= 3
