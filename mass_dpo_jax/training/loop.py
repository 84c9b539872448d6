"""The training loop: from a configuration to a finished run, or on from its newest checkpoint."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mass_dpo_jax.runs import loggers, metrics_files, origin, resume, run_config, run_folder
from mass_dpo_jax.training import checkpoint, interruption, scoring
from mass_dpo_jax.training.monitor import BadSteps, Evaluator, StepLog, WriteReport, check_best
from mass_dpo_jax.training.optimizer import learning_rate, make_optimizer
from mass_dpo_jax.training.policy import save_description
from mass_dpo_jax.training.setup import Reference, Setup, models_read, prepare
from mass_dpo_jax.training.updates import Batches, TrainStep, abstract_state, first_state
from mass_dpo_jax.utils import distributed

SPLITS = ("train", "validation", "test")
_log = logging.getLogger(__name__)


def train(
    config: ConfigDict, workdir: Path, write_report: WriteReport | None = None
) -> dict[str, Any]:
    """Does what `mass_dpo_jax.train.train` says; `write_report` writes the run's report, if any."""
    with contextlib.closing(run_folder.Lock(workdir)) as lock:
        return _train(config, workdir, lock, write_report)


def _train(
    config: ConfigDict, workdir: Path, lock: run_folder.Lock, write_report: WriteReport | None
) -> dict[str, Any]:
    distributed.run_on_primary(lambda: resume.check_settings(workdir, config))
    distributed.check_shared_folder(workdir, "--workdir")
    loggers.check(config)
    if workdir.exists():  # Else it is made when everything has been found in order.
        lock.take()
    done = distributed.run_on_primary(lambda: run_folder.read_finished_metrics(workdir))
    if done is not None:
        _log.info(f"{workdir}: finished at step {done['step']}; nothing to do")
        return done
    distributed.run_on_primary(lambda: run_folder.check_writable(workdir))
    check_best(config.train, config.method, SPLITS)
    begun = distributed.run_on_primary(lambda: run_folder.latest_step(workdir)) is not None
    setup = prepare(run_config.use_own_files(config, workdir) if begun else config, workdir, SPLITS)
    check_best(config.train, config.method, setup.tokens)
    digests = setup.digests()
    distributed.run_on_primary(lambda: resume.check_data(workdir, digests))
    params, reference_params, weights = _read_weights(setup, begun)
    if begun:
        distributed.run_on_primary(lambda: origin.check_weights(workdir, weights))
    lock.take()
    config = _claim(setup, config, workdir, None if begun else weights)
    # The reference is a table: its weights are not needed after this.
    reference = Reference({}) if reference_params is None else setup.reference(reference_params)
    for split, logps in reference.logps.items():
        if not np.isfinite(logps).all(1).any():  # Updates skip single rows, and name them.
            scoring.check_finite(logps, setup.tokens[split], "the reference")
    del reference_params

    batches = Batches(setup, reference)
    total = len(batches)

    # Resume order: this run's newest checkpoint, else model.path, else random weights.
    trained, frozen = setup.policy.split(params)
    del params
    optimizer = make_optimizer(config.train, total)
    like = abstract_state(setup, optimizer)
    best = f"eval/{config.train.keep_best}"
    values = dict(
        distributed.run_on_primary(lambda: list(metrics_files.read_figure(workdir, best).items()))
    )
    saved = checkpoint.Checkpoints(workdir, config.train.keep_checkpoints, values)
    negatives = None
    if saved.latest() is None:
        state = first_state(like, optimizer, trained)
    else:
        del trained
        state, negatives, _ = saved.restore(like)
        _log.info(f"{workdir}: going on from step {int(state.step)} of {total}")

    start = int(state.step)
    evaluated = distributed.run_on_primary(
        lambda: sorted(metrics_files.read_evaluated_steps(workdir))
    )
    log = loggers.Logs(config, workdir, start)
    evaluator = Evaluator(setup, reference.logps, workdir, log, write_report)
    rate = learning_rate(config.train, total)
    train_step = TrainStep(batches, optimizer, frozen, negatives)
    steps = StepLog(log, config.train, config.method, start, total)
    every = config.train.eval_every
    ids = setup.tokens["train"].ids

    def evaluate(step: int) -> None:
        text, found = evaluator.evaluate_step({**frozen, **state.params}, step)
        steps.print_line(text)
        if best in found:
            values[step] = found[best]

    def save() -> None:
        if step := int(state.step):
            about = {"config": config.to_dict(), "data": digests}
            where = {**about, **batches.order.locate(step)}
            saved.save(state, train_step.sets.state, where)

    # However training ends, each of these is closed: what is being written is waited for.
    with contextlib.ExitStack() as stack:
        for opened in (log, saved, steps):
            stack.callback(opened.close)
        try:
            if start == 0:
                evaluator.evaluate_start({**frozen, **state.params})
            elif every and (start % every == 0 or start == total) and start not in evaluated:
                evaluate(start)  # An interruption came between saving and evaluating.
            for step in range(start, total):
                interruption.raise_if_requested()
                batch = batches[step]
                state, used, figures = train_step.update(state, batch)
                interruption.defer_signals()
                changed = train_step.sets.fraction_changed(batch.rows, used.candidate_ids)
                metrics = {**figures, "learning_rate": rate(step)}
                steps.add(
                    step + 1, metrics, [ids[row] for row in batch.rows], used.not_finite, changed
                )
                last = step + 1 == total
                due = every > 0 and (last or (step + 1) % every == 0)
                keep = last or (step + 1) % config.train.checkpoint_every == 0
                if due or keep:
                    steps.flush()
                    if keep or config.train.keep_best:
                        save()
                    if due:
                        evaluate(step + 1)
                    steps.restart_clock()
        except (interruption.Stopped, BadSteps):
            save()
            raise
    return evaluator.evaluate_end({**frozen, **state.params}, total)


def _claim(
    setup: Setup, config: ConfigDict, workdir: Path, weights: Mapping[str, str] | None
) -> ConfigDict:
    """Writes what a run is, or that it goes on, and returns the settings that it keeps.

    Args:
      weights: digests of what it begins from; None: it goes on.
    """
    # Again: another training may have come and gone.
    distributed.run_on_primary(lambda: resume.check_settings(workdir, config))
    if weights is None:
        resume.log_changed_settings(workdir, config)
        config = run_config.restore_typed_paths(config, workdir)
    run_folder.write_config(workdir, config)
    if weights is not None:
        save_description(setup.policy, config, workdir)
    if distributed.is_primary():
        origin.write(workdir, setup.config, weights)
    return config


def _read_weights(setup: Setup, begun: bool) -> tuple[Any, Any, dict[str, str]]:
    """Reads the weights that training starts from and the reference's.

    Returns:
      The weights, empty where the run has them in its checkpoints; the reference's, or None; and
      digests of both by the setting that names them.
    """
    config, policy = setup.config, setup.policy
    names = models_read(config, begun)
    params: Any = {}
    reference, digests = None, {}
    if "path" in names or not config.model.path:
        params, digests["model.path"] = policy.read(
            config.model.path, config.seed, config.model.lora.path
        )
        reference = params if setup.method.uses_reference else None
    if "reference_path" in names:
        other = config.model.reference_path
        reference, digests["model.reference_path"] = policy.read(other, config.seed)
    return params, reference, {name: digest for name, digest in digests.items() if digest}
