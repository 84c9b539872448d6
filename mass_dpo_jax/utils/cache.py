"""The cache folder: arrays that take long to compute, and compiled programs."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import platform
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

import mass_dpo_jax
from mass_dpo_jax.utils import distributed
from mass_dpo_jax.utils.files import write_whole

CHECKSUM_BYTES = hashlib.sha256().digest_size
MAX_COMPILED_BYTES = 2**31  # JAX deletes the program that was used longest ago first.
_log = logging.getLogger(__name__)


def cache_folder(setting: str) -> Path:
    """Returns `setting` or, where that is empty, mass_dpo_jax in the user's cache folder."""
    if setting:
        return Path(setting)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mass_dpo_jax"


def load_or_compute(
    folder: Path, name: str, key: str, compute: Callable[[], np.ndarray]
) -> np.ndarray:
    """Returns `compute()`, or what an earlier run with the same key has written to `folder`.

    The file's name has a digest of `key` and the package's version. The file ends with a checksum,
    behind what NumPy reads; one that was damaged is reported and written again. Nothing is kept
    where the folder cannot be written.

    Only the primary process reads and writes; the others need not see its folder.
    """
    digest = hashlib.sha256(f"{key} {mass_dpo_jax.__version__}".encode()).hexdigest()[:32]
    path = folder / f"{name}-{digest}.npy"
    array = distributed.broadcast_array(_load(path) if distributed.is_primary() else None)
    if array is None:
        array = compute()
        if distributed.is_primary():
            _save(path, array)
    return array


def _load(path: Path) -> np.ndarray | None:
    try:
        written = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.warning(f"{path}: unreadable ({error.strerror}); computing it again")
        return None
    content, checksum = written[:-CHECKSUM_BYTES], written[-CHECKSUM_BYTES:]
    if hashlib.sha256(content).digest() != checksum:
        _log.warning(f"{path}: not what was written; computing it again")
        return None
    _log.info(f"reference: read from {path}")
    array: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
    return array


def _save(path: Path, array: np.ndarray) -> None:
    """Writes an array and its checksum; other runs may write it at the same time."""
    memory = io.BytesIO()
    np.save(memory, array)
    content = memory.getvalue()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, [content, hashlib.sha256(content).digest()], shared=True)
    except OSError as error:
        _log.warning(f"{path}: {error.strerror}; the reference is not kept")


def keep_compiled(cache_dir: str) -> None:
    """Makes JAX keep compiled programs, so that later runs need not compile them again.

    This sets options of the whole process, so commands call it and library functions do not. The
    user's own JAX_COMPILATION_CACHE_DIR takes precedence. Programs for CPUs fit one kind of CPU,
    which JAX's key leaves out, so each kind has a folder.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or _refuses_cpu_programs():
        return
    folder = cache_folder(cache_dir) / f"compiled-{_digest_cpu()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _log.warning(f"{folder}: {error.strerror}; compiled programs are not kept")
        return
    jax.config.update("jax_compilation_cache_max_size", MAX_COMPILED_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _refuses_cpu_programs() -> bool:
    """Whether XLA refuses the CPU programs that it wrote itself.

    It does on Intel CPUs with slow gathers, with an error message for each (jax issue 38445).
    """
    state = _read_system_file("/sys/devices/system/cpu/vulnerabilities/gather_data_sampling")
    is_slow = state != "" and not state.startswith("Not affected")
    return is_slow and jax.default_backend() == "cpu"


def _digest_cpu() -> str:
    """Returns a digest of the CPU's features; of the machine's name where Linux lists none."""
    lines = _read_system_file("/proc/cpuinfo").splitlines()
    features = (line for line in lines if line.startswith(("flags", "Features")))
    text = f"{platform.machine()} {next(features, platform.node())}"
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _read_system_file(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
