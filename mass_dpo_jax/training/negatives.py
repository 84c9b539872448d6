"""Sets of negatives that outlive a step (`selection.refresh`): chosen ahead, kept, saved."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.data.batches import Order
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.training import scoring
from mass_dpo_jax.training.setup import Reference, Setup
from mass_dpo_jax.training.step import KeptSets
from mass_dpo_jax.utils import distributed

NO_SET = -1  # In place of the negatives of an example that has had no set; 0 is no negative.
_log = logging.getLogger(__name__)


class Sets:
    """The negatives of the steps of one refresh window after another.

    At a window's first step every example that the window trains on is scored with the policy of
    that moment and its set is kept until the window ends. With `refresh=step`, and for criteria
    that need no scoring, sets are chosen inside of the train step. In both cases the last set of
    every example is remembered, to see how many change.

    Args:
      restored: int32 [M, n], what `to_keep` gave at the step that training goes on from.

    Attributes:
      window: steps that a choice lasts.
    """

    def __init__(
        self,
        setup: Setup,
        order: Order,
        total_steps: int,
        reference: Reference,
        restored: np.ndarray | None,
    ):
        refresh = setup.config.selection.refresh
        # `once` is one window as long as the run.
        self.window = config_lib.parse_refresh(refresh, order.steps_per_epoch) or total_steps
        self._scored = setup.method.scores_pools
        self._kept = self.window > 1 and self._scored
        self._setup, self._order, self._total = setup, order, total_steps
        self._reference = reference
        shape = (len(setup.tokens["train"]), setup.method.num_negatives)
        self._last = np.full(shape, NO_SET, np.int32)
        # The window that they are of; None: none, or the one of the first step that is asked for.
        self._window: int | None = None
        self._restored = restored is not None
        if restored is not None:
            # Earlier checkpoints have zeros where there was no set.
            self._last = np.where(restored.any(1, keepdims=True), restored, NO_SET)
        self._changed: float | None = None

    def at(self, step: int, params: Any, given: KeptSets | None = None) -> KeptSets | None:
        """The sets to train on at a step; None: they are chosen inside of it.

        Chooses at the first step of a window, and at any other whose sets are not there.

        Args:
          step: counted from 0.
          params: the policy before it.
          given: what the last step's state has, which counts more than what is remembered here.

        Raises:
          UserError: those given are of other examples or another number of negatives.
        """
        self._changed = None
        if not self._kept:
            return None
        window, since = divmod(step, self.window)
        if given is not None:
            self._take(given)
        elif self._restored and self._window is None:
            self._window = window
        rows = self._order(step)[0]
        known = self._window == window and (self._last[rows] != NO_SET).all()
        if since and not known:
            _log.warning(
                f"step {step}: the state has no sets of negatives of its window, which began at "
                f"step {step - since} (selection.refresh={self._setup.config.selection.refresh}); "
                "they are chosen now, by the weights of this step. To go on with those of before, "
                "keep TrainState.sets with the other parts of the state"
            )
        if not (since and known):
            self._last = self._last.copy()  # A state has the array of before.
            self._changed = self._remember(*self._choose(step, params))
            self._window = window
        return KeptSets(window, self._last)

    def changed(self, rows: np.ndarray, numbers: Any) -> float | Callable[[], float | None] | None:
        """The share of examples whose set is another than the one they had before; None: not
        chosen at this step, or for the first time. Call after `at`.

        Args:
          rows: `[B]`, the examples that the step trained on.
          numbers: `[A, B / A, n]` on the devices, their negatives. Where they were chosen inside
            of the step the share is a function, which waits for them.
        """
        if self._kept or not self._scored:
            return self._changed
        return functools.partial(self._remember, rows, numbers)

    def to_keep(self) -> np.ndarray | None:
        """What a checkpoint must hold: the last set of every example, or `NO_SET`."""
        return self._last if self._scored else None

    def _take(self, given: KeptSets) -> None:
        numbers = np.asarray(distributed.gather(given.numbers), np.int32)
        if numbers.shape != self._last.shape:
            raise UserError(
                f"the state's sets of negatives are {list(numbers.shape)}, expected "
                f"{list(self._last.shape)} for these batches (training examples, num_negatives): "
                "a state of another run? state._replace(sets=None) chooses them anew"
            )
        self._last, self._window = numbers, int(given.window)

    def _remember(self, rows: np.ndarray, numbers: Any) -> float | None:
        new = distributed.gather(numbers).reshape(len(rows), -1)
        seen = (self._last[rows] != NO_SET).all(1)
        differ = (np.sort(self._last[rows]) != np.sort(new)).any(1)
        self._last[rows] = new
        return float(differ[seen].mean()) if seen.any() else None

    def _choose(self, step: int, params: Any) -> tuple[np.ndarray, np.ndarray]:
        """The examples of a step and of what is left of its window, and their sets."""
        end = (step // self.window + 1) * self.window
        steps = range(step, min(end, self._total))
        wanted = np.unique(np.concatenate([self._order(s)[0] for s in steps]))
        setup = self._setup
        key = setup.key(step // self.window)
        batches = scoring.batches(
            setup.tokens["train"],
            setup.buckets["train"],
            setup.config.eval.batch_size,
            setup.mesh,
            "choosing negatives",
            wanted,
            self._reference.logps.get("train"),
            self._reference.grams,
        )
        rows, sets = zip(
            *scoring.computed(
                lambda batch: setup.program.choose_batch(params, batch, key)[0].numbers, batches
            ),
            strict=True,
        )
        return np.concatenate(rows), np.concatenate(sets)
