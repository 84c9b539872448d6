"""What clusters and data do to a run: signals, full disks, damaged files, numbers that are none."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mass_dpo_jax.data.batches import Batch
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.runs import metrics_files, run_folder
from mass_dpo_jax.train import train
from mass_dpo_jax.training import checkpoint, checkpoint_reading, interruption, mesh
from mass_dpo_jax.training.evaluator import Evaluator
from mass_dpo_jax.training.method_config import make_method
from mass_dpo_jax.training.optimizer import make_optimizer
from mass_dpo_jax.training.prepare import prepare
from mass_dpo_jax.training.setup import Setup
from mass_dpo_jax.training.step import Program, TrainState
from mass_dpo_jax.training.step_log import BadSteps, StepLog
from mass_dpo_jax.training.updates import abstract_state
from tests.support.helpers import log_lines, slow, tiny_config, write_jsonl
from tests.support.runs import SAVED_ALL, SmallFiles, assert_same_run, final_state

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl")


# --- Signals.


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """SIGTERM to this process at the n-th call of a method."""
    real = getattr(owner, name)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize(
    ("owner", "name", "call", "saved_at"),
    [
        (Program, "train_step", 3, 3),  # In training.
        (Evaluator, "evaluate_step", 1, 2),  # In an evaluation.
        (Setup, "score", 1, None),  # In the reference pass.
        (Evaluator, "evaluate_end", 1, 4),  # In the last evaluation.
    ],
)
def test_sigterm_saves_and_the_run_goes_on(
    tmp_path: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    saved_at: int | None,
) -> None:
    config = tiny_config(
        data, **{"train.checkpoint_every": 100, "cache_dir": str(tmp_path / "cache")}
    )
    run, whole = tmp_path / "run", tmp_path / "whole"
    with monkeypatch.context() as patch:
        kill_at(patch, owner, name, call)
        with pytest.raises(interruption.Stopped, match="SIGTERM"), interruption.handle_signals():
            train(config, run)
    assert run_folder.latest_step(run) == saved_at
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    done = train(config, run)
    config.cache_dir = str(tmp_path / "other")  # With log-probs of the reference of its own.
    expected = train(config, whole)
    assert done == expected
    assert_same_run(config, run, whole)


@pytest.mark.parametrize("call", [1, 2])
def test_an_interruption_costs_no_evaluation(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Those of steps 3 and, as the last one, 4 each come after a save."""
    config = tiny_config(data, **SAVED_ALL, **{"train.eval_every": 3})
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(config, whole)
    assert metrics_files.read_evaluated_steps(whole) == {0, 3, 4}
    with monkeypatch.context() as patch:
        kill_at(patch, Evaluator, "evaluate_step", call)
        with pytest.raises(interruption.Stopped), interruption.handle_signals():
            train(config, run)
    assert run_folder.latest_step(run) == 2 + call
    assert metrics_files.read_evaluated_steps(run) == {0, 3, 4} - {2 + call, 4}
    train(config, run)
    assert_same_run(config, run, whole)


def test_a_second_signal_is_not_held_back() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for number, error in (
            (signal.SIGINT, KeyboardInterrupt),
            (signal.SIGTERM, interruption.Stopped),
        ):
            with pytest.raises(error), interruption.handle_signals():
                signal.raise_signal(number)  # There is nothing to save.
        with interruption.handle_signals():
            interruption.defer_signals()
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(interruption.Stopped, match="SIGINT"):
                interruption.raise_if_requested()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        # As `nohup` and shells have it for what runs in the background.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with interruption.handle_signals():
            interruption.defer_signals()
            signal.raise_signal(signal.SIGINT)
            interruption.raise_if_requested()
    finally:
        signal.signal(signal.SIGINT, before)


# --- Two at a time.


def test_two_trainings_do_not_share_a_folder(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(data)
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(config, whole)
    real, before = run_folder.write_config, Setup.score
    refused = []

    def second(folder: Path) -> None:
        with pytest.raises(UserError, match=f"{folder}: another training is at work"):
            train(config, folder)
        refused.append(folder)

    def claim(workdir: Path, *rest: Any) -> None:
        monkeypatch.setattr(run_folder, "write_config", real)
        second(workdir)  # Started at the same moment, in a folder that was not there.
        real(workdir, *rest)

    def score(self: Setup, *args: Any) -> Any:
        if len(refused) == 1:
            second(run)
        return before(self, *args)

    monkeypatch.setattr(run_folder, "write_config", claim)
    monkeypatch.setattr(Setup, "score", score)
    train(config, run)
    assert refused == [run, run]
    assert_same_run(config, run, whole)


def test_a_training_that_failed_leaves_the_folder_free(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(data)
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "evaluate_end", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError) as kept:  # And with it the frames of the training.
            train(config, tmp_path / "run")
    assert train(config, tmp_path / "run")["finished"]
    assert kept


def test_without_locks_a_run_goes_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    for lock in [run_folder.Lock(tmp_path), run_folder.Lock(tmp_path)]:
        lock.take()
        lock.close()


# --- Data that changes.


def split_data(tmp_path: Path) -> Path:
    folder = tmp_path / "splits"
    folder.mkdir()
    for seed, split in enumerate(("train", "validation", "test")):
        write_jsonl(folder / f"{split}.jsonl", examples=8, seed=seed)
    return folder


@pytest.mark.parametrize("change", ["train", "test", "score", "nothing said"])
def test_a_run_does_not_go_on_with_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    folder, run, whole = split_data(tmp_path), tmp_path / "run", tmp_path / "whole"
    config = tiny_config(folder, method="odpo")
    train(config, whole)
    with monkeypatch.context() as patch:
        kill_at(patch, Program, "train_step", 3)
        with pytest.raises(interruption.Stopped), interruption.handle_signals():
            train(config, run)
    split = "test" if change == "test" else "train"
    path = folder / f"{split}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    before = path.read_text()
    if change == "score":
        rows[0]["score_chosen"] = 10
    else:
        rows.pop()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    if change == "nothing said":  # By a checkpoint of before.
        about = run / "checkpoints" / "3" / "run" / "metadata"
        content = json.loads(about.read_text())
        assert set(content.pop("data")) == {"train", "validation", "test"}
        about.write_text(json.dumps(content))
        assert train(config, run)["finished"]
        return
    with pytest.raises(UserError, match=f"{run}: .* other data: {split} has .*Nothing is lost"):
        train(config, run)
    assert kept == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    path.write_text(before)
    train(config, run)
    assert_same_run(config, run, whole)


# --- Numbers that are none.


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, float], None]]:
    """Sets the reference log-prob of an example's chosen response: its loss becomes NaN, or its
    gradient infinite."""
    real = Setup.score_reference

    def poison(name: str, value: float) -> None:
        def score_reference(self: Setup, params: Any) -> Any:
            found = real(self, params)
            table = found.logps["train"].copy()
            table[self.tokens["train"].ids.index(name)] = value
            return found._replace(logps={**found.logps, "train": table})

        monkeypatch.setattr(Setup, "score_reference", score_reference)

    yield poison


@pytest.mark.parametrize("micro", [slow(8), 4])
def test_an_update_with_nan_is_skipped(
    tmp_path: Path,
    data: Path,
    poisoned: Callable[[str, float], None],
    capsys: pytest.CaptureFixture,
    micro: int,
) -> None:
    poisoned("row5", np.nan)
    config = tiny_config(
        data,
        **{"train.steps": 6, "train.micro_batch_size": micro, "data.validation_share": 0.0},
        **SAVED_ALL,
    )
    run = tmp_path / "run"
    train(config, run)
    lines = [line for line in log_lines(run) if "loss" in line]
    skipped = [line["step"] for line in lines if line["skipped"]]
    # 24 examples in batches of 8: in each of the two epochs row5 comes once.
    assert len(skipped) == 2 and skipped[0] <= 3 < skipped[1]
    assert [line["loss"] is None for line in lines] == [line["skipped"] == 1 for line in lines]
    json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    told = capsys.readouterr().out
    for step in skipped:
        assert f"step {step}: the loss is not finite; example(s) row5; the update is skip" in told
    like = abstract_state(prepare(config, run, ("train",)), make_optimizer(config.train, 6))
    saved = checkpoint.Checkpoints(run, keep=8)

    def state(step: int) -> Any:
        found = checkpoint_reading.read_checkpoint(
            (run / "checkpoints" / str(step)).absolute(),
            {"params": like.params, "opt_state": like.opt_state},
        )
        return jax.tree.map(np.asarray, (found["params"], found["opt_state"][0]))

    for step in skipped:
        if step > 1:
            jax.tree.map(np.testing.assert_array_equal, state(step), state(step - 1))
    taken = next(line["step"] for line in lines if not line["skipped"] and line["step"] > 1)
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, state(taken), state(taken - 1))
    saved.close()


class Steep(Program):
    """Has a loss that is finite where its gradient is not: at a weight of 0."""

    def loss(self, params: Any, batch: Any, *rest: Any) -> Any:
        return jnp.sqrt(params["w"]).sum(), (jnp.zeros(batch.index.shape, bool), {})


@pytest.mark.parametrize(("weight", "skipped"), [(0.0, 1), (1.0, 0)])
def test_an_update_with_an_infinite_gradient_is_skipped(
    tmp_path: Path, weight: float, skipped: int
) -> None:
    config = tiny_config(tmp_path, method="sft", **{"train.warmup_ratio": 0.0})
    everywhere = mesh.replicated_sharding(mesh.make_mesh(config.mesh))
    program = Steep(None, make_method(config, largest_pool=1), {"w": everywhere})
    optimizer = make_optimizer(config.train, 4)
    before = {"w": np.array([weight, 1.0], np.float32)}
    state = TrainState(jnp.int32(0), jax.tree.map(jnp.array, before), optimizer.init(before))
    batch = Batch(np.zeros((1, 2, 4), np.int32), *[None] * 4, index=np.zeros((1, 2), np.int32))
    state, _, figures = program.train_step(optimizer, state, batch, None, jax.random.key(0), 8)
    assert np.isfinite(figures["loss"]) and figures["skipped"] == skipped
    assert np.array_equal(state.params["w"], before["w"]) == bool(skipped)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_a_run_of_bad_updates_ends_with_the_examples_and_a_saved_state(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Program.train_step
    calls = 0

    def poison(self: Program, optimizer: Any, state: Any, batch: Any, *rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 2:
            batch = batch._replace(ref_logps=batch.ref_logps.at[0, 1].set(jnp.nan))
        return real(self, optimizer, state, batch, *rest)

    monkeypatch.setattr(Program, "train_step", poison)
    changes = {"train.steps": 20, "train.max_skipped": 3, "train.checkpoint_every": 100}
    config = tiny_config(data, **changes, **{"train.eval_every": 0})
    with pytest.raises(BadSteps, match=r"step 5: the loss is not finite; example\(s\) row\d+; 3 "):
        train(config, tmp_path / "run")
    # The sixth step had begun when the fifth was looked at.
    assert run_folder.latest_step(tmp_path / "run") == 6
    assert [line["skipped"] for line in log_lines(tmp_path / "run") if "loss" in line][:5] == [
        0, 0, 1, 1, 1,
    ]  # fmt: skip
    state = final_state(tmp_path / "run", config)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_only_updates_skipped_in_a_row_end_a_run(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **{"train.max_skipped": 2})
    steps = StepLog(SimpleNamespace(write=lambda *_: None), config.train, "", 0, 6)

    def add(step: int, skipped: int) -> None:
        steps.add(step, {"loss": 1.0, "skipped": skipped}, ["row1"], np.array([bool(skipped)]))

    for step, skipped in enumerate((1, 0, 1, 0, 1), start=1):
        add(step, skipped)
    add(6, 1)
    with pytest.raises(BadSteps, match=r"step 6: the loss is not finite; .* row1; 2 updates in a"):
        steps.flush()


@pytest.mark.parametrize("still", ["grad_norm", "update_ratio"])
def test_steps_that_change_nothing_are_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture, still: str
) -> None:
    config = tiny_config(tmp_path, **{"train.learning_rate": 1e6, "train.max_skipped": 99})
    steps = StepLog(SimpleNamespace(write=lambda *_: None), config.train, "", 0, 99)

    def add(count: int, value: float, skipped: int = 0) -> str:
        figures = {"loss": 2.5, "grad_norm": 1.0, "update_ratio": 1.0, "skipped": skipped}
        for _ in range(count):
            step[0] += 1
            steps.add(step[0], {**figures, still: value}, ["row1"], np.array([bool(skipped)]))
        return capsys.readouterr().out

    step = [0]
    for _ in range(3):  # Nine in a row, as a warm-up begins and a schedule ends.
        assert add(9, 0.0) == ""
        assert add(1, 0.5) == ""
    assert "the update is skipped" in add(12, 0.0, skipped=1)
    assert "has been 0" not in add(10, 0.0)  # The last one is written with the next.
    said = add(15, 0.0)
    what = "the gradient" if still == "grad_norm" else "the update of the weights"
    assert said.count(f"{what} has been 0 for 10 steps") == 1
    assert "(loss 2.5)" in said and "lower config.train.learning_rate (here 1e+06)" in said
    steps.close()


# --- Full disks.


@pytest.mark.parametrize("always", [False, True])
def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: Callable[[], str],
    always: bool,
) -> None:
    config = tiny_config(data, **SAVED_ALL)
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(config, whole)
    save = checkpoint.Checkpoints.save

    def full(self: checkpoint.Checkpoints, state: Any, *rest: Any) -> None:
        if int(state.step) == 2 or (always and int(state.step) > 2):
            self._settle()
            # Above the log's size and below that of any array's file.
            with SmallFiles(20_000):
                save(self, state, *rest)
                self._settle()
        else:
            save(self, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", full)
        if always:
            with pytest.raises(UserError, match=r"not written: File too large; the newest is that"):
                train(config, run)
        else:
            train(config, run)
    assert "checkpoints/2: this checkpoint was not written: File too large" in said()
    steps = [1] if always else [1, 3, 4]
    assert run_folder.list_steps(run) == steps
    train(config, run)
    assert_same_run(config, run, whole)
    # Orbax's threads may write on for a moment after a failure: the next start has removed that.
    assert all(path.name.isdecimal() for path in (run / "checkpoints").iterdir())


def test_a_save_that_fails_at_once_is_not_forgotten(tmp_path: Path) -> None:
    values = {"w": jnp.ones(3)}
    saved = checkpoint.Checkpoints(tmp_path)
    saved.save(checkpoint.TrainState(jnp.int32(1), values, values), None, {})
    # What orbax refuses before it writes: a tree that is a bare array.
    saved.save(checkpoint.TrainState(jnp.int32(2), values, jnp.ones(3)), None, {})
    with pytest.raises(UserError, match=r"checkpoints/2: .* not written.*newest is that of step 1"):
        saved.close()


def test_a_log_that_cannot_be_written_ends_the_run(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(data, **SAVED_ALL)
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(config, whole)
    write = metrics_files.MetricsLog.write

    def full(self: metrics_files.MetricsLog, step: int, figures: Any) -> None:
        if step == 3 and "loss" in figures:
            with SmallFiles(self._path.stat().st_size + 20):
                write(self, step, figures)
        else:
            write(self, step, figures)

    with monkeypatch.context() as patch:
        patch.setattr(metrics_files.MetricsLog, "write", full)
        with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written: File too large"):
            train(config, run)
    train(config, run)
    assert_same_run(config, run, whole)
