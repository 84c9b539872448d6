"""The shared-prefix forward: one prompt, many responses, each as if it stood there alone."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mass_dpo_jax.models import attention
from mass_dpo_jax.models.decoder import Decoder
from mass_dpo_jax.models.response_layout import (
    Picks,
    gather_candidates,
    lay_out_packed,
    lay_out_rectangle,
)
from mass_dpo_jax.models.shared_prefix import CandidateScores, score
from tests.support.helpers import slow
from tests.support.models import (
    VOCABULARY,
    Candidates,
    random_candidates,
    random_decoder,
    scored,
    tiny_config,
)

pytestmark = pytest.mark.usefixtures("strict_jax")

RESPONSE = 7
LAYOUTS: dict[str, dict[str, Any]] = {
    "packed": {"layout": "packed"},
    "rectangle": {"layout": "rectangle", "max_response": RESPONSE},
    "wide rectangle": {"layout": "rectangle", "max_response": RESPONSE + 4},
    "rectangle, 2 at a time": {
        "layout": "rectangle",
        "max_response": RESPONSE,
        "candidate_chunk": 2,
    },
    "packed, few logits": {"layout": "packed", "max_logits": 4 * VOCABULARY},
    "packed, 2 at a time": {"layout": "packed", "max_response": RESPONSE, "candidate_chunk": 2},
}


def alone(model: Decoder, pool: Candidates, pooling: str) -> CandidateScores:
    """One row a response: no packing, no sharing, no padding in common."""
    batch, candidates = pool.response_lengths.shape
    rows = [(row, c) for row in range(batch) for c in range(candidates)]
    responses = np.zeros((len(rows), RESPONSE), np.int32)
    for i, (row, c) in enumerate(rows):
        responses[i, : pool.response_lengths[row, c]] = pool.response(row, c)
    single = Candidates(
        np.repeat(pool.prompts, candidates, axis=0),
        np.repeat(pool.prompt_lengths, candidates),
        responses,
        pool.response_lengths.reshape(-1, 1),
    )
    found = scored(model, single, pooling=pooling)
    return jax.tree.map(lambda x: x.reshape(batch, candidates, *x.shape[2:]), found)


@pytest.mark.parametrize("model_type", ["qwen3", "smollm3", "mistral", "gemma3_text"])
def test_all_layouts_equal_one_row_per_response(model_type: str) -> None:
    model = random_decoder(tiny_config(model_type))
    pool = random_candidates(response=RESPONSE)
    expected = alone(model, pool, "response")
    for name, layout in LAYOUTS.items():
        found = scored(model, pool, pooling="response", **layout)
        np.testing.assert_allclose(found.logps, expected.logps, rtol=1e-5, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(found.features, expected.features, rtol=1e-4, atol=1e-5)


def test_pooling() -> None:
    """`all` counts the prompt's tokens too; None leaves features out and logps as they are."""
    model = random_decoder(tiny_config("qwen3"))
    pool = random_candidates(response=RESPONSE)
    expected = alone(model, pool, "all")
    response = scored(model, pool, pooling="response")
    for layout in ("packed", "rectangle", "rectangle, 2 at a time"):
        found = scored(model, pool, pooling="all", **LAYOUTS[layout])
        np.testing.assert_allclose(found.features, expected.features, rtol=1e-4, atol=1e-5)
    assert not np.allclose(expected.features, response.features, atol=0.1)
    none = scored(model, pool, pooling=None)
    assert none.features is None
    np.testing.assert_allclose(none.logps, response.logps, rtol=1e-6)


def test_a_response_is_scored_as_if_it_were_plain_text() -> None:
    """Behind its own prompt from position 0 on, causal: what the layouts have in common, too."""
    model = random_decoder(tiny_config("qwen3"))
    pool = random_candidates(response=RESPONSE)
    rows = np.argwhere(pool.response_lengths > 0)
    prompts = [pool.prompt(row) for row, _ in rows]
    responses = [pool.response(row, c) for row, c in rows]
    tokens = np.zeros((len(rows), pool.prompts.shape[1] + RESPONSE), np.int32)
    for text, prompt, response in zip(tokens, prompts, responses, strict=True):
        text[: len(prompt) + len(response)] = [*prompt, *response]

    @jax.jit
    def plain(tokens: jax.Array) -> Any:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = model(tokens, positions, attention.attend_causally)
        return hidden, jax.nn.log_softmax(hidden @ model.vocabulary_weights().T)

    hidden, logps = map(np.asarray, plain(tokens))
    found, of_all = (scored(model, pool, pooling=pooling) for pooling in ("response", "all"))
    for i, (row, c) in enumerate(rows):
        start, end = len(prompts[i]), len(prompts[i]) + len(responses[i])
        expected = logps[i, np.arange(start - 1, end - 1), responses[i]].sum()
        assert float(found.logps[row, c]) == pytest.approx(expected, rel=1e-4, abs=1e-4)
        for features, first in ((found.features, start), (of_all.features, 0)):
            mean = hidden[i, first:end].mean(axis=0)
            np.testing.assert_allclose(features[row, c], mean, rtol=1e-4, atol=1e-4)


def gradients(model: Decoder, pool: Candidates, **settings: Any) -> Any:
    """Differentiates a loss in which every log-prob and feature has its own weight."""
    graphdef, params = nnx.split(model)
    arrays = tuple(map(jnp.asarray, pool))
    return _gradients(graphdef, params, arrays, tuple(sorted(settings.items())))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _gradients(graphdef: Any, params: Any, pool: Any, settings: Any) -> Any:
    rng = np.random.default_rng(0)
    shape = pool[-1].shape
    by_logp, by_feature = rng.normal(size=shape), rng.normal(size=(*shape, 1))

    def loss(params: Any) -> jax.Array:
        model = nnx.merge(graphdef, params)
        found = score(model, *pool, pooling="response", **dict(settings))
        assert found.features is not None
        return jnp.sum(by_logp * found.logps) + jnp.sum(by_feature * found.features)

    return jax.grad(loss)(params)


def test_all_layouts_have_the_same_gradients() -> None:
    model = random_decoder(tiny_config("smollm3"))
    pool = random_candidates(response=RESPONSE)
    expected = gradients(model, pool)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(expected))
    for name in ("rectangle", "rectangle, 2 at a time", "packed, few logits"):
        found = gradients(model, pool, **LAYOUTS[name])
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b), name


@pytest.mark.parametrize("layout", ["packed", "rectangle, 2 at a time"])
def test_what_a_response_depends_on(layout: str) -> None:
    """By gradient: a log-prob depends on the prompt and on its own response's earlier tokens, a
    feature on its last token too, and neither on anything else."""
    model = random_decoder(tiny_config("llama", tie_word_embeddings=False))
    lengths = np.array([[3, 0, 2, 4]], np.int32)
    # Every place has a token of its own, so a row of the embedding's gradient is a place.
    prompt, size = 6, 12
    prompts = np.arange(prompt, dtype=np.int32)[None]
    responses = np.arange(prompt, prompt + size, dtype=np.int32)[None]
    pool = Candidates(prompts, np.array([4], np.int32), responses, lengths)
    graphdef, params = nnx.split(model)

    @jax.jit
    def influence(params: Any) -> tuple[jax.Array, jax.Array]:
        def scored(params: Any) -> tuple[jax.Array, jax.Array]:
            args = map(jnp.asarray, pool)
            found = score(nnx.merge(graphdef, params), *args, pooling="response", **LAYOUTS[layout])
            assert found.features is not None
            return found.logps[0], found.features[0].sum(axis=-1)

        return jax.tree.map(lambda x: x["embed"][...], jax.jacrev(scored)(params), is_leaf=is_state)

    def is_state(x: Any) -> bool:
        return isinstance(x, nnx.State)

    logps, features = (np.any(x != 0, axis=-1) for x in influence(params))  # [C, V]
    start = prompt
    for candidate, length in enumerate(lengths[0]):
        own = set(range(start, start + length))
        before = own - {start + length - 1}
        seen = set(range(4)) if length else set()
        assert set(np.flatnonzero(logps[candidate])) == seen | before
        assert set(np.flatnonzero(features[candidate])) == seen | own
        start += length


@pytest.mark.parametrize("layout", ["packed", "wide rectangle", "rectangle, 2 at a time"])
def test_absent_candidates_and_padding(layout: str) -> None:
    """Absent candidates are exact zeros, and what padding holds does not matter."""
    model = random_decoder(tiny_config("qwen3"))
    pool = random_candidates(response=RESPONSE)
    found = scored(model, pool, pooling="all", **LAYOUTS[layout])
    absent = pool.response_lengths == 0
    assert absent[-1].all() and absent.sum() == 6 and pool.prompt_lengths[-1] == 1
    assert np.all(np.isfinite(found.logps)) and np.all(np.isfinite(found.features))
    assert np.all(np.asarray(found.logps)[absent] == 0.0)
    assert np.all(np.asarray(found.logps)[~absent] < 0.0)
    assert np.all(np.asarray(found.features)[absent] == 0.0)
    prompts, responses = pool.prompts.copy(), pool.responses.copy()
    for row in range(len(prompts)):
        prompts[row, pool.prompt_lengths[row] :] = 0
        responses[row, pool.response_lengths[row].sum() :] = 0
    cleared = pool._replace(prompts=prompts, responses=responses)
    again = scored(model, cleared, pooling="all", **LAYOUTS[layout])
    jax.tree.map(np.testing.assert_array_equal, again, found)


def test_an_absent_row_does_not_spoil_gradients() -> None:
    model = random_decoder(tiny_config("smollm3"))
    pool = random_candidates(response=RESPONSE)
    empty = pool._replace(response_lengths=np.zeros_like(pool.response_lengths))
    for layout in ("packed", "rectangle, 2 at a time"):
        for grad in jax.tree.leaves(gradients(model, empty, **LAYOUTS[layout])):
            assert np.all(grad == 0.0)


ROWS = st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=3)


@settings(deadline=None, max_examples=30)
@given(ROWS, st.integers(0, 5), st.data())
def test_layouts_and_gathering_move_the_right_tokens(
    rows: list[list[int]], spare: int, data: st.DataObject
) -> None:
    lengths = np.array(rows, np.int32)
    size = int(lengths.sum(axis=1).max()) + spare + 1
    responses = np.arange(1, lengths.shape[0] * size + 1, dtype=np.int32).reshape(-1, size)
    pool = Candidates(responses, lengths[:, 0], responses, lengths)
    batch, candidates = lengths.shape

    packed = lay_out_packed(jnp.asarray(responses), jnp.asarray(lengths))
    grouped = lay_out_rectangle(jnp.asarray(responses), jnp.asarray(lengths), 5)
    for row in range(batch):
        for c in range(candidates):
            expected = pool.response(row, c).tolist()
            for layout in (packed, grouped):
                own = np.asarray(layout.segments[row]) == c
                assert np.asarray(layout.tokens[row])[own].tolist() == expected
                assert np.asarray(layout.offsets[row])[own].tolist() == list(range(len(expected)))
        for layout in (packed, grouped):
            real = np.asarray(layout.segments[row]) < candidates
            assert real.sum() == lengths[row].sum()

    draw = st.lists(st.integers(0, candidates - 1), min_size=2, max_size=2)
    chosen = np.array([data.draw(draw) for _ in range(batch)], np.int32)
    valid = np.array([data.draw(st.lists(st.booleans(), min_size=2, max_size=2)) for _ in rows])
    found, found_lengths = gather_candidates(
        jnp.asarray(responses),
        jnp.asarray(lengths),
        Picks(jnp.asarray(chosen), jnp.asarray(valid), 9),
    )
    for row in range(batch):
        picked = [pool.response(row, c).tolist() for c in chosen[row][valid[row]]]
        tokens = [token for response in picked for token in response]
        assert found[row].tolist() == tokens + [0] * (9 - len(tokens))
        kept = [n if ok else 0 for n, ok in zip(lengths[row, chosen[row]], valid[row], strict=True)]
        assert found_lengths[row].tolist() == kept


def test_gathered_candidates_keep_their_scores() -> None:
    model = random_decoder(tiny_config("smollm3"))
    pool = random_candidates(response=RESPONSE)
    whole = scored(model, pool, pooling=None).logps
    chosen = jnp.asarray([[0, 4, 2], [0, 2, 3], [0, 1, 2]])
    valid = jnp.asarray([[True, True, False], [True, True, True], [True, True, True]])
    responses, lengths = gather_candidates(
        jnp.asarray(pool.responses), jnp.asarray(pool.response_lengths), Picks(chosen, valid, 24)
    )
    picked = pool._replace(responses=np.asarray(responses), response_lengths=np.asarray(lengths))
    found = scored(model, picked, pooling=None).logps
    expected = jnp.where(valid, jnp.take_along_axis(whole, chosen, axis=1), 0.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layout", ["packed", "rectangle, 2 at a time"])
def test_bfloat16(layout: str) -> None:
    config, pool = tiny_config("llama"), random_candidates(response=RESPONSE)
    exact = scored(random_decoder(config), pool, pooling="response")
    rough = scored(
        random_decoder(config, dtype="bfloat16"), pool, pooling="response", **LAYOUTS[layout]
    )
    assert rough.logps.dtype == rough.features.dtype == jnp.float32
    # These logits are far larger than a trained model's: a nat or so in 50.
    np.testing.assert_allclose(rough.logps, exact.logps, rtol=0.03, atol=0.5)
    np.testing.assert_allclose(rough.features, exact.features, atol=0.2)


@pytest.mark.parametrize("layout", [slow("packed"), slow("rectangle, 2 at a time")])
def test_sharded_weights_and_rows(layout: str) -> None:
    """Rows over one axis, weights over both: left to the compiler, and the same numbers."""
    config = tiny_config("qwen3", vocab_size=104)
    model = random_decoder(config)
    pool = random_candidates(batch=4, response=RESPONSE)
    expected = scored(model, pool, pooling="response")
    grads = gradients(model, pool)
    mesh = jax.make_mesh((4, 2), ("rows", "tensor"), axis_types=(AxisType.Auto,) * 2)
    axes = {"embed": "rows", "vocab": "tensor", "heads": "tensor", "mlp": "tensor"}

    def place(parameter: Any) -> Any:
        dims = (axes.get(dim) for dim in parameter.get_metadata("dims"))
        return parameter.replace(jax.device_put(parameter[...], NamedSharding(mesh, P(*dims))))

    graphdef, params = nnx.split(model)
    is_param = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    model = nnx.merge(graphdef, jax.tree.map(place, params, is_leaf=is_param))
    pool = jax.device_put(pool, NamedSharding(mesh, P("rows")))
    found = scored(model, pool, pooling="response", **LAYOUTS[layout])
    np.testing.assert_allclose(found.logps, expected.logps, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found.features, expected.features, rtol=1e-4, atol=1e-4)
    for a, b in zip(
        jax.tree.leaves(gradients(model, pool, **LAYOUTS[layout])),
        jax.tree.leaves(grads),
        strict=True,
    ):
        assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pooling": "mean"}, "pooling: found 'mean'"),
        ({"pooling": None, "layout": "square"}, "layout: found 'square'"),
        ({"pooling": None, "layout": "rectangle"}, "max_response"),
        ({"pooling": None, "candidate_chunk": 2}, "chunks need max_response"),
        ({"pooling": None, "candidate_chunk": 2, "max_response": 7, "record": True}, "rectangle"),
    ],
)
def test_settings_that_do_not_exist(settings: dict[str, Any], words: str) -> None:
    model = random_decoder(tiny_config())
    with pytest.raises(ValueError, match=words):
        score(model, *map(jnp.asarray, random_candidates()), **settings)
