"""What a run tells: a line and a progress bar for each step, metrics before, during and after."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from ml_collections import ConfigDict

import mass_dpo_jax
from mass_dpo_jax import metrics
from mass_dpo_jax.data.examples import digest
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.runs import run_folder
from mass_dpo_jax.runs.loggers import Log
from mass_dpo_jax.training import scoring
from mass_dpo_jax.training.methods import METHODS
from mass_dpo_jax.training.setup import Setup
from mass_dpo_jax.utils import distributed
from mass_dpo_jax.utils.files import read_array

IDLE_STEPS = 10  # Updates in a row that change nothing, before that is said.
MOST_SELECTED = 256  # Rows of the final split in which the report shows what is selected.
if TYPE_CHECKING:
    from mass_dpo_jax.reports import run_page

METRICS, START_LOGPS, FINAL_LOGPS = "metrics.json", "logps-start.npy", "logps-final.npy"
EXIST_LOGPS = "logps-exist.npy"


def check_best(config: ConfigDict, splits: Collection[str]) -> None:
    """Raises UserError if the checkpoint to keep is the best by what no evaluation gives.

    Args:
      splits: the names of those that there are.
    """
    best, known = (
        config.train.keep_best,
        metrics.metric_names(METHODS[config.method].uses_reference),
    )
    if best and best not in known:
        raise UserError(
            f"config.train.keep_best={best!r}: expected a metric of the evaluations of "
            f"config.method={config.method}, one of {', '.join(known)}"
        )
    if best and not config.train.eval_every:
        raise UserError(
            f"config.train.keep_best={best!r}: config.train.eval_every=0 evaluates nothing; "
            "expected a number of steps, or keep_best empty"
        )
    if best and "validation" not in splits:
        raise UserError(
            f"config.train.keep_best={best!r}: there are no validation rows to evaluate; expected "
            "some, as with config.data.validation_share=0.1, or keep_best empty"
        )


class BadSteps(UserError):
    """Too many updates in a row were skipped."""


class StepLog:
    """Writes each step's figures while the next step computes, and counts skipped updates."""

    def __init__(self, log: Log, config: ConfigDict, start: int, total: int):
        self._log, self._batch_size = log, config.train.batch_size
        self._bar = scoring.progress_bar(
            total=total, initial=start, desc=config.method, unit="step"
        )
        self._waiting: tuple[int, Mapping[str, Any], Sequence[str], Any] | None = None
        self._most = config.train.max_skipped
        self._skipped, self._complaint = 0, ""  # In a row.
        self._idle, self._rate = 0, config.train.learning_rate  # Likewise.
        self._clock = time.perf_counter()

    def add(self, step: int, figures: Mapping[str, Any], ids: Sequence[str], bad: Any) -> None:
        """Takes the figures of a step that was started; writes those of the one before.

        Args:
          step: its number, from 1.
          figures: a figure may be a function that waits for the step; None is left out.
          ids: of its examples.
          bad: bool, of as many, on the devices: whose losses are not finite.

        Raises:
          BadSteps: `train.max_skipped` updates in a row were skipped, the last of them the one
            before this.
        """
        self._write()
        self._waiting = (step, figures, ids, bad)
        self._check()

    def flush(self) -> None:
        """Waits for the last step and writes it; raises as `add`."""
        self._write()
        self._check()

    def resume(self) -> None:
        """What happened since the last step (an evaluation) is not counted as the next one's."""
        self._clock = time.perf_counter()

    def say(self, text: str) -> None:
        self._bar.write(text)

    def close(self) -> None:
        self._write()
        self._bar.close()

    def _write(self) -> None:
        if self._waiting is None:
            return
        step, figures, ids, bad = self._waiting
        found = {name: value() if callable(value) else value for name, value in figures.items()}
        # Waits for the device; all figures come from it together.
        values = jax.device_get(list(found.values()))
        figures = {name: float(x) for name, x in zip(found, values, strict=True) if x is not None}
        now = time.perf_counter()
        figures["examples_per_second"] = self._batch_size / (now - self._clock)
        self._log.write(step, figures)
        shown = {"loss": f"{figures['loss']:.3f}"}
        if "rewards/accuracies" in figures:
            shown["accuracy"] = f"{figures['rewards/accuracies']:.2f}"
            shown["margin"] = f"{figures['rewards/margins']:.3f}"
        shown["examples/s"] = f"{figures['examples_per_second']:.1f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
        self._waiting, self._clock = None, now
        self._skipped = self._skipped + 1 if figures["skipped"] else 0
        if self._skipped:
            self._complaint = _which(step, ids, distributed.gather(bad).reshape(-1))
            self.say(f"{self._complaint}; the update is skipped")
        still = 0 in (figures.get("grad_norm"), figures.get("update_ratio"))
        self._idle = self._idle + 1 if still and not self._skipped else 0
        if self._idle == IDLE_STEPS:
            what = "the gradient" if figures["grad_norm"] == 0 else "the update of the weights"
            self.say(
                f"step {step}: {what} has been 0 for {IDLE_STEPS} steps, so nothing more is learnt "
                f"(loss {figures['loss']:.3g}). If the model is no good, an update has thrown it "
                "far off: begin another run with a lower config.train.learning_rate (here "
                f"{self._rate:g})"
            )

    def _check(self) -> None:
        if self._skipped >= self._most:
            raise BadSteps(
                f"{self._complaint}; {self._skipped} updates in a row were skipped "
                "(config.train.max_skipped). The state before them is saved. Look at these "
                "examples, or begin another run from it with a lower train.learning_rate: "
                "--config.model.path=WORKDIR"
            )


def _which(step: int, ids: Sequence[str], bad: np.ndarray) -> str:
    """The examples that an update was skipped for: those with a bad loss, or else the batch."""
    guilty = [name for name, wrong in zip(ids, bad, strict=True) if wrong] or list(ids)
    shown = ", ".join(guilty[:10])
    more = f" and {len(guilty) - 10} more" if len(guilty) > 10 else ""
    what = "loss" if bad.any() else "gradient"
    return f"step {step}: the {what} is not finite; example(s) {shown}{more}"


class Report:
    """Evaluation at the start of a run, during it, and at its end.

    The start and the end are measured on the test split, or on the validation split where there
    is no other; their log-probs are kept as `.npy` files `[M, C]` for comparisons row by row, and
    in another which candidates exist.
    """

    def __init__(
        self,
        setup: Setup,
        refs: Mapping[str, np.ndarray],
        workdir: Path,
        log: Log,
    ):
        self._setup, self._refs, self._workdir, self._log = setup, refs, workdir, log
        self._final = next((s for s in ("test", "validation") if s in setup.tokens), None)

    def at_start(self, params: Any) -> None:
        """The policy's ranking before the first update, into metrics.json."""
        start = None
        for split in {"validation", self._final} - {None}:
            if split not in self._setup.tokens:
                continue
            if self._setup.config.model.reference_path or split not in self._refs:
                logps = self._setup.score(params, split, "start")
            else:
                logps = self._refs[split]  # The policy still is the reference.
            found = metrics.evaluate_logps(logps, None, self._valid(split), 1.0)
            if split == "validation":
                self._log.write(0, {f"eval/{name}": value for name, value in found.items()})
            if split == self._final:
                start = found
                self._keep(START_LOGPS, split, logps)
        content = self._content(finished=False, step=0, start=start)
        run_folder.write_json(self._workdir / METRICS, content)

    def during(self, params: Any, step: int) -> tuple[str, dict[str, float]]:
        """Metrics of the validation split, into metrics.jsonl; the headline as text, and them."""
        if "validation" not in self._setup.tokens:
            return f"step {step}: no validation split", {}
        scores, _ = self._evaluate(params, "validation")
        found = {f"eval/{name}": value for name, value in scores.items()}
        self._log.write(step, found)
        return f"step {step}, validation: {format_headline(scores)}", found

    def at_end(self, params: Any, step: int) -> dict[str, Any]:
        """The final metrics, into report.html and metrics.json."""
        started = distributed.run_on_primary(lambda: run_folder.read_metrics(self._workdir)) or {}
        final = gain = tested = None
        if self._final:
            final, logps = self._evaluate(params, self._final)
            before = distributed.broadcast_array(
                read_array(self._workdir / START_LOGPS) if distributed.is_primary() else None
            )
            assert before is not None
            gain = metrics.ranking_gains(logps, before, self._valid(self._final))
            self._keep(FINAL_LOGPS, self._final, logps)
            if self._setup.config.log.report:
                tested = self._tested(self._final, params, before, logps)
        done = self._content(
            finished=True, step=step, start=started.get("start"), final=final, gain=gain
        )
        if self._setup.config.log.report and distributed.is_primary():
            # Only here: matplotlib is slow to import, and looks for the system's fonts.
            from mass_dpo_jax.reports import run_page

            run_page.write(self._workdir, self._setup.config, done, tested)
        # Last: a run that says it is finished is never looked at again.
        run_folder.write_json(self._workdir / METRICS, done)
        return done

    def _tested(
        self, split: str, params: Any, before: np.ndarray, after: np.ndarray
    ) -> run_page.Tested | None:
        """What the report shows of a split, on the first process. All of them must ask for it."""
        tokens = self._setup.tokens[split]
        selected = self._selected(split, params)
        if not distributed.is_primary():
            return None
        by_id = {example.id: example for example in self._setup.examples[split]}
        from mass_dpo_jax.reports import run_page

        return run_page.Tested(
            [by_id[name] for name in tokens.ids],
            tokens.numbers,
            self._valid(split),
            before,
            after,
            self._refs.get(split),
            selected,
        )

    def _selected(self, split: str, params: Any) -> np.ndarray | None:
        """bool `[K, C]`: what the method would train on in the first K rows of a split."""
        setup, method = self._setup, self._setup.method
        tokens = setup.tokens[split]
        # Of other splits than the training split no frozen features are kept.
        if method.is_supervised or method.frozen_features:
            return None
        rows = np.arange(min(len(tokens), MOST_SELECTED))
        if (
            method.uses_whole_pool
        ):  # Of n of the training split, which pools here may be larger than.
            return self._valid(split)[rows] & (np.arange(tokens.response_lengths.shape[1]) > 0)
        chosen = np.zeros((len(rows), tokens.response_lengths.shape[1]), bool)
        batches = scoring.batches(
            tokens,
            setup.buckets[split],
            setup.config.eval.batch_size,
            setup.mesh,
            "selecting",
            rows,
            self._refs.get(split),
        )
        for some, numbers in scoring.computed(
            lambda batch: setup.program.choose_batch(params, batch, setup.key(0))[0].numbers,
            batches,
        ):
            chosen[some[:, None], numbers] = True
        chosen[:, 0] = False  # Also what stands for no negative.
        return chosen

    def _keep(self, name: str, split: str, logps: np.ndarray) -> None:
        run_folder.write_table(self._workdir / name, logps)
        run_folder.write_table(self._workdir / EXIST_LOGPS, self._valid(split))

    def _valid(self, split: str) -> np.ndarray:
        return self._setup.tokens[split].response_lengths > 0

    def _tested_on(self) -> dict[str, Any]:
        """How many examples there are in the final split, and which."""
        if not self._final:
            return {"examples": 0, "digest": ""}
        split, setup = self._final, self._setup

        def found() -> dict[str, Any]:
            ids = set(setup.tokens[split].ids)
            rows = [example for example in setup.examples[split] if example.id in ids]
            return {"examples": len(rows), "digest": digest(rows)}

        return dict(distributed.run_on_primary(found))

    def _evaluate(self, params: Any, split: str) -> tuple[dict[str, float], np.ndarray]:
        logps = self._setup.score(params, split, "evaluation")
        beta = self._setup.config.beta
        refs = self._refs.get(split)
        return metrics.evaluate_logps(logps, refs, self._valid(split), beta), logps

    def _content(self, **more: Any) -> dict[str, Any]:
        """Of metrics.json."""
        version = mass_dpo_jax.__version__
        return {"version": version, "split": self._final, **self._tested_on(), **more}


def format_headline(values: Mapping[str, float]) -> str:
    """Formats the headline metrics of `metrics.evaluate_logps` as one line of text."""
    parts = []
    for prefix in ("policy", "reward"):
        if f"{prefix}/accuracy" in values:
            parts.append(
                f"{prefix} accuracy {100 * values[f'{prefix}/accuracy']:.1f} "
                f"± {100 * values[f'{prefix}/accuracy_se']:.1f}%, mrr {values[f'{prefix}/mrr']:.3f}"
            )
    if "rewards/margins" in values:
        parts.append(f"margin {values['rewards/margins']:.3f}")
    return "; ".join(parts)
