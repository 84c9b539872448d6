"""Runs the blocks of a Markdown page in order and holds what they print against the page.

    python -m tests.support.documents --write docs/tutorials/selector.md   # or --check

Blocks of `python` share their names, blocks of `bash` are run as they are, both in a folder that
starts empty. The block without a language that may follow is what they print. A comment before a
block changes that:

    <!-- not run -->       the code is shown only
    <!-- numbers vary -->  (before an output) between machines: only the words are compared
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"(?:<!-- (?P<skip>not run) -->\n)?```(?P<language>python|bash)\n(?P<code>.*?)```\n"
    r"(?:\n(?P<varies><!-- numbers vary -->\n)?```(?:text)?\n(?P<output>.*?)```\n)?",
    re.DOTALL,
)
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?")


class Ran(NamedTuple):
    """A block that was run, what the page says it prints, and what it printed."""

    block: re.Match
    printed: str

    @property
    def as_promised(self) -> bool:
        promised, printed = (self.block["output"] or "").rstrip(), self.printed.rstrip()
        if self.block["varies"]:
            promised, printed = (_words(text) for text in (promised, printed))
        return promised == printed


def run(page: Path) -> Iterator[Ran]:
    """Runs each block of a page in a new folder; an error in a block is raised."""
    names: dict[str, Any] = {"__name__": "__main__"}
    text = page.read_text()
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for block in BLOCK.finditer(text):
                if not block["skip"]:
                    place = f"{page.name}:{text.count(chr(10), 0, block.start('code')) + 1}"
                    python = block["language"] == "python"
                    code = block["code"]
                    yield Ran(block, _python(code, names, place) if python else _bash(code, place))
        finally:
            os.chdir(before)


def _python(code: str, names: dict[str, Any], place: str) -> str:
    printed = io.StringIO()
    page, line = place.split(":")
    with contextlib.redirect_stdout(printed):
        # So that a traceback names the line of the page.
        exec(compile("\n" * (int(line) - 1) + code, page, "exec"), names)
    return printed.getvalue()


def _bash(code: str, place: str) -> str:
    words = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code], capture_output=True, text=True, env=words
    )
    if done.returncode:
        raise RuntimeError(f"{place}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def _words(text: str) -> str:
    """Returns the text without numbers and without the spaces that align them."""
    return " ".join(NUMBER.sub("#", text).split())


def check(page: Path) -> bool:
    """Whether a page shows what its blocks print; prints both where it does not."""
    wrong = [ran for ran in run(page) if not ran.as_promised]
    for ran in wrong:
        code, promised = ran.block["code"], ran.block["output"]
        print(f"{page}:\n{code}\nprinted:\n{ran.printed}\nthe page says:\n{promised}")
    return not wrong


def write(page: Path) -> None:
    """Replaces the outputs shown on the page by what the blocks print now."""
    text, done, at = page.read_text(), [], 0
    for ran in run(page):
        if ran.block["output"] is not None:
            done += [text[at : ran.block.start("output")], ran.printed.rstrip() + "\n"]
            at = ran.block.end("output")
        elif ran.printed.strip():
            print(f"{page}: no place for {ran.printed!r}", file=sys.stderr)
    page.write_text("".join([*done, text[at:]]))


if __name__ == "__main__":
    how, *pages = sys.argv[1:]
    if how == "--write":
        for name in pages:
            write(Path(name).resolve())
    else:
        sys.exit(sum(not check(Path(name).resolve()) for name in pages))
