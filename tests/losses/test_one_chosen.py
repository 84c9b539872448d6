"""Losses of one chosen response: closed forms, masks, extreme inputs."""

from __future__ import annotations

import doctest
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mass_dpo_jax import losses, selection
from mass_dpo_jax.losses import graded, one_chosen

pytestmark = pytest.mark.usefixtures("strict_jax")

GARBAGE = (np.nan, np.inf, -np.inf, 3e38)


def float64_plackett_luce(log_ratios, valid, beta):
    """-log of the chosen response's share, written out; and its gradient."""
    rewards = beta * np.asarray(log_ratios, np.float64)
    values, gradients = [], np.zeros(log_ratios.shape)
    for b, (reward, present) in enumerate(zip(rewards, valid, strict=True)):
        total = np.logaddexp.reduce(reward[present])
        values.append(total - reward[0])
        gradients[b, present] = beta * np.exp(reward[present] - total)
        gradients[b, 0] -= beta
    return np.array(values), gradients


def value_and_grad(loss, log_ratios, *args):
    """Values [B] and d(sum of values)/d(log_ratios)."""
    args = [jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in args]
    values, pull = jax.vjp(lambda r: loss(r, *args), jnp.asarray(log_ratios))
    return np.asarray(values), np.asarray(pull(jnp.ones_like(values))[0])


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0.01, 0.1, 1.0, 5.0]),
    st.sampled_from([0.1, 10.0, 1e3]),
    st.sampled_from(GARBAGE),
)
def test_plackett_luce_is_its_float64_formula_and_ignores_what_is_masked(
    seed, beta, scale, garbage
):
    rng = np.random.default_rng(seed)
    log_ratios = rng.normal(0, scale, (6, 6)).astype(np.float32)
    valid = rng.random((6, 6)) < 0.7
    valid[:, :2] = True
    want, want_gradient = float64_plackett_luce(log_ratios, valid, beta)
    log_ratios[~valid] = garbage
    got, gradient = value_and_grad(losses.plackett_luce, log_ratios, jnp.asarray(valid), beta)
    magnitude = beta * np.abs(log_ratios[valid]).max()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * magnitude)
    np.testing.assert_allclose(
        gradient, want_gradient, rtol=1e-4 + 1e-6 * magnitude, atol=1e-6 * beta * (1 + magnitude)
    )
    assert (gradient[~valid] == 0).all()


@pytest.mark.parametrize("garbage", GARBAGE)
def test_weighted_plackett_luce_is_its_float64_formula(garbage):
    rng = np.random.default_rng(0)
    log_ratios, log_weights = (rng.normal(0, 3, (6, 6)).astype(np.float32) for _ in range(2))
    valid = rng.random((6, 6)) < 0.7
    valid[:, :2] = True
    scores = 0.5 * (log_ratios[:, 1:] - log_ratios[:, :1]).astype(np.float64)
    terms = np.where(valid[:, 1:], np.exp(log_weights[:, 1:] + scores), 0.0)
    total = terms.sum(1, keepdims=True)
    slopes = 0.5 * terms / (1 + total)
    log_ratios[~valid] = log_weights[~valid] = garbage
    log_weights[:, 0] = garbage  # The chosen response stands for itself.
    got, gradient = value_and_grad(
        lambda r: losses.plackett_luce(r, jnp.asarray(valid), 0.5, jnp.asarray(log_weights)),
        log_ratios,
    )
    np.testing.assert_allclose(got, np.log1p(total[:, 0]), rtol=1e-5)
    np.testing.assert_allclose(gradient[:, 1:], slopes, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(gradient[:, 0], -slopes.sum(1), rtol=1e-4)


def test_weights_of_one_change_nothing_bit_for_bit():
    rng = np.random.default_rng(0)
    log_ratios = rng.normal(0, 3, (6, 6)).astype(np.float32)
    valid = jnp.asarray(rng.random((6, 6)) < 0.7)
    plain = value_and_grad(losses.plackett_luce, log_ratios, valid, 0.5)
    weighted = value_and_grad(
        losses.plackett_luce, log_ratios, valid, 0.5, np.zeros((6, 6), np.float32)
    )
    for got, want in zip(weighted, plain, strict=True):
        np.testing.assert_array_equal(got, want)


def test_weights_make_the_sum_over_all_negatives_the_mean_over_draws_and_the_loss_lower():
    """Over every set of n of N negatives, each of which is drawn with the probability n / N."""
    total, n = 6, 2
    log_ratios = np.random.default_rng(0).normal(0, 1, (1, 1 + total)).astype(np.float32)
    sets = [(0, *(1 + i for i in s)) for s in itertools.combinations(range(total), n)]
    rows = np.concatenate([log_ratios[:, s] for s in sets])
    log_weights = jnp.full(rows.shape, np.log(total / n), jnp.float32)
    drawn = losses.plackett_luce(jnp.asarray(rows), jnp.ones(rows.shape, bool), 1.0, log_weights)
    whole = losses.plackett_luce(jnp.asarray(log_ratios), jnp.ones((1, 1 + total), bool), 1.0)[0]
    assert np.expm1(drawn).mean() == pytest.approx(np.expm1(whole), rel=1e-5)
    assert drawn.mean() < whole - 0.01


@pytest.mark.parametrize("scale", [0.1, 100.0])
def test_plackett_luce_is_the_ranking_loss_of_optax(scale):
    rng = np.random.default_rng(0)
    log_ratios = rng.normal(0, scale, (6, 6)).astype(np.float32)
    valid = jnp.asarray(rng.random((6, 6)) < 0.7).at[:, :2].set(True)

    def ranking(r, valid, beta):
        chosen = jnp.zeros(r.shape).at[:, 0].set(1.0)
        return optax.losses.ranking_softmax_loss(beta * r, chosen, where=valid, reduce_fn=None)

    for got, want in zip(
        value_and_grad(losses.plackett_luce, log_ratios, valid, 0.5),
        value_and_grad(ranking, log_ratios, valid, 0.5),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("n", [1, 3, 5])
def test_at_the_reference_the_loss_is_the_log_of_the_number_of_candidates(n):
    valid = np.tril(np.ones((n, n + 1), bool), 1)  # rows with 1, 2, .. n valid negatives
    got = losses.plackett_luce(jnp.zeros((n, n + 1)), jnp.asarray(valid), 0.1)
    np.testing.assert_allclose(got, np.log(1 + np.arange(1, n + 1)), rtol=1e-6)


@pytest.mark.parametrize("difference", [-1e4, -30.0, -1.0, 0.0, 2.0, 1e4])
def test_with_one_negative_plackett_luce_is_dpo(difference):
    log_ratios = np.array([[difference, 0.0]], np.float32)
    valid = jnp.ones((1, 2), bool)
    value, gradient = value_and_grad(losses.plackett_luce, log_ratios, valid, 1.0)
    dpo_value, dpo_gradient = value_and_grad(losses.dpo, log_ratios, valid, 1.0)
    np.testing.assert_allclose(value, dpo_value, rtol=1e-6)
    np.testing.assert_allclose(gradient, dpo_gradient, rtol=1e-6)
    np.testing.assert_allclose(dpo_value, np.logaddexp(0.0, -difference), rtol=1e-5)
    sigmoid = np.exp(-np.logaddexp(0.0, difference))  # of the negative score
    np.testing.assert_allclose(dpo_gradient, [[-sigmoid, sigmoid]], rtol=1e-5)


def test_extreme_log_ratios_give_finite_values_and_gradients():
    extreme = np.array(
        [[1e4, -1e4, -1e4], [-1e4, 1e4, 1e4], [-1e4, 1e4, -1e4], [1e4, 1e4, 1e4]], np.float32
    )
    values, gradients = value_and_grad(losses.plackett_luce, extreme, jnp.ones((4, 3), bool), 1.0)
    np.testing.assert_allclose(values, [0, 2e4 + np.log(2), 2e4, np.log(3)], rtol=1e-6)
    third = 1 / 3
    want = [[0, 0, 0], [-1, 0.5, 0.5], [-1, 1, 0], [third - 1, third, third]]
    np.testing.assert_allclose(gradients, want, rtol=1e-3, atol=1e-12)


def test_a_small_loss_keeps_its_digits():
    got = losses.plackett_luce(jnp.array([[20.0, 0.0, 0.0]]), jnp.ones((1, 3), bool), 1.0)
    np.testing.assert_allclose(got, 2 * np.exp(-20.0), rtol=1e-5)


# The losses of log-ratios by name, each with what it takes beside (log_ratios, valid, beta), as a
# function of the number of negatives.
def odpo(log_ratios, valid, beta):
    return losses.odpo(log_ratios, valid, beta, jnp.zeros_like(log_ratios[:, 1:]) + 0.7)


def sampled(log_ratios, valid, beta):
    weights = jnp.full_like(log_ratios[:, 1:], 0.5)
    return losses.sampled_plackett_luce(log_ratios, valid, beta, weights, jnp.full(len(valid), 1.3))


PAIRS = [losses.plackett_luce, losses.dpo, losses.dpo_k, losses.dmpo]
EVERY = [*PAIRS, odpo, sampled]


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("loss", EVERY)
def test_a_row_without_negatives_or_without_a_chosen_response_costs_nothing(loss, garbage):
    log_ratios = np.array([[2.0, garbage], [garbage, 2.0], [garbage, garbage]], np.float32)
    valid = jnp.array([[True, False], [False, True], [False, False]])
    values, gradients = value_and_grad(loss, log_ratios, valid, 0.1)
    assert (values == 0).all() and (gradients == 0).all()


def float64_of_pairs(name, rewards, margins):
    """Loss and gradient with respect to the rewards [1 + n] of one row, written out."""
    margin = rewards[0] - rewards[1:]
    n = len(margin)
    if name == "dmpo":
        margin = np.array([margin.mean()])
    if name == "odpo":
        margin = margin - margins
    if name == "mppo":
        margin = np.array([margin.sum()])
    value = np.logaddexp(0.0, -margin).mean()
    slope = np.exp(-np.logaddexp(0.0, margin))  # sigmoid(-margin)
    share = {"dmpo": slope / n, "mppo": slope}.get(name, slope / n) * np.ones(n)
    return value, np.concatenate([[-share.sum()], share])


@settings(deadline=None, max_examples=20)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0.1, 1.0]),
    st.sampled_from([0.1, 10.0]),
    st.sampled_from(GARBAGE),
)
@pytest.mark.parametrize("name", ["dpo_k", "dmpo", "odpo", "mppo"])
def test_losses_by_pairs_are_their_float64_formulas(name, seed, beta, scale, garbage):
    rng = np.random.default_rng(seed)
    logs = -np.abs(rng.normal(0, scale, (5, 6)))
    valid = rng.random((5, 6)) < 0.7
    valid[:, :2] = True
    margins, tokens = rng.normal(0, 1, (5, 5)), rng.integers(1, 9, (5, 6))
    dirty = np.where(valid, logs, garbage).astype(np.float32)
    spoiled = jnp.asarray(np.where(valid[:, 1:], margins, garbage), jnp.float32)
    mask = jnp.asarray(valid)
    loss = {
        "dpo_k": lambda x: losses.dpo_k(x, mask, beta),
        "dmpo": lambda x: losses.dmpo(x, mask, beta),
        "odpo": lambda x: losses.odpo(x, mask, beta, spoiled),
        "mppo": lambda x: losses.mppo(x, jnp.asarray(tokens), mask),
    }[name]
    got, gradient = value_and_grad(loss, dirty)
    want, want_gradient = np.zeros(5), np.zeros((5, 6))
    for b, row_valid in enumerate(valid):
        if name == "mppo":
            rewards = np.exp(logs[b] / tokens[b])
            chain = rewards / tokens[b]
        else:
            rewards, chain = beta * logs[b], np.full(6, beta)
        want[b], slope = float64_of_pairs(name, rewards[row_valid], margins[b][row_valid[1:]])
        want_gradient[b, row_valid] = chain[row_valid] * slope
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("difference", [-1e4, -1.0, 0.0, 2.0, 1e4])
@pytest.mark.parametrize("loss", [losses.dpo_k, losses.dmpo])
def test_with_one_negative_the_losses_by_pairs_are_dpo(loss, difference):
    log_ratios, valid = np.array([[difference, 0.0]], np.float32), jnp.ones((1, 2), bool)
    for got, want in zip(
        value_and_grad(loss, log_ratios, valid, 0.5),
        value_and_grad(losses.dpo, log_ratios, valid, 0.5),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_margin_increases_odpo_loss():
    log_ratios, valid = jnp.array([[0.3, 1.0, -2.0]]), jnp.ones((1, 3), bool)
    plain = losses.dpo_k(log_ratios, valid, 0.5)
    np.testing.assert_allclose(losses.odpo(log_ratios, valid, 0.5, jnp.zeros((1, 2))), plain)
    assert losses.odpo(log_ratios, valid, 0.5, jnp.array([[0.0, 1.0]])) > plain


@pytest.mark.parametrize("loss", [losses.dpo_k, losses.dmpo, odpo, sampled])
def test_extreme_log_ratios_leave_every_loss_finite(loss):
    extreme = np.array([[1e4, -1e4, -1e4], [-1e4, 1e4, -1e4]], np.float32)
    values, gradients = value_and_grad(loss, extreme, jnp.ones((2, 3), bool), 1.0)
    assert np.isfinite(values).all() and np.isfinite(gradients).all()


def test_the_least_likely_response_leaves_mppo_finite():
    logps = np.array([[-1e5, -1e-3, -1e5]], np.float32)
    tokens = jnp.array([[1, 2000, 1]])
    value, gradient = value_and_grad(
        lambda x: losses.mppo(x, tokens, jnp.ones((1, 3), bool)), logps
    )
    np.testing.assert_allclose(value, np.logaddexp(0.0, 1.0), rtol=1e-5)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("draw", ["pivotal", "independent"])
def test_drawn_negatives_estimate_the_gradient_of_all_without_bias(draw):
    rng = np.random.default_rng(0)
    log_ratios = rng.normal(0, 1.5, (1, 8)).astype(np.float32)
    all_valid, beta, n, draws = jnp.ones((1, 8), bool), 1.0, 3, 20_000
    value, want = value_and_grad(losses.plackett_luce, log_ratios, all_valid, beta)
    scores = beta * jnp.asarray(log_ratios[0, 1:] - log_ratios[0, 0])
    criterion_settings = selection.Settings(criterion="sampled", draw=draw)
    pools = selection.Pool(
        gram=None,
        scores=jnp.broadcast_to(scores, (draws, 7)),
        mask=jnp.ones((draws, 7), bool),
        key=jax.random.split(jax.random.key(1), draws),
    )
    drawn = jax.jit(selection.select, static_argnums=(1, 2))(pools, n, criterion_settings)
    pool_loss = selection.pool_loss(scores, all_valid[0, 1:])
    np.testing.assert_allclose(pool_loss, value[0], rtol=1e-6)

    def loss(r, indices, valid, weights):
        row, valid = r[0, jnp.pad(indices + 1, (1, 0))], jnp.pad(valid, (1, 0), constant_values=1)
        arguments = [x[None] for x in (weights, pool_loss)]
        return losses.sampled_plackett_luce(row[None], valid[None], beta, *arguments)[0]

    per_draw_grad = jax.vmap(jax.value_and_grad(loss), (None, 0, 0, 0))
    values, gradients = jax.jit(per_draw_grad)(
        log_ratios, drawn.indices, drawn.valid, drawn.weights
    )
    np.testing.assert_allclose(values, value[0], rtol=1e-6)
    mean, spread = gradients[:, 0].mean(0), gradients[:, 0].std(0)
    assert (np.abs(mean - want[0]) < 5 * spread / np.sqrt(draws) + 1e-6).all()
    assert (spread[1:] > 0.05).sum() >= 6  # It is an estimate; one candidate is always drawn.


def test_when_the_whole_pool_is_drawn_the_estimate_is_exact():
    log_ratios = np.array([[0.3, 1.0, -2.0, 0.5]], np.float32)
    valid = jnp.ones((1, 4), bool)
    scores = jnp.asarray(log_ratios[:, 1:] - log_ratios[:, :1])
    pools = selection.Pool(None, scores, valid[:, 1:], jax.random.split(jax.random.key(0), 1))
    drawn = selection.select(pools, 3, selection.Settings(criterion="sampled"))
    rows = np.concatenate([log_ratios[:, :1], log_ratios[:, 1 + np.asarray(drawn.indices[0])]], 1)
    pool_loss = losses.plackett_luce(jnp.asarray(log_ratios), valid, 1.0)
    got, gradient = value_and_grad(
        losses.sampled_plackett_luce, rows, valid, 1.0, drawn.weights, pool_loss
    )
    want, want_gradient = value_and_grad(losses.plackett_luce, rows, valid, 1.0)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-5)


def test_no_nan_or_infinity_arises_on_the_way():
    valid = jnp.array([[True, False, False], [False, True, True], [True, True, True]])
    with jax.debug_nans(True), jax.debug_infs(True):
        value_and_grad(losses.plackett_luce, np.full((3, 3), 1e4, np.float32), valid, 1.0)


def test_masked_negative_equals_removed_negative():
    log_ratios = jnp.array([[0.3, 1.0, -2.0, 0.5]])
    valid = jnp.array([[True, True, False, True]])
    got = losses.plackett_luce(log_ratios, valid, 0.5)
    want = losses.plackett_luce(log_ratios[:, jnp.array([0, 1, 3])], jnp.ones((1, 3), bool), 0.5)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_half_precision_is_computed_in_float32():
    log_ratios = jnp.array([[1.0, 0.5, 0.25]], jnp.bfloat16)
    got = losses.plackett_luce(log_ratios, jnp.ones((1, 3), bool), 0.1)
    assert got.dtype == jnp.float32
    want, _ = float64_plackett_luce(np.array([[1.0, 0.5, 0.25]]), np.ones((1, 3), bool), 0.1)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_supervised_is_nats_per_token_and_ignores_empty_rows():
    logps, tokens = jnp.array([-6.0, jnp.nan, -1.5]), jnp.array([3, 0, 1])
    values, pull = jax.vjp(lambda x: losses.supervised(x, tokens), logps)
    np.testing.assert_allclose(values, [2.0, 0.0, 1.5])
    np.testing.assert_allclose(pull(jnp.ones(3))[0], [-1 / 3, 0.0, -1.0])


@pytest.mark.usefixtures("shapes_unchecked")
def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        losses.plackett_luce(jnp.zeros((2, 3)), jnp.ones((2, 2), bool), 0.1)
    with pytest.raises(ValueError, match=r"\[B, 2\]"):
        losses.dpo(jnp.zeros((2, 3)), jnp.ones((2, 3), bool), 0.1)


@pytest.mark.parametrize("module", [losses, one_chosen, graded])
def test_the_examples_in_the_docstrings_run(module):
    assert doctest.testmod(module).failed == 0
    assert doctest.testmod(module).attempted > 0
