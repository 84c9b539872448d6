"""Reads checkpoints: into sharded arrays, or a piece at a time, with digests checked.

Orbax checks only its own tables when it reads: a flipped bit in a weight is a weight. A checkpoint
therefore has digests of its weights, moments and picks, computed before it is written and again
after it is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.runs import run_folder
from mass_dpo_jax.runs.run_folder import CHECKPOINTS
from mass_dpo_jax.utils import distributed, fingerprint

MAX_REASON_CHARS = 300  # Maximum length of an orbax error in a message.
ITEMS = {
    "params": ocp.StandardCheckpointHandler,
    "opt_state": ocp.StandardCheckpointHandler,
    "negatives": ocp.ArrayCheckpointHandler,
    "run": ocp.JsonCheckpointHandler,
}
_log = logging.getLogger(__name__)


class _Damaged(UserError):
    """A checkpoint cannot be read, or is not what was written."""


def load_params(workdir: Path, abstract: Any, step: int | None = None) -> Any:
    """Reads only the weights of a checkpoint in a run folder, into `abstract`'s shardings.

    Args:
        workdir: the run folder.
        abstract: shapes, types and shardings.
        step: the checkpoint's step; None: the newest that can be read.

    Raises:
        UserError: there is none, or none that can be read.
    """
    if distributed.run_on_primary(lambda: run_folder.latest_step(workdir)) is None:
        raise UserError(f"{workdir}: {run_folder.NO_CHECKPOINT}")

    def read(step: int) -> Any:
        folder = (workdir / CHECKPOINTS / str(step)).absolute()
        return read_checkpoint(folder, {"params": abstract})["params"]

    return read_newest(workdir, read, step)[0]


def read_newest(
    workdir: Path, read: Callable[[int], Any], step: int | None = None
) -> tuple[Any, list[int]]:
    """Reads the newest checkpoint of a run that can be read.

    Args:
        workdir: the run folder.
        read: reads the checkpoint of a step.
        step: the only one to try, if given.

    Returns:
        What `read` returned, and the steps of newer checkpoints, which are damaged.

    Raises:
        UserError: none can be read.
    """
    damaged: list[int] = []
    steps: list[Any] = [step]
    if step is None:
        steps = distributed.run_on_primary(lambda: run_folder.list_steps(workdir))
    for candidate in reversed(steps):
        try:
            return read(candidate), damaged
        except _Damaged as error:
            _log.warning(str(error))
            damaged.append(candidate)
    damaged_steps = ", ".join(map(str, damaged))
    raise UserError(
        f"{workdir / CHECKPOINTS}: none of its checkpoints can be read (step {damaged_steps}); "
        "restore the folder from a copy, or choose another --workdir"
    )


class Reader:
    """Reads the weights of a checkpoint piece by piece, whatever devices it was written on."""

    def __init__(self, workdir: Path, step: int):
        self._folder = (workdir / CHECKPOINTS / str(step)).absolute()
        self._arrays: dict[tuple[str, ...], ts.TensorStore] = {}
        self._sums: dict[tuple[str, ...], np.ndarray] = {}

    def __call__(self, path: tuple[str, ...], layer: int | None) -> np.ndarray:
        """Reads a parameter or, if `layer` is given, one layer of a parameter that stacks them.

        Raises:
            UserError: the checkpoint is damaged.
        """
        with refuse_unreadable(self._folder):
            if path not in self._arrays:
                base = f"file://{self._folder / 'params'}/"
                kvstore = {"driver": "ocdbt", "base": base, "path": ".".join(path) + "/"}
                spec = {"driver": "zarr", "kvstore": kvstore}
                self._arrays[path] = ts.open(spec, open=True, read=True).result()
            array = self._arrays[path]
            part = np.asarray((array if layer is None else array[layer]).read().result())
        sums = fingerprint.checksum_part(part, (layer or 0) * part.size)
        self._sums[path] = self._sums.get(path, np.zeros(2, np.uint32)) + sums
        return part

    def check(self) -> None:
        """Raises UserError unless every piece has been read once, and is what was written."""
        with refuse_unreadable(self._folder):
            digest = fingerprint.combine_checksums(
                {path: (self._arrays[path].shape, sums) for path, sums in self._sums.items()}
            )
            written = json.loads((self._folder / "run" / "metadata").read_text())["digests"]
            if digest != written["params"]:
                raise ValueError("params: not what was written")


def read_checkpoint(folder: Path, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Reads trees of arrays, the negatives and the JSON of a checkpoint, and checks the digests.

    Args:
        folder: the checkpoint's folder.
        abstract: the trees to read, by name: shapes, types and shardings.

    Returns:
        The trees by name, `negatives` (None: it has none) and `run`, what it says of the run.

    Raises:
        _Damaged: on every process, if one of them could not read its part.
        UserError: it holds other arrays than `like`.
    """
    items: Any = {}
    problem = ""
    try:
        with refuse_unreadable(folder):
            run, items = _restore_items(folder, abstract)
            digests = {name: str(run["digests"][name]) for name in (*abstract, "negatives")}
    except _Damaged as error:
        problem = str(error)
    _raise_on_all(folder, problem)
    negatives = items.get("negatives")
    negatives = None if negatives is None else np.asarray(negatives)
    checks = {name: fingerprint.fingerprint(items[name]) for name in abstract}
    for name, digest in {**checks, "negatives": digest_negatives(negatives)}.items():
        if digest != digests[name]:
            problem = f"{folder}: not a readable checkpoint: {name}: not what was written"
    _raise_on_all(folder, problem)
    trees = {name: _convert(items[name], tree) for name, tree in abstract.items()}
    return {**trees, "negatives": negatives, "run": run}


def _restore_items(folder: Path, abstract: Mapping[str, Any]) -> tuple[Any, Any]:
    """Reads the JSON of a checkpoint and, in the types it stores, `like` and the negatives."""
    handlers = {name: handler() for name, handler in ITEMS.items()}
    arrays = ocp.type_handlers.create_type_handler_registry((jax.Array, _ArrayHandler()))
    for name in abstract:
        handlers[name] = ocp.PyTreeCheckpointHandler(type_handler_registry=arrays)
    checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))
    with contextlib.closing(checkpointer):
        run = checkpointer.restore(folder, ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
        stored = checkpointer.metadata(folder).item_metadata
        items: dict[str, Any] = {}
        for name, tree in abstract.items():
            tree = _as_stored(folder, name, tree, stored[name])
            restore_args = ocp.checkpoint_utils.construct_restore_args(tree)
            items[name] = ocp.args.PyTreeRestore(tree, restore_args=restore_args)
        if run["digests"]["negatives"]:
            items["negatives"] = ocp.args.ArrayRestore()
        return run, checkpointer.restore(folder, ocp.args.Composite(**items))


class _ArrayHandler(ocp.type_handlers.ArrayHandler):
    """Orbax's handler, except that it waits for all outstanding reads before it raises.

    At the first error orbax closes its event loop. Threads of tensorstore are still reading then,
    and would call into that loop, and into coroutines that have been freed, when they are done.
    """

    async def metadata(self, infos: Sequence[Any]) -> Any:
        return await _wait_for_tasks(super().metadata(infos))

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Any:
        return await _wait_for_tasks(super().deserialize(infos, args))


async def _wait_for_tasks(reading: Awaitable[Any]) -> Any:
    """Returns or raises what `reading` does, once all tasks that it started have ended."""
    before = asyncio.all_tasks()
    try:
        return await reading
    except Exception:
        while started := asyncio.all_tasks() - before:
            await asyncio.wait(started)
        raise


@contextlib.contextmanager
def refuse_unreadable(folder: Path) -> Iterator[None]:
    """Turns what orbax raises for a damaged checkpoint, even bare Exception, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise _Damaged(
            f"{folder}: not a readable checkpoint: {message[:MAX_REASON_CHARS]}"
        ) from None


def _as_stored(folder: Path, name: str, abstract: Any, stored: Any) -> Any:
    """Returns `abstract` with the types that a checkpoint stores: digests are of what was written.

    Raises:
        UserError: its arrays have other names or shapes.
    """
    ours, theirs = _by_path(abstract), _by_path(stored)
    if not theirs:
        raise ValueError(f"{name}: no arrays")
    location = f"{folder}: {name}"
    for path in ours:
        if path not in theirs:
            raise UserError(f"{location}: has no {path}, expected for this configuration")
        if tuple(theirs[path].shape) != tuple(ours[path].shape):
            raise UserError(
                f"{location}: {path}: found shape {list(theirs[path].shape)}, expected "
                f"{list(ours[path].shape)} for this configuration"
            )
    for path in theirs:
        if path not in ours:
            raise UserError(f"{location}: has {path}, which this configuration knows nothing of")
    return jax.tree.map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(
            x.shape, theirs[_join(path)].dtype, sharding=x.sharding
        ),
        abstract,
    )


def _convert(tree: Any, abstract: Any) -> Any:
    """Converts arrays whose types differ from `abstract`'s, each on its own devices."""

    def convert(x: jax.Array, abstract: Any) -> jax.Array:
        if x.dtype == abstract.dtype:
            return x
        cast = jax.jit(lambda y: y.astype(abstract.dtype), out_shardings=abstract.sharding)
        converted: jax.Array = cast(x)
        return converted

    return jax.tree.map(convert, tree, abstract)


def _by_path(tree: Any) -> dict[str, Any]:
    return {_join(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _join(path: Any) -> str:
    """Returns `0/mu/blocks/gate/kernel`: the same for NamedTuples and what orbax makes of them."""
    return "/".join(
        str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path
    )


def digest_negatives(negatives: np.ndarray | None) -> str:
    """Returns a digest of int32 [M, n]; empty: there are none."""
    if negatives is None:
        return ""
    return hashlib.sha256(np.ascontiguousarray(negatives, np.int32).tobytes()).hexdigest()


def _raise_on_all(folder: Path, problem: str) -> None:
    """Raises _Damaged on every process if one of them has a problem with a checkpoint."""
    problems = list(filter(None, distributed.gather_values(problem)))
    if problems:
        raise _Damaged(problem or f"{problems[0]} (said by another process)")
