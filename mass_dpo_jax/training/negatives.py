"""Negatives that outlive a step (`selection.refresh`): chosen ahead, kept in the state, saved."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from mass_dpo_jax.config_values import parse_refresh
from mass_dpo_jax.data.batches import Order
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.training import scoring
from mass_dpo_jax.training.setup import Reference, Setup
from mass_dpo_jax.training.step import WindowNegatives
from mass_dpo_jax.utils import distributed

NOT_CHOSEN = -1  # The candidate id of an example without a choice yet; 0 stands for no negative.
_log = logging.getLogger(__name__)


class NegativeSets:
    """The negatives of the steps of one refresh window after another.

    At a window's first step, every example that the window trains on is scored with the policy of
    that moment, and its negatives are kept until the window ends. With `refresh=step`, and for
    criteria that need no scoring, negatives are chosen inside of the train step. In both cases the
    last negatives of every example are remembered, to measure how many of them change.

    Args:
        setup: the run's setup.
        order: a function from a step to its rows.
        total_steps: number of updates of the run.
        reference: the scores and features kept from the reference.
        restored: int32 [M, n], the `state` at the step that training resumes from.

    Attributes:
        window: the refresh interval in steps.
    """

    def __init__(
        self,
        setup: Setup,
        order: Order,
        total_steps: int,
        reference: Reference,
        restored: np.ndarray | None,
    ):
        refresh = setup.refresh
        # `once` is one window as long as the run.
        self.window = parse_refresh(refresh, order.steps_per_epoch) or total_steps
        self._scores_pools = setup.method.scores_pools
        self._outlive_steps = self.window > 1 and self._scores_pools
        self._setup, self._order, self._total = setup, order, total_steps
        self._reference = reference
        # The window that `_last` belongs to; None before the first, or of restored negatives.
        self._window: int | None = None
        self._is_restored = restored is not None
        shape = (len(setup.tokens["train"]), setup.method.num_negatives)
        no_choice = np.full(shape, NOT_CHOSEN, np.int32)
        self._last = no_choice if restored is None else np.array(restored)
        self._fraction_changed: float | None = None

    def for_step(
        self, step: int, params: Any, state_sets: WindowNegatives | None = None
    ) -> WindowNegatives | None:
        """Returns the negatives to train on at a step; None: they are chosen inside of it.

        Chooses at the first step of a window, and at any other whose negatives are missing.

        Args:
            step: counted from 0.
            params: the policy before the step.
            state_sets: the negatives of the last step's state; they override those remembered here.

        Raises:
            UserError: the state's negatives belong to other examples or have another number.
        """
        self._fraction_changed = None
        if not self._outlive_steps:
            return None
        window, steps_into_window = divmod(step, self.window)
        if state_sets is not None:
            self._take(state_sets)
        elif self._is_restored and self._window is None:
            self._window = window
        rows = self._order(step)[0]
        has_choices = self._window == window and (self._last[rows] != NOT_CHOSEN).all()
        if steps_into_window and not has_choices:
            _log.warning(
                f"step {step}: the state has no sets of negatives of its window, which began at "
                f"step {step - steps_into_window} (selection.refresh={self._setup.refresh}); "
                "they are chosen now, with the weights of this step. To continue with the earlier "
                "ones, keep TrainState.sets with the other parts of the state"
            )
        if not (steps_into_window and has_choices):
            self._last = self._last.copy()  # A state still holds the previous array.
            self._fraction_changed = self._remember(*self._choose(step, params))
            self._window = window
        return WindowNegatives(window, self._last)

    def fraction_changed(self, rows: np.ndarray, candidate_ids: Any) -> Callable[[], float | None]:
        """Returns a function for the fraction of examples whose negatives changed at a step.

        The function waits for the step where that has chosen the negatives; otherwise it only
        returns a number. It gives None where nothing was chosen, or for the first time. Call this
        after `for_step` of the same step.

        Args:
            rows: int [B], the examples that the step trained on.
            candidate_ids: int32 [A, B / A, n], their negatives, on the devices.
        """
        if self._outlive_steps or not self._scores_pools:
            fraction = self._fraction_changed
            return lambda: fraction
        return lambda: self._remember(rows, candidate_ids)

    @property
    def state(self) -> np.ndarray | None:
        """What a checkpoint has to hold: int32 [M, n], every example's last negatives, or None."""
        return self._last if self._scores_pools else None

    def _take(self, state_sets: WindowNegatives) -> None:
        candidate_ids = np.asarray(distributed.gather(state_sets.candidate_ids), np.int32)
        if candidate_ids.shape != self._last.shape:
            raise UserError(
                f"the state's sets of negatives are {list(candidate_ids.shape)}, expected "
                f"{list(self._last.shape)} for these batches (training examples, num_negatives): "
                "a state of another run? state._replace(sets=None) chooses them anew"
            )
        self._last, self._window = candidate_ids, int(state_sets.window)

    def _remember(self, rows: np.ndarray, candidate_ids: Any) -> float | None:
        new_ids = distributed.gather(candidate_ids).reshape(len(rows), -1)
        had_choice = (self._last[rows] != NOT_CHOSEN).all(1)
        differ = (np.sort(self._last[rows]) != np.sort(new_ids)).any(1)
        self._last[rows] = new_ids
        return float(differ[had_choice].mean()) if had_choice.any() else None

    def _choose(self, step: int, params: Any) -> tuple[np.ndarray, np.ndarray]:
        """Chooses for the examples of a step and of the rest of its window.

        Returns:
            Their rows and candidate ids [rows, n].
        """
        end = (step // self.window + 1) * self.window
        steps = range(step, min(end, self._total))
        window_rows = np.unique(np.concatenate([self._order(s)[0] for s in steps]))
        setup = self._setup
        key = setup.key(step // self.window)
        ref_logps, ref_grams = self._reference.logps.get("train"), self._reference.grams
        batches = setup.scoring_batches(
            "train", "choosing negatives", window_rows, ref_logps, ref_grams
        )
        choices = scoring.compute_each(
            lambda batch: setup.program.choose_batch(params, batch, key)[0].candidate_ids, batches
        )
        rows, candidate_ids = zip(*choices, strict=True)
        return np.concatenate(rows), np.concatenate(candidate_ids)
