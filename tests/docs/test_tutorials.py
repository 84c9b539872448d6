"""The tutorials print what they say, on one device as most readers have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs/tutorials").glob("*.md"))
pytestmark = pytest.mark.usefixtures("torch")


@pytest.mark.slow(reason="runs a page of the documentation as its reader does")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_prints_what_it_says(page: Path) -> None:
    words = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    words["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.documents", "--check", page],
        cwd=ROOT,
        env=words,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
