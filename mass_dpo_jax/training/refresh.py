"""Sets of negatives that outlive a step (`selection.refresh`): chosen ahead, kept, saved."""

from __future__ import annotations

from typing import Any

import numpy as np

from mass_dpo_jax import config as config_lib
from mass_dpo_jax import selection
from mass_dpo_jax.data.batches import Order
from mass_dpo_jax.training import scoring
from mass_dpo_jax.training.setup import Setup


class Sets:
    """The negatives of the steps of one refresh window after another.

    At a window's first step every example that the window trains on is scored with the policy of
    that moment and its set is kept until the window ends. With `refresh=step`, and for criteria
    that need no scoring, nothing is kept: sets are then chosen inside of the train step.

    Attributes:
      window: steps that a choice lasts.
    """

    def __init__(
        self,
        setup: Setup,
        order: Order,
        total_steps: int,
        refs: np.ndarray | None,
        restored: np.ndarray | None,
    ):
        refresh = setup.config.selection.refresh
        # `once` is one window as long as the run.
        self.window = config_lib.refresh_window(refresh, order.steps_per_epoch) or total_steps
        self._kept = (
            self.window > 1
            and not setup.method.supervised
            and selection.needs_scoring(setup.method.selection.criterion)
        )
        self._setup, self._order, self._total = setup, order, total_steps
        self._refs, self._sets = refs, restored

    def at(self, step: int, params: Any) -> np.ndarray | None:
        """int32 `[M, n]`, candidate numbers as `Program.choose` returns them; None: not kept."""
        if self._kept and (step % self.window == 0 or self._sets is None):
            self._sets = self._choose(step, params)
        return self._sets if self._kept else None

    def to_keep(self, step: int) -> np.ndarray | None:
        """What a checkpoint before `step` must hold: the sets, in the middle of a window."""
        return self._sets if self._kept and step % self.window else None

    def _choose(self, step: int, params: Any) -> np.ndarray:
        setup = self._setup
        steps = range(step, min(step + self.window, self._total))
        rows = np.unique(np.concatenate([self._order(s)[0] for s in steps]))
        tokens = setup.tokens["train"]
        sets = np.zeros((len(tokens), setup.method.num_negatives), np.int32)
        for indices, batch in scoring.batches(
            tokens,
            setup.buckets["train"],
            setup.config.eval.batch_size,
            setup.mesh,
            "choosing negatives",
            self._refs,
            rows,
        ):
            chosen, _ = setup.program.choose_batch(params, batch, np.int32(step // self.window))
            real = indices >= 0
            sets[indices[real]] = np.asarray(chosen)[real]
        return sets
