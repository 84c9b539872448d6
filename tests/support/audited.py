"""Runs a module of ours under an audit hook: python audited.py REPORT FOLDERS MODULE ARGUMENTS...

Writes to REPORT, a line each, what the module did that it must not: unpickle, reach for the
network, start a program, or open a file elsewhere than in FOLDERS (separated by ":"), the Python
installation, this repository and, to read, what the operating system describes itself in. The hook
sees what goes through Python, not what Rust and C++ open.
"""

from __future__ import annotations

import os
import runpy
import site
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Packages for CUDA, where another library brought them, ask so for the C library when imported.
HARMLESS = ("/sbin/ldconfig", ["/sbin/ldconfig", "-p"])
SYSTEM = ("/proc", "/sys", "/dev", "/etc", "/usr")
FORBIDDEN = {
    "pickle.find_class", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname",
    "socket.bind", "urllib.Request", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen",
}  # fmt: skip


def watch(report: Path, folders: list[str]) -> None:
    """Records what the process does from now on until it ends."""
    python = [sys.prefix, sys.base_prefix, *site.getsitepackages(), str(ROOT)]
    known = [os.path.realpath(folder) for folder in (*folders, *python, tempfile.gettempdir())]
    ours = [os.path.realpath(folder) for folder in folders]
    threads = f"/proc/{os.getpid()}/comm"  # A library names its threads there.
    file = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    inside = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal inside
        if inside or not (event == "open" or event in FORBIDDEN):
            return
        inside = True
        try:
            if event == "subprocess.Popen" and arguments[:2] == HARMLESS:
                return
            if event != "open":
                os.write(file, f"{event} {arguments!r:.300}\n".encode())
            elif isinstance(arguments[0], (str, bytes)):
                path = os.path.realpath(os.fsdecode(arguments[0]))
                writes = bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
                places = [*ours, "/dev", threads] if writes else [*known, *SYSTEM]
                if not any(path == place or path.startswith(place + "/") for place in places):
                    os.write(file, f"open {path} {'to write' if writes else 'to read'}\n".encode())
        finally:
            inside = False

    sys.addaudithook(hook)


if __name__ == "__main__":
    _, _report, _folders, _module, *_arguments = sys.argv
    sys.path[0] = str(ROOT)
    sys.argv = [_module, *_arguments]
    watch(Path(_report), _folders.split(":"))
    runpy.run_module(_module, run_name="__main__", alter_sys=True)
