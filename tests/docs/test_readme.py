"""The README is short, its Python is valid, and the example with an output prints that output."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
MAX_LINES = 120
BLOCK = r"```python\n((?:(?!```).)*)```\n"


def test_it_is_short() -> None:
    assert len(README.read_text().splitlines()) <= MAX_LINES


def test_its_python_is_valid() -> None:
    blocks = re.findall(BLOCK, README.read_text(), re.DOTALL)
    assert len(blocks) > 1
    for code in blocks:
        compile(code, str(README), "exec")


def test_the_example_prints_its_output() -> None:
    blocks = re.findall(rf"{BLOCK}\n+```\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    for code, output in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(README), "exec"), {})
        assert printed.getvalue().strip() == output.strip()
