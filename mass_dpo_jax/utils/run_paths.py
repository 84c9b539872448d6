"""Paths given as run folders: whether they are, and what to give instead."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import expand_path

CHECKPOINTS = "checkpoints"
# What a run writes into its folder; the code that writes it imports JAX.
ENTRIES = (
    f"{CHECKPOINTS} model adapters mined tensorboard wandb figures config.json origin.json "
    "metrics.json metrics.jsonl report.html"
).split()
MAX_SHOWN = 3  # Runs in a folder that a message names.


def check_run(folder: Path) -> None:
    """Raises UserError where a path is no run folder, and says what to give instead."""
    if not (folder / "config.json").is_file() or find_enclosing_run(folder):
        raise UserError(f"{folder}: {explain_non_run(folder)}")


def resolve_run(workdir: str | Path) -> Path:
    """Returns the path of a run with `~` and variables replaced.

    Raises:
        UserError: it is no run.
    """
    path = expand_path(workdir, "workdir")
    check_run(path)
    return path


def check_new_run(workdir: Path) -> None:
    """Raises UserError where no run can be written, before hours of work are lost."""
    if run := find_enclosing_run(workdir):
        raise UserError(
            f"--workdir={workdir}: inside of the run {run}; expected a folder beside it"
        )
    for path in (workdir, *workdir.parents):
        if path.is_symlink() and not path.exists():
            raise UserError(
                f"--workdir={workdir}: {path} is a link to {path.readlink()}, which is not there; "
                "is its disk mounted?"
            )
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: a file stands where a folder is expected")
    parent = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise UserError(f"--workdir={workdir}: {parent} is a file, expected a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"--workdir={workdir}: nothing may be written in {parent}")


def explain_non_run(folder: Path) -> str:
    """Returns what a path is, if not a run folder, and what to give instead."""
    if run := find_enclosing_run(folder):
        text = f"inside of the run {run}; expected {run}, whose newest checkpoint is taken"
        if folder.parent.name == CHECKPOINTS:
            text += f" (this one is export's --step={folder.name}, and can be config.model.path)"
        return text
    if folder.is_symlink() and not folder.exists():
        return f"a link to {folder.readlink()}, which is not there"
    if not folder.exists():
        near = _find_similar(folder)
        return "no such folder" + (f"; did you mean {near}?" if near else "")
    if not folder.is_dir():
        return "a file; expected a run's folder, which was the --workdir of mass_dpo_jax.train"
    if (folder / "adapter_config.json").exists():
        return "adapters, no run; expected them as --config.model.lora.path, without --workdir"
    if runs := [path for path in _list_folders(folder) if is_run(path)]:
        shown = ", ".join(map(str, runs[:MAX_SHOWN])) + (", ..." if len(runs) > MAX_SHOWN else "")
        return f"not a run folder, but has runs in it; expected one of them: {shown}"
    return (
        "not a run folder (it has no config.json); expected what was the --workdir of "
        "mass_dpo_jax.train"
    )


def find_enclosing_run(path: Path) -> Path | None:
    """Returns the run that a path is inside of, or None."""
    for parent in path.parents:
        if path.relative_to(parent).parts[0] in ENTRIES and is_run(parent):
            return parent
    return None


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, and not a model's, which has a config.json too."""
    beside = (CHECKPOINTS, "model", "metrics.jsonl")
    return (folder / "config.json").is_file() and any((folder / name).exists() for name in beside)


def _find_similar(folder: Path) -> Path | None:
    """Returns an existing path with a similar name at the first missing part, runs preferred."""
    missing = folder
    while not missing.parent.exists():
        missing = missing.parent
    beside = {path.name: path for path in _list_folders(missing.parent)}
    near = difflib.get_close_matches(missing.name, beside, n=3, cutoff=0.6)
    similar = [beside[name] / folder.relative_to(missing) for name in near]
    similar.sort(key=lambda path: not is_run(path))
    return next((path for path in similar if path.exists()), None)


def _list_folders(folder: Path) -> Iterable[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return ()
