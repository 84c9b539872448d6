"""The folder of a run: how to recognize it, the checkpoints in it, and the lock that guards it.

It holds config.json, origin.json, metrics.jsonl, metrics.json, prompts.jsonl, checkpoints/, model/,
adapters/, mined/ and what loggers and reports add.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.runs import origin
from mass_dpo_jax.runs.metrics_files import explain_write_errors, read_metrics_json
from mass_dpo_jax.utils import distributed
from mass_dpo_jax.utils.files import read_json, write_whole
from mass_dpo_jax.utils.run_paths import CHECKPOINTS

PROMPTS = "prompts.jsonl"  # Which prompts epochs were trained on, where not all.
NO_CHECKPOINT = (
    "a run that has saved no checkpoint yet; go on with mass_dpo_jax.train and the same --workdir"
)


class RunPath(NamedTuple):
    """A run, or one of its checkpoints, that a path names.

    Attributes:
        folder: the run folder.
        step: step of the checkpoint; None: the path names the run.
    """

    folder: Path
    step: int | None


def find_run(path: Path) -> RunPath | None:
    """Returns the run that a path names, itself or by one of its checkpoints.

    None if it names no run, but a Hugging Face folder.
    """
    if has_description(path):
        return RunPath(path, None)
    if path.parent.name == CHECKPOINTS and path.name.isdecimal():
        if run := find_run(path.parent.parent):
            return RunPath(run.folder, int(path.name))
    return None


def has_description(workdir: Path) -> bool:
    """Whether a folder has a run's description of its model, unlike a Hugging Face folder."""
    return (workdir / origin.MODEL / "config.json").is_file()


def list_steps(workdir: Path) -> list[int]:
    """Returns the steps of the complete checkpoints in a run folder, the newest last."""
    folder = workdir / CHECKPOINTS
    # A checkpoint gets its final, numeric name when it is complete.
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def latest_step(workdir: Path) -> int | None:
    """Returns the step of the newest complete checkpoint in a run folder; None: there is none."""
    return max(list_steps(workdir), default=None)


def check_step(run: RunPath) -> None:
    """Raises UserError if a run has no checkpoint of the step, and says which it has."""
    steps = list_steps(run.folder)
    if run.step is not None and run.step not in steps:
        steps_text = ", ".join(map(str, steps)) or "none"
        raise UserError(f"{run.folder}: no checkpoint of step {run.step}; found {steps_text}")


def read_checkpoint_notes(workdir: Path) -> dict[str, Any]:
    """Reads what the newest readable checkpoint says of its run, as JSON; empty: there is none."""
    for step in reversed(list_steps(workdir)):
        with contextlib.suppress(UserError):
            notes = read_json(workdir / CHECKPOINTS / str(step) / "run" / "metadata")
            if isinstance(notes, dict):
                return notes
    return {}


def read_finished_metrics(workdir: Path) -> dict[str, Any] | None:
    """Reads metrics.json of a run that is finished and has its last checkpoint; None of others."""
    metrics = read_metrics_json(workdir)
    if metrics and metrics["finished"] and latest_step(workdir) == metrics["step"]:
        return metrics
    return None


def check_writable(workdir: Path) -> None:
    """Raises UserError if nothing can be written in the folder, before data and weights are read.

    Where it does not exist yet, the folder is tried that it would be made in.
    """
    folder = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".mass_dpo_jax-"):
            pass
    except OSError as error:
        raise UserError(
            f"--workdir={workdir}: {folder} cannot be written: {error.strerror}"
        ) from None


class Lock:
    """The lock of a run folder, held by the primary process of the training that writes it.

    The operating system frees it when the process dies, however that happens. Where the file system
    or the operating system has no locks, nothing is held: that, and no lock file that outlives its
    process, is what `filelock` does not offer.
    """

    def __init__(self, workdir: Path):
        self._path = workdir / ".lock"
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Makes the folder and takes the lock, unless this object holds it already.

        Raises:
            UserError: another training holds it.
        """
        if self._file is not None or not distributed.is_primary():
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            import fcntl  # Windows has none.

            self._file = self._path.open("a")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UserError(
                f"{self._path.parent}: another training is at work in this folder; wait for its "
                "end, or choose another --workdir"
            ) from None
        except (ImportError, OSError):
            pass

    def close(self) -> None:
        """Frees the lock, if it is held."""
        if self._file is not None:
            self._file.close()
            self._file = None


def write_config(workdir: Path, config: ConfigDict) -> None:
    """Writes config.json, which makes the folder a run's.

    Args:
        workdir: the run folder; it is made.
        config: settings, with paths as typed, see `run_config.restore_typed_paths`.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", config.to_dict())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, completely or not at all, on the primary process."""
    if distributed.is_primary():
        with explain_write_errors(path):
            write_whole(path, [json.dumps(content, indent=2) + "\n"])


def add_prompts(workdir: Path, choice: Mapping[str, Any]) -> None:
    """Adds a choice of prompts to prompts.jsonl, on the primary process.

    Choices of the same epoch and later ones are replaced: those of a run that was interrupted, and
    now makes the same steps again.
    """
    if not distributed.is_primary():
        return
    path = workdir / PROMPTS
    lines = path.read_text(encoding="utf-8").splitlines() if choice["epoch"] else []
    earlier = [line for line in lines if json.loads(line)["epoch"] < choice["epoch"]]
    with explain_write_errors(path):
        write_whole(path, (f"{line}\n" for line in [*earlier, json.dumps(choice)]))


def write_table(path: Path, table: np.ndarray) -> None:
    """Writes a `.npy` file, completely or not at all, on the primary process."""
    if distributed.is_primary():
        content = io.BytesIO()
        np.save(content, table)
        write_whole(path, [content.getvalue()])
