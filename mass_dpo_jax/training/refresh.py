"""Sets of negatives that outlive a step (`selection.refresh`): chosen ahead, kept, saved."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from mass_dpo_jax import config as config_lib
from mass_dpo_jax import hosts
from mass_dpo_jax.data.batches import Order
from mass_dpo_jax.training import scoring
from mass_dpo_jax.training.setup import Reference, Setup


class Sets:
    """The negatives of the steps of one refresh window after another.

    At a window's first step every example that the window trains on is scored with the policy of
    that moment and its set is kept until the window ends. With `refresh=step`, and for criteria
    that need no scoring, sets are chosen inside of the train step. In both cases the last set of
    every example is remembered, to see how many change.

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
        self.window = config_lib.refresh_window(refresh, order.steps_per_epoch) or total_steps
        self._scored = setup.method.selection.needs_scoring and not setup.method.supervised
        self._kept = self.window > 1 and self._scored
        self._setup, self._order, self._total = setup, order, total_steps
        self._reference = reference
        shape = (len(setup.tokens["train"]), setup.method.num_negatives)
        self._last = np.zeros(shape, np.int32) if restored is None else restored
        self._changed: float | None = None

    def at(self, step: int, params: Any) -> np.ndarray | None:
        """int32 `[M, n]`, numbers as in `Choice`; None: not kept."""
        self._changed = None
        if self._kept and step % self.window == 0:
            self._changed = self._remember(*self._choose(step, params))
        return self._last if self._kept else None

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
        """What a checkpoint must hold: the last set of every example, 0 where there was none."""
        return self._last if self._scored else None

    def _remember(self, rows: np.ndarray, numbers: Any) -> float | None:
        new = hosts.whole(numbers).reshape(len(rows), -1)
        seen = self._last[rows].any(1)
        differ = (np.sort(self._last[rows]) != np.sort(new)).any(1)
        self._last[rows] = new
        return float(differ[seen].mean()) if seen.any() else None

    def _choose(self, step: int, params: Any) -> tuple[np.ndarray, np.ndarray]:
        """The examples of the window that begins at a step, and their sets."""
        steps = range(step, min(step + self.window, self._total))
        wanted = np.unique(np.concatenate([self._order(s)[0] for s in steps]))
        setup = self._setup
        key = setup.key(step // self.window)
        rows, sets = [], []
        for indices, batch in scoring.batches(
            setup.tokens["train"],
            setup.buckets["train"],
            setup.config.eval.batch_size,
            setup.mesh,
            "choosing negatives",
            wanted,
            self._reference.logps.get("train"),
            self._reference.grams,
        ):
            choice, _ = setup.program.choose_batch(params, batch, key)
            rows.append(indices[indices >= 0])
            sets.append(hosts.whole(choice.numbers)[indices >= 0])
        return np.concatenate(rows), np.concatenate(sets)
