r"""Trains a policy on preferences with several negatives.

    python -m mass_dpo_jax.train --config=tiny --workdir=runs/tiny
    python -m mass_dpo_jax.train --config=llama3 --config.model.path=DIR \
        --config.data.path=pairs.jsonl --workdir=runs/mine
    python -m mass_dpo_jax.train --config=llama3 --config.model.path=DIR \
        --config.data.name=lastfm --config.data.path=DIR --config.dry_run=True

Run again on the same --workdir, it goes on from the newest checkpoint; --config may then be left
out. With --config.dry_run=True it only says what a step needs of memory and arithmetic. The work
folder gets config.json, metrics.jsonl, metrics.json, report.html (with figures/), tensorboard/,
checkpoints/ and model/ (architecture and tokenizer), and can be given to the other commands, and to
this one as --config.model.path.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from mass_dpo_jax import cli, evaluation, hosts
from mass_dpo_jax.dry_run import dry_run
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.training import checkpoint, interruption, loggers, run_folder, scoring
from mass_dpo_jax.training.optimizer import learning_rate, make_optimizer
from mass_dpo_jax.training.policy import save_description
from mass_dpo_jax.training.report import BadSteps, Report, StepLog, check_best
from mass_dpo_jax.training.setup import Reference, Setup, prepare
from mass_dpo_jax.training.updates import Batches, TrainStep, abstract_state, first_state

SPLITS = ("train", "validation", "test")
_log = logging.getLogger(__name__)


def train(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains, or goes on training.

    Returns:
      What it wrote to metrics.json: `start` and `final`, metrics of the test split (without one,
      of the validation split), and `gain`, the difference with paired standard errors.

    Raises:
      UserError: something in the configuration, the data or the model folder is wrong, or another
        training is at work in `workdir`.
    """
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


def main() -> None:
    config = cli.required(_CONFIG)
    if config.dry_run:
        if hosts.several():
            raise UserError("config.dry_run: expected one process; it only needs the mesh's sizes")
        folder = Path(_WORKDIR.value) if _WORKDIR.value else None
        print(dry_run(config, folder, SPLITS))
        return
    if _WORKDIR.value is None:
        raise UserError(
            "--workdir is missing: a folder for all that a run writes, as in --workdir=runs/first"
        )
    workdir = Path(_WORKDIR.value)
    try:
        with interruption.on_signals():
            done = train(config, workdir)
    except interruption.Stopped as signal:
        step = checkpoint.latest_step(workdir)
        where = "before its first step" if step is None else f"and saved at step {step}"
        print(f"stopped by {signal} {where}; run the same command again to go on")
        return
    for name in ("start", "final"):
        if done[name]:
            print(f"{done['split']}, {name}: {evaluation.line(done[name])}")
    print(f"written to {_WORKDIR.value}")


if __name__ == "__main__":
    _log = logging.getLogger("mass_dpo_jax.train")
    _CONFIG = cli.define_config()
    cli.define_hosts()
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder that the run keeps all it writes in.")
    cli.run(main, goes_on=True)
