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

import jax
import numpy as np
import optax
from absl import flags
from ml_collections import ConfigDict

from mass_dpo_jax import cli, evaluation, hosts
from mass_dpo_jax.data.batches import Batch, Order, make_batch
from mass_dpo_jax.dry_run import dry_run
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.training import checkpoint, interruption, loggers, run_folder
from mass_dpo_jax.training import mesh as mesh_lib
from mass_dpo_jax.training.optimizer import learning_rate, make_optimizer, memory_of_moments
from mass_dpo_jax.training.policy import save_description
from mass_dpo_jax.training.refresh import Sets
from mass_dpo_jax.training.report import BadSteps, Report, StepLog
from mass_dpo_jax.training.setup import Reference, Setup, prepare
from mass_dpo_jax.training.step import TrainState

SPLITS = ("train", "validation", "test")
_log = logging.getLogger(__name__)


def train(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains, or goes on training.

    Returns:
      What it wrote to metrics.json: `start` and `final`, metrics of the test split (without one,
      of the validation split), and `gain`, the difference with paired standard errors.

    Raises:
      UserError: something in the configuration, the data or the model folder is wrong.
    """
    hosts.check_shared(workdir, "--workdir")
    run_folder.check(workdir, config)
    loggers.check(config)
    done = hosts.from_first(run_folder.read_metrics(workdir))
    if done and done["finished"] and checkpoint.latest_step(workdir) == done["step"]:
        _log.info(f"{workdir}: finished at step {done['step']}; nothing to do")
        return done
    setup = prepare(config, workdir, SPLITS)
    order = Order(setup.buckets["train"], config.train.batch_size, config.seed)
    total = config.train.steps or config.train.epochs * order.steps_per_epoch
    params = setup.policy.weights(config.model.path, config.seed, config.model.lora.path)
    run_folder.claim(workdir, config)
    save_description(setup.policy, config, workdir)

    # The reference is a table: its weights are not needed after this.
    if not setup.method.reference:
        reference = Reference({})
    elif config.model.reference_path:
        reference = setup.reference(setup.policy.weights(config.model.reference_path, config.seed))
    else:
        reference = setup.reference(params)

    # Resume order: this run's newest checkpoint, else model.path, else random weights.
    trained, frozen = setup.policy.split(params)
    del params
    optimizer = make_optimizer(config.train, total)
    like = abstract_state(setup, optimizer)
    best = f"eval/{config.train.keep_best}"
    values = dict(hosts.from_first(list(run_folder.by_step(workdir, best).items())))
    saved = checkpoint.Checkpoints(workdir, config.train.keep_checkpoints, values)
    negatives = None
    if saved.latest() is None:
        state = TrainState(
            jax.device_put(np.int32(0), like.step.sharding),
            trained,
            jax.jit(optimizer.init, out_shardings=_shardings(like.opt_state))(trained),
        )
    else:
        del trained
        state, negatives, _ = saved.restore(like)
        _log.info(f"{workdir}: going on from step {int(state.step)} of {total}")

    start = int(state.step)
    evaluated = hosts.from_first(sorted(run_folder.evaluated(workdir)))
    log = loggers.Logs(config, workdir, start)
    report = Report(setup, reference.logps, workdir, log)
    rate = learning_rate(config.train, total)
    sets = Sets(setup, order, total, reference, negatives)
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
            saved.save(state, sets.to_keep(), {"config": config.to_dict(), **order.place(step)})

    # However training ends, each of these is closed: what is being written is waited for.
    with contextlib.ExitStack() as stack:
        for opened in (log, saved, steps):
            stack.callback(opened.close)
        try:
            if start == 0:
                report.at_start({**frozen, **state.params})
            elif every and start % every == 0 and start not in evaluated:
                evaluate(start)  # An interruption came between saving and evaluating.
            for step in range(start, total):
                interruption.check()
                negatives = sets.at(step, {**frozen, **state.params})
                batch, chosen, size = put(setup, order, step, reference, negatives)
                key = setup.key(step // sets.window)
                state, used, figures = setup.program.train_step(
                    optimizer, state, batch, chosen, key, size, frozen
                )
                rows = order(step)[0]
                changed = sets.changed(rows, used.numbers)
                more = {"learning_rate": rate(step), "selection/changed": changed}
                steps.add(step + 1, {**figures, **more}, [ids[row] for row in rows], used.bad)
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


def put(
    setup: Setup, order: Order, step: int, reference: Reference, sets: np.ndarray | None
) -> tuple[Batch, jax.Array | None, int]:
    """The micro-batches of a step on the devices, its sets, and the room they need after selection.

    Args:
      sets: `[M, n]`, its negatives where they were chosen beforehand.
    """
    rows, shape = order(step)
    refs = reference.logps.get("train")

    def make(rows: np.ndarray) -> tuple[Batch, np.ndarray | None]:
        every = rows.reshape(-1)
        batch = make_batch(setup.tokens["train"], every, shape, refs, reference.grams)
        made = batch, None if sets is None else sets[every]
        return jax.tree.map(lambda x: x.reshape(*rows.shape, *x.shape[1:]), made)

    rows = rows.reshape(-1, setup.config.train.micro_batch_size)
    batch, chosen = mesh_lib.place_rows(setup.mesh, rows, make)
    return batch, chosen, shape.selected


def abstract_state(setup: Setup, optimizer: optax.GradientTransformation) -> Any:
    """A `TrainState` of shapes and shardings: Adam's moments lie where their weights do."""
    params, _ = setup.policy.split(setup.policy.abstract)
    everywhere = mesh_lib.replicated(setup.mesh)
    memory = memory_of_moments(setup.config.train, setup.mesh)

    def beside(leaf: Any, weight: Any) -> jax.ShapeDtypeStruct:
        place = weight.sharding
        if memory is not None:
            place = place.with_memory_kind(memory)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        beside,
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=everywhere
        ),
    )
    return TrainState(jax.ShapeDtypeStruct((), np.int32, sharding=everywhere), params, opt_state)


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def main() -> None:
    config = cli.required(_CONFIG)
    if config.dry_run:
        if hosts.several():
            raise UserError("config.dry_run: expected one process; it only needs the mesh's sizes")
        folder = Path(_WORKDIR.value) if _WORKDIR.value else None
        print(dry_run(config, folder, SPLITS))
        return
    if _WORKDIR.value is None:
        raise UserError("--workdir is missing: a folder for checkpoints and metrics")
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
    cli.run(main)
