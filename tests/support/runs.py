"""What tests ask of whole runs: their state, and whether two are the same."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from mass_dpo_jax.training import checkpoint, mesh
from mass_dpo_jax.training.optimizer import make_optimizer
from mass_dpo_jax.training.prepare import prepare
from mass_dpo_jax.training.updates import abstract_state
from tests.support.helpers import log_lines

SAVED_ALL = {"train.checkpoint_every": 1, "train.keep_checkpoints": 8}


def final_state(workdir: Path, config: Any) -> Any:
    """Returns weights and moments of the newest checkpoint, as NumPy."""
    setup = prepare(config, workdir, ("train",))
    like = abstract_state(setup, make_optimizer(config.train, config.train.steps))
    saved = checkpoint.Checkpoints(workdir, keep=100)
    state = saved.restore(like).state
    saved.close()
    return jax.tree.map(np.asarray, state)


def assert_same_run(config: Any, one: Path, other: Path) -> None:
    """Asserts that two runs agree bit for bit: weights, moments, every figure but the speed."""
    a, b = final_state(one, config), final_state(other, config)
    jax.tree.map(np.testing.assert_array_equal, a, b)

    def figures(workdir: Path) -> list[dict[str, Any]]:
        return [
            {k: v for k, v in line.items() if k != "examples_per_second"}
            for line in log_lines(workdir)
        ]

    assert figures(one) == figures(other)


@contextlib.contextmanager
def on_one_device() -> Iterator[None]:
    """Lets runs see the first device only; for fixtures of a module, tests have `one_device`."""
    make_mesh = mesh.make_mesh

    def of_one(config: Any, devices: Any = None) -> Any:
        return make_mesh(config, devices=devices or jax.devices()[:1])

    with mock.patch.object(mesh, "make_mesh", of_one):
        yield


class SmallFiles:
    """No file may grow above some bytes, as on a disk that is full."""

    def __init__(self, most: int):
        self.most = most

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.most, self.before[1]))

    def __exit__(self, *_: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
