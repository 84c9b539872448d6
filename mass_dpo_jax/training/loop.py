"""The training loop: from a configuration to a finished run, or on from its newest checkpoint."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mass_dpo_jax import hosts
from mass_dpo_jax.training import checkpoint, interruption, loggers, run_folder, scoring
from mass_dpo_jax.training.optimizer import learning_rate, make_optimizer
from mass_dpo_jax.training.policy import save_description
from mass_dpo_jax.training.report import BadSteps, Report, StepLog, check_best
from mass_dpo_jax.training.setup import Reference, Setup, prepare
from mass_dpo_jax.training.updates import Batches, TrainStep, abstract_state, first_state

SPLITS = ("train", "validation", "test")
_log = logging.getLogger(__name__)


def train(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Does what `mass_dpo_jax.train.train` says."""
    with contextlib.closing(run_folder.Lock(workdir)) as lock:
        return _train(config, workdir, lock)


def _train(config: ConfigDict, workdir: Path, lock: run_folder.Lock) -> dict[str, Any]:
    hosts.check_shared(workdir, "--workdir")
    run_folder.check(workdir, config)
    loggers.check(config)
    if workdir.exists():  # Else it is made when everything has been found in order.
        lock.take()
    done = hosts.from_first(run_folder.read_metrics(workdir))
    if done and done["finished"] and checkpoint.latest_step(workdir) == done["step"]:
        _log.info(f"{workdir}: finished at step {done['step']}; nothing to do")
        return done
    check_best(config, SPLITS)
    setup = prepare(config, workdir, SPLITS)
    check_best(config, setup.tokens)
    digests = setup.digests()
    run_folder.check_data(workdir, digests)
    params = setup.policy.weights(config.model.path, config.seed, config.model.lora.path)
    lock.take()
    run_folder.claim(workdir, config)
    save_description(setup.policy, config, workdir)

    # The reference is a table: its weights are not needed after this.
    if not setup.method.reference:
        reference = Reference({})
    elif config.model.reference_path:
        reference = setup.reference(setup.policy.weights(config.model.reference_path, config.seed))
    else:
        reference = setup.reference(params)

    batches = Batches(setup, reference)
    total = len(batches)

    # Resume order: this run's newest checkpoint, else model.path, else random weights.
    trained, frozen = setup.policy.split(params)
    del params
    weights = fingerprints(setup, reference, frozen)
    run_folder.check_weights(workdir, weights)
    optimizer = make_optimizer(config.train, total)
    like = abstract_state(setup, optimizer)
    best = f"eval/{config.train.keep_best}"
    values = dict(hosts.from_first(list(run_folder.by_step(workdir, best).items())))
    saved = checkpoint.Checkpoints(workdir, config.train.keep_checkpoints, values)
    negatives = None
    if saved.latest() is None:
        state = first_state(like, optimizer, trained)
    else:
        del trained
        state, negatives, _ = saved.restore(like)
        _log.info(f"{workdir}: going on from step {int(state.step)} of {total}")

    start = int(state.step)
    evaluated = hosts.from_first(sorted(run_folder.evaluated(workdir)))
    log = loggers.Logs(config, workdir, start)
    report = Report(setup, reference.logps, workdir, log)
    rate = learning_rate(config.train, total)
    train_step = TrainStep(batches, optimizer, frozen, negatives)
    steps = StepLog(log, config, start, total)
    every = config.train.eval_every
    ids = setup.tokens["train"].ids

    def evaluate(step: int) -> None:
        text, found = report.during({**frozen, **state.params}, step)
        steps.say(text)
        if best in found:
            values[step] = found[best]

    def save() -> None:
        if step := int(state.step):
            about = {"config": config.to_dict(), "data": digests, "weights": weights}
            where = {**about, **batches.order.place(step)}
            saved.save(state, train_step.sets.to_keep(), where)

    # However training ends, each of these is closed: what is being written is waited for.
    with contextlib.ExitStack() as stack:
        for opened in (log, saved, steps):
            stack.callback(opened.close)
        try:
            if start == 0:
                report.at_start({**frozen, **state.params})
            elif every and (start % every == 0 or start == total) and start not in evaluated:
                evaluate(start)  # An interruption came between saving and evaluating.
            for step in range(start, total):
                interruption.check()
                batch = batches[step]
                state, used, figures = train_step.update(state, batch)
                changed = train_step.sets.changed(batch.rows, used.numbers)
                more = {"learning_rate": rate(step), "selection/changed": changed}
                rows = [ids[row] for row in batch.rows]
                steps.add(step + 1, {**figures, **more}, rows, used.bad)
                last = step + 1 == total
                due = every > 0 and (last or (step + 1) % every == 0)
                keep = last or (step + 1) % config.train.checkpoint_every == 0
                if due or keep:
                    steps.flush()
                    if keep or config.train.keep_best:
                        save()
                    if due:
                        evaluate(step + 1)
                    steps.resume()
        except (interruption.Stopped, BadSteps):
            save()
            raise
    return report.at_end({**frozen, **state.params}, total)


def fingerprints(setup: Setup, reference: Reference, frozen: Any) -> dict[str, str]:
    """Of the weights that training reads and does not save. Only where every machine makes the same
    of a file: those drawn at random or quantized may differ by rounding."""
    config = setup.config.model
    if not config.path or (frozen and config.lora.base in ("int8", "nf4")):
        return {}
    found = {"reference": reference.fingerprint} if reference.fingerprint else {}
    return {**found, "base": scoring.fingerprint(frozen)} if frozen else found
