"""Losses of graded lists: formulas written out in float64, masks, ties, extreme inputs."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mass_dpo_jax import losses
from mass_dpo_jax.losses.graded import places

pytestmark = pytest.mark.usefixtures("strict_jax")

GARBAGE = (np.nan, np.inf, -np.inf, 3e38)
LEVELS = (0.0, 0.25, 0.5, 1.0)


def pl_rank(top):
    def loss(log_ratios, valid, beta, grades):
        return losses.pl_rank(log_ratios, valid, beta, grades, top)

    return loss


LISTS = {
    "pl_rank": pl_rank(0),
    "pl_rank_2": pl_rank(2),
    "lipo_lambda": losses.lipo_lambda,
    "tree_po": losses.tree_po,
}


def dcg(rewards, grades, exchange=()):
    """DCG of the responses in the order of rewards, of ties the worst first.

    With `exchange`, two responses change places.
    """
    order = sorted(range(len(rewards)), key=lambda i: (-rewards[i], grades[i], i))
    for i in range(len(order)):
        if order[i] in exchange:
            order[i] = sum(exchange) - order[i]
    return sum((2 ** grades[i] - 1) / np.log2(1 + place) for place, i in enumerate(order, 1))


def float64_of_list(name, rewards, grades):
    """Loss and gradient with respect to the rewards of a list whose responses all count."""
    value, gradient, size = 0.0, np.zeros(len(rewards)), len(rewards)
    if name.startswith("pl_rank"):
        top = 2 if name == "pl_rank_2" else size
        for i in range(size):
            worse = grades < grades[i]
            if (grades > grades[i]).sum() >= top or not worse.any():
                continue
            total = np.logaddexp(rewards[i], np.logaddexp.reduce(rewards[worse]))
            value += total - rewards[i]
            gradient[worse] += np.exp(rewards[worse] - total)
            gradient[i] += np.exp(rewards[i] - total) - 1
        return value, gradient
    for i, j in itertools.permutations(range(size), 2):
        if grades[i] > grades[j]:
            weight = abs(dcg(rewards, grades, (i, j)) - dcg(rewards, grades))
            weight /= size * (size - 1) / 2 if name == "tree_po" else 1
            value += weight * np.logaddexp(0, rewards[j] - rewards[i])
            slope = weight * np.exp(-np.logaddexp(0, rewards[i] - rewards[j]))
            gradient[i] -= slope
            gradient[j] += slope
    return value, gradient


@functools.partial(jax.jit, static_argnums=(0, 3))
def pull_back(loss, log_ratios, valid, beta, grades):
    values, pull = jax.vjp(lambda r: loss(r, valid, beta, grades), log_ratios)
    return values, pull(jnp.ones_like(values))[0]


def value_and_grad(loss, log_ratios, valid, beta, grades):
    """Values [B] and d(sum of values)/d(log_ratios)."""
    log_ratios, valid, grades = (jnp.asarray(x) for x in (log_ratios, valid, grades))
    return tuple(np.asarray(x) for x in pull_back(loss, log_ratios, valid, beta, grades))


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0.1, 1.0]),
    st.sampled_from([0.1, 10.0]),
    st.sampled_from(GARBAGE),
)
@pytest.mark.parametrize("name", LISTS)
def test_losses_of_lists_are_their_float64_formulas(name, seed, beta, scale, garbage):
    rng = np.random.default_rng(seed)
    log_ratios = rng.normal(0, scale, (5, 6)).astype(np.float32)
    log_ratios[0, 1] = log_ratios[0, 2]  # A tie in reward, too.
    grades = rng.choice(LEVELS, (5, 6)).astype(np.float32)
    valid = rng.random((5, 6)) < 0.7
    want, want_gradient = np.zeros(5), np.zeros((5, 6))
    for b, row in enumerate(valid):
        rewards = (beta * log_ratios[b, row]).astype(np.float64)
        want[b], slope = float64_of_list(name, rewards, grades[b, row])
        want_gradient[b, row] = beta * slope
    spoiled, spoiled_grades = (
        np.where(valid, x, garbage).astype("f") for x in (log_ratios, grades)
    )
    got, gradient = value_and_grad(LISTS[name], spoiled, valid, beta, spoiled_grades)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", LISTS)
def test_a_row_without_a_pair_costs_nothing(name):
    log_ratios = np.array([[2.0, 1.0, -1.0], [2.0, np.nan, np.inf], [np.nan] * 3], np.float32)
    valid = np.array([[True] * 3, [True, False, False], [False] * 3])
    grades = np.array([[0.5] * 3, [1.0, 0.0, np.nan], [1.0, 0.5, 0.0]], np.float32)
    values, gradients = value_and_grad(LISTS[name], log_ratios, valid, 0.1, grades)
    assert (values == 0).all() and (gradients == 0).all()


@pytest.mark.parametrize("difference", [-1e4, -1.0, 0.0, 2.0, 1e4])
@pytest.mark.parametrize("name", LISTS)
def test_with_one_pair_the_losses_of_lists_are_dpo(name, difference):
    log_ratios, valid = np.array([[difference, 0.0]], np.float32), np.ones((1, 2), bool)
    factor = 1.0 if name.startswith("pl_rank") else 1 - 1 / np.log2(3)
    dpo = jax.value_and_grad(lambda r: losses.dpo(r, jnp.asarray(valid), 0.5)[0])
    value, gradient = value_and_grad(LISTS[name], log_ratios, valid, 0.5, np.array([[1.0, 0.0]]))
    want, want_gradient = dpo(jnp.asarray(log_ratios))
    np.testing.assert_allclose(value[0], factor * want, rtol=1e-6)
    np.testing.assert_allclose(gradient, factor * want_gradient, rtol=1e-6)


@pytest.mark.parametrize("name", LISTS)
def test_extreme_log_ratios_leave_losses_of_lists_finite(name):
    extreme = np.array([[1e4, -1e4, -1e4], [-1e4, 1e4, 0.0]], np.float32)
    grades = np.array([[1.0, 0.5, 0.0]] * 2, np.float32)
    values, gradients = value_and_grad(LISTS[name], extreme, np.ones((2, 3), bool), 1.0, grades)
    assert np.isfinite(values).all() and np.isfinite(gradients).all()
    assert values[1] > 1e3


def test_the_probabilities_of_all_rankings_sum_to_one():
    log_ratios = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4)).astype(np.float32))
    rankings = jnp.array(list(itertools.permutations(range(4))), jnp.float32)
    valid = jnp.ones((24, 4), bool)
    rows = jnp.broadcast_to(log_ratios, (24, 4))
    full = losses.pl_rank(rows, valid, 1.0, rankings, top=0)
    assert np.exp(-np.asarray(full)).sum() == pytest.approx(1, abs=1e-5)
    # The first two places: each pair of them occurs twice among the rankings.
    first = losses.pl_rank(rows, valid, 1.0, rankings, top=2)
    assert np.exp(-np.asarray(first)).sum() == pytest.approx(2, abs=1e-5)


def test_the_first_place_of_a_ranking_is_plackett_luce():
    rng = np.random.default_rng(1)
    log_ratios = rng.normal(size=(3, 5)).astype(np.float32)
    grades = np.concatenate([np.full((3, 1), 2.0), rng.random((3, 4))], 1).astype(np.float32)
    valid = np.ones((3, 5), bool)
    got, gradient = value_and_grad(pl_rank(1), log_ratios, valid, 0.5, grades)

    def chosen(r, valid, beta, grades):
        return losses.plackett_luce(r, valid, beta)

    want, want_gradient = value_and_grad(chosen, log_ratios, valid, 0.5, grades)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-5, atol=1e-7)


def test_several_best_responses_are_each_compared_with_the_common_negatives():
    log_ratios = np.array([[0.3, -1.0, 0.8, 2.0]], np.float32)
    grades = np.array([[1.0, 0.0, 0.0, 1.0]], np.float32)
    valid = np.ones((1, 4), bool)
    got, _ = value_and_grad(pl_rank(1), log_ratios, valid, 1.0, grades)
    alone = [
        losses.plackett_luce(jnp.asarray(log_ratios[:, [best, 1, 2]]), jnp.ones((1, 3), bool), 1.0)
        for best in (0, 3)
    ]
    np.testing.assert_allclose(got, sum(alone), rtol=1e-6)


def test_places_put_the_worst_of_equal_rewards_first_and_the_invalid_last():
    rewards = jnp.array([[0.0, 0.0, 0.0, 0.0], [1.0, 3.0, jnp.nan, 3.0]])
    grades = jnp.array([[1.0, 0.5, 0.0, 0.5], [0.0, 0.0, 0.0, 1.0]])
    valid = jnp.array([[True] * 4, [True, True, False, True]])
    got = places(rewards, valid, grades)
    np.testing.assert_array_equal(got, [[4, 2, 1, 3], [3, 1, 4, 2]])


def test_lambda_weights_are_constants():
    rng = np.random.default_rng(2)
    rewards, grades = (jnp.asarray(rng.normal(size=(2, 5)), jnp.float32) for _ in range(2))
    valid = jnp.ones((2, 5), bool)
    slope = jax.grad(lambda r: losses.lambda_weights(r, valid, grades).sum())(rewards)
    assert (np.asarray(slope) == 0).all()
    weights = losses.lambda_weights(rewards, valid, grades)
    np.testing.assert_array_equal(weights, jnp.swapaxes(weights, 1, 2))


def test_steps_that_two_responses_share_cancel():
    """Of a tree's two branches, only what comes after the common steps has a gradient."""
    valid, grades = np.ones((1, 2), bool), np.array([[1.0, 0.0]], np.float32)

    def loss(steps, valid, beta, grades):
        return losses.tree_po(steps[:, 1:] + steps[:, :1], valid, beta, grades)

    steps = np.array([[-5.0, 0.7, -0.4]], np.float32)  # One in common, one each.
    value, gradient = value_and_grad(loss, steps, valid, 1.0, grades)
    assert gradient[0, 0] == 0 and gradient[0, 1] < 0 < gradient[0, 2]
    steps[0, 0] = 3.0
    assert value_and_grad(loss, steps, valid, 1.0, grades)[0] == pytest.approx(value, rel=1e-6)


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize("name", LISTS)
def test_wrong_shapes_are_refused(name):
    with pytest.raises(ValueError, match="differ in shape"):
        LISTS[name](jnp.zeros((2, 3)), jnp.ones((2, 2), bool), 0.1, jnp.zeros((2, 3)))
