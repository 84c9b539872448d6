"""Claims of the MASS-DPO paper that need a check of their own, most of which do not hold.

Numbers of equations are the paper's. What holds of Lemmas 4.1 and 4.2 is in `test_theory.py`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mass_dpo_jax import losses, theory


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def unit_ball(rng, *shape):
    """Vectors of norm at most 1, as Assumption B.1 asks of features and parameters."""
    vectors = rng.normal(size=shape)
    return vectors / np.maximum(1.0, np.linalg.norm(vectors, axis=-1, keepdims=True))


# ---- Section 3: the equations that the loss is derived from.


def test_eq_2_needs_the_logarithm_of_z():
    rng = np.random.default_rng(0)
    reward, reference, beta = rng.normal(size=6), rng.dirichlet(np.ones(6)), 0.5
    z = np.sum(reference * np.exp(reward / beta))
    optimal = reference * np.exp(reward / beta) / z
    log_ratio = beta * np.log(optimal / reference)
    np.testing.assert_allclose(log_ratio + beta * np.log(z), reward, atol=1e-12)
    assert np.abs(log_ratio + z - reward).min() > 1  # As printed.


def test_eq_3_lacks_a_beta_that_eq_5_has():
    chosen, rejected, beta = 0.7, -1.9, 0.1
    log_ratios = jnp.array([[chosen, rejected]])
    eq_5 = losses.plackett_luce(log_ratios, jnp.ones((1, 2), bool), beta)[0]
    assert eq_5 == pytest.approx(-np.log(sigmoid(beta * (chosen - rejected))), rel=1e-6)
    printed = -np.log(sigmoid(beta * chosen - rejected))
    assert abs(printed - eq_5) > 0.4


# ---- Appendix A.1 and A.2: signs.


def slips(seed=0):
    """phi, theta, b and beta of a random prompt; b far from 0."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(5, 3)), rng.normal(size=3), rng.normal(size=5), 0.7


def test_weights_with_minus_b_over_a_sum_with_plus_b_are_none():
    phi, theta, b, beta = slips()
    total = np.exp(beta * (phi @ theta + b)).sum()  # A of Lemma A.1.
    assert np.sum(np.exp(beta * (phi @ theta + b)) / total) == pytest.approx(1)
    assert abs(np.sum(np.exp(beta * (phi @ theta - b)) / total) - 1) > 0.1  # p_j as printed there.


def test_two_signs_of_lemma_a2_cancel():
    phi, theta, b, beta = slips()
    at = theory.quantities(theta, phi, b, beta)
    with jax.enable_x64(True):
        slope = jax.grad(lambda t: -jax.nn.logsumexp(beta * (phi @ t + b)))(jnp.asarray(theta))
    np.testing.assert_allclose(slope, -beta * at.mean, atol=1e-12)  # Printed: + beta phi_bar.
    sigma = sigmoid(at.z)
    rest = beta**2 * (1 - sigma) * at.covariance
    # Eq. 21 with the signs of calculus, and as printed with the printed slope: both are Eq. 25.
    right = rest - beta * sigma * (1 - sigma) * np.outer(at.mean, -beta * at.mean)
    printed = rest + beta * sigma * (1 - sigma) * np.outer(at.mean, beta * at.mean)
    np.testing.assert_allclose(right, theory.hessian(theta, phi, b, beta), atol=1e-12)
    np.testing.assert_allclose(printed, right, atol=1e-12)


# ---- Eq. 11: which set the weights are over.


def test_with_the_weights_of_the_set_eq_11_is_the_same_for_every_single_negative():
    phi, theta, b, beta = slips()
    for i in range(5):
        v = theory.pool_fisher_vectors(phi[[i]], beta * (phi[[i]] @ theta + b[[i]]))
        np.testing.assert_array_equal(v, np.zeros((1, 3)))  # p = 1 and phi_i is its own mean.


def test_with_the_weights_of_the_pool_eq_11_bounds_no_hessian_of_the_set():
    phi, theta, b, beta = slips()
    scores = beta * (phi @ theta + b)
    factor = beta**2 * (1 - sigmoid(-np.logaddexp.reduce(scores)))
    v = theory.pool_fisher_vectors(phi, scores)
    for i in range(5):  # One negative: the Hessian has rank one, along phi_i and not along v_i.
        exact = theory.hessian(theta, phi[[i]], b[[i]], beta)
        assert np.linalg.eigvalsh(exact - factor * np.outer(v[i], v[i]))[0] < -1e-4


def test_the_proof_of_lemma_a4_compares_the_wrong_way():
    vectors, ridge = np.array([[0.8, 0.8], [1.0, 0.0], [0.0, 1.0]]), 0.1
    chosen, gains = theory.greedy(vectors, 2, ridge)
    other = ridge * np.eye(2) + np.outer(vectors[1], vectors[1])  # H~_1 of the set {2, 3}
    gain = vectors[2] @ np.linalg.solve(other, vectors[2])
    assert chosen == [0, 1] and gains[1] < gain  # The proof says >=.
    after = ridge * np.eye(2) + np.outer(vectors[0], vectors[0])
    assert np.linalg.eigvalsh(after - other)[0] < -0.5  # Nor is H_1 >= H~_1, its premise.


# ---- Theorem 5.1: one prompt.


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.sampled_from([1, 3, 30, 300]), st.sampled_from([0.1, 1.0]))
def test_the_information_in_one_prompt_is_bounded_whatever_n(seed, n, beta):
    rng = np.random.default_rng(seed)
    h = unit_ball(rng, 1 + n, 4)
    hessian = theory.hessian(unit_ball(rng, 4), h[1:] - h[0], rng.uniform(-1, 1, n), beta)
    assert np.linalg.eigvalsh(hessian)[-1] <= beta**2 + 1e-12


@pytest.mark.parametrize("n", [1, 3, 19, 1001])
def test_the_error_of_theorem_51_is_the_same_for_every_n(n):
    h = np.where(np.arange(1 + n) % 2, -1.0, 1.0)  # d = 1; the chosen response has 1.
    phi = (h[1:] - h[0])[:, None]
    grid = np.linspace(-1, 1, 101)
    steps = [theory.gradient(np.array([t]), phi, np.zeros(n), 1.0)[0] for t in grid]
    assert max(steps) < 0  # L falls up to the end of the unit ball: theta_hat = 1.
    # The truth is 0, where all responses are equally likely; so the error of the logits is 1.


# ---- Theorems A.1 and A.2 and Theorem 5.2: the steps to the bound.


@pytest.mark.parametrize("seed", range(5))
def test_sigma_is_at_least_v(seed):
    rng = np.random.default_rng(seed)
    h, theta, b, beta, ridge = unit_ball(rng, 8, 3), unit_ball(rng, 3), rng.normal(size=7), 0.7, 0.1
    phi = h[1:] - h[0]
    at = theory.quantities(theta, phi, b, beta)
    c_min = beta**2 * (1 - sigmoid(at.z)) * at.weights.min()
    inner = phi.T @ (at.weights[:, None] * phi) - (1 - sigmoid(at.z)) * np.outer(at.mean, at.mean)
    v = ridge * np.eye(3) + c_min * inner
    sigma = ridge * np.eye(3) + theory.hessian(theta, phi, b, beta)
    assert np.linalg.eigvalsh(sigma - v)[0] > -1e-12


def test_the_concentration_step_of_theorem_a1_fails_for_every_choice():
    # Four responses with features 1, 1, -1, -1, all as likely as each other at theta = 0: B.1 and
    # B.2 hold. Whichever is chosen, by symmetry phi and -phi give the same norms.
    ridge, delta, d, beta = 1.0, 0.05, 1, 1.0
    phi = np.array([[0.0], [-2.0], [-2.0]])
    at = theory.quantities(np.zeros(1), phi, np.zeros(3), beta)
    miss = 1 - sigmoid(at.z)
    c_min = beta**2 * miss * at.weights.min()
    assert c_min == pytest.approx(beta**2 / 4)  # The largest that B.2 allows.
    mean, second = at.mean[0] ** 2, np.sum(at.weights * phi[:, 0] ** 2)
    v = ridge + c_min * (second - miss * mean)
    first = (1 - c_min * miss * mean / ridge) ** (-1 / d) * c_min * second / ridge
    second_line = (1 - c_min * mean / ridge) ** (-1 / d) * c_min / ridge
    for term in (first, second_line):
        assert mean / v > 1.3 > 0.95 > d / 4 * np.log((1 + term) / delta)


def test_weights_cannot_be_taken_out_of_the_norm_as_theorem_a2_does():
    mean, misses = np.array([1.0, 0.0]), np.array([0.9, 0.3])  # phi_bar of one prompt, - of another
    left = np.linalg.norm(misses[0] * mean - misses[1] * mean)
    right = misses.sum() * np.linalg.norm(mean - mean)
    assert left > 0.5 and right == 0


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 2**31), st.integers(1, 4), st.sampled_from([0.1, 1.0]),
    st.sampled_from([0.01, 0.3]),
)  # fmt: skip
def test_eq_26_says_less_than_that_both_parameters_are_in_the_unit_ball(seed, d, beta, delta):
    rng = np.random.default_rng(seed)
    h, ridge, n = unit_ball(rng, 20, d), 0.1, 19
    phi, b = h[1:] - h[0], rng.uniform(-1, 1, n)
    theta = unit_ball(rng, d)
    at = theory.quantities(theta, phi, b, beta)
    sigma = ridge * np.eye(d) + theory.hessian(theta, phi, b, beta)
    farthest = 2 * np.sqrt(np.linalg.eigvalsh(sigma)[-1])  # Of any two of norm 1.
    c_min = min(beta**2 * (1 - sigmoid(at.z)) * at.weights.min(), beta**2 / 4)
    base = 1 - c_min * at.mean @ at.mean / ridge
    if base > 0:
        term = np.log((1 + base ** (-1 / d) * c_min / ridge) / delta)
        assert farthest <= np.sqrt(beta**2 * d / c_min * term) + 2 * np.sqrt(ridge)


@pytest.mark.parametrize(("prompts", "ridge"), [(20, 0.01), (100, 0.1), (400, 0.1), (400, 0.01)])
@pytest.mark.parametrize("delta", [0.05, 0.01])
def test_eq_16_fails_more_often_than_it_says(prompts, ridge, delta):
    # Eight responses with features 1 (four of them) and -1, d = 1, beta = 1, truth 0, a uniform
    # reference. All assumptions hold, everywhere in the unit ball:
    shares = [np.exp(t) / (4 * np.exp(t) + 4 * np.exp(-t)) for t in np.linspace(-1, 1, 101)]
    c_min = 0.05 * ridge / prompts
    assert c_min < min(shares) and max(shares) < 1 / 4  # beta^2 (1 - sigma(Z)) p_i, for B.2
    # How many of the chosen responses have feature 1 is binomial, and decides everything.
    ones = np.arange(prompts + 1)
    probability = np.exp([math.log(math.comb(prompts, m)) - prompts * math.log(2) for m in ones])
    assert probability.sum() == pytest.approx(1)
    estimate = np.clip(np.arctanh(np.clip(2 * ones / prompts - 1, -0.99, 0.99)), -1, 1)
    # It is the minimum of the loss in the unit ball: the gradient there is 0.
    inside = np.abs(estimate) < 1
    slope = prompts * np.tanh(estimate) - (2 * ones - prompts)
    np.testing.assert_allclose(slope[inside], 0, atol=1e-9)
    phi = np.repeat([-2.0, 0.0], [4, 3])[:, None]
    hessian = theory.hessian(np.zeros(1), phi, np.zeros(7), 1.0)[0, 0]
    assert hessian == pytest.approx(1)
    error = np.sqrt(ridge + prompts * hessian) * np.abs(estimate)
    failures = probability[error > theory.batch_design_bound(prompts, 1, c_min, ridge, delta)].sum()
    assert failures > 2 * delta


def test_eq_16_is_undefined_once_there_are_enough_prompts():
    assert (
        theory.batch_design_bound(39, 8, 0.0025, 0.1, 0.05) > 0
    )  # At the reference, beta 0.1, n 3.
    for prompts in (40, 1000):
        with pytest.raises(ValueError, match="undefined"):
            theory.batch_design_bound(prompts, 8, 0.0025, 0.1, 0.05)


@pytest.mark.parametrize(("n", "holds"), [(1, False), (2, False), (3, True), (19, True)])
def test_assumption_b2_fails_at_the_reference_with_one_or_two_negatives(n, holds):
    beta = 0.1
    at = theory.quantities(np.zeros(2), np.ones((n, 2)), np.zeros(n), beta)
    values = beta**2 * (1 - sigmoid(at.z)) * at.weights
    # 1 - sigma(Z) times p_i is the probability of negative i among all 1 + n.
    np.testing.assert_allclose(values, beta**2 / (1 + n), rtol=1e-12)
    assert (values.max() <= beta**2 / 4 + 1e-15) == holds
