"""Adam's moments in bfloat16 and in the host's memory: what they change, and that it is little."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mass_dpo_jax import config as config_lib
from mass_dpo_jax import train as train_lib
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.runs import metrics_files
from mass_dpo_jax.training import checkpoint, mesh
from mass_dpo_jax.training import optimizer as optimizer_lib
from mass_dpo_jax.training.optimizer import (
    HOST,
    make_optimizer,
    moments_memory,
    store_in_bfloat16,
)
from mass_dpo_jax.training.prepare import prepare
from mass_dpo_jax.training.updates import abstract_state
from tests.support.helpers import losses, slow, tiny_config, write_jsonl


def settings(**changes: Any) -> Any:
    train = config_lib.default().train
    train.update({"learning_rate": 1e-2, "warmup_ratio": 0.0, **changes})
    return train


def after(optimizer: optax.GradientTransformation, gradients: np.ndarray) -> Any:
    """Weights [D] from zero after gradients [T, D], and the optimizer's state."""

    def step(carry: Any, gradient: jax.Array) -> tuple[Any, None]:
        weights, state = carry
        updates, state = optimizer.update(gradient, state, weights)
        return (optax.apply_updates(weights, updates), state), None

    weights = jnp.zeros(gradients.shape[1])
    return jax.jit(lambda g: jax.lax.scan(step, (weights, optimizer.init(weights)), g)[0])(
        jnp.asarray(gradients, jnp.float32)
    )


@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_it_is_adamw_with_a_clipped_gradient(scale: float) -> None:
    gradients = np.random.default_rng(0).normal(size=(50, 40)) * scale
    train = settings(weight_decay=0.1, clip=0.3)
    rate = optimizer_lib._make_schedule(train.learning_rate, round(train.warmup_ratio * 50), 50)
    want = optax.chain(optax.clip_by_global_norm(0.3), optax.adamw(rate, weight_decay=0.1))
    ours, theirs = (after(o, gradients) for o in (make_optimizer(train, 50), want))
    assert jax.tree.structure(ours[1]) == jax.tree.structure(theirs[1][1])  # That of AdamW.
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-7)
    assert np.abs(ours[0]).min() > 0


@pytest.mark.parametrize("warmup", [0, 1, 10, 49, 50])
@pytest.mark.parametrize("total", [50, 1])
def test_the_rate_in_the_log_is_that_of_the_updates(warmup: int, total: int) -> None:
    train = settings(learning_rate=2e-3, warmup_ratio=warmup / 50)
    schedule = optimizer_lib._make_schedule(2e-3, round(warmup / 50 * total), total)
    with jax.transfer_guard("disallow"):
        rate = optimizer_lib.learning_rate(train, total)
        found = [rate(step) for step in range(total + 3)]
    want = [float(schedule(step)) for step in range(total + 3)]
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("warmup", [0, 10])
def test_the_learning_rate_grows_to_its_peak_and_falls_to_zero(warmup: int) -> None:
    train = settings(learning_rate=2e-3, warmup_ratio=warmup / 50)
    step = np.arange(51)
    cosine = (1 + np.cos(np.pi * (step - warmup) / (50 - warmup))) / 2
    want = 2e-3 * np.where(step < warmup, step / max(warmup, 1), cosine)
    found = np.array([optimizer_lib.learning_rate(train, 50)(i) for i in step])
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-9)


def test_bfloat16_moments_are_float32s_on_average() -> None:
    """Gradients of standard deviation 1, then 0.1: the second moment must follow them down."""
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(4000, 1000)).astype(np.float32)
    gradients[1000:] *= 0.1
    adam = optax.scale_by_adam()
    _, wide = after(adam, gradients)
    _, narrow = after(store_in_bfloat16(adam), gradients)
    assert narrow.mu.dtype == narrow.nu.dtype == jnp.bfloat16
    ratio = np.asarray(narrow.nu, np.float64) / np.asarray(wide.nu, np.float64)
    assert abs(ratio.mean() - 1) < 0.012  # The standard error of this mean is 0.003.
    assert 0.01 < ratio.std() < 0.12  # What bfloat16 costs after such a fall, 0.05 in its step.
    error = np.asarray(narrow.mu, np.float64) - np.asarray(wide.mu, np.float64)
    spread = np.asarray(wide.mu).std()
    assert abs(error.mean()) < 0.001 * spread and error.std() < 0.02 * spread

    # To the nearest value, it stays where the large gradients left it.
    nearest = np.asarray(wide.nu).mean()
    state = jnp.full(4, jnp.bfloat16(1.0))
    for _ in range(3000):
        state = (0.999 * state.astype(jnp.float32) + 0.001 * 0.01).astype(jnp.bfloat16)
    assert np.asarray(state, np.float64).mean() == 1.0 and nearest < 0.07


@pytest.mark.slow(reason="two runs of forty steps")
@pytest.mark.usefixtures("one_device")
def test_bfloat16_moments_train_as_float32_does(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl")
    found = {}
    for dtype in ("float32", "bfloat16"):
        config = tiny_config(
            data, **{"train.moments_dtype": dtype, "train.steps": 40, "train.eval_every": 0,
                     "beta": 1.0, "method": "sdpo", "train.clip": 1.0},
        )  # fmt: skip
        train_lib.train(config, tmp_path / dtype)
        found[dtype] = np.asarray(losses(tmp_path / dtype))
    wide, narrow = found["float32"], found["bfloat16"]
    assert wide[-5:].mean() < 0.8 * wide[:5].mean()
    assert not np.array_equal(wide, narrow)
    assert np.abs(wide - narrow).max() < 0.02 * wide[0]


class Stop(Exception):
    pass


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("offload", [slow(False), True])
def test_a_run_with_small_moments_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offload: bool
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl")
    config = tiny_config(
        data, **{"train.moments_dtype": "bfloat16", "train.offload_moments": offload,
                 "train.eval_every": 0, "method": "sdpo"},
    )  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_lib.train(config, whole)
    write = metrics_files.MetricsLog.write

    def write_and_stop(self: metrics_files.MetricsLog, step: int, figures: dict) -> None:
        if "loss" in figures and step == 4:
            raise Stop
        write(self, step, figures)

    def save_and_wait(self: checkpoint.Checkpoints, *args: Any) -> None:
        save(self, *args)
        self._manager.wait_until_finished()  # A run in this process goes on writing after a stop.

    save = checkpoint.Checkpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(metrics_files.MetricsLog, "write", write_and_stop)
        patch.setattr(checkpoint.Checkpoints, "save", save_and_wait)
        with pytest.raises(Stop):
            train_lib.train(config, parts)
    train_lib.train(config, parts)
    assert losses(parts) == losses(whole) and len(losses(parts)) == 4

    setup = prepare(config, parts, ("train",))
    like = abstract_state(setup, make_optimizer(config.train, 4))
    state, *_ = checkpoint.Checkpoints(parts).restore(like)
    for moment in (state.opt_state[0].mu, state.opt_state[0].nu):
        kernel = moment["blocks"]["gate"]["kernel"]
        assert kernel.dtype == jnp.bfloat16 and np.abs(np.asarray(kernel)).max() > 0
        assert kernel.sharding.memory_kind == (HOST if offload else "device")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moments_on_the_host_change_nothing(dtype: str) -> None:
    """Eight devices; the state is donated and comes back where it was, split as it was."""
    config = config_lib.default().mesh
    config.update(data=2, fsdp=2, tensor=2)
    devices = mesh.make_mesh(config)
    split = NamedSharding(devices, P("fsdp", "tensor"))
    gradients = np.random.default_rng(0).normal(size=(5, 8, 12)).astype(np.float32)
    found = {}
    for offload in (False, True):
        train = settings(moments_dtype=dtype, offload_moments=offload)
        optimizer = make_optimizer(train, 5)
        memory = moments_memory(train, devices) or "device"

        def place(leaf: Any, memory: str = memory) -> Any:
            return (
                split.with_memory_kind(memory) if leaf.ndim else mesh.replicated_sharding(devices)
            )

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(weights: Any, state: Any, gradient: Any, optimizer: Any = optimizer) -> Any:
            updates, state = optimizer.update(gradient, state, weights)
            return optax.apply_updates(weights, updates), state

        weights = jax.device_put(jnp.zeros((8, 12)), split)
        places = jax.tree.map(place, jax.eval_shape(optimizer.init, weights))
        state = jax.jit(optimizer.init, out_shardings=places)(weights)
        for gradient in gradients:
            before = state
            weights, state = step(weights, state, jax.device_put(gradient, split))
            adam = state[0]
            for moment in (adam.mu, adam.nu):
                assert moment.sharding.memory_kind == memory
                assert moment.addressable_shards[0].data.shape == (4, 6)
                assert moment.dtype == dtype
            assert before[0].mu.is_deleted() and before[0].nu.is_deleted()
        found[offload] = np.asarray(weights)
    np.testing.assert_array_equal(found[True], found[False])
    assert np.abs(found[True]).min() > 0


def test_devices_without_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = mesh.make_mesh(config_lib.default().mesh)
    assert moments_memory(settings(), devices) is None
    assert moments_memory(settings(offload_moments=True), devices) == HOST
    monkeypatch.setattr(optimizer_lib, "HOST", "pinned_nowhere")
    with pytest.raises(UserError, match=r"offload_moments=True: cpu .*device, .*pinned_nowhere"):
        moments_memory(settings(offload_moments=True), devices)
