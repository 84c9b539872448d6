"""Checkpoints of a run, by orbax: written in the background, each whole or not there at all."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.training.step import TrainState

FOLDER = "checkpoints"


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes, types and places of a tree: what orbax needs to restore into."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def latest_step(workdir: Path) -> int | None:
    """The step of the newest complete checkpoint in a run folder."""
    folder = workdir / FOLDER
    # A checkpoint gets its final, numeric name when it is complete.
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=None)


class Checkpoints:
    """The checkpoints in a run folder: the last `keep` of them, by step.

    A checkpoint holds weights, optimizer state and step and, of criteria that score the pool, the
    set that every example had last (`negatives` `[examples, n]`), so that a run interrupted within
    a refresh window goes on with the same sets.
    """

    def __init__(self, workdir: Path, keep: int = 1):
        policy = checkpoint_managers.preservation_policy.LatestN(keep)
        self._manager = ocp.CheckpointManager(
            (workdir / FOLDER).absolute(),
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
            "params": ocp.args.StandardSave(state.params),
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


def load_params(workdir: Path, like: Any) -> Any:
    """Only the weights of the newest checkpoint in a run folder, into `like`'s shardings."""
    step = latest_step(workdir)
    if step is None:
        raise UserError(f"{workdir}: a run that has saved no checkpoint yet")
    manager = ocp.CheckpointManager(
        (workdir / FOLDER).absolute(),
        item_names=("params",),
        options=ocp.CheckpointManagerOptions(read_only=True),
    )
    with contextlib.closing(manager):
        return _restore(manager, step, {"params": ocp.args.StandardRestore(like)}).params


def _restore(manager: ocp.CheckpointManager, step: int, items: dict[str, Any]) -> Any:
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    # Of a broken checkpoint, orbax lets through whatever its libraries met, bare Exception too.
    except Exception as error:
        message = " ".join(str(error).split())
        raise UserError(
            f"{manager.directory / str(step)}: the checkpoint cannot be read: {message[:300]}"
        ) from None
