"""Checkpoints of a run, by orbax: written in the background, each completely or not at all."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.runs import run_folder
from mass_dpo_jax.training.checkpoint_reading import (
    ITEMS,
    digest_negatives,
    read_checkpoint,
    read_newest,
    refuse_unreadable,
)
from mass_dpo_jax.training.step import TrainState
from mass_dpo_jax.utils import distributed, fingerprint

DAMAGED_SUFFIX = ".damaged"  # Added to the name of a checkpoint that could not be read.
TEMPORARY_PATTERN = "*.orbax-checkpoint-tmp*"
PACKAGES = ("mass_dpo_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
_log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        state: the training state to resume from.
        negatives: int32 [M, n], the last picks of every example; None: it has none.
        notes: the metadata given to `Checkpoints.save`, with versions and digests.
    """

    state: TrainState
    negatives: np.ndarray | None
    notes: dict[str, Any]


def best_step(steps: Sequence[int], values: Mapping[int, float]) -> int | None:
    """Returns the step with the highest value, the newest of equals; None: no step has one.

    Values that are not finite do not count: a run that is resumed reads them from metrics.jsonl,
    which has null there.
    """
    finite = [step for step in sorted(steps) if math.isfinite(values.get(step, math.nan))]
    return max(reversed(finite), key=values.__getitem__, default=None)


@dataclasses.dataclass
class _Best(checkpoint_managers.preservation_policy.PreservationPolicy):
    """Keeps the best checkpoint of those that have a value."""

    values: Mapping[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        best = best_step([info.step for info in checkpoints], self.values)
        return [info.step == best for info in checkpoints]


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, except that it does not ask JAX at every save whether the run should end.

    JAX makes all processes end at the number after the highest that any of them has asked with.
    Orbax asks with the step, `interruption.raise_if_requested` with higher numbers, so that an end
    agreed on during a save would already be past.
    """

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


class Checkpoints:
    """The checkpoints in a run folder: the newest `keep` of them, and the best.

    A checkpoint holds weights, optimizer state and, for criteria that score the pool, the last
    picks of every example (`negatives` [M, n]), so that a run interrupted within a refresh window
    resumes with the same ones. Beside them, as JSON, are the notes that `save` is given, the
    versions of the packages, and the digests.

    Args:
        workdir: the run folder.
        keep: number of the newest checkpoints to keep.
        values: the metric of each step, which the caller adds to while it evaluates; the best
            checkpoint by it is kept too.
    """

    def __init__(self, workdir: Path, keep: int = 1, values: Mapping[int, float] | None = None):
        self._workdir = workdir
        self._folder = (workdir / run_folder.CHECKPOINTS).absolute()
        self._remove_unfinished()
        policies = checkpoint_managers.preservation_policy
        self._policy = policies.AnyPreservationPolicy(
            [policies.LatestN(keep), _Best({} if values is None else values)]
        )
        self._writing: int | None = None  # The step that is being written.
        self._failure: str | None = None  # Why the last one was not written.

    @functools.cached_property
    def _manager(self) -> _Manager:
        """Orbax's manager, made at the first save: it reads the folder, which may be damaged."""
        with refuse_unreadable(self._folder):
            return _Manager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._policy, single_host_load_and_broadcast=True
                ),
                item_handlers={name: handler() for name, handler in ITEMS.items()},
            )

    def latest(self) -> int | None:
        """Returns the step of the newest complete checkpoint, the same on every process."""
        step: int | None = distributed.run_on_primary(lambda: run_folder.latest_step(self._workdir))
        return step

    def save(
        self, state: TrainState, negatives: np.ndarray | None, notes: Mapping[str, Any]
    ) -> None:
        """Starts writing a checkpoint; returns as soon as the arrays are copied from the devices.

        If the last one could not be written (a full disk), this logs a warning and training
        continues; the newest complete checkpoint stays untouched.
        """
        self._settle()
        step = int(state.step)
        if distributed.run_on_primary(lambda: step in run_folder.list_steps(self._workdir)):
            return
        items = {
            "params": ocp.args.StandardSave(state.params, _by_layer(state.params)),
            "opt_state": ocp.args.StandardSave(state.opt_state),
        }
        if negatives is not None:
            items["negatives"] = ocp.args.ArraySave(negatives)
        digests = {
            "params": fingerprint.fingerprint(state.params),
            "opt_state": fingerprint.fingerprint(state.opt_state),
            "negatives": digest_negatives(negatives),
        }
        versions = {name: metadata.version(name) for name in PACKAGES}
        run = {"step": step, **notes, "versions": versions, "digests": digests}
        items["run"] = ocp.args.JsonSave(run)
        manager = self._manager
        self._writing = step
        self._try(step, lambda: manager.save(step, args=ocp.args.Composite(**items)))

    def restore(self, abstract: TrainState) -> Restored:
        """Reads the newest state that can be read, with `abstract`'s types, shapes and shardings.

        Newer checkpoints that cannot be read are reported and renamed, since their steps run and
        are saved again.

        Raises:
            UserError: the newest belongs to another model, or none can be read.
        """

        def read(step: int) -> Restored:
            trees = {"params": abstract.params, "opt_state": abstract.opt_state}
            content = read_checkpoint(self._folder / str(step), trees)
            step_array = jax.device_put(np.int32(step), abstract.step.sharding)
            state = TrainState(step_array, content["params"], content["opt_state"])
            return Restored(state, content["negatives"], content["run"])

        restored, damaged = read_newest(self._workdir, read)
        if distributed.is_primary():
            for step in damaged:
                renamed = self._folder / f"{step}{DAMAGED_SUFFIX}"
                shutil.rmtree(renamed, ignore_errors=True)
                (self._folder / str(step)).rename(renamed)
        distributed.wait_for_all()  # No process lists the steps before that.
        return restored

    def close(self) -> None:
        """Waits for the checkpoint that is being written.

        Raises:
            UserError: the last state could not be written.
        """
        self._settle()
        if "_manager" in self.__dict__:
            self._manager.close()
        if self._failure is not None:
            newest = run_folder.latest_step(self._workdir)
            remaining = (
                "there is none" if newest is None else f"the newest is that of step {newest}"
            )
            raise UserError(
                f"{self._failure}; {remaining}. Make room, and run the same command again to go on"
            )

    def _settle(self) -> None:
        """Waits for the checkpoint that is being written, and notes a failure."""
        if self._writing is not None:
            self._try(self._writing, self._manager.wait_until_finished)
            self._writing = None

    def _try(self, step: int, write: Callable[[], Any]) -> None:
        self._failure = None
        try:
            write()
        except (OSError, ValueError) as error:  # tensorstore's errors are ValueErrors.
            reason = str(error).split(" [")[0].rsplit(": ", 1)[-1]
            self._failure = f"{self._folder / str(step)}: this checkpoint was not written: {reason}"
            self._writing = None  # There is nothing to wait for, and the failure stands.
            _log.warning(f"{self._failure}; training goes on")
            self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        """Removes what was being written when the disk was full or the process ended."""
        if distributed.is_primary() and self._folder.is_dir():
            for unfinished in self._folder.glob(TEMPORARY_PATTERN):
                shutil.rmtree(unfinished, ignore_errors=True)


def _by_layer(params: Any) -> Any:
    """Returns how to save weights: by layer, so that a reader need not hold all layers at once."""

    def save_args(path: Any, _: Any) -> ocp.SaveArgs:
        return ocp.SaveArgs(shard_axes=(0,) if path[0].key == "blocks" else ())

    return jax.tree_util.tree_map_with_path(save_args, params)
