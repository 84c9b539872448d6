"""The grid of losses of one chosen response: every cell against its formula, and TRL's at n = 1."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mass_dpo_jax import losses
from mass_dpo_jax.losses.one_chosen import AGGREGATIONS, LINKS
from tests.losses.test_one_chosen import GARBAGE, value_and_grad

pytestmark = pytest.mark.usefixtures("strict_jax")

CELLS = list(itertools.product(AGGREGATIONS, LINKS))


def softplus(x):
    return np.logaddexp(0.0, x)


def float64_link(link, gap, beta, smoothing):
    """The loss of a lead `gap` of the chosen response, in rewards."""
    right, wrong = softplus(-gap), softplus(gap)
    return {
        "logistic": (1 - smoothing) * right + smoothing * wrong,
        "robust": ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing),
        "hinge": np.maximum(0.0, 1.0 - gap),
        "squared": (gap / beta - 1 / (2 * beta)) ** 2,
    }[link]


def float64_loss(aggregation, link, values, beta, smoothing, margins):
    """The loss of one row of responses that count, [1 + n]."""
    gaps = beta * (values[0] - values[1:]) - margins
    if aggregation == "softmax":
        gaps = -np.logaddexp.reduce(-gaps)
    if aggregation == "mean":
        gaps = gaps.mean()
    return np.mean(float64_link(link, gaps, beta, smoothing))


@settings(deadline=None, max_examples=10)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0.05, 1.0]),
    st.sampled_from([0.1, 10.0]),
    st.sampled_from([0.0, 0.2]),
    st.sampled_from(GARBAGE),
)
@pytest.mark.parametrize(("aggregation", "link"), CELLS)
def test_every_cell_is_its_float64_formula(
    aggregation, link, seed, beta, scale, smoothing, garbage
):
    rng = np.random.default_rng(seed)
    log_ratios, margins = rng.normal(0, scale, (5, 6)), rng.normal(0, 1, (5, 5))
    valid = rng.random((5, 6)) < 0.7
    valid[:, :2] = True
    dirty = jnp.asarray(np.where(valid, log_ratios, garbage), jnp.float32)
    spoiled = jnp.asarray(np.where(valid[:, 1:], margins, garbage), jnp.float32)

    def loss(x):
        return losses.preference_loss(
            x, jnp.asarray(valid), beta, aggregation, link, smoothing, spoiled
        )

    def want(x):
        return np.array(
            [
                float64_loss(aggregation, link, x[b, row], beta, smoothing, margins[b, row[1:]])
                for b, row in enumerate(valid)
            ]
        )

    got, gradient = value_and_grad(loss, dirty)
    np.testing.assert_allclose(got, want(log_ratios), rtol=2e-5, atol=1e-5)
    assert (gradient[~valid] == 0).all()
    step = 1e-6
    for column in range(6):
        moved = np.zeros((5, 6))
        moved[:, column] = step
        slope = (want(log_ratios + moved) - want(log_ratios - moved)) / (2 * step)
        bound = 1e-4 * max(1.0, np.abs(slope).max())
        np.testing.assert_allclose(gradient[:, column], slope, atol=bound)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_with_one_negative_the_links_are_trls_losses(aggregation):
    """TRL's formulas in its own terms: scores of pairs, and averages over tokens."""
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(0, 3, (2, 8))
    tokens, beta, smoothing, gamma = rng.integers(1, 9, (2, 8)), 0.3, 0.1, 0.5
    delta, average = chosen - rejected, chosen / tokens[0] - rejected / tokens[1]
    sigmoid_loss = softplus(-beta * delta)
    want = {
        ("logistic", 0.0, False): sigmoid_loss,
        ("logistic", smoothing, False): (1 - smoothing) * sigmoid_loss
        + smoothing * softplus(beta * delta),
        ("logistic", 0.0, True): softplus(-beta * average),
        ("hinge", 0.0, False): np.maximum(0, 1 - beta * delta),
        ("squared", 0.0, True): (average - 1 / (2 * beta)) ** 2,
        ("robust", smoothing, False): (
            (1 - smoothing) * sigmoid_loss - smoothing * softplus(beta * delta)
        )
        / (1 - 2 * smoothing),
    }
    pairs = np.stack([chosen, rejected], 1)
    valid = jnp.ones((8, 2), bool)
    for (link, epsilon, per_token), expected in want.items():
        values = jnp.asarray(pairs / tokens.T if per_token else pairs, jnp.float32)
        found = losses.preference_loss(values, valid, beta, aggregation, link, epsilon)
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=link)
    simpo = softplus(-beta * (average - gamma / beta))
    values, margins = jnp.asarray(pairs / tokens.T, jnp.float32), jnp.full((8, 1), gamma)
    found = losses.preference_loss(values, valid, beta, aggregation, margins=margins)
    np.testing.assert_allclose(found, simpo, rtol=1e-5)


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize(("aggregation", "link"), CELLS)
def test_a_row_that_compares_nothing_costs_nothing(aggregation, link, garbage):
    log_ratios = np.array([[2.0, garbage], [garbage, 2.0], [garbage, garbage]], np.float32)
    valid = jnp.array([[True, False], [False, True], [False, False]])
    margins = jnp.full((3, 1), garbage)
    values, gradients = value_and_grad(
        lambda x: losses.preference_loss(x, valid, 0.1, aggregation, link, 0.1, margins),
        log_ratios,
    )
    assert (values == 0).all() and (gradients == 0).all()


@pytest.mark.parametrize(("aggregation", "link"), CELLS)
def test_extreme_log_ratios_leave_every_cell_finite(aggregation, link):
    extreme = np.array([[1e4, -1e4, -1e4], [-1e4, 1e4, -1e4]], np.float32)
    values, gradients = value_and_grad(
        lambda x: losses.preference_loss(x, jnp.ones((2, 3), bool), 1.0, aggregation, link, 0.1),
        extreme,
    )
    assert np.isfinite(values).all() and np.isfinite(gradients).all()


def test_names_that_do_not_exist_are_refused():
    ratios, valid = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
    with pytest.raises(ValueError, match=r"link='ipo'.*squared"):
        losses.preference_loss(ratios, valid, 1.0, link="ipo")
    with pytest.raises(ValueError, match=r"aggregation='sum'.*softmax"):
        losses.preference_loss(ratios, valid, 1.0, "sum")
