"""What a run leaves behind: config.json, metrics.jsonl, metrics.json, checkpoints/, model/.

And that one training at a time writes it."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import IO, Any

import numpy as np
from ml_collections import ConfigDict

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.runs import origin, run_config
from mass_dpo_jax.training.checkpoint import about, latest_step
from mass_dpo_jax.utils import distributed
from mass_dpo_jax.utils.files import parse_json, read_json, write_whole
from mass_dpo_jax.utils.run_paths import check_new_run

_log = logging.getLogger(__name__)

# Settings that may change when a run goes on: they do not change what it computes.
FREE = (
    "cache_dir",
    "dry_run",
    "device_memory_gb",
    "log.",
    "train.checkpoint_every",
    "train.keep_",
    "train.max_skipped",
    "train.moments_dtype",
    "train.offload_moments",
)


# Those that split the same updates into other sums, so that they round otherwise.
SPLITTING = (
    "mesh.",
    "eval.batch_size",
    "train.micro_batch_size",
    "train.reuse_scoring",
    "model.remat",
    "model.attention",
    "model.layout",
    "data.max_shapes",
)


def check(workdir: Path, config: ConfigDict) -> None:
    """Raises UserError if the folder holds something else than a run, or the work of a run with
    other settings, and names them.

    A run that has saved nothing yet has nothing to lose: its folder may be taken over. Files may
    have other names: that they are the same is seen when they are read.
    """
    check_new_run(workdir)
    if not (workdir / "config.json").exists():
        if (workdir / "model" / "config.json").exists():  # A run writes it after its own.
            raise UserError(
                f"{workdir}: has a folder model/ that is no run's; choose another --workdir"
            )
        return
    try:
        own = run_config.load_config(workdir)
    except UserError as error:  # Not ours to write over.
        raise UserError(f"{error}. Choose another --workdir") from None
    if latest_step(workdir) is None:
        return
    ours, theirs = dict(config_lib.flatten(config)), dict(config_lib.flatten(own))
    differ = [
        name
        for name in ours
        if ours[name] != theirs[name]
        and not name.startswith((*FREE, *SPLITTING))
        and not _may_be_same_file(name, config, own, workdir)
    ]
    if differ:
        shown = ", ".join(f"{k} (there {theirs[k]!r}, here {ours[k]!r})" for k in differ[:5])
        raise UserError(
            f"{workdir} belongs to a run with other settings: {shown}. To go on with it, give the "
            f"same settings (--workdir={workdir} alone has them); to train its weights further, "
            f"choose another --workdir with --config.model.path={workdir}"
        )


def _may_be_same_file(name: str, config: ConfigDict, own: ConfigDict, workdir: Path) -> bool:
    """May a setting that a run has otherwise name the same file? `check_data` and `check_weights`
    see whether data and weights are the same; of template and adapters the run has copies."""
    ours, theirs = (dict(config_lib.flatten(c))[name] for c in (config, own))
    if name not in origin.PATHS or not ours or not theirs or not origin.read(workdir)["files"]:
        return False
    if name in ("data.chat_template", "model.lora.path"):
        return run_config.is_own_file(config, workdir, name)
    return True


def say_changed(workdir: Path, config: ConfigDict) -> None:
    """Logs the settings that only split the updates of a run otherwise than before."""
    ours, theirs = (dict(config_lib.flatten(c)) for c in (config, run_config.load_config(workdir)))
    changed = [n for n in ours if ours[n] != theirs[n] and n.startswith(SPLITTING)]
    if changed:
        shown = ", ".join(f"{name}={ours[name]} (was {theirs[name]})" for name in changed)
        _log.info(f"{workdir}: going on with {shown}: the same updates, whose sums round otherwise")
    if "data.max_shapes" in changed:
        _log.warning(
            "config.data.max_shapes: batches are put together otherwise, so that in the epoch at "
            "work some rows may come twice and others not at all"
        )


def check_writable(workdir: Path) -> None:
    """Raises UserError if nothing can be written in the folder or, where it is not there yet, next
    to it: before data and weights are read."""
    there = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".mass_dpo_jax-"):
            pass
    except OSError as error:
        raise UserError(
            f"--workdir={workdir}: {there} cannot be written: {error.strerror}"
        ) from None


def check_data(workdir: Path, digests: Mapping[str, str]) -> None:
    """Raises UserError if the run in the folder was saved with other data, and names the split.

    That of evaluations counts, too: a run's figures are compared with each other, at its end row
    by row. A checkpoint that says nothing of its data, as once they did, fits any.

    Args:
      digests: of each split, see `Setup.digests`.
    """
    known = about(workdir).get("data")
    if not isinstance(known, dict):
        return
    differ = sorted(n for n in {*known, *digests} if known.get(n) != digests.get(n))
    if differ:
        raise UserError(
            f"{workdir}: the run was saved with other data: {', '.join(differ)} has other rows or "
            "other tokens now. Nothing is lost: go on with the data (and the tokenizer) of before, "
            f"or begin another run from its weights, --config.model.path={workdir}"
        )


class Lock:
    """Held by the first process of the training that is at work in a run folder.

    It is the system's own, which goes with a process however that ends. Where a file system or a
    system has none, nothing is held.
    """

    def __init__(self, workdir: Path):
        self._path = workdir / ".lock"
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Makes the folder, and raises UserError if another training has it. Once is enough."""
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
        if self._file is not None:
            self._file.close()
            self._file = None


def claim(workdir: Path, config: ConfigDict) -> None:
    """Writes the run's configuration, once everything it names has been found in order.

    Args:
      config: with paths as they were typed, see `origin.typed`.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", config.to_dict())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Written whole or not at all, by the first process."""
    if distributed.is_primary():
        with _room_for(path):
            write_whole(path, [json.dumps(content, indent=2) + "\n"])


def write_table(path: Path, table: np.ndarray) -> None:
    """A `.npy` file, written by the first process."""
    if distributed.is_primary():
        np.save(path, table)


def read_metrics(workdir: Path) -> dict[str, Any] | None:
    """What a run has written to metrics.json; None where it has written nothing yet.

    Raises:
      UserError: the file is something else.
    """
    path = workdir / "metrics.json"
    if not path.exists():
        return None
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object")
    for name, (kinds, words) in _METRICS.items():
        if not isinstance(found.get(name), kinds):
            raise UserError(f"{path}: field {name!r}: found {found.get(name)!r}, expected {words}")
    for name in ("start", "final"):
        for metric, value in (found.get(name) or {}).items():
            if not isinstance(value, (int, float)):
                raise UserError(f"{path}: {name}: {metric}: found {value!r}, expected a number")
    return found


def finished(workdir: Path) -> dict[str, Any] | None:
    """The metrics of a run that is through, its last checkpoint there; None of any other."""
    found = read_metrics(workdir)
    done = found and found["finished"] and latest_step(workdir) == found["step"]
    return found if done else None


_METRICS: Mapping[str, tuple[Any, str]] = {
    "finished": (bool, "true or false"),
    "step": (int, "an integer"),
    "split": ((str, NoneType), "the name of a split or null"),
    "examples": (int, "an integer"),
    "digest": (str, "a string"),
    "start": ((dict, NoneType), "an object of numbers or null"),
    "final": ((dict, NoneType), "an object of numbers or null"),
}


def _lines(workdir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, up to the line that an interruption cut short."""
    path = workdir / "metrics.jsonl"
    found: list[dict[str, Any]] = []
    if not path.exists():
        return found
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            row = parse_json(line, path, number)
        except UserError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), (int, float)):
            break
        found.append(row)
    return found


def by_step(workdir: Path, name: str) -> dict[int, float]:
    """A figure of metrics.jsonl, wherever it is a number."""
    lines = _lines(workdir)
    return {line["step"]: line[name] for line in lines if isinstance(line.get(name), (int, float))}


def evaluated(workdir: Path) -> set[int]:
    """The steps that metrics.jsonl has an evaluation of."""
    return {row["step"] for row in _lines(workdir) if any(x.startswith("eval/") for x in row)}


class MetricsLog:
    """metrics.jsonl: an object a line, each with its `step` and any other figures.

    Opened at the step a run goes on from; lines of later steps, written before an interruption,
    are taken out, since those steps run again.
    """

    def __init__(self, workdir: Path, step: int):
        self._path = workdir / "metrics.jsonl"
        kept = [line for line in _lines(workdir) if step and line["step"] <= step]
        with _room_for(self._path):
            write_whole(self._path, (json.dumps(line) + "\n" for line in kept))
            self._file = self._path.open("a")

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Numbers that are not finite become null, as JSON has none."""
        values = {name: x if math.isfinite(x) else None for name, x in figures.items()}
        with _room_for(self._path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # Said by `write` already.
            self._file.close()


@contextlib.contextmanager
def _room_for(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror}. Checkpoints are left as they are; make "
            "room, and run the same command again to go on"
        ) from None
