"""LoRA's dropout: the masks, their place in the model, and that a token alone decides them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mass_dpo_jax.models import chunked_replay, decoder
from mass_dpo_jax.models.dropout import DropoutKeys, draw_factors, make_example_keys
from mass_dpo_jax.models.lora import merge_adapters
from mass_dpo_jax.models.replay import replay
from mass_dpo_jax.models.response_layout import gather_candidates
from mass_dpo_jax.models.shared_prefix import score
from tests.models.test_chunked_replay import loss, some_picks
from tests.models.test_lora import ALL, SOME, weights_of
from tests.support.helpers import slow
from tests.support.models import Candidates, random_candidates, random_decoder, tiny_config

pytestmark = pytest.mark.usefixtures("strict_jax")

RATE = 0.3
RESPONSE = 7
DROPS = dataclasses.replace(ALL, dropout=RATE)


def make_keys(pool: Candidates, step: int = 0) -> jax.Array:
    rows = jnp.arange(10, 10 + len(pool.prompts))
    return make_example_keys(jax.random.fold_in(jax.random.key(0), step), rows)


def number_candidates(pool: Candidates) -> jax.Array:
    shape = pool.response_lengths.shape
    return jnp.broadcast_to(jnp.arange(shape[1]), shape)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(graphdef: Any, settings: Any, params: Any, arrays: Any, dropout: Any) -> Any:
    model = nnx.merge(graphdef, params)
    return score(model, *arrays, pooling=None, dropout=dropout, **dict(settings)).logps


def logps_of(model: Any, pool: Candidates, dropout: DropoutKeys | None, **settings: Any) -> Any:
    graphdef, params = nnx.split(model)
    arrays = tuple(map(jnp.asarray, pool))
    return _score(graphdef, tuple(settings.items()), params, arrays, dropout)


class TestFactors:
    def test_a_share_is_zero_and_the_mean_is_one(self) -> None:
        keys = make_keys(random_candidates(response=RESPONSE))
        keys = DropoutKeys(keys, jnp.zeros((len(keys), 1), int)).make_prompt_keys(300)
        factors = np.asarray(draw_factors(keys.reshape(-1, 2), 3, 100, RATE))
        assert set(np.unique(factors)) == {np.float32(0), np.float32(1 / (1 - RATE))}
        # Four standard errors of a mean of as many.
        assert np.mean(factors == 0) == pytest.approx(RATE, abs=4 * 0.46 / factors.size**0.5)

    def test_tokens_layers_and_projections_have_their_own(self) -> None:
        keys = make_keys(random_candidates(response=RESPONSE))[:2]
        tokens = DropoutKeys(keys, jnp.array([[0, 1], [0, 1]]))
        segments = jnp.array([[[0, 0, 1, 1]]] * 2)
        found = jnp.concatenate(
            [
                tokens.make_prompt_keys(4),
                tokens.make_response_keys(segments, jnp.array([[[0, 1, 0, 1]]] * 2)),
            ],
            axis=1,
        ).reshape(-1, 2)
        masks = [np.asarray(draw_factors(found, number, 400, RATE)) > 0 for number in range(3)]
        rows = np.concatenate(masks).astype(float)
        correlations = np.corrcoef(rows) - np.eye(len(rows))
        assert np.abs(correlations).max() < 5 / 400**0.5

    def test_a_response_keeps_its_own_wherever_it_stands(self) -> None:
        keys = make_keys(random_candidates(response=RESPONSE))[:1]
        offsets = jnp.arange(5)[None, None]
        alone = DropoutKeys(keys, jnp.array([[6]])).make_response_keys(0 * offsets, offsets)
        among = DropoutKeys(keys, jnp.array([[2, 6, 4]]))
        np.testing.assert_array_equal(among.make_response_keys(0 * offsets + 1, offsets), alone)
        assert (among.make_response_keys(0 * offsets, offsets) != alone).any()


@pytest.mark.parametrize(
    ("model_type", "layout"),
    [("qwen3", "packed"), ("gemma3_text", "rectangle"), slow("llama", "rectangle")],
)
def test_masks_multiply_the_rows_of_a(
    model_type: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one mask for all tokens, W + s diag(m) A B is a model without adapters."""
    config = tiny_config(model_type)
    lora = dataclasses.replace(SOME if model_type == "qwen3" else ALL, dropout=RATE)
    model = random_decoder(config, lora=lora)
    count = config.num_layers * len(lora.targets)
    rng = np.random.default_rng(1)
    masks = (rng.random((count, 512)) > RATE) / (1 - RATE)
    drawn = []

    def draw(keys: jax.Array, number: Any, size: int, rate: float) -> jax.Array:
        drawn.append(rate)
        row = jnp.asarray(masks, jnp.float32)[number, :size]
        return jnp.broadcast_to(row, (len(keys), size))

    monkeypatch.setattr(decoder, "draw_factors", draw)
    pool = random_candidates(response=RESPONSE)
    keys = DropoutKeys(make_keys(pool), number_candidates(pool))
    found = logps_of(model, pool, keys, layout=layout, max_response=RESPONSE)
    assert set(drawn) == {RATE}

    params = weights_of(model)
    for place, name in enumerate(lora.targets):
        a = params["adapters"][name]["a"]
        rows = np.arange(config.num_layers) * len(lora.targets) + place
        params["adapters"][name]["a"] = a * masks[rows, : a.shape[1], None].astype(np.float32)
    graphdef = nnx.graphdef(decoder.abstract_decoder(config))
    plain = nnx.merge(graphdef, merge_adapters(params, lora))
    expected = logps_of(plain, pool, None, layout=layout, max_response=RESPONSE)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-4)
    assert np.abs(found - logps_of(model, pool, None)).max() > 0.1


def test_layouts_and_chunks_drop_the_same() -> None:
    model = random_decoder(tiny_config("qwen3"), lora=DROPS)
    pool = random_candidates(response=RESPONSE)
    keys = DropoutKeys(make_keys(pool), number_candidates(pool))
    packed = logps_of(model, pool, keys)
    for settings in (
        {"layout": "rectangle"},
        {"layout": "rectangle", "candidate_chunk": 2},
        {"layout": "packed", "candidate_chunk": 3},
    ):
        found = logps_of(model, pool, keys, max_response=RESPONSE, **settings)
        np.testing.assert_allclose(found, packed, rtol=2e-5, atol=2e-4)
    later = keys._replace(examples=make_keys(pool, step=1))
    assert np.abs(logps_of(model, pool, later) - packed).max() > 0.1
    # Without keys nothing is dropped: selection, evaluation and the reference.
    whole = random_decoder(tiny_config("qwen3"), lora=ALL)
    np.testing.assert_array_equal(logps_of(model, pool, None), logps_of(whole, pool, None))
    assert np.abs(logps_of(model, pool, None) - packed).max() > 0.1


@pytest.mark.parametrize(
    ("model_type", "remat", "layout"),
    [("qwen3", "dots", "packed"), slow("smollm3", "full", "rectangle")],
)
def test_the_gradient_passes_the_same_masks(model_type: str, remat: str, layout: str) -> None:
    """Of a record, and of a few responses at a time, against JAX's of one pass."""
    tied = model_type == "smollm3"
    config = tiny_config(model_type, tie_word_embeddings=tied)
    graphdef, _ = nnx.split(random_decoder(config, lora=DROPS, remat=remat))
    frozen = weights_of(random_decoder(config, lora=DROPS))
    trained = {"adapters": frozen.pop("adapters")}
    pool = random_candidates(response=RESPONSE)
    picks, arrays = some_picks(pool), tuple(map(jnp.asarray, pool))
    keys = DropoutKeys(make_keys(pool), picks.candidate_ids)
    settings: Any = {"layout": layout, "max_response": RESPONSE}

    def build(trained: Any) -> Any:
        return nnx.merge(graphdef, {**frozen, **trained})

    def score_picks(model: Any, **more: Any) -> Any:
        some = gather_candidates(*arrays[2:], picks)
        return score(model, *arrays[:2], *some, pooling=None, dropout=keys, **settings, **more)

    @jax.jit
    def at_once(trained: Any) -> Any:
        def joint(trained: Any) -> Any:
            return loss(score_picks(build(trained)).logps)

        return jax.value_and_grad(joint, has_aux=True)(trained)

    @jax.jit
    def recorded(trained: Any) -> Any:
        record = score_picks(build(trained), record=True).record

        def joint(trained: Any) -> Any:
            some = gather_candidates(*arrays[2:], picks)
            model = build(trained)
            return loss(replay(model, record, *arrays[:2], *some, dropout=keys, **settings))

        return jax.value_and_grad(joint, has_aux=True)(trained)

    @jax.jit
    def in_chunks(trained: Any) -> Any:
        return chunked_replay.value_and_grad(
            loss, build, trained, *arrays, picks, 2, dropout=keys.examples, **settings
        )

    (value, logps), expected = at_once(trained)
    for differentiate in (recorded, in_chunks):
        (found, found_logps), gradient = differentiate(trained)
        np.testing.assert_allclose(found, value, rtol=1e-5)
        np.testing.assert_allclose(found_logps, logps, rtol=2e-5, atol=2e-4)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
            norm = float(jnp.linalg.norm(b))
            assert norm > 0
            assert float(jnp.linalg.norm(a - b)) < 1e-4 * norm
