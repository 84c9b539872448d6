"""The training loop: from a configuration to a finished run, from the newest checkpoint on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optax
from ml_collections import ConfigDict

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.runs import loggers, metrics_files, origin, resume, run_config, run_folder
from mass_dpo_jax.training import checkpoint, interruption, mined_negatives, scoring
from mass_dpo_jax.training.evaluator import EvaluatedSplit, Evaluator, check_best, log_long_cutoffs
from mass_dpo_jax.training.method_config import find_unread
from mass_dpo_jax.training.mined_negatives import MinedNegatives
from mass_dpo_jax.training.model_paths import fetch_models
from mass_dpo_jax.training.open_policy import save_description
from mass_dpo_jax.training.optimizer import learning_rate, make_optimizer
from mass_dpo_jax.training.prepare import list_models_read, prepare
from mass_dpo_jax.training.prompts import check_gaps, choose_for_step, read_settings
from mass_dpo_jax.training.setup import Reference, Setup
from mass_dpo_jax.training.step import TrainState
from mass_dpo_jax.training.step_log import BadSteps, StepLog
from mass_dpo_jax.training.updates import Batches, TrainStep, abstract_state, first_state
from mass_dpo_jax.utils import distributed

SPLITS = ("train", "validation", "test")
# Writes report.html: from the run folder, the configuration, the final metrics, and the rows that
# these were measured on, if any.
WriteReport = Callable[[Path, ConfigDict, Mapping[str, Any], EvaluatedSplit | None], None]
_log = logging.getLogger(__name__)


def train(
    config: ConfigDict, workdir: Path, write_report: WriteReport | None = None
) -> dict[str, Any]:
    """Runs training to the end, resuming from the newest checkpoint.

    Args:
        config: the configuration, validated.
        workdir: the run folder.
        write_report: a function that writes the run's report, where `log.report` asks for one.
    """
    with contextlib.closing(run_folder.Lock(workdir)) as lock:
        metrics = _check_folder(config, workdir, lock)
        if metrics is not None:
            _log.info(f"{workdir}: finished at step {metrics['step']}; nothing to do")
            return metrics
        while (metrics := _train_on(config, workdir, lock, write_report)) is None:
            interruption.allow_signals()  # Mining may take hours, and has nothing to save.
            interruption.raise_if_requested()
        return metrics


def _train_on(
    config: ConfigDict, workdir: Path, lock: run_folder.Lock, write_report: WriteReport | None
) -> dict[str, Any] | None:
    """Trains to the end, or to where negatives are mined again: then returns None.

    What follows resumes the run with other negatives, as another process would.
    """
    start = _prepare(config, workdir, lock)
    reference = _score_reference(start)
    run = _restore_or_start(start, reference, write_report)
    if start.mined is not None:
        notes = run_folder.read_checkpoint_notes(workdir)
        if start.mined.epoch != mined_negatives.find_epoch(config, notes):
            run.close()  # The newest checkpoint is damaged; the one before has other negatives.
            return None
    return _run_steps(run)


@dataclasses.dataclass
class _Start:
    """A run before its first or next update. Made by `_prepare`.

    Attributes:
        config: the configuration that the run keeps, with paths as they were first typed.
        resolved_config: the same configuration with paths that lead to the files from here.
        digests: digests of the data, by split.
        mined: the negatives that the run mined; None where it trains on those of its data.
        params: weights that were read or drawn, empty if the run's checkpoint has them all.
        reference_params: the reference's weights, if any. The two are set to None as soon as they
            are used: the arrays must not outlive that.
    """

    workdir: Path
    config: ConfigDict
    resolved_config: ConfigDict
    setup: Setup
    digests: dict[str, str]
    mined: MinedNegatives | None
    params: Any
    reference_params: Any


@dataclasses.dataclass
class _Run:
    """A run that is being trained. Made by `_restore_or_start`.

    Attributes:
        settings: the section `config.train`.
        draw_noise_every: steps between two measurements of the draw's noise; 0 for none.
        is_mining_due: from an epoch and its batch to whether negatives are mined before it.
        notes: metadata saved with each checkpoint: the run's configuration and digests of its data.
        state: the training state, which every update replaces.
        frozen: weights that are not trained.
        best_metric_by_step: the metric that the best checkpoint is kept by; evaluations add to it.
        evaluated_steps: steps that were evaluated before this start.
    """

    settings: ConfigDict
    draw_noise_every: int
    is_mining_due: Callable[[int, int], bool]
    notes: dict[str, Any]
    workdir: Path
    batches: Batches
    train_step: TrainStep
    state: TrainState
    frozen: Any
    checkpoints: checkpoint.Checkpoints
    best_metric_by_step: dict[int, float]
    evaluated_steps: list[int]
    log: loggers.Logs
    step_log: StepLog
    evaluator: Evaluator

    @property
    def params(self) -> Any:
        """All weights of the policy as it is now."""
        return {**self.frozen, **self.state.params}

    def evaluate(self, step: int) -> None:
        """Evaluates the policy, prints the headline, and notes how good this step is."""
        text, metrics = self.evaluator.evaluate_step(self.params, step)
        self.step_log.print_line(text)
        best = f"eval/{self.settings.keep_best}"
        if best in metrics:
            self.best_metric_by_step[step] = metrics[best]

    def save(self) -> None:
        """Starts writing a checkpoint, unless no update has been made yet."""
        if step := int(self.state.step):
            batches = self.batches
            notes = {**self.notes, **batches.order.locate(step), **batches.prompts.notes()}
            self.checkpoints.save(self.state, self.train_step.sets.state, notes)

    def close(self) -> None:
        """Waits for everything that is being written, even if one of them fails."""
        with contextlib.ExitStack() as stack:
            for writer in (self.log, self.checkpoints, self.step_log):
                stack.callback(writer.close)


def _check_folder(
    config: ConfigDict, workdir: Path, lock: run_folder.Lock
) -> dict[str, Any] | None:
    """Checks that the run folder can take this run, before anything is loaded.

    Returns:
        The metrics of a run that is finished already; None: there is something to train.
    """
    distributed.run_on_primary(lambda: resume.check_settings(workdir, config))
    distributed.check_shared_folder(workdir, "--workdir")
    loggers.check_requirements(config.log)
    if workdir.exists():  # Otherwise it is made once everything has been found in order.
        lock.take()
    metrics: dict[str, Any] | None = distributed.run_on_primary(
        lambda: run_folder.read_finished_metrics(workdir)
    )
    if metrics is None:
        distributed.run_on_primary(lambda: run_folder.check_writable(workdir))
        check_best(config, SPLITS)
        check_gaps(read_settings(config), bool(config.model.reference_path))
        mined_negatives.check_mining(config)
    return metrics


def _prepare(config: ConfigDict, workdir: Path, lock: run_folder.Lock) -> _Start:
    """Loads data and weights, checks that they are the run's, and writes what the run is."""
    step = distributed.run_on_primary(lambda: run_folder.latest_step(workdir))
    has_checkpoint = step is not None
    resolved_config = run_config.use_own_files(config, workdir) if has_checkpoint else config
    resolved_config = fetch_models(resolved_config)
    mined = mined_negatives.open_mined(resolved_config, workdir)
    replace = None if mined is None else mined.replace
    setup = prepare(resolved_config, workdir, SPLITS, replace_negatives=replace)
    check_best(config, setup.tokens, setup.tokens.get("validation"))
    log_long_cutoffs(
        config.eval.cutoffs, {name: t for name, t in setup.tokens.items() if name != "train"}
    )
    digests = setup.digests() | (mined.digests if mined else {})
    distributed.run_on_primary(lambda: resume.check_data(workdir, digests))
    params, reference_params, weights = _read_weights(setup, has_checkpoint)
    if has_checkpoint:
        distributed.run_on_primary(lambda: origin.check_weights(workdir, weights))
    lock.take()
    # Checked again, since another training may have run meanwhile.
    distributed.run_on_primary(lambda: resume.check_settings(workdir, config))
    if has_checkpoint:
        resume.log_changed_settings(workdir, config)
        config = run_config.restore_typed_paths(config, workdir)
    run_folder.write_config(workdir, config)
    if not has_checkpoint:
        save_description(setup.policy, resolved_config.model, config.data.chat_template, workdir)
    if distributed.is_primary():
        origin.write(workdir, resolved_config, None if has_checkpoint else weights)
    return _Start(workdir, config, resolved_config, setup, digests, mined, params, reference_params)


def _read_weights(setup: Setup, has_checkpoint: bool) -> tuple[Any, Any, dict[str, str]]:
    """Reads the weights that training starts from, and the reference's.

    Returns:
        The weights, empty if the run's checkpoint has them all; the reference's, or None; and the
        digests of both by the setting that names them.
    """
    model, policy, uses_reference = setup.model, setup.policy, setup.method.uses_reference
    names = list_models_read(uses_reference, model, has_checkpoint)
    params: Any = {}
    reference, digests = None, {}
    if "path" in names or not model.path:
        params, digests["model.path"] = policy.read(model.path, setup.seed, model.lora.path)
        reference = params if uses_reference else None
    if "reference_path" in names:
        reference, digests["model.reference_path"] = policy.read(model.reference_path, setup.seed)
    return params, reference, {name: digest for name, digest in digests.items() if digest}


def _score_reference(start: _Start) -> Reference:
    """Scores all responses with the reference, and drops its weights: the scores are enough."""
    params, start.reference_params = start.reference_params, None
    if params is None:
        return Reference({})
    reference = start.setup.score_reference(params)
    for split, logps in reference.logps.items():
        # Single rows without a number are for the updates, which skip and name them.
        if not np.isfinite(logps).all(1).any():
            scoring.check_finite(logps, start.setup.tokens[split], "the reference")
    return reference


def _restore_or_start(
    start: _Start, reference: Reference, write_report: WriteReport | None
) -> _Run:
    """Restores the newest checkpoint or makes the first state, and opens the logs at its step."""
    setup, workdir, settings = start.setup, start.workdir, start.config.train
    batches = Batches(setup, reference)
    total = len(batches)
    optimizer = make_optimizer(settings, total)
    checkpoints, best_metric_by_step = _open_checkpoints(workdir, settings)

    # Where weights come from. The order is important:
    # 1. The newest checkpoint of this run that can be read; frozen weights from 2 or 3.
    # 2. The model at model.path: a Hugging Face folder, another run or one of its checkpoints; with
    #    LoRA its adapters from model.lora.path, or new ones.
    # 3. Random weights.
    state, frozen, negatives, notes = _restore_state(start, optimizer, checkpoints)
    batches.prompts.restore(notes)
    step = int(state.step)
    if step:
        _log.info(f"{workdir}: going on from step {step} of {total}")
    is_mining_due = functools.partial(mined_negatives.is_due, start.config)
    location = batches.order.locate(step)
    if is_mining_due(*location.values()):
        negatives = None  # Those of other pools.
    if start.mined is not None:
        start.mined.check_location(location, notes)

    evaluated_steps = distributed.run_on_primary(
        lambda: sorted(metrics_files.read_evaluated_steps(workdir))
    )
    log = loggers.Logs(start.config.log, dict(config_lib.flatten(start.config)), workdir, step)
    report = None
    if write_report is not None and start.config.log.report:
        report = functools.partial(write_report, workdir, start.resolved_config)
    return _Run(
        settings=settings,
        draw_noise_every=_draw_noise_every(start.config),
        is_mining_due=is_mining_due,
        notes={"config": start.config.to_dict(), "data": start.digests},
        workdir=workdir,
        batches=batches,
        train_step=TrainStep(batches, optimizer, frozen, negatives),
        state=state,
        frozen=frozen,
        checkpoints=checkpoints,
        best_metric_by_step=best_metric_by_step,
        evaluated_steps=evaluated_steps,
        log=log,
        step_log=StepLog(log, settings, setup.method.name, step, total),
        evaluator=Evaluator(setup, reference.logps, workdir, log, report),
    )


def _draw_noise_every(config: ConfigDict) -> int:
    """Returns 0 where no negatives are drawn at a step, whose noise could be measured."""
    is_read = "log.draw_noise_every" not in find_unread(config)
    return config.log.draw_noise_every if is_read else 0


def _open_checkpoints(
    workdir: Path, settings: ConfigDict
) -> tuple[checkpoint.Checkpoints, dict[int, float]]:
    """Opens a run's checkpoints; also returns the metric that the best is kept by, by step."""
    figure = f"eval/{settings.keep_best}"
    # As pairs: what processes send each other is JSON, whose objects have strings for keys.
    pairs = distributed.run_on_primary(
        lambda: list(metrics_files.read_figure(workdir, figure).items())
    )
    best_metric_by_step = dict(pairs)
    checkpoints = checkpoint.Checkpoints(workdir, settings.keep_checkpoints, best_metric_by_step)
    return checkpoints, best_metric_by_step


def _restore_state(
    start: _Start, optimizer: optax.GradientTransformation, checkpoints: checkpoint.Checkpoints
) -> tuple[TrainState, Any, np.ndarray | None, dict[str, Any]]:
    """Returns training state, frozen weights, and a checkpoint's negatives and notes, if any."""
    trained, frozen = start.setup.policy.split(start.params)
    start.params = None
    abstract = abstract_state(start.setup, optimizer)
    if checkpoints.latest() is None:
        return first_state(abstract, optimizer, trained), frozen, None, {}
    del trained  # Before as many weights are read.
    state, negatives, notes = checkpoints.restore(abstract)
    return state, frozen, negatives, notes


def _run_steps(run: _Run) -> dict[str, Any] | None:
    """Makes the updates that are left, evaluates and saves when due; returns the final metrics.

    Where negatives are to be mined before the next update, saves the state and returns None.
    """
    eval_every, num_steps = run.settings.eval_every, len(run.batches)
    first_step = int(run.state.step)
    schedule = learning_rate(run.settings, num_steps)
    with contextlib.closing(run):
        try:
            if first_step == 0:
                run.evaluator.evaluate_start(run.params)
            elif (
                eval_every
                and (first_step % eval_every == 0 or first_step == num_steps)
                and first_step not in run.evaluated_steps
            ):
                run.evaluate(first_step)  # An interruption came between saving and evaluating.
            for step in range(first_step, num_steps):
                interruption.raise_if_requested()
                _train_one_step(run, step, schedule(step))
                is_last = step + 1 == num_steps
                is_evaluated = eval_every > 0 and (is_last or (step + 1) % eval_every == 0)
                location = run.batches.order.locate(step + 1)
                is_mined = not is_last and run.is_mining_due(*location.values())
                is_saved = is_last or is_mined or (step + 1) % run.settings.checkpoint_every == 0
                if is_evaluated or is_saved:
                    run.step_log.flush()
                    if is_saved or run.settings.keep_best:
                        run.save()
                    if is_evaluated:
                        run.evaluate(step + 1)
                    run.step_log.restart_clock()
                if is_mined:
                    return None
        except (interruption.Stopped, BadSteps):
            run.save()
            raise
    return run.evaluator.evaluate_end(run.params, num_steps)


def _train_one_step(run: _Run, step: int, rate: Any) -> None:
    """Makes one update; its figures are logged while the next one computes."""
    window = run.train_step.sets.window
    if text := choose_for_step(run.batches, step, run.params, window, run.workdir):
        run.step_log.print_line(text)
        run.step_log.restart_clock()
    batch = run.batches[step]
    draw_noise: dict[str, Any] = {}
    if run.draw_noise_every and (step + 1) % run.draw_noise_every == 0:
        if (other := run.batches.find_other(step)) is not None:
            share = run.train_step.measure_draw_noise(run.state, batch, run.batches[other])
            draw_noise = {"selection/draw_noise": share}
    run.state, trained, figures = run.train_step.update(run.state, batch)
    interruption.defer_signals()
    changed = run.train_step.sets.fraction_changed(batch.rows, trained.candidate_ids)
    ids = run.batches.setup.tokens["train"].ids
    figures = {**figures, **draw_noise, "learning_rate": rate}
    names = [ids[row] for row in batch.rows]
    run.step_log.add(step + 1, figures, names, trained.not_finite, changed)
