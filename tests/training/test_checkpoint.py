"""Checkpoints: what they say of themselves, damage, other types, and which are kept."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.export import export
from mass_dpo_jax.runs import metrics_files, resume, run_folder
from mass_dpo_jax.train import train
from mass_dpo_jax.training import checkpoint, checkpoint_reading
from mass_dpo_jax.training.evaluator import Evaluator, check_best
from mass_dpo_jax.training.optimizer import make_optimizer
from mass_dpo_jax.training.prepare import prepare
from mass_dpo_jax.training.updates import abstract_state
from tests.support.helpers import log_lines, losses, tiny_config, write_jsonl
from tests.support.runs import final_state

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl")


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
    reader = checkpoint_reading.Reader(tmp_path / "run", 4)
    reader(("norm", "scale"), None)
    with pytest.raises(UserError, match="not what was written"):
        reader.check()  # Not everything was read.
    export(tmp_path / "run", tmp_path / "whole")
    real = checkpoint_reading.ts.open

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

    monkeypatch.setattr(checkpoint_reading.ts, "open", flip)
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
    assert run_folder.latest_step(tmp_path) == 2


def test_single_bits(tmp_path: Path) -> None:
    """A flip anywhere in the files of the arrays is noticed, or changes nothing."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {"w": jax.ShapeDtypeStruct((40, 50), jnp.float32, sharding=here)}
    values = {"w": jax.random.normal(jax.random.key(0), (40, 50))}
    state = checkpoint.TrainState(jnp.int32(3), values, values)
    saved = checkpoint.Checkpoints(tmp_path)
    saved.save(state, None, {})
    saved.close()
    found = checkpoint_reading.load_params(tmp_path, like)
    np.testing.assert_array_equal(found["w"], values["w"])
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
            found = checkpoint_reading.load_params(tmp_path, like)
        except UserError:
            noticed += 1
        else:
            np.testing.assert_array_equal(found["w"], values["w"])
        path.write_bytes(content)
    assert noticed > 10


def test_a_failed_restore_leaves_nothing_that_is_still_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Native threads would call into an event loop that is closed by then."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {"broken": (1000,), **{f"large{i}": (1000, 1000) for i in range(8)}}
    values = {
        name: jax.random.bits(jax.random.key(i), shape)
        for i, (name, shape) in enumerate(shapes.items())
    }
    like = {
        name: jax.ShapeDtypeStruct(shape, jnp.uint32, sharding=here)
        for name, shape in shapes.items()
    }
    saved = checkpoint.Checkpoints(tmp_path)
    saved.save(checkpoint.TrainState(jnp.int32(3), values, {"w": jnp.ones(3)}), None, {})
    saved.close()
    # What is random is stored as it is, behind the number that zstd begins everything with.
    stored = np.asarray(values["broken"]).tobytes()
    for path in (tmp_path / "checkpoints/3/params").rglob("*"):
        content = bytearray(path.read_bytes()) if path.is_file() else bytearray()
        if stored in content:
            content[content.rindex(b"\x28\xb5\x2f\xfd", 0, content.index(stored))] ^= 1
            path.write_bytes(content)
    left = []
    close = asyncio.SelectorEventLoop.close

    def closed(loop: Any) -> None:
        left.extend(asyncio.all_tasks(loop))
        close(loop)

    monkeypatch.setattr(asyncio.SelectorEventLoop, "close", closed)
    with pytest.raises(UserError, match="none of its checkpoints can be read"):
        checkpoint_reading.load_params(tmp_path, like)
    assert not left


def test_a_checkpoint_of_another_model_says_what_differs(tmp_path: Path, data: Path) -> None:
    config = tiny_config(data)
    train(config, tmp_path / "run")
    other = tiny_config(data, **{"model.scratch.intermediate_size": 64})
    setup = prepare(other, tmp_path / "other", ("train",))
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
        checkpoint_reading.load_params(tmp_path / "run", params)
    del params["more"], params["norm"]
    with pytest.raises(UserError, match="params: has norm/scale, which this configuration knows"):
        checkpoint_reading.load_params(tmp_path / "run", params)


def test_restoring_into_another_type(tmp_path: Path, data: Path) -> None:
    """Moments are stored in 16 bits from here on, as a user short of memory would have it."""
    train(tiny_config(data), tmp_path / "run")
    before = final_state(tmp_path / "run", tiny_config(data))
    config = tiny_config(data, **{"train.moments_dtype": "bfloat16"})
    resume.check_settings(tmp_path / "run", config)
    after = final_state(tmp_path / "run", config)
    for a, b in zip(*map(jax.tree.leaves, (after.params, before.params)), strict=True):
        np.testing.assert_array_equal(a, b)
    mu, wide = (x.opt_state[0].mu["blocks"]["gate"]["kernel"] for x in (after, before))
    assert mu.dtype == jnp.bfloat16
    np.testing.assert_array_equal(mu, wide.astype(jnp.bfloat16))


def test_the_best_is_kept_beside_the_newest(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.2, 0.9, 0.4, 0.9, 0.1, 0.3])
    real = Evaluator.evaluate_step

    def evaluate_step(self: Evaluator, params: Any, step: int) -> Any:
        text, found = real(self, params, step)
        return text, {**found, "eval/policy/mrr": next(values)}

    monkeypatch.setattr(Evaluator, "evaluate_step", evaluate_step)
    config = tiny_config(
        data,
        **{
            "train.steps": 6, "train.eval_every": 1, "train.checkpoint_every": 100,
            "train.keep_checkpoints": 1, "train.keep_best": "policy/mrr",
        },
    )  # fmt: skip
    train(config, tmp_path / "run")
    assert run_folder.list_steps(tmp_path / "run") == [4, 6]
    assert checkpoint.best_step([1, 2, 3], {}) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_never_the_best(tmp_path: Path, bad: float) -> None:
    for values in (
        {100: 0.5, 200: bad},
        {100: bad, 200: 0.5, 300: 0.2},
        {100: bad, 200: bad, 300: -2.0, 400: bad},
    ):
        finite = {step: value for step, value in values.items() if math.isfinite(value)}
        assert checkpoint.best_step([*values], values) == max(finite, key=finite.__getitem__)
        # A run that goes on reads them from its log, and judges the same.
        log = metrics_files.MetricsLog(tmp_path, 0)
        for step, value in values.items():
            log.write(step, {"eval/rewards/margins": value})
        log.close()
        read = metrics_files.read_figure(tmp_path, "eval/rewards/margins")
        assert checkpoint.best_step([*values], read) == checkpoint.best_step([*values], values)
    assert checkpoint.best_step([100, 200], {100: bad, 200: bad}) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.keep_best": "policy/mmr"}, "keep_best='policy/mmr': .* one of .*, policy/mrr, "),
        ({"train.keep_best": "eval/policy/mrr"}, "expected a metric"),
        ({"train.keep_best": "reward/mrr", "method": "sft"}, "method=sft, one of policy/accuracy"),
        ({"train.keep_best": "policy/mrr", "train.eval_every": 0}, "eval_every=0 evaluates nothi"),
        ({"train.keep_best": "policy/mrr", "data.validation_share": 0.0}, "no validation rows"),
    ],
)
def test_the_best_by_what_no_evaluation_gives(
    tmp_path: Path, data: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(tiny_config(data, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow(reason="a run for each metric")
def test_every_metric_of_an_evaluation_can_be_the_best(tmp_path: Path, data: Path) -> None:
    for method in ("dpo", "sft"):
        config = tiny_config(data, method=method, **{"train.steps": 1})
        train(config, tmp_path / method)
        logged = {name for line in log_lines(tmp_path / method) for name in line}
        for name in logged:
            if name.startswith("eval/") and not name.endswith("_se"):
                config.train.keep_best = name.removeprefix("eval/")
                check_best(config, ["validation"])


@pytest.mark.usefixtures("one_device")
def test_the_best_by_gains_needs_grades(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{i} plus {i}", "chosen": str(2 * i), "rejected": [f"{i}1", f"{i}2"]}
        for i in range(20)
    ]
    path = tmp_path / "plain.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"train.steps": 1, "train.keep_best": "policy/gain_ndcg@3", "num_negatives": 2}
    config = tiny_config(path, **changes)
    with pytest.raises(UserError, match=r"keep_best='policy/gain_ndcg@3': expected a metric"):
        train(config, tmp_path / "run")
