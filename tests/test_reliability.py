"""What clusters and data do to a run: signals, full disks, damaged files, numbers that are none."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import log_lines, losses, tiny_config, write_jsonl
from jax.experimental import multihost_utils

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.export import export
from mass_dpo_jax.train import abstract_state, train
from mass_dpo_jax.training import checkpoint, interruption, run_folder
from mass_dpo_jax.training.optimizer import make_optimizer
from mass_dpo_jax.training.report import BadSteps, Report, check_best
from mass_dpo_jax.training.setup import Setup, prepare
from mass_dpo_jax.training.step import Program

pytestmark = pytest.mark.usefixtures("one_device")

SAVED_ALL = {"train.checkpoint_every": 1, "train.keep_checkpoints": 8}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl")


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """What the program has logged so far."""
    monkeypatch.setattr(logging.getLogger("mass_dpo_jax"), "propagate", True)
    caplog.set_level(logging.INFO)
    return lambda: caplog.text


def final_state(workdir: Path, config: Any) -> Any:
    """Weights and moments of the newest checkpoint, as numpy."""
    setup = prepare(config, workdir, ("train",))
    like = abstract_state(setup, make_optimizer(config.train, config.train.steps))
    saved = checkpoint.Checkpoints(workdir, keep=100)
    state = saved.restore(like).state
    saved.close()
    return jax.tree.map(np.asarray, state)


def assert_same_run(config: Any, one: Path, other: Path) -> None:
    """Bit for bit: weights, moments, and every figure but the speed."""
    a, b = final_state(one, config), final_state(other, config)
    jax.tree.map(np.testing.assert_array_equal, a, b)

    def figures(workdir: Path) -> list[dict[str, Any]]:
        return [
            {k: v for k, v in line.items() if k != "examples_per_second"}
            for line in log_lines(workdir)
        ]

    assert figures(one) == figures(other)


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
        (Report, "during", 1, 2),  # In an evaluation.
        (Setup, "score", 1, None),  # In the reference pass.
        (Report, "at_end", 1, 4),  # In the last evaluation.
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
        with pytest.raises(interruption.Stopped, match="SIGTERM"), interruption.on_signals():
            train(config, run)
    assert checkpoint.latest_step(run) == saved_at
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    done = train(config, run)
    config.cache_dir = ""
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
    assert run_folder.evaluated(whole) == {0, 3, 4}
    with monkeypatch.context() as patch:
        kill_at(patch, Report, "during", call)
        with pytest.raises(interruption.Stopped), interruption.on_signals():
            train(config, run)
    assert checkpoint.latest_step(run) == 2 + call
    assert run_folder.evaluated(run) == {0, 3, 4} - {2 + call, 4}
    train(config, run)
    assert_same_run(config, run, whole)


def test_a_second_signal_is_not_held_back() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with interruption.on_signals():
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(interruption.Stopped, match="SIGINT"):
                interruption.check()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        # As `nohup` and shells have it for what runs in the background.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with interruption.on_signals():
            signal.raise_signal(signal.SIGINT)
            interruption.check()
    finally:
        signal.signal(signal.SIGINT, before)


# --- Two at a time.


def test_two_trainings_do_not_share_a_folder(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(data)
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(config, whole)
    real, before = run_folder.claim, Setup.score
    refused = []

    def second(folder: Path) -> None:
        with pytest.raises(UserError, match=f"{folder}: another training is at work"):
            train(config, folder)
        refused.append(folder)

    def claim(workdir: Path, *rest: Any) -> None:
        monkeypatch.setattr(run_folder, "claim", real)
        second(workdir)  # Started at the same moment, in a folder that was not there.
        real(workdir, *rest)

    def score(self: Setup, *args: Any) -> Any:
        if len(refused) == 1:
            second(run)
        return before(self, *args)

    monkeypatch.setattr(run_folder, "claim", claim)
    monkeypatch.setattr(Setup, "score", score)
    train(config, run)
    assert refused == [run, run]
    assert_same_run(config, run, whole)


def test_a_training_that_failed_leaves_the_folder_free(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(data)
    with monkeypatch.context() as patch:
        patch.setattr(Report, "at_end", lambda *_: 1 / 0)
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
        with pytest.raises(interruption.Stopped), interruption.on_signals():
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
    real = Setup.reference

    def poison(name: str, value: float) -> None:
        def reference(self: Setup, params: Any) -> Any:
            found = real(self, params)
            table = found.logps["train"].copy()
            table[self.tokens["train"].ids.index(name)] = value
            return found._replace(logps={**found.logps, "train": table})

        monkeypatch.setattr(Setup, "reference", reference)

    yield poison


@pytest.mark.parametrize("micro", [8, 4])
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
        found = checkpoint._read(
            (run / "checkpoints" / str(step)).absolute(),
            {"params": like.params, "opt_state": like.opt_state},
        )
        return jax.tree.map(np.asarray, (found["params"], found["opt_state"][1][0]))

    for step in skipped:
        if step > 1:
            jax.tree.map(np.testing.assert_array_equal, state(step), state(step - 1))
    taken = next(line["step"] for line in lines if not line["skipped"] and line["step"] > 1)
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, state(taken), state(taken - 1))
    saved.close()


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
    assert checkpoint.latest_step(tmp_path / "run") == 6
    assert [line["skipped"] for line in log_lines(tmp_path / "run") if "loss" in line][:5] == [
        0, 0, 1, 1, 1,
    ]  # fmt: skip
    state = final_state(tmp_path / "run", config)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


# --- Checkpoints.


def test_a_checkpoint_says_what_it_is_of(tmp_path: Path, data: Path) -> None:
    config = tiny_config(data, **{"data.validation_share": 0.0})
    train(config, tmp_path / "run")
    about = json.loads((tmp_path / "run/checkpoints/4/run/metadata").read_text())
    assert (about["step"], about["epoch"], about["batch_of_epoch"]) == (4, 1, 1)
    assert about["config"] == config.to_dict()
    assert about["versions"]["jax"] == jax.__version__
    assert len(about["digests"]["params"]) == 64


def damage(folder: Path, how: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    if how == "truncated":
        largest.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        largest.write_bytes(b"")
    elif how == "missing":
        largest.unlink()
    elif how == "no description":
        (folder / "run" / "metadata").write_text('{"step": ')
    elif how == "no tables":
        for path in files:
            if path.name == "_METADATA":
                path.unlink()
    else:
        for place in range(0, len(content), len(content) // 23):
            content[place] ^= 1 << (place % 8)
        largest.write_bytes(content)


HOW = ("truncated", "empty", "missing", "no description", "no tables", "flipped")


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    tmp_path: Path, data: Path, how: str, said: Callable[[], str]
) -> None:
    config = tiny_config(data)
    run, whole = tmp_path / "run", tmp_path / "whole"
    train(config, whole)
    train(config, run)
    damage(run / "checkpoints" / "4", how)
    (run / "metrics.json").unlink()  # As if it had been cut off after step 4.
    train(config, run)
    assert f"{run}/checkpoints/4: not a readable checkpoint: " in said()
    assert "going on from step 2 of 4" in said()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["2", "4", "4.damaged"]
    assert losses(run) == losses(whole)


def test_weights_of_a_damaged_run_come_from_the_checkpoint_before(
    tmp_path: Path, data: Path, said: Callable[[], str]
) -> None:
    config = tiny_config(data)
    train(config, tmp_path / "run")
    setup = prepare(config, tmp_path / "run", ("train",))
    before = jax.tree.map(np.asarray, setup.policy.weights(f"{tmp_path}/run/checkpoints/2", 0))
    damage(tmp_path / "run/checkpoints/4/params", "flipped")
    found = setup.policy.weights(str(tmp_path / "run"), 0)
    jax.tree.map(np.testing.assert_array_equal, found, before)
    assert "checkpoints/4: not a readable checkpoint" in said()
    damage(tmp_path / "run/checkpoints/2/params", "truncated")
    with pytest.raises(UserError, match=r"none of its checkpoints can be read \(step 4, 2\)"):
        setup.policy.weights(str(tmp_path / "run"), 0)
    (tmp_path / "run/metrics.json").unlink()
    with pytest.raises(UserError, match="none of its checkpoints can be read"):
        train(config, tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["2", "4"]  # Nothing was renamed or removed.


def test_an_export_notices_a_flipped_bit(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit of one weight, in what the files are decompressed to: no library would see it."""
    train(tiny_config(data), tmp_path / "run")
    reader = checkpoint.Reader(tmp_path / "run", 4)
    reader(("norm", "scale"), None)
    with pytest.raises(UserError, match="not what was written"):
        reader.check()  # Not everything was read.
    export(tmp_path / "run", tmp_path / "whole")
    real = checkpoint.ts.open

    class Flipped:
        def __init__(self, array: Any):
            self.shape, self._array = array.shape, array

        def __getitem__(self, layer: int) -> Flipped:
            return Flipped(self._array[layer])

        def read(self) -> Any:
            values = np.array(self._array.read().result())
            values.view(np.uint32).flat[7] ^= 1
            return SimpleNamespace(result=lambda: values)

    def flip(spec: Any, **more: Any) -> Any:
        opened = real(spec, **more)
        if "embed" not in spec["kvstore"]["path"]:
            return opened
        return SimpleNamespace(result=lambda: Flipped(opened.result()))

    monkeypatch.setattr(checkpoint.ts, "open", flip)
    with pytest.raises(UserError, match="params: not what was written"):
        export(tmp_path / "run", tmp_path / "flipped")
    assert not (tmp_path / "flipped").exists()


def test_only_the_loop_asks_whether_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that asked too, with another number, made several processes lose a SIGTERM."""

    def asked(number: int) -> bool:
        raise AssertionError(f"a save asked with {number}")

    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked)
    values = {"w": jnp.ones(3)}
    saved = checkpoint.Checkpoints(tmp_path)
    for step in (1, 2):
        saved.save(checkpoint.TrainState(jnp.int32(step), values, values), None, {})
    saved.close()
    assert checkpoint.latest_step(tmp_path) == 2


def test_single_bits(tmp_path: Path) -> None:
    """A flip anywhere in the files of the arrays is noticed, or changes nothing."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {"w": jax.ShapeDtypeStruct((40, 50), jnp.float32, sharding=here)}
    values = {"w": jax.random.normal(jax.random.key(0), (40, 50))}
    state = checkpoint.TrainState(jnp.int32(3), values, values)
    saved = checkpoint.Checkpoints(tmp_path)
    saved.save(state, None, {})
    saved.close()
    rng = np.random.default_rng(0)
    files = sorted(p for p in (tmp_path / "checkpoints/3/params").rglob("*") if p.is_file())
    noticed = 0
    for _ in range(40):
        path = files[rng.integers(len(files))]
        content = path.read_bytes()
        if not content:
            continue
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        try:
            found = checkpoint.load_params(tmp_path, like)
        except UserError:
            noticed += 1
        else:
            np.testing.assert_array_equal(found["w"], values["w"])
        path.write_bytes(content)
    assert noticed > 10


def test_a_checkpoint_of_another_model_says_what_differs(tmp_path: Path, data: Path) -> None:
    config = tiny_config(data)
    train(config, tmp_path / "run")
    other = tiny_config(data, **{"model.scratch.intermediate_size": 64})
    setup = prepare(other, tmp_path / "run", ("train",))
    like = abstract_state(setup, make_optimizer(other.train, 4))
    with pytest.raises(
        UserError,
        match=r"checkpoints/4: params: blocks/\w+/kernel: found shape \[2, .*48.*\], expected \[2, "
        r".*64.*\] for this configuration",
    ):
        checkpoint.Checkpoints(tmp_path / "run").restore(like)
    params = dict(prepare(config, tmp_path / "run", ("train",)).policy.abstract)
    params["more"] = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=like.step.sharding)
    with pytest.raises(UserError, match="params: has no more, expected"):
        checkpoint.load_params(tmp_path / "run", params)
    del params["more"], params["norm"]
    with pytest.raises(UserError, match="params: has norm/scale, which this configuration knows"):
        checkpoint.load_params(tmp_path / "run", params)


def test_restoring_into_another_type(tmp_path: Path, data: Path) -> None:
    """Moments are stored in 16 bits from here on, as a user short of memory would have it."""
    train(tiny_config(data), tmp_path / "run")
    before = final_state(tmp_path / "run", tiny_config(data))
    config = tiny_config(data, **{"train.moments_dtype": "bfloat16"})
    run_folder.check(tmp_path / "run", config)
    after = final_state(tmp_path / "run", config)
    for a, b in zip(*map(jax.tree.leaves, (after.params, before.params)), strict=True):
        np.testing.assert_array_equal(a, b)
    mu, wide = (x.opt_state[1][0].mu["blocks"]["gate"]["kernel"] for x in (after, before))
    assert mu.dtype == jnp.bfloat16
    np.testing.assert_array_equal(mu, wide.astype(jnp.bfloat16))


def test_the_best_is_kept_beside_the_newest(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.2, 0.9, 0.4, 0.9, 0.1, 0.3])
    real = Report.during

    def during(self: Report, params: Any, step: int) -> Any:
        text, found = real(self, params, step)
        return text, {**found, "eval/policy/mrr": next(values)}

    monkeypatch.setattr(Report, "during", during)
    config = tiny_config(
        data,
        **{
            "train.steps": 6, "train.eval_every": 1, "train.checkpoint_every": 100,
            "train.keep_checkpoints": 1, "train.keep_best": "policy/mrr",
        },
    )  # fmt: skip
    train(config, tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run") == [4, 6]
    assert checkpoint.best_step([1, 2, 3], {}) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.keep_best": "policy/mmr"}, "keep_best='policy/mmr': .* one of .*, policy/mrr, "),
        ({"train.keep_best": "eval/policy/mrr"}, "expected a metric"),
        ({"train.keep_best": "reward/mrr", "method": "sft"}, "method=sft, one of policy/accuracy"),
        ({"train.keep_best": "policy/mrr", "train.eval_every": 0}, "eval_every=0 evaluates nothi"),
    ],
)
def test_the_best_by_what_no_evaluation_gives(
    tmp_path: Path, data: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(tiny_config(data, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_metric_of_an_evaluation_can_be_the_best(tmp_path: Path, data: Path) -> None:
    for method in ("dpo", "sft"):
        config = tiny_config(data, method=method, **{"train.steps": 1})
        train(config, tmp_path / method)
        logged = {name for line in log_lines(tmp_path / method) for name in line}
        for name in logged:
            if name.startswith("eval/") and not name.endswith("_se"):
                config.train.keep_best = name.removeprefix("eval/")
                check_best(config)


# --- Full disks.


class SmallFiles:
    """No file may grow above some bytes, as on a disk that is full."""

    def __init__(self, most: int):
        self.most = most

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.most, self.before[1]))

    def __exit__(self, *_: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


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
    assert checkpoint.steps(run) == steps
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
    write = run_folder.MetricsLog.write

    def full(self: run_folder.MetricsLog, step: int, figures: Any) -> None:
        if step == 3 and "loss" in figures:
            with SmallFiles(self._path.stat().st_size + 20):
                write(self, step, figures)
        else:
            write(self, step, figures)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.MetricsLog, "write", full)
        with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written: File too large"):
            train(config, run)
    train(config, run)
    assert_same_run(config, run, whole)
