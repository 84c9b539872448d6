"""Eight devices compute what one does, and the state really is split over them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from mass_dpo_jax import train as train_lib
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models import fused_attention
from mass_dpo_jax.training import mesh as mesh_lib
from mass_dpo_jax.training.optimizer import make_optimizer
from mass_dpo_jax.training.prepare import prepare
from mass_dpo_jax.training.setup import Reference, Setup
from mass_dpo_jax.training.step import TrainState
from mass_dpo_jax.training.updates import Batches, abstract_state, first_state
from tests.support.helpers import slow, tiny_config, write_jsonl

STEPS = 5


def start(config: Any, workdir: Path) -> tuple[Setup, Any, TrainState, Reference]:
    setup = prepare(config, workdir, ("train",))
    optimizer = make_optimizer(config.train, STEPS)
    params = setup.policy.weights("", config.seed)
    like = abstract_state(setup, optimizer)
    return setup, optimizer, first_state(like, optimizer, params), setup.score_reference(params)


@pytest.mark.parametrize(
    ("model_type", "fused"),
    [
        ("llama", False),
        slow("llama", True),
        slow("qwen2", False),
        slow("mistral", True),
        slow("olmo2", False),
        slow("gemma2", False),
        slow("gemma3_text", True),
    ],
)
def test_eight_devices_equal_one(
    model_type: str, fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(jax.devices()) == 8
    data = write_jsonl(tmp_path / "data.jsonl", examples=40)
    # Adam moves a weight whose gradient is rounding noise by the whole learning rate, to a side
    # that the order of summation decides. Its epsilon above that noise lets such weights rest.
    adam = functools.partial(optax.scale_by_adam, eps=1e-3)
    monkeypatch.setattr(optax, "scale_by_adam", adam)
    changes = {
        "train.steps": STEPS, "train.micro_batch_size": 4, "train.learning_rate": 1e-3,
        "data.validation_share": 0.0, "beta": 1.0, "model.scratch.model_type": model_type,
    }  # fmt: skip
    config = tiny_config(data, **changes)
    eight = tiny_config(data, **changes)
    eight.mesh.update(data=2, fsdp=2, tensor=2)
    make_mesh = mesh_lib.make_mesh
    with monkeypatch.context() as patch:
        patch.setattr(mesh_lib, "make_mesh", lambda c: make_mesh(c, devices=jax.devices()[:1]))
        setup, optimizer, state, refs = start(config, tmp_path / "one")
    if fused:  # Its calls, in plain operations.
        monkeypatch.setattr(
            fused_attention,
            "choose_attention",
            lambda *args: fused_attention.FusedAttention("xla", args[-1]),
        )
    setup_8, optimizer_8, state_8, refs_8 = start(eight, tmp_path / "eight")
    logps = refs.logps["train"]
    np.testing.assert_allclose(refs_8.logps["train"], logps, rtol=1e-5, atol=1e-5)

    for part in (state_8.params, state_8.opt_state[0].mu, state_8.opt_state[0].nu):
        kernel = part["blocks"]["gate"]["kernel"]  # [layer, embed, mlp]
        assert kernel.addressable_shards[0].data.shape == (2, 32 // 2, 48 // 2)
        assert part["embed"].addressable_shards[0].data.size == part["embed"].size // 4

    both = Batches(setup, refs), Batches(setup_8, refs_8)
    flips = 0
    for step in range(STEPS):
        # A near-tie may flip in the last digit, so both train on the sets that one device chose.
        sets, sets_8 = np.zeros((2, len(logps), 3), np.int32)
        batch, batch_8 = (batches[step] for batches in both)
        for program, weights, arrays, target in (
            (setup, state.params, batch.arrays, sets),
            (setup_8, state_8.params, batch_8.arrays, sets_8),
        ):
            for part in range(2):
                micro = jax.tree.map(lambda x, i=part: x[i], arrays)
                choice, _ = program.program.choose_batch(weights, micro, program.key(step))
                target[np.asarray(micro.index)] = np.asarray(choice.candidate_ids)
        flips += int((sets != sets_8).any(1).sum())
        negatives, negatives_8 = (batches.shard_negatives(batch.rows, sets) for batches in both)
        state, _, found = setup.program.train_step(
            optimizer, state, batch.arrays, negatives, setup.key(step), batch.packed_length
        )
        state_8, _, found_8 = setup_8.program.train_step(
            optimizer_8,
            state_8,
            batch_8.arrays,
            negatives_8,
            setup_8.key(step),
            batch_8.packed_length,
        )
        found.pop("rewards/accuracies")  # A count: rounding decides it while policy = reference.
        assert float(found_8["loss"]) == pytest.approx(float(found["loss"]), abs=1e-5)
        for name, value in found.items():
            assert float(found_8[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-4), name
    assert flips <= 1
    # The update keeps the state where it was.
    kernel = state_8.opt_state[0].nu["blocks"]["gate"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 16, 24)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3, "fsdp": 1}, "does not fit the 8 device"),
        ({"data": -1, "fsdp": -1}, "at most one -1"),
        ({"data": 0, "fsdp": 1}, "sizes above 0"),
        ({"data": 2, "fsdp": 2}, "does not fit the 8 device"),
    ],
)
def test_meshes_that_do_not_fit(tmp_path: Path, sizes: dict[str, int], message: str) -> None:
    config = tiny_config(tmp_path)
    config.mesh.update(sizes)
    with pytest.raises(UserError, match=message):
        mesh_lib.make_mesh(config.mesh)


def test_batches_must_split_evenly(tmp_path: Path) -> None:
    config = tiny_config(write_jsonl(tmp_path / "data.jsonl"), **{"train.micro_batch_size": 4})
    with pytest.raises(UserError, match=r"micro_batch_size=4.* = 8"):
        train_lib.train(config, tmp_path / "run")


@pytest.mark.parametrize("changes", [{}, {"train.moments_dtype": "bfloat16"}])
def test_a_step_says_where_its_state_lies(tmp_path: Path, changes: dict[str, Any]) -> None:
    """XLA for CPUs leaves it where it was anyway, XLA for GPUs gave every device all moments."""
    config = tiny_config(write_jsonl(tmp_path / "data.jsonl", examples=40), **changes)
    config.mesh.update(data=2, fsdp=2, tensor=2)
    setup, optimizer, state, refs = start(config, tmp_path / "run")
    batch = Batches(setup, refs)[0]
    traced = setup.program.train_step.trace(
        setup.program, optimizer, state, batch.arrays, None, setup.key(0), batch.packed_length
    )
    program = traced.jaxpr.jaxpr
    made_by = {x: equation for equation in program.eqns for x in equation.outvars}
    leaves = jax.tree.leaves_with_path(state)
    for (path, leaf), out in zip(leaves, program.outvars[: len(leaves)], strict=True):
        if leaf.ndim:  # Not a count.
            equation = made_by[out]
            assert equation.primitive.name == "sharding_constraint", jax.tree_util.keystr(path)
            assert equation.params["sharding"].is_equivalent_to(leaf.sharding, leaf.ndim)
