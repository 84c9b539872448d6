"""Checkpoints of a run, by orbax: written in the background, each whole or not there at all.

What orbax writes it does not check when it reads, but for its own tables: a flipped bit in a
weight is a weight. So a checkpoint holds a digest of every array, computed on the devices before
it is written and again after it is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import checkpoint_managers

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.training import scoring
from mass_dpo_jax.training.step import TrainState
from mass_dpo_jax.utils import distributed
from mass_dpo_jax.utils.files import read_json

FOLDER = "checkpoints"
NONE_YET = (
    "a run that has saved no checkpoint yet; go on with mass_dpo_jax.train and the same --workdir"
)
DAMAGED = ".damaged"  # Behind the name of a checkpoint that could not be read.
TEMPORARY = "*.orbax-checkpoint-tmp*"
PACKAGES = ("mass_dpo_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
ITEMS = {
    "params": ocp.StandardCheckpointHandler,
    "opt_state": ocp.StandardCheckpointHandler,
    "negatives": ocp.ArrayCheckpointHandler,
    "run": ocp.JsonCheckpointHandler,
}
_log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """state: where training goes on. negatives: int32 [M, n], the last sets, where there were any.
    about: what `Checkpoints.save` was told."""

    state: TrainState
    negatives: np.ndarray | None
    about: dict[str, Any]


class _Damaged(UserError):
    """A checkpoint that cannot be read, or is not what was written."""


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes, types and places of a tree: what orbax needs to restore into."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def steps(workdir: Path) -> list[int]:
    """The steps of the complete checkpoints in a run folder, the newest last."""
    folder = workdir / FOLDER
    # A checkpoint gets its final, numeric name when it is complete.
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def latest_step(workdir: Path) -> int | None:
    """The step of the newest complete checkpoint in a run folder."""
    return max(steps(workdir), default=None)


def about(workdir: Path) -> dict[str, Any]:
    """What the newest checkpoint that can be read says of its run; nothing where there is none."""
    for step in reversed(steps(workdir)):
        with contextlib.suppress(UserError):
            found = read_json(workdir / FOLDER / str(step) / "run" / "metadata")
            if isinstance(found, dict):
                return found
    return {}


def best_step(among: Sequence[int], values: Mapping[int, float]) -> int | None:
    """The step with the highest value, the newest of equals; None: no step has one.

    A value that is not finite is none: metrics.jsonl, which a run that goes on reads it from, has
    null there.
    """
    known = [step for step in sorted(among) if math.isfinite(values.get(step, math.nan))]
    return max(reversed(known), key=values.__getitem__, default=None)


@dataclasses.dataclass
class _Best(checkpoint_managers.preservation_policy.PreservationPolicy):
    """Keeps the best checkpoint of those whose value is known."""

    values: Mapping[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        best = best_step([info.step for info in checkpoints], self.values)
        return [info.step == best for info in checkpoints]


class _Manager(ocp.CheckpointManager):
    """Orbax's, which does not ask JAX at every save whether the run is to end.

    JAX lets all processes end at the number after the last that any of them asked with. Orbax asks
    with the step; `interruption.check` counts higher, so an end agreed on after a save was past.
    """

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


class Checkpoints:
    """The checkpoints in a run folder: the last `keep` of them by step, and the best.

    A checkpoint holds weights, optimizer state and, of criteria that score the pool, the set that
    every example had last (`negatives` `[examples, n]`), so that a run interrupted within a refresh
    window goes on with the same sets. Beside them lies, as JSON, what `save` is told of the run,
    the versions of the packages, and the digests.

    Args:
      workdir: the run folder.
      keep: how many of the newest to keep.
      values: by step, how good it is, growing while the run evaluates; the best is kept, too.
    """

    def __init__(self, workdir: Path, keep: int = 1, values: Mapping[int, float] | None = None):
        self._workdir = workdir
        self._folder = (workdir / FOLDER).absolute()
        self._remove_unfinished()
        policies = checkpoint_managers.preservation_policy
        self._policy = policies.AnyPreservationPolicy(
            [policies.LatestN(keep), _Best({} if values is None else values)]
        )
        self._writing: int | None = None  # The step that is being written.
        self._failed: str | None = None  # The last one that could not be written.

    @functools.cached_property
    def _manager(self) -> _Manager:
        """Made when something is to be written: it reads what there is, which may be damaged."""
        with _refusals(self._folder):
            return _Manager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._policy, single_host_load_and_broadcast=True
                ),
                item_handlers={name: handler() for name, handler in ITEMS.items()},
            )

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, the same on every process."""
        found: int | None = distributed.run_on_primary(lambda: latest_step(self._workdir))
        return found

    def save(
        self, state: TrainState, negatives: np.ndarray | None, about: Mapping[str, Any]
    ) -> None:
        """Starts writing; returns as soon as the arrays are copied from the device.

        If the one before could not be written (a full disk), that is reported here. Training goes
        on, with the newest one that was written untouched.
        """
        self._settle()
        step = int(state.step)
        if distributed.run_on_primary(lambda: step in steps(self._workdir)):
            return
        items = {
            "params": ocp.args.StandardSave(state.params, _by_layer(state.params)),
            "opt_state": ocp.args.StandardSave(state.opt_state),
        }
        if negatives is not None:
            items["negatives"] = ocp.args.ArraySave(negatives)
        digests = {
            "params": scoring.fingerprint(state.params),
            "opt_state": scoring.fingerprint(state.opt_state),
            "negatives": _digest(negatives),
        }
        versions = {name: metadata.version(name) for name in PACKAGES}
        run = {"step": step, **about, "versions": versions, "digests": digests}
        items["run"] = ocp.args.JsonSave(run)
        manager = self._manager
        self._writing = step
        self._try(step, lambda: manager.save(step, args=ocp.args.Composite(**items)))

    def restore(self, like: TrainState) -> Restored:
        """The newest state that can be read, with the types, shapes and shardings of `like`.

        Newer ones that cannot be read are reported and renamed, since their steps are run and
        saved again.

        Raises:
          UserError: the newest belongs to another model; or none can be read.
        """

        def read(step: int) -> Restored:
            wanted = {"params": like.params, "opt_state": like.opt_state}
            found = _read(self._folder / str(step), wanted)
            state = TrainState(
                jax.device_put(np.int32(step), like.step.sharding),
                found["params"],
                found["opt_state"],
            )
            return Restored(state, found["negatives"], found["run"])

        restored, damaged = _newest(self._workdir, read)
        if distributed.is_primary():
            for step in damaged:
                shutil.rmtree(self._folder / f"{step}{DAMAGED}", ignore_errors=True)
                (self._folder / str(step)).rename(self._folder / f"{step}{DAMAGED}")
        distributed.gather_values("renamed")
        return restored

    def close(self) -> None:
        """Waits for what is being written.

        Raises:
          UserError: the last state could not be written.
        """
        self._settle()
        if "_manager" in self.__dict__:
            self._manager.close()
        if self._failed is not None:
            newest = latest_step(self._workdir)
            there = "there is none" if newest is None else f"the newest is that of step {newest}"
            raise UserError(
                f"{self._failed}; {there}. Make room, and run the same command again to go on"
            )

    def _settle(self) -> None:
        if self._writing is not None:
            self._try(self._writing, self._manager.wait_until_finished)
            self._writing = None

    def _try(self, step: int, write: Callable[[], Any]) -> None:
        self._failed = None
        try:
            write()
        except (OSError, ValueError) as error:  # tensorstore's errors are ValueErrors.
            reason = str(error).split(" [")[0].rsplit(": ", 1)[-1]
            self._failed = f"{self._folder / str(step)}: this checkpoint was not written: {reason}"
            self._writing = None  # There is nothing to wait for, and the failure stands.
            _log.warning(f"{self._failed}; training goes on")
            self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        """What was being written when the disk was full or the process ended."""
        if distributed.is_primary() and self._folder.is_dir():
            for left in self._folder.glob(TEMPORARY):
                shutil.rmtree(left, ignore_errors=True)


def _by_layer(params: Any) -> Any:
    """Stored in pieces of one layer, so that `reader` need not hold a whole stack."""

    def how(path: Any, _: Any) -> ocp.SaveArgs:
        return ocp.SaveArgs(shard_axes=(0,) if path[0].key == "blocks" else ())

    return jax.tree_util.tree_map_with_path(how, params)


class Reader:
    """Reads the weights of a checkpoint a piece at a time, whatever devices it was written on."""

    def __init__(self, workdir: Path, step: int):
        self._folder = (workdir / FOLDER / str(step)).absolute()
        self._arrays: dict[tuple[str, ...], ts.TensorStore] = {}
        self._sums: dict[tuple[str, ...], np.ndarray] = {}

    def __call__(self, path: tuple[str, ...], layer: int | None) -> np.ndarray:
        """A parameter or, of one that stacks layers, a layer (None: all of it).

        Raises:
          UserError: the checkpoint is broken.
        """
        with _refusals(self._folder):
            if path not in self._arrays:
                base = f"file://{self._folder / 'params'}/"
                kvstore = {"driver": "ocdbt", "base": base, "path": ".".join(path) + "/"}
                spec = {"driver": "zarr", "kvstore": kvstore}
                self._arrays[path] = ts.open(spec, open=True, read=True).result()
            array = self._arrays[path]
            part = np.asarray((array if layer is None else array[layer]).read().result())
        sums = scoring.sums_of_part(part, (layer or 0) * part.size)
        self._sums[path] = self._sums.get(path, np.zeros(2, np.uint32)) + sums
        return part

    def check(self) -> None:
        """Raises UserError unless all that was written has been read, each piece once."""
        with _refusals(self._folder):
            found = scoring.digest_of(
                ("".join(f"[{name!r}]" for name in path), self._arrays[path].shape, sums)
                for path, sums in sorted(self._sums.items())
            )
            written = json.loads((self._folder / "run" / "metadata").read_text())["digests"]
            if found != written["params"]:
                raise ValueError("params: not what was written")


def load_params(workdir: Path, like: Any, step: int | None = None) -> Any:
    """Only the weights of a checkpoint in a run folder, into `like`'s shardings.

    Args:
      workdir: the run folder.
      like: shapes, types and shardings.
      step: of the checkpoint; None: the newest that can be read.
    """
    if distributed.run_on_primary(lambda: latest_step(workdir)) is None:
        raise UserError(f"{workdir}: {NONE_YET}")

    def read(step: int) -> Any:
        folder = (workdir / FOLDER / str(step)).absolute()
        return _read(folder, {"params": like})["params"]

    return _newest(workdir, read, step)[0]


def _newest(
    workdir: Path, read: Callable[[int], Any], only: int | None = None
) -> tuple[Any, list[int]]:
    """What `read` gives of the newest checkpoint that can be read, and the newer ones' steps."""
    damaged: list[int] = []
    there = [only] if only is not None else distributed.run_on_primary(lambda: steps(workdir))
    for step in reversed(there):
        try:
            return read(step), damaged
        except _Damaged as error:
            _log.warning(str(error))
            damaged.append(step)
    shown = ", ".join(str(step) for step in damaged)
    raise UserError(
        f"{workdir / FOLDER}: none of its checkpoints can be read (step {shown}); restore the "
        "folder from a copy, or choose another --workdir"
    )


def _read(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Some of a checkpoint's trees of arrays, its sets, and what it says of the run.

    Raises:
      _Damaged: on every process, if one of them could not read its part.
      UserError: it holds other arrays than those wanted.
    """
    handlers = {name: handler() for name, handler in ITEMS.items()}
    arrays = ocp.type_handlers.create_type_handler_registry((jax.Array, _Arrays()))
    for name in wanted:
        handlers[name] = ocp.PyTreeCheckpointHandler(type_handler_registry=arrays)
    reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))
    found: Any = {}
    problem = ""
    try:
        with _refusals(folder), contextlib.closing(reader):
            run = reader.restore(folder, ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
            digests = {name: str(run["digests"][name]) for name in (*wanted, "negatives")}
            there = reader.metadata(folder).item_metadata
            stored = {name: _stored(folder, name, wanted[name], there[name]) for name in wanted}
            items = {
                name: ocp.args.PyTreeRestore(
                    tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree)
                )
                for name, tree in stored.items()
            }
            if digests["negatives"]:
                items["negatives"] = ocp.args.ArrayRestore()
            found = reader.restore(folder, ocp.args.Composite(**items))
    except _Damaged as error:
        problem = str(error)
    _agree(folder, problem)
    sets = found.get("negatives")
    sets = None if sets is None else np.asarray(sets)
    checks = {name: scoring.fingerprint(found[name]) for name in wanted}
    for name, digest in {**checks, "negatives": _digest(sets)}.items():
        if digest != digests[name]:
            problem = f"{folder}: not a readable checkpoint: {name}: not what was written"
    _agree(folder, problem)
    trees = {name: _as_wanted(found[name], tree) for name, tree in wanted.items()}
    return {**trees, "negatives": sets, "run": run}


class _Arrays(ocp.type_handlers.ArrayHandler):
    """Orbax's, which does not fail before all that it began to read is read or has failed, too.

    At the first error orbax closes its event loop. Threads of tensorstore go on reading, and when
    they are done they would call into that loop, and into coroutines freed meanwhile.
    """

    async def metadata(self, infos: Sequence[Any]) -> Any:
        return await _ended(super().metadata(infos))

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Any:
        return await _ended(super().deserialize(infos, args))


async def _ended(reading: Awaitable[Any]) -> Any:
    """What `reading` gives or raises, once none of the tasks that it began is left."""
    before = asyncio.all_tasks()
    try:
        return await reading
    except Exception:
        while begun := asyncio.all_tasks() - before:
            await asyncio.wait(begun)
        raise


@contextlib.contextmanager
def _refusals(folder: Path) -> Iterator[None]:
    """Of a broken checkpoint, orbax lets through whatever its libraries met, bare Exception too."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise _Damaged(f"{folder}: not a readable checkpoint: {message[:300]}") from None


def _stored(folder: Path, name: str, wanted: Any, there: Any) -> Any:
    """`wanted` with the types that a checkpoint has: digests are of what was written.

    Raises:
      UserError: its arrays have other names or shapes.
    """
    ours, theirs = _by_path(wanted), _by_path(there)
    if not theirs:
        raise ValueError(f"{name}: no arrays")
    place = f"{folder}: {name}"
    for path in ours:
        if path not in theirs:
            raise UserError(f"{place}: has no {path}, expected for this configuration")
        if tuple(theirs[path].shape) != tuple(ours[path].shape):
            raise UserError(
                f"{place}: {path}: found shape {list(theirs[path].shape)}, expected "
                f"{list(ours[path].shape)} for this configuration"
            )
    for path in theirs:
        if path not in ours:
            raise UserError(f"{place}: has {path}, which this configuration knows nothing of")
    return jax.tree.map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(
            x.shape, theirs[_name(path)].dtype, sharding=x.sharding
        ),
        wanted,
    )


def _as_wanted(found: Any, wanted: Any) -> Any:
    """Types that differ are converted in place, shard by shard."""
    return jax.tree.map(
        lambda x, w: (
            x
            if x.dtype == w.dtype
            else jax.jit(lambda y: y.astype(w.dtype), out_shardings=w.sharding)(x)
        ),
        found,
        wanted,
    )


def _by_path(tree: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _name(path: Any) -> str:
    """`0/mu/blocks/gate/kernel`: the same for tuples by name and what orbax makes of them."""
    return "/".join(
        str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path
    )


def _digest(negatives: np.ndarray | None) -> str:
    if negatives is None:
        return ""
    return hashlib.sha256(np.ascontiguousarray(negatives, np.int32).tobytes()).hexdigest()


def _agree(folder: Path, problem: str) -> None:
    """Raises _Damaged on every process if one of them has a problem with a checkpoint."""
    problems = list(filter(None, distributed.gather_values(problem)))
    if problems:
        raise _Damaged(problem or f"{problems[0]} (said by another process)")
