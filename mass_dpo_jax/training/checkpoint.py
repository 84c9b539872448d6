"""Checkpoints of a run, by orbax: written in the background, each whole or not there at all."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import checkpoint_managers

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.training.step import TrainState

FOLDER = "checkpoints"


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


class Checkpoints:
    """The checkpoints in a run folder: the last `keep` of them, by step.

    A checkpoint holds weights, optimizer state and step and, of criteria that score the pool, the
    set that every example had last (`negatives` `[examples, n]`), so that a run interrupted within
    a refresh window goes on with the same sets.
    """

    def __init__(self, workdir: Path, keep: int = 1):
        policy = checkpoint_managers.preservation_policy.LatestN(keep)
        folder = (workdir / FOLDER).absolute()
        with _refusals(folder):
            self._manager = ocp.CheckpointManager(
                folder,
                options=ocp.CheckpointManagerOptions(preservation_policy=policy),
                item_names=("params", "opt_state", "negatives", "step"),
            )

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, negatives: np.ndarray | None) -> None:
        """Starts writing; returns as soon as the arrays are copied from the device."""
        step = int(state.step)
        if step == self.latest():
            return
        items = {
            "params": ocp.args.StandardSave(state.params, _by_layer(state.params)),
            "opt_state": ocp.args.StandardSave(state.opt_state),
            "step": ocp.args.JsonSave({"step": step}),
        }
        if negatives is not None:
            items["negatives"] = ocp.args.ArraySave(negatives)
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, like: TrainState) -> tuple[TrainState, np.ndarray | None]:
        """The newest state, with the shapes and shardings of `like`, and the last sets."""
        step = self.latest()
        assert step is not None
        items = {
            "params": ocp.args.StandardRestore(like.params),
            "opt_state": ocp.args.StandardRestore(like.opt_state),
        }
        if self._has_negatives(step):
            items["negatives"] = ocp.args.ArrayRestore()
        found = _restore(self._manager, step, items)
        state = TrainState(
            jax.device_put(np.int32(step), like.step.sharding), found.params, found.opt_state
        )
        negatives = None if found.get("negatives") is None else np.asarray(found["negatives"])
        return state, negatives

    def _has_negatives(self, step: int) -> bool:
        return (Path(self._manager.directory) / str(step) / "negatives").exists()

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.close()


def _by_layer(params: Any) -> Any:
    """Stored in pieces of one layer, so that `reader` need not hold a whole stack."""

    def how(path: Any, _: Any) -> ocp.SaveArgs:
        return ocp.SaveArgs(shard_axes=(0,) if path[0].key == "blocks" else ())

    return jax.tree_util.tree_map_with_path(how, params)


def reader(workdir: Path, step: int) -> Callable[[tuple[str, ...], int | None], np.ndarray]:
    """Reads the weights of a checkpoint a piece at a time, whatever devices it was written on.

    Returns:
      A function of a parameter's path and, of one that stacks layers, a layer (None: all of it).
      It raises UserError where the checkpoint is broken.
    """
    folder = (workdir / FOLDER / str(step)).absolute()

    @functools.cache
    def opened(path: tuple[str, ...]) -> ts.TensorStore:
        base = f"file://{folder / 'params'}/"
        kvstore = {"driver": "ocdbt", "base": base, "path": ".".join(path) + "/"}
        return ts.open({"driver": "zarr", "kvstore": kvstore}, open=True, read=True).result()

    def read(path: tuple[str, ...], layer: int | None) -> np.ndarray:
        with _refusals(folder):
            array = opened(path)
            return np.asarray((array if layer is None else array[layer]).read().result())

    return read


def load_params(workdir: Path, like: Any) -> Any:
    """Only the weights of the newest checkpoint in a run folder, into `like`'s shardings."""
    step = latest_step(workdir)
    if step is None:
        raise UserError(f"{workdir}: a run that has saved no checkpoint yet")
    folder = (workdir / FOLDER).absolute()
    with _refusals(folder):
        manager = ocp.CheckpointManager(
            folder,
            item_names=("params",),
            options=ocp.CheckpointManagerOptions(read_only=True),
        )
    with contextlib.closing(manager):
        return _restore(manager, step, {"params": ocp.args.StandardRestore(like)}).params


def _restore(manager: ocp.CheckpointManager, step: int, items: dict[str, Any]) -> Any:
    with _refusals(Path(manager.directory) / str(step)):
        return manager.restore(step, args=ocp.args.Composite(**items))


@contextlib.contextmanager
def _refusals(folder: Path) -> Iterator[None]:
    """Of a broken checkpoint, orbax lets through whatever its libraries met, bare Exception too."""
    try:
        yield
    except Exception as error:
        message = " ".join(str(error).split())
        raise UserError(f"{folder}: the checkpoint cannot be read: {message[:300]}") from None
