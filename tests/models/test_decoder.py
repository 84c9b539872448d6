"""The decoder as a program: one block for all layers, remat, precision, names of dimensions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models import attention
from mass_dpo_jax.models.decoder import Decoder, abstract_decoder, param_dims
from mass_dpo_jax.models.logprobs import compute_token_logps
from tests.support.models import FAMILIES, VOCABULARY, random_decoder, tiny_config

TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 9)).astype(np.int32)


def loss(model: Decoder) -> jax.Array:
    """Mean log-likelihood of the next token."""
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    hidden, _ = model(jnp.asarray(TOKENS), positions, attention.attend_causally)
    weights = model.vocabulary_weights()
    return -compute_token_logps(hidden[:, :-1], weights, jnp.asarray(TOKENS[:, 1:])).mean()


def gradients(model: Decoder) -> dict[str, Any]:
    graphdef, params = nnx.split(model)
    grads = jax.jit(jax.grad(lambda params: loss(nnx.merge(graphdef, params))))(params)
    return nnx.to_pure_dict(grads)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr, those of inner jaxprs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_the_program_does_not_grow_with_depth() -> None:
    def size(num_layers: int) -> int:
        model = random_decoder(tiny_config(num_hidden_layers=num_layers))
        graphdef, params = nnx.split(model)
        program = jax.make_jaxpr(jax.value_and_grad(lambda p: loss(nnx.merge(graphdef, p))))
        return sum(1 for _ in equations(program(params).jaxpr))

    assert size(2) == size(8) > 100


def test_an_unknown_remat_is_an_error() -> None:
    with pytest.raises(UserError, match=r"remat: found 'some', expected one of dots, full"):
        Decoder(tiny_config(), rngs=nnx.Rngs(0), remat="some")


def test_a_tied_embedding_is_one_array_with_two_uses() -> None:
    untied = random_decoder(tiny_config(tie_word_embeddings=False))
    tied = random_decoder(tiny_config(tie_word_embeddings=True))
    params = nnx.state(untied, nnx.Param)
    params["head"][...] = params["embed"][...]
    nnx.update(untied, params)
    del params["head"]
    nnx.update(tied, params)

    parts, total = gradients(untied), gradients(tied)
    assert "head" not in total
    assert len(jax.tree.leaves(total)) == len(jax.tree.leaves(parts)) - 1
    expected = parts["embed"] + parts["head"]
    np.testing.assert_allclose(total["embed"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_parameter_names_its_dimensions(model_type: str) -> None:
    config = tiny_config(model_type)
    sizes = {
        "layer": config.num_layers,
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "heads": config.num_heads * config.head_dim,
        "kv_heads": config.num_kv_heads * config.head_dim,
        "mlp": config.intermediate_size,
        None: config.head_dim,
    }
    model = abstract_decoder(config)
    params = nnx.state(model, nnx.Param)

    def check(array: Any, dims: tuple[str | None, ...]) -> int:
        assert isinstance(array, jax.ShapeDtypeStruct)
        assert array.dtype == jnp.float32
        assert array.shape == tuple(sizes[dim] for dim in dims)
        return 1

    assert sum(jax.tree.leaves(jax.tree.map(check, params, param_dims(params)))) >= 11
    # The plan fits the real thing.
    real = nnx.state(Decoder(config, rngs=nnx.Rngs(0)), nnx.Param)
    assert jax.tree.structure(real) == jax.tree.structure(params)


def test_layers_are_initialised_apart_and_by_seed() -> None:
    config = tiny_config()

    def gate(seed: int) -> np.ndarray:
        return np.asarray(Decoder(config, rngs=nnx.Rngs(seed)).blocks.gate.kernel[...])

    first = gate(0)
    assert not np.array_equal(first[0], first[1])
    np.testing.assert_array_equal(first, gate(0))
    assert not np.array_equal(first, gate(1))
    assert first.std() == pytest.approx(config.initializer_range, rel=0.05)


def test_bfloat16_computes_over_float32_masters() -> None:
    exact = random_decoder(tiny_config())
    rough = random_decoder(tiny_config(), dtype="bfloat16")
    hidden, _ = rough(jnp.asarray(TOKENS), jnp.zeros_like(TOKENS), attention.attend_causally)
    assert hidden.dtype == jnp.bfloat16
    assert loss(rough).dtype == jnp.float32
    expected, found = gradients(exact), gradients(rough)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert b.dtype == jnp.float32
        assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(a)


def test_logps_in_chunks() -> None:
    """Chunks change neither value nor gradient, and no array of all logits exists."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 11, 8)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(50, 8)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 50, (2, 11)))
    logits = np.asarray(hidden) @ np.asarray(weights).T
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(expected, np.asarray(targets)[..., None], -1)[..., 0]

    def total(hidden: jax.Array, weights: jax.Array, max_logits: int) -> jax.Array:
        return (compute_token_logps(hidden, weights, targets, max_logits) ** 2).sum()

    whole = jax.grad(total, argnums=(0, 1))(hidden, weights, 10**6)
    for max_logits in (1, 300, 10**6):
        found = compute_token_logps(hidden, weights, targets, max_logits)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        grads = jax.grad(total, argnums=(0, 1))(hidden, weights, max_logits)
        for a, b in zip(grads, whole, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)

    program = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)), static_argnums=2)
    sizes = {
        variable.aval.size
        for equation in equations(program(hidden, weights, 300).jaxpr)
        for variable in equation.outvars
        if variable.aval.ndim >= 2 and variable.aval.shape[-1] == 50
    }
    assert max(sizes) == 2 * 3 * 50 <= 300 < logits.size


def test_extreme_logits_stay_finite() -> None:
    hidden = jnp.asarray([[[1e4, 0.0]]])
    weights = jnp.asarray([[1.0, 0.0], [-1.0, 0.0], [0.5, 1.0]])
    found = [
        float(compute_token_logps(hidden, weights, jnp.asarray([[t]]))[0, 0]) for t in range(3)
    ]
    assert found == [0.0, -2e4, -5e3]


def test_the_heads_gradient_adds_up_in_float32() -> None:
    """512 equal contributions: a bfloat16 sum would stop growing at 256 of them."""
    length, vocabulary = 512, 4
    hidden = jnp.ones((1, length, 2), jnp.bfloat16)
    weights = jnp.zeros((vocabulary, 2), jnp.float32)
    targets = jnp.zeros((1, length), jnp.int32)
    one_at_a_time = jax.grad(lambda w: compute_token_logps(hidden, w, targets, vocabulary).sum())(
        weights
    )
    assert one_at_a_time.dtype == jnp.float32
    np.testing.assert_array_equal(one_at_a_time[0], [length * 0.75] * 2)
