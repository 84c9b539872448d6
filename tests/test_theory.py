"""Closed forms against automatic differentiation in float64, and what holds of the lemmas."""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mass_dpo_jax import losses, theory
from tests import test_theory_claims

DOCUMENT = (Path(__file__).parents[1] / "docs/theory.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
CASES = [(seed, beta, size) for seed, beta in enumerate((0.1, 1.0, 3.0)) for size in (1, 2, 7)]


def problem(seed, negatives, dimension=5):
    """psi [1 + N, d], theta [d], reference log-probabilities [1 + N] of a random prompt."""
    rng = np.random.default_rng(seed)
    psi = rng.normal(size=(1 + negatives, dimension))
    return psi, rng.normal(size=dimension), np.log(rng.dirichlet(np.ones(1 + negatives)))


def differences(psi, reference):
    """phi and b as the paper defines them above Eq. 7."""
    return psi[1:] - psi[0], reference[0] - reference[1:]


def loss(theta, psi, reference, beta):
    """The loss that training uses, on a softmax policy over the candidates."""
    log_ratios = jax.nn.log_softmax(psi @ theta) - reference
    return losses.plackett_luce(log_ratios[None], jnp.ones((1, len(psi)), bool), beta)[0]


@functools.partial(jax.jit, static_argnums=3)
def derivatives(*args):
    return loss(*args), jax.grad(loss)(*args), jax.hessian(loss)(*args)


@pytest.mark.parametrize(("seed", "beta", "size"), CASES)
def test_equations_9_and_10_are_the_gradient_and_hessian_of_the_loss(seed, beta, size):
    psi, theta, reference = problem(seed, size)
    phi, b = differences(psi, reference)
    with jax.enable_x64(True):
        value, gradient, hessian = map(np.asarray, derivatives(theta, psi, reference, beta))
    assert hessian.dtype == np.float64
    z = theory.quantities(theta, phi, b, beta).z
    np.testing.assert_allclose(value, np.logaddexp(0, -z), rtol=1e-12)  # -log sigma(Z)
    np.testing.assert_allclose(theory.gradient(theta, phi, b, beta), gradient, atol=1e-12)
    np.testing.assert_allclose(theory.hessian(theta, phi, b, beta), hessian, atol=1e-11)


@pytest.mark.parametrize(("seed", "beta", "size"), CASES)
def test_the_bound_of_lemma_42_drops_one_rank_one_term(seed, beta, size):
    psi, theta, reference = problem(seed, size)
    phi, b = differences(psi, reference)
    at = theory.quantities(theta, phi, b, beta)
    sigma = 1 / (1 + np.exp(-at.z))
    exact = theory.hessian(theta, phi, b, beta)
    bound = theory.hessian_bound(theta, phi, b, beta)
    dropped = beta**2 * sigma * (1 - sigma) * np.outer(at.mean, at.mean)
    np.testing.assert_allclose(exact - bound, dropped, atol=1e-12)
    assert np.linalg.eigvalsh(exact - bound)[0] > -1e-12


@pytest.mark.parametrize(("seed", "beta", "size"), CASES)
def test_the_exact_hessian_is_the_covariance_under_all_candidates(seed, beta, size):
    psi, theta, reference = problem(seed, size)
    rewards = beta * (psi @ theta - reference)
    q = np.exp(rewards - np.logaddexp.reduce(rewards))
    centred = psi - q @ psi
    phi, b = differences(psi, reference)
    np.testing.assert_allclose(
        theory.hessian(theta, phi, b, beta),
        beta**2 * centred.T @ (q[:, None] * centred),
        atol=1e-12,
    )


def test_the_bound_is_the_design_matrix_of_algorithm_1():
    psi, theta, reference = problem(3, 6)
    phi, b = differences(psi, reference)
    vectors = theory.pool_fisher_vectors(psi[1:], phi @ theta + b)  # h for phi: h_0 cancels.
    factor = 1 / (1 + np.exp(theory.quantities(theta, phi, b, beta=1.0).z))
    np.testing.assert_allclose(
        factor * vectors.T @ vectors, theory.hessian_bound(theta, phi, b, 1.0), atol=1e-12
    )


def test_the_bound_does_not_see_the_chosen_response():
    psi, theta, reference = problem(4, 6)
    other = psi.copy()
    other[0] += 10.0
    picks = []
    for features in (psi, other):
        phi, b = differences(features, reference)
        scores = features[1:] @ theta - features[0] @ theta + b
        picks.append(theory.algorithm_1(phi, scores, 3, 0.1))
    assert picks[0][0] == picks[1][0]
    np.testing.assert_allclose(picks[0][1], picks[1][1], rtol=1e-9)


def test_greedy_is_not_optimal_though_lemma_43_says_so():
    vectors = np.array([[0.8, 0.8], [1.0, 0.0], [0.0, 1.0]])
    chosen, _ = theory.greedy(vectors, 2, ridge=0.1)
    best, _ = theory.exhaustive(vectors @ vectors.T / 0.1, 2, np.ones(3, bool))

    def determinant(indices):
        return np.linalg.det(0.1 * np.eye(2) + vectors[indices].T @ vectors[indices])

    assert (chosen, best) == ([0, 1], [1, 2])
    assert determinant(chosen) == pytest.approx(0.878)
    assert determinant(best) == pytest.approx(1.210)


def test_nor_is_it_with_the_centring_of_algorithm_1():
    phi = np.array([[-0.5, -0.7], [0.4, -0.7], [0.0, 0.6], [0.0, 0.9]])
    chosen, gains = theory.algorithm_1(phi, np.zeros(4), 2, ridge=0.1)
    vectors = (phi - phi.mean(0)) / 2
    gram = vectors @ vectors.T / 0.1
    best, value = theory.exhaustive(gram, 2, np.ones(4, bool))
    start = 2 * np.log(0.1)
    assert start + theory.logdet(gram, chosen) == pytest.approx(-2.851, abs=5e-4)
    assert start + np.log1p(gains).sum() == pytest.approx(-2.851, abs=5e-4)
    assert start + value == pytest.approx(-2.617, abs=5e-4)
    assert set(chosen) != set(best)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 6), st.sampled_from([0.01, 1.0]))
def test_greedy_reaches_its_guaranteed_share_of_the_optimum(seed, n, dimension, ridge):
    vectors = np.random.default_rng(seed).normal(size=(7, dimension))
    gram = vectors @ vectors.T / ridge
    chosen, gains = theory.greedy(vectors, n, ridge)
    _, best = theory.exhaustive(gram, n, np.ones(7, bool))
    assert theory.logdet(gram, chosen) == pytest.approx(np.log1p(gains).sum())
    assert (1 - 1 / np.e) * best <= theory.logdet(gram, chosen) <= best + 1e-9


def test_exhaustive_looks_at_every_set_of_valid_candidates():
    vectors = np.random.default_rng(0).normal(size=(8, 3))
    mask = np.array([True, False, True, True, True, False, True, True])
    best, value = theory.exhaustive(vectors @ vectors.T, 3, mask)
    sets = [list(s) for s in itertools.combinations(np.flatnonzero(mask), 3)]
    values = [np.linalg.slogdet(np.eye(3) + vectors[s].T @ vectors[s])[1] for s in sets]
    assert best == sets[int(np.argmax(values))]
    assert value == pytest.approx(max(values))


def test_exhaustive_takes_all_when_fewer_are_valid_than_asked_for():
    mask = np.array([False, True, True])
    assert theory.exhaustive(np.eye(3), 5, mask) == ([1, 2], pytest.approx(2 * np.log(2)))
    assert theory.exhaustive(np.eye(3), 5, np.zeros(3, bool)) == ([], 0.0)


def scored_pool(seed, size=7, dimension=4, spread=1.0):
    """features [1 + N, d] and scores [N] of a random prompt."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(1 + size, dimension)), spread * rng.normal(size=size)


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("indices", [[], [4], [6, 0, 3]])
def test_set_logdet_is_that_of_the_exact_hessian_of_the_loss_on_the_set(beta, indices):
    psi, theta, reference = problem(5, 7)
    ridge = 0.1
    rewards = beta * (psi @ theta - reference)
    members = [0, *(1 + i for i in indices)]
    with jax.enable_x64(True):
        hessian = np.asarray(derivatives(theta, psi[members], reference[members], beta)[2])
    if not indices:  # A row without negatives has no loss.
        hessian = np.zeros_like(hessian)
    matrix = ridge * np.eye(5) + hessian / beta**2
    want = np.linalg.slogdet(matrix)[1] - 5 * np.log(ridge)
    got = theory.set_logdet(psi, rewards[1:] - rewards[0], indices, ridge)
    assert got == pytest.approx(want, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_contrast_information_is_the_covariance_and_the_mean_direction(seed):
    features, scores = scored_pool(seed)
    at = theory.quantities(np.zeros(4), features[1:] - features[0], scores, beta=1.0)
    vectors = theory.contrast_vectors(features, scores)
    contrast = vectors.T @ vectors
    np.testing.assert_allclose(contrast, at.covariance + np.outer(at.mean, at.mean), atol=1e-12)
    pool = theory.pool_fisher_vectors(features[1:], scores)
    np.testing.assert_allclose(pool.T @ pool, at.covariance, atol=1e-12)
    # The exact Hessian on the whole pool lies between the two, up to the factor of Eq. 11.
    factor = 1 / (1 + np.exp(at.z))
    exact = theory.set_information(features, scores, range(7))
    for upper, lower in ((factor * contrast, exact), (exact, factor * at.covariance)):
        assert np.linalg.eigvalsh(upper - lower)[0] > -1e-12


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**31), st.integers(1, 4), st.sampled_from([0.0, 1.0, 5.0]), st.booleans()
)  # fmt: skip
def test_greedy_of_both_pool_criteria_reaches_its_share_of_the_optimum(seed, n, spread, contrast):
    features, scores = scored_pool(seed, spread=spread)
    if contrast:
        vectors = theory.contrast_vectors(features, scores)
    else:
        vectors = theory.pool_fisher_vectors(features[1:], scores)
    gram = vectors @ vectors.T / 0.1
    chosen, _ = theory.greedy(vectors, n, 0.1)
    _, best = theory.exhaustive(gram, n, np.ones(7, bool))
    assert (1 - 1 / np.e) * best <= theory.logdet(gram, chosen) + 1e-12


@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0])
def test_set_fisher_takes_the_best_candidate_at_every_step(spread):
    features, scores = scored_pool(6, spread=spread)
    chosen, gains = theory.set_fisher(features, scores, 4, 0.1)
    value = 0.0
    for k, gain in enumerate(gains):
        free = [i for i in range(7) if i not in chosen[:k]]
        values = {i: theory.set_logdet(features, scores, [*chosen[:k], i], 0.1) for i in free}
        assert chosen[k] == max(free, key=lambda i: values[i])
        assert gain == pytest.approx(values[chosen[k]] - value)
        value = values[chosen[k]]
    assert value <= theory.set_exhaustive(features, scores, 4, 0.1)[1] + 1e-12


def test_of_equal_candidates_set_fisher_takes_the_first():
    features = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert theory.set_fisher(features, np.zeros(3), 2, 0.1)[0] == [0, 1]


def test_a_new_member_can_lower_the_exact_information():
    # A copy of the chosen response with a high score takes the probability that the others need.
    features = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    _, gains = theory.set_fisher(features, np.array([0.0, 5.0]), 2, 0.1)
    assert gains[0] > 0 > gains[1]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 1.0, 5.0]))
def test_exchange_never_lowers_and_leaves_no_swap_that_helps(seed, spread):
    features, scores = scored_pool(seed, spread=spread)

    def value(indices):
        return theory.set_logdet(features, scores, indices, 0.1)

    start, _ = theory.set_fisher(features, scores, 3, 0.1)
    got = theory.exchange(value, start, range(7))
    assert len(set(got)) == 3
    assert value(start) <= value(got) <= theory.set_exhaustive(features, scores, 3, 0.1)[1] + 1e-9
    for slot, new in itertools.product(range(3), set(range(7)) - set(got)):
        swap = [*got[:slot], new, *got[slot + 1 :]]
        assert value(swap) <= value(got) + 1e-9


def test_exchange_mends_the_counterexample_to_lemma_43():
    vectors = np.array([[0.8, 0.8], [1.0, 0.0], [0.0, 1.0]])
    gram = vectors @ vectors.T / 0.1
    chosen, _ = theory.greedy(vectors, 2, ridge=0.1)
    better = theory.exchange(lambda s: theory.logdet(gram, s), chosen, range(3))
    assert (chosen, better) == ([0, 1], [2, 1])


def test_exchange_prefers_the_lowest_slot_and_then_the_lowest_index():
    worth = [0.0, 0.0, 1.0, 1.0]
    assert theory.exchange(lambda s: max(worth[i] for i in s), [1, 0], range(4)) == [2, 0]
    assert theory.exchange(lambda s: 0.0, [1, 0], range(4)) == [1, 0]
    assert theory.exchange(lambda s: 0.0, [], range(4)) == []


def test_only_the_criteria_beyond_the_paper_see_the_chosen_response():
    features, scores = scored_pool(0)
    moved = features.copy()
    moved[0] *= -3.0

    def picks(features, scores):
        phi = features[1:] - features[0]
        contrast = theory.contrast_vectors(features, scores)
        return {
            "algorithm_1": set(theory.algorithm_1(phi, scores, 3, 0.1)[0]),
            "contrast": set(theory.greedy(contrast, 3, 0.1)[0]),
            "set_fisher": set(theory.set_fisher(features, scores, 3, 0.1)[0]),
        }

    before = picks(features, scores)
    feature, score = picks(moved, scores), picks(features, scores + 2.0)
    changed = {name for name in before if before[name] != feature[name]}
    assert changed == {"contrast", "set_fisher"}
    # How likely the chosen response is matters to the exact Hessian only: the pool's softmax does
    # not notice a number added to all scores.
    assert {name for name in before if before[name] != score[name]} == {"set_fisher"}


@pytest.mark.parametrize("place", range(len(SNIPPETS)))
def test_the_snippets_of_the_document_run_as_they_are(place):
    exec(compile(SNIPPETS[place], f"docs/theory.md, snippet {place}", "exec"), {})


def test_the_document_names_tests_that_exist():
    names = set(re.findall(r"`(test_\w+)`", DOCUMENT))
    assert len(names) > 20 and names <= {*globals(), *vars(test_theory_claims)}
