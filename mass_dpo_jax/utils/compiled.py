"""Compiled programs, kept on disk: a run that goes on, or the next one, need not compile again."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from pathlib import Path

import jax

from mass_dpo_jax.utils.files import cache_folder

MOST_BYTES = 2**31  # What was used longest ago goes first.
_log = logging.getLogger(__name__)


def keep_compiled(cache_dir: str) -> None:
    """Tells JAX to keep what it compiles beside the reference's log-probs.

    A setting of the whole process, so commands call it and library functions do not. The user's
    own JAX_COMPILATION_CACHE_DIR has precedence. Programs for CPUs are made for one kind of CPU,
    which JAX's own key leaves out: each kind has a folder.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or _useless():
        return
    folder = cache_folder(cache_dir) / f"compiled-{_kind_of_cpu()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _log.warning(f"{folder}: {error.strerror}; compiled programs are not kept")
        return
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _useless() -> bool:
    """Where Intel's CPUs are slow at gathering, XLA refuses the CPU programs it wrote itself, with
    an error message for each (jax issue 38445)."""
    state = _read("/sys/devices/system/cpu/vulnerabilities/gather_data_sampling")
    slow = state != "" and not state.startswith("Not affected")
    return slow and jax.default_backend() == "cpu"


def _kind_of_cpu() -> str:
    """A digest of what this CPU can do or, where the system does not say, of the machine's name."""
    lines = _read("/proc/cpuinfo").splitlines()
    found = next(
        (line for line in lines if line.startswith(("flags", "Features"))), platform.node()
    )
    return hashlib.sha256(f"{platform.machine()} {found}".encode()).hexdigest()[:8]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
