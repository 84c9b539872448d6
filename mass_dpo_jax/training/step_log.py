"""The log of a run's steps: their metrics, a progress bar, and warnings."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.runs.loggers import Log
from mass_dpo_jax.training import scoring
from mass_dpo_jax.utils import distributed

MAX_IDLE_STEPS = 10  # Updates in a row that change nothing, before a warning.
MAX_NAMED_EXAMPLES = 10  # In a message about a skipped update.


class BadSteps(UserError):
    """Too many updates in a row were skipped."""


class _StartedStep(NamedTuple):
    """The arguments of `StepLog.add`."""

    step: int
    metrics: Mapping[str, Any]
    ids: Sequence[str]
    not_finite: Any
    fraction_changed: Callable[[], float | None]


class StepLog:
    """Writes each step's metrics while the next step computes, and counts skipped updates.

    Args:
        log: the logs that metrics are written to.
        train: the section `config.train`.
        label: label of the progress bar.
        start: number of updates made so far.
        total: number of updates of the whole run.
    """

    def __init__(self, log: Log, train: ConfigDict, label: str, start: int, total: int):
        self._log, self._train = log, train
        self._bar = scoring.progress_bar(total=total, initial=start, desc=label, unit="step")
        self._started: _StartedStep | None = None
        self._skipped, self._complaint = 0, ""  # Updates in a row, and the reason of the last.
        self._idle = 0  # Updates in a row that changed nothing.
        self._clock = time.perf_counter()

    def add(
        self,
        step: int,
        metrics: Mapping[str, Any],
        ids: Sequence[str],
        not_finite: Any,
        fraction_changed: Callable[[], float | None] = lambda: None,
    ) -> None:
        """Takes the metrics of a step that has started, and writes those of the step before.

        Args:
            step: its number, from 1.
            metrics: scalars by name, on the devices.
            ids: names of its B examples.
            not_finite: bool [A, B / A] on the devices, the examples whose loss is not finite.
            fraction_changed: see `NegativeSets.fraction_changed`.

        Raises:
            BadSteps: the step before this one was the last of `train.max_skipped` in a row to be
                skipped.
        """
        self._write()
        self._started = _StartedStep(step, metrics, ids, not_finite, fraction_changed)
        self._check()

    def flush(self) -> None:
        """Waits for the last step and writes it.

        Raises:
            BadSteps: the same as for `add`.
        """
        self._write()
        self._check()

    def restart_clock(self) -> None:
        """Leaves what happened since the last step, an evaluation, out of the next one's speed."""
        self._clock = time.perf_counter()

    def print_line(self, text: str) -> None:
        """Prints a line above the progress bar."""
        self._bar.write(text)

    def close(self) -> None:
        """Writes the last step and removes the progress bar."""
        self._write()
        self._bar.close()

    def _write(self) -> None:
        if self._started is None:
            return
        started = self._started
        # Waits for the device; all metrics come from it together.
        arrays = jax.device_get(list(started.metrics.values()))
        values = {name: float(x) for name, x in zip(started.metrics, arrays, strict=True)}
        if (changed := started.fraction_changed()) is not None:
            values["selection/changed"] = changed
        now = time.perf_counter()
        values["examples_per_second"] = self._train.batch_size / (now - self._clock)
        self._clock = now
        self._log.write(started.step, values)
        postfix = {"loss": f"{values['loss']:.3f}"}
        if "rewards/accuracies" in values:
            postfix["accuracy"] = f"{values['rewards/accuracies']:.2f}"
            postfix["margin"] = f"{values['rewards/margins']:.3f}"
        postfix["examples/s"] = f"{values['examples_per_second']:.1f}"
        self._bar.set_postfix(postfix, refresh=False)
        self._bar.update()
        self._started = None
        self._count_skipped(started, values)
        self._count_idle(started.step, values)

    def _count_skipped(self, started: _StartedStep, values: Mapping[str, float]) -> None:
        self._skipped = self._skipped + 1 if values["skipped"] else 0
        if self._skipped:
            not_finite = distributed.gather(started.not_finite).reshape(-1)
            self._complaint = _describe_skipped(started.step, started.ids, not_finite)
            self.print_line(f"{self._complaint}; the update is skipped")

    def _count_idle(self, step: int, values: Mapping[str, float]) -> None:
        is_idle = 0 in (values.get("grad_norm"), values.get("update_ratio"))
        self._idle = self._idle + 1 if is_idle and not self._skipped else 0
        if self._idle == MAX_IDLE_STEPS:
            idle_part = "the gradient" if values["grad_norm"] == 0 else "the update of the weights"
            self.print_line(
                f"step {step}: {idle_part} has been 0 for {MAX_IDLE_STEPS} steps, so the model no "
                f"longer learns (loss {values['loss']:.3g}). If the model is no good, an update "
                "has thrown it far off: start another run with a lower "
                f"config.train.learning_rate (here {self._train.learning_rate:g})"
            )

    def _check(self) -> None:
        if self._skipped >= self._train.max_skipped:
            raise BadSteps(
                f"{self._complaint}; {self._skipped} updates in a row were skipped "
                "(config.train.max_skipped). The state before them is saved. Look at these "
                "examples, or start another run from it with a lower train.learning_rate: "
                "--config.model.path=WORKDIR"
            )


def _describe_skipped(step: int, ids: Sequence[str], not_finite: np.ndarray) -> str:
    """Names the examples whose loss is not finite or, where all are, the whole batch."""
    names = [name for name, bad in zip(ids, not_finite, strict=True) if bad] or list(ids)
    listed = ", ".join(names[:MAX_NAMED_EXAMPLES])
    hidden = len(names) - MAX_NAMED_EXAMPLES
    more = f" and {hidden} more" if hidden > 0 else ""
    quantity = "loss" if not_finite.any() else "gradient"
    return f"step {step}: the {quantity} is not finite; example(s) {listed}{more}"
