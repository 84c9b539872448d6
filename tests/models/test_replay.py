"""Training from the record of a scoring pass: the numbers and gradients of a pass of its own."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mass_dpo_jax.models.precomputed import use_precomputed
from mass_dpo_jax.models.replay import replay
from mass_dpo_jax.models.response_layout import Picks, gather_candidates
from mass_dpo_jax.models.shared_prefix import score
from mass_dpo_jax.training.optimizer import make_optimizer
from mass_dpo_jax.training.prepare import prepare
from mass_dpo_jax.training.setup import Reference
from mass_dpo_jax.training.step import TrainState
from mass_dpo_jax.training.updates import Batches
from tests.support.helpers import slow, write_jsonl
from tests.support.helpers import tiny_config as run_config
from tests.support.models import (
    VOCABULARY,
    Candidates,
    random_candidates,
    random_decoder,
    tiny_config,
)

pytestmark = pytest.mark.usefixtures("strict_jax")

RESPONSE = 7
LAYOUTS: dict[str, dict[str, Any]] = {
    "packed": {"layout": "packed"},
    "packed, few logits": {"layout": "packed", "max_logits": 4 * VOCABULARY},
    "rectangle": {"layout": "rectangle", "max_response": RESPONSE},
    "rectangle, 2 at a time": {
        "layout": "rectangle",
        "max_response": RESPONSE,
        "candidate_chunk": 2,
    },
}


def sets(pool: Candidates) -> tuple[np.ndarray, np.ndarray]:
    """Three candidates of each prompt in any order, one twice, and now and then one too few."""
    rng = np.random.default_rng(0)
    batch, candidates = pool.response_lengths.shape
    numbers = np.pad(rng.integers(1, candidates, (batch, 2)), ((0, 0), (1, 0)))
    numbers[0, 2] = numbers[0, 1]
    valid = np.ones_like(numbers, bool)
    valid[-1, 2] = False
    return numbers, valid & (np.take_along_axis(pool.response_lengths, numbers, 1) > 0)


def gradients(
    graphdef: Any,
    params: Any,
    pool: Candidates,
    layout: dict[str, Any],
    recorded: bool,
    frozen: Any = None,
    pooling: str | None = None,
) -> Any:
    """Log-probs of some candidates, and gradients of a loss that weighs each of them, with respect
    to all weights that are not frozen."""
    arrays = tuple(map(jnp.asarray, pool))
    static = graphdef, tuple(layout.items()), recorded, pooling
    return _gradients(*static, params, frozen or {}, arrays, tuple(map(jnp.asarray, sets(pool))))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _gradients(
    graphdef: Any, layout: Any, recorded: bool, pooling: str | None, params: Any, frozen: Any,
    pool: Any, chosen: Any,
) -> Any:  # fmt: skip
    picks = Picks(*chosen, 3 * RESPONSE)
    weights = np.random.default_rng(1).normal(size=picks[0].shape)
    whole = {key: value for key, value in layout if key != "candidate_chunk"}
    record = None
    if recorded:
        model = nnx.merge(graphdef, {**frozen, **params})
        record = score(model, *pool, pooling=pooling, record=True, **dict(layout)).record

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, {**frozen, **params})
        if record is not None:
            logps = replay(model, record, *pool, picks, **whole)
        else:
            some = gather_candidates(*pool[2:], picks)
            logps = score(model, *pool[:2], *some, pooling=None, **whole).logps
        return jnp.sum(weights * logps), logps

    (_, logps), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return logps, grads


@pytest.mark.parametrize(
    ("model_type", "remat", "layout"),
    [
        ("qwen3", "dots", "packed"),
        ("qwen3", "full", "rectangle, 2 at a time"),
        ("smollm3", "full", "packed, few logits"),
        ("smollm3", "dots", "rectangle"),
        ("llama", "dots", "rectangle, 2 at a time"),
        ("qwen2", "dots", "packed, few logits"),
        ("mistral", "dots", "rectangle, 2 at a time"),
        ("gemma3_text", "dots", "packed"),
        ("olmo2", "full", "rectangle, 2 at a time"),
    ],
)
def test_gradients_are_those_of_a_pass_of_its_own(model_type: str, remat: str, layout: str) -> None:
    model = random_decoder(tiny_config(model_type), remat=remat)
    pool = random_candidates(response=RESPONSE)
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    logps, found = gradients(graphdef, params, pool, LAYOUTS[layout], recorded=True)
    others, expected = gradients(graphdef, params, pool, LAYOUTS[layout], recorded=False)
    np.testing.assert_allclose(logps, others, rtol=1e-5, atol=1e-4)
    assert np.all(logps[-1, 2] == 0)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        norm = float(jnp.linalg.norm(b))
        assert norm > 0, path
        assert float(jnp.linalg.norm(a - b)) < 1e-4 * norm, path


@pytest.mark.parametrize("remat", ["dots", "full"])
@pytest.mark.parametrize("layout", ["packed", "rectangle, 2 at a time"])
def test_a_record_of_all_hidden_states(remat: str, layout: str) -> None:
    """Features of prompt and response need the prompt's states; training still does not. With one
    layer, which is the first and the last."""
    graphdef, state = nnx.split(random_decoder(tiny_config(num_hidden_layers=1), remat=remat))
    args = graphdef, nnx.to_pure_dict(state), random_candidates(response=RESPONSE), LAYOUTS[layout]
    found = gradients(*args, recorded=True, pooling="all")
    for a, b in zip(
        jax.tree.leaves(found), jax.tree.leaves(gradients(*args, recorded=True)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_use_precomputed_computes_nothing_forward() -> None:
    def cube(x: jax.Array, times: jax.Array) -> jax.Array:
        return x**3 * times

    x, wrong = jnp.array([1.0, 2.0]), jnp.array([7.0, 7.0])
    np.testing.assert_array_equal(use_precomputed(cube, wrong, x, jnp.array([2, 1])), wrong)
    value, vjp = jax.vjp(lambda x: use_precomputed(cube, wrong, x, jnp.array([2, 1])), x)
    np.testing.assert_array_equal(value, wrong)
    np.testing.assert_array_equal(vjp(jnp.ones(2))[0], [6.0, 12.0])


@pytest.mark.parametrize(
    "changes",
    [
        slow({"selection.criterion": "contrast"}),
        slow({"method": "pl_sampled", "selection.draw": "local", "model.layout": "rectangle"}),
        {"train.batch_size": 8, "train.micro_batch_size": 4, "model.remat": "dots"},
    ],
)
@pytest.mark.usefixtures("one_device")
def test_a_step_is_the_same_without_reuse(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = run_config(write_jsonl(tmp_path / "data.jsonl"), **changes)
    setup = prepare(config, tmp_path / "run", ("train",))
    assert setup.program.reuse  # By default.
    params = setup.policy.weights("", 0)
    # Away from the reference, so that pool weights are not uniform.
    reference = Reference({"train": setup.score(setup.policy.weights("", 1), "train", "reference")})
    found = []
    for reuse in (True, False):
        optimizer = make_optimizer(config.train, 4)
        state = TrainState(jnp.int32(0), params, optimizer.init(params))
        batch = Batches(setup, reference)[0]
        program = dataclasses.replace(setup.program, reuse=reuse)
        state, numbers, figures = program.train_step(
            optimizer,
            jax.tree.map(jnp.copy, state),
            batch.arrays,
            None,
            setup.key(0),
            batch.packed_length,
        )
        found.append((numbers, figures))
    (numbers, figures), (others, expected) = found
    np.testing.assert_array_equal(numbers.candidate_ids, others.candidate_ids)
    assert not np.asarray(numbers.not_finite).any()
    assert figures.keys() == expected.keys()
    for name, value in figures.items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=2e-5, err_msg=name)
