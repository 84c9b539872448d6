"""The README's Python example prints what it says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_example_prints_its_output() -> None:
    blocks = re.findall(r"```python\n(.*?)```\n+```\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    for code, output in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(README), "exec"), {})
        assert printed.getvalue().strip() == output.strip()
