"""Runs the tests on deliberate faults of the package: do they notice each? No pytest.

    python -m tests.scripts.mutations
    python -m tests.scripts.mutations --only=losses --jobs=2
    python -m tests.scripts.mutations --tree=../before --quick --output=results.json

Each fault of `mutation_list` is put into a copy of the tree, and the tests that it names run there.
It is caught if one of them fails; any other end of pytest than success or failures (tests that are
not there or cannot be collected, a timeout) is an error and never counts as caught. The exit
status is 1 unless all are caught.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.scripts.mutation_list import MUTATIONS, PACKAGE, Mutation, locate

ROOT = Path(__file__).parents[2]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header"]
QUICK = ["-m", "not slow"]
WHOLE = ["-x", "--numprocesses=auto", "--dist=loadfile"]
PASSED, FAILED, NONE_COLLECTED = 0, 1, 5  # Exit statuses of pytest.


class Outcome(NamedTuple):
    """What became of a mutation.

    verdict: "caught", "survived" or "error".
    by: the first test that failed; of an error, what pytest said last.
    seconds: of the clock.
    """

    verdict: str
    by: str
    seconds: float


class Copy:
    """A copy of a tree, for one mutation at a time."""

    def __init__(self, tree: Path, folder: Path):
        listed = subprocess.run(
            ["git", "ls-files", "-zco", "--exclude-standard"],
            cwd=tree, check=True, capture_output=True, text=True,
        )  # fmt: skip
        for name in filter(None, listed.stdout.split("\0")):
            if (tree / name).is_file():  # A file that was deleted is still listed.
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(tree / name, folder / name)
        self.folder = folder
        self.environment = {**os.environ, "PYTHONPATH": str(folder)}
        # An installed package must not hide the copy, in which case all would survive.
        code = f"import {PACKAGE}; print({PACKAGE}.__file__)"
        found = subprocess.run(
            [sys.executable, "-c", code],
            cwd="/", env=self.environment, check=True, capture_output=True, text=True,
        )  # fmt: skip
        if not Path(found.stdout.strip()).is_relative_to(folder):
            raise SystemExit(f"{PACKAGE} is imported from {found.stdout.strip()}, not {folder}")

    def run(self, arguments: Sequence[str], timeout: float) -> tuple[int | None, str]:
        """Pytest's exit status, None after the timeout, and its output."""
        process = subprocess.Popen(
            [*PYTEST, *arguments],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # With the commands that a test has started.
            return None, process.communicate()[0]
        return process.returncode, output

    def test(self, mutation: Mutation, arguments: argparse.Namespace) -> Outcome:
        """Runs a mutation's tests, and the whole suite if they pass and that is asked for."""
        path = locate(mutation.old, self.folder)
        source = path.read_text()
        began = time.monotonic()
        quick = QUICK if arguments.quick else []
        try:
            self._write(path, source.replace(mutation.old, mutation.new))
            verdict, by = self._verdict(["-x", *quick, *mutation.tests], arguments)
            if verdict == "survived" and arguments.whole:
                verdict, by = self._verdict([*WHOLE, *quick], arguments)
        finally:
            self._write(path, source)
            # Hypothesis tries the failures of the mutation before first.
            shutil.rmtree(self.folder / ".hypothesis", ignore_errors=True)
        return Outcome(verdict, by, round(time.monotonic() - began, 1))

    def _verdict(self, words: list[str], arguments: argparse.Namespace) -> tuple[str, str]:
        status, output = self.run(words, arguments.timeout)
        failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        if status == FAILED and failures:
            return "caught", failures[0]
        if status == PASSED or (status == NONE_COLLECTED and arguments.quick):
            return "survived", ""
        last = (output.strip().splitlines() or [""])[-1]
        return "error", f"timeout: {last}" if status is None else f"status {status}: {last}"

    def _write(self, path: Path, source: str) -> None:
        path.write_text(source)
        # Python takes a compiled file for current by size and second of the source.
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()


def check_unmutated(copy: Copy, chosen: Iterable[Mutation], arguments: argparse.Namespace) -> None:
    """Ends the program unless all tests that are named pass without a mutation."""
    tests = sorted({test for mutation in chosen for test in mutation.tests})
    quick = QUICK if arguments.quick else []
    status, output = copy.run([*quick, *tests], 10 * arguments.timeout)
    if status != PASSED and not (status == NONE_COLLECTED and arguments.quick):
        raise SystemExit(f"{output}\nwithout a mutation: pytest ended with status {status}")


def run(arguments: argparse.Namespace) -> dict[str, Outcome]:
    """Tests the chosen mutations and prints a line for each."""
    chosen = [mutation for mutation in MUTATIONS if arguments.only in mutation.name]
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="mutations_") as name:
        copies: queue.Queue[Copy] = queue.Queue()
        for i in range(arguments.jobs):
            copies.put(Copy(arguments.tree, Path(name).resolve() / str(i)))
        if arguments.baseline:
            copy = copies.get()
            check_unmutated(copy, chosen, arguments)
            copies.put(copy)

        def test(mutation: Mutation) -> None:
            copy = copies.get()
            try:
                outcome = copy.test(mutation, arguments)
            finally:
                copies.put(copy)
            outcomes[mutation.name] = outcome
            words = f"{outcome.verdict:8} {outcome.seconds:6.1f} s  {mutation.name}"
            print(f"{words}  [{outcome.by}]" if outcome.by else words, flush=True)

        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(test, chosen))  # Raises what a mutation raised.
    return outcomes


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tree", type=Path, default=ROOT, help="the git checkout to test")
    parser.add_argument("--only", default="", help="mutations whose name contains this")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--quick", action="store_true", help="leave out tests marked as slow")
    parser.add_argument("--whole", action="store_true", help="all tests, for what survives its own")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for a mutation")
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    parser.add_argument(
        "--no-baseline", dest="baseline", action="store_false",
        help="do not run the tests without a mutation first",
    )  # fmt: skip
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    for mutation in MUTATIONS:
        locate(mutation.old, arguments.tree)  # Before anything runs: is each text there once?
    began = time.monotonic()
    outcomes = run(arguments)
    counts = Counter(outcome.verdict for outcome in outcomes.values())
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    summary = {
        **{verdict: counts[verdict] for verdict in ("caught", "survived", "error")},
        "seconds": round(time.monotonic() - began),
        "cpu_seconds": round(used.ru_utime + used.ru_stime),
    }
    if arguments.output:
        found = {name: outcome._asdict() for name, outcome in outcomes.items()}
        arguments.output.write_text(json.dumps({**summary, "mutations": found}, indent=2) + "\n")
    print(", ".join(f"{name} {value}" for name, value in summary.items()))
    return 0 if counts["caught"] == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
