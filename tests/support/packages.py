"""The project as users get it: its source archive and wheel, built without the network."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _not_sources(folder: str, names: list[str]) -> set[str]:
    """Returns what is not copied: what an earlier build left beside the sources would be packed."""
    ignored = shutil.ignore_patterns(".[!g]*", ".git", "*.egg-info", "__pycache__")(folder, names)
    return ignored | ({"build", "dist", "runs"} if Path(folder) == ROOT else set())


def build(folder: Path) -> tuple[Path, Path]:
    """Builds a source archive of the checkout, and with pip a wheel of that archive alone."""
    shutil.copytree(ROOT, folder / "source", ignore=_not_sources)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    _run([sys.executable, "-c", code], folder / "source")
    (archive,) = folder.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    _run([*pip, f"--wheel-dir={folder}", str(archive)], folder)
    (wheel,) = folder.glob("*.whl")
    return archive, wheel


def install(wheel: Path, folder: Path) -> None:
    """Installs the wheel into a folder for PYTHONPATH; its requirements are in the environment."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    _run([*pip, f"--target={folder}", str(wheel)], folder)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
