"""How tests compile, and the processes that they start.

Compiling takes most of a test's time, and nearly all of it makes programs fast that run once. So
LLVM does not optimize, and XLA leaves a loop's body to LLVM instead of building it by a pipeline of
MLIR of its own, which takes half of the time. The tutorials run with XLA's own settings.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ACCELERATOR = os.environ.get("MASS_DPO_TEST_ACCELERATOR") == "1"
COMPILE_QUICKLY = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
)
# XLA ends at a flag that it does not know, as jaxlib 0.12 does at this one; it compiles for longer.
if tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    COMPILE_QUICKLY += ("--xla_cpu_use_fusion_emitters=false",)


def xla_flags(devices: int) -> str:
    """Returns XLA's flags for some simulated devices and, on CPUs, a short time of compiling."""
    quickly = () if ACCELERATOR else COMPILE_QUICKLY
    return " ".join((f"--xla_force_host_platform_device_count={devices}", *quickly))


def environment(devices: int = 1, **changes: str) -> dict[str, str]:
    """Returns the variables of a child process that finds the package and the tests' modules."""
    path = str(ROOT)
    return {**os.environ, "XLA_FLAGS": xla_flags(devices), "PYTHONPATH": path, **changes}


def python(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs Python with some arguments in the project's folder, and keeps what it prints."""
    given: dict[str, Any] = {"cwd": ROOT, "env": environment(), "check": False, **options}
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, **given
    )


def command(module: str, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `python -m module words...`; with options that subprocess.run has, as a process of its
    own, and without them in a fork of one that has imported most of what a command needs."""
    if options:
        return python("-m", module, *words, **options)
    server = _command_server()
    assert server.stdin and server.stdout
    server.stdin.write(json.dumps([module, words, str(ROOT)]) + "\n")
    server.stdin.flush()
    return subprocess.CompletedProcess([module, *words], *json.loads(server.stdout.readline()))


@functools.cache
def _command_server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.support.command_server"], text=True, cwd=ROOT,
        env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip

    def end() -> None:
        assert server.stdin
        server.stdin.close()
        server.wait()

    atexit.register(end)
    return server


def refused(module: str, *words: str) -> str:
    """Runs a command that must refuse, and returns the one line that it says."""
    done = command(module, *words)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def spawn(words: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Starts Python with some arguments and does not wait."""
    return subprocess.Popen(
        [sys.executable, *words], text=True, cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def ended(processes: Iterable[subprocess.Popen[str]], seconds: int) -> list[tuple[int, str, str]]:
    """Waits; returns exit status, standard output and error of each. None of them lives on."""
    processes = list(processes)
    try:
        found = [(p, p.communicate(timeout=seconds)) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, out, err) for p, (out, err) in found]
