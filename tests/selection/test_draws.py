"""Weighted draws: unbiased, of different candidates, with weights that sum to 1, and efficient."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mass_dpo_jax import config as config_lib
from mass_dpo_jax import selection
from mass_dpo_jax.selection import Settings, draws

DUELS = ("pivotal", "local")
DISTINCT = (*DUELS, "partition")
DRAWS = 60_000
rng = np.random.default_rng(3)
SCORES = {
    "flat": np.zeros(19),
    "spread": rng.normal(0, 2, 19),
    "peaked": np.r_[9.0, rng.normal(size=18)],
    "vanishing": np.r_[400.0, 200.0, rng.normal(size=8)],  # In float32 one weight is all of p.
    "tiny": np.array([0.3, -0.2]),
    "single": np.array([1.0]),
    "huge": rng.normal(size=250),
}


def draw_many(
    draw: str, scores: np.ndarray, n: int, count: int = DRAWS, padding: int = 0, seed: int = 0
) -> tuple[Any, np.ndarray]:
    """Returns selections, and the weights of all candidates [count, N + padding]."""
    size = len(scores) + padding
    features = np.random.default_rng(7).normal(size=(size + 1, 4)).astype(np.float32)
    pool = selection.Pool(
        jnp.asarray(features @ features.T),
        jnp.asarray(np.r_[scores, np.full(padding, np.nan)], jnp.float32),
        jnp.arange(size) < len(scores),
        jax.random.key(0),
    )
    pools = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), pool)
    pools = pools._replace(key=jax.random.split(jax.random.key(seed), count))
    settings = Settings(criterion="sampled", draw=draw)
    picks = jax.jit(selection.select, static_argnums=(1, 2))(pools, n, settings)
    picks = jax.tree.map(np.asarray, picks)
    weights = np.zeros((count, size))
    np.add.at(weights, (np.arange(count)[:, None], picks.indices), picks.weights)
    return picks, weights


def softmax(scores: np.ndarray) -> np.ndarray:
    p = np.exp(scores - scores.max())
    return p / p.sum()


def include(p: np.ndarray, n: int) -> np.ndarray:
    """Computes inclusion probabilities by the definition, round after round, in float64."""
    certain = np.zeros(len(p), bool)
    while True:
        places, rest = n - certain.sum(), p[~certain].sum()
        pi = np.where(certain, 1.0, places * p / rest if rest else 0.0)
        reached = ~certain & (pi >= 1 - 1e-9)
        if not reached.any():
            return pi
        certain |= reached


@pytest.mark.parametrize("draw", draws.DRAWS)
@pytest.mark.parametrize("pool", SCORES)
@pytest.mark.parametrize("n", [1, 3])
def test_weights_average_to_those_of_the_pool_and_sum_to_one(draw: str, pool: str, n: int) -> None:
    scores = SCORES[pool]
    count = 6_000 if pool == "huge" else DRAWS
    if draw in config_lib.FEATURE_DRAWS and pool == "huge":
        count = 600
    _, weights = draw_many(draw, scores, n, count)
    p = softmax(scores)
    # The variance is at most that of independent draws of one, which is known.
    error = np.sqrt(p * (1 - p) / n / count)
    tolerance = 4 * error + 4 / count * (p < 1 / count) + 1e-6
    assert (np.abs(weights.mean(0) - p) <= tolerance).all()
    np.testing.assert_allclose(weights.sum(1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("draw", DISTINCT)
@pytest.mark.parametrize("pool", SCORES)
@pytest.mark.parametrize("n", [1, 2, 5, 30])
def test_n_different_candidates_are_drawn(draw: str, pool: str, n: int) -> None:
    scores = SCORES[pool]
    picks, weights = draw_many(draw, scores, n, 400)
    size = min(n, len(scores))
    assert (picks.valid.sum(1) == size).all() and picks.valid[:, :size].all()
    assert all(len({*row[:size]}) == size for row in picks.indices.tolist())
    if n >= len(scores):  # The sum itself.
        np.testing.assert_allclose(weights, np.tile(softmax(scores), (400, 1)), 1e-5, 1e-7)


@pytest.mark.parametrize("pool", ["flat", "spread", "peaked", "tiny", "huge"])
@pytest.mark.parametrize("n", [1, 2, 5, 18])
def test_inclusion_probabilities_against_their_definition(pool: str, n: int) -> None:
    p = softmax(SCORES[pool])
    got = draws.inclusion_probabilities(jnp.log(jnp.asarray(p, jnp.float32)), n)
    expected = include(p, n)
    np.testing.assert_allclose(got.probabilities, expected, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(got.weights, p / expected, rtol=2e-5)


@pytest.mark.parametrize("draw", DUELS)
def test_each_candidate_is_drawn_as_often_as_it_should_be(draw: str) -> None:
    scores, n = SCORES["spread"], 4
    _, weights = draw_many(draw, scores, n, seed=5)
    pi = include(softmax(scores), n)
    error = np.sqrt(pi * (1 - pi) / DRAWS)
    assert (np.abs((weights > 0).mean(0) - pi) <= 4 * error + 1e-6).all()


@pytest.mark.parametrize("draw", DUELS)
@pytest.mark.parametrize("pool", ["flat", "spread", "peaked"])
@pytest.mark.parametrize("n", [1, 3, 5])
def test_variance_is_at_most_that_of_independent_draws(draw: str, pool: str, n: int) -> None:
    """(w - p)' K (w - p) on a fixed Gram matrix; independent draws have tr Cov_p / n."""
    scores = SCORES[pool]
    gradients = np.random.default_rng(1).normal(size=(len(scores), 6)) + 2.0
    gram, p = gradients @ gradients.T, softmax(scores)
    independent = (p @ np.diag(gram) - p @ gram @ p) / n
    _, weights = draw_many(draw, scores, n, 20_000, seed=2)
    errors = np.einsum("ki,ij,kj->k", weights - p, gram, weights - p)
    noise = 4 * errors.std() / np.sqrt(len(errors))
    assert errors.mean() <= independent + noise
    if n > 1:
        assert errors.mean() + noise < independent
    if pool == "flat" and draw == "pivotal":  # Simple random sampling without replacement.
        size = len(scores)
        assert errors.mean() == pytest.approx(independent * (size - n) / (size - 1), abs=noise)


@pytest.mark.parametrize("pool", ["flat", "spread", "peaked"])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_partition_is_at_most_a_share_of_the_whole(pool: str, n: int) -> None:
    """In the metric it is made with, half features and half all pairs alike: at most 1 / n."""
    scores = SCORES[pool]
    features = np.random.default_rng(7).normal(size=(len(scores) + 1, 4))[1:]
    p = softmax(scores)
    pairs = np.outer(p, p)
    distances = ((features[:, None] - features) ** 2).sum(-1)
    unlike = 1 - np.eye(len(p))
    metric = distances / (pairs * distances).sum() + unlike / (pairs * unlike).sum()
    _, weights = draw_many("partition", scores, n, 20_000, seed=2)
    errors = -np.einsum("ki,ij,kj->k", weights - p, metric, weights - p) / 2
    noise = 4 * errors.std() / np.sqrt(len(errors))
    assert errors.mean() <= 1 / n + noise  # Independent draws have (pairs * metric).sum() / 2 / n.


def test_partitions_of_small_pools_are_close_to_the_best() -> None:
    for seed in range(4):
        scores = np.random.default_rng(seed).normal(size=7)
        features = np.random.default_rng(7).normal(size=(8, 4))[1:]
        p = softmax(scores)
        pairs = np.outer(p, p)
        distances = ((features[:, None] - features) ** 2).sum(-1)
        unlike = 1 - np.eye(7)
        metric = distances / (pairs * distances).sum() + unlike / (pairs * unlike).sum()
        best = min(
            (pairs * metric * np.equal.outer(cells, cells)).sum() / 2
            for cells in itertools.product(range(2), repeat=7)
        )
        _, weights = draw_many("partition", scores, 2, 20_000, seed=seed)
        errors = -np.einsum("ki,ij,kj->k", weights - p, metric, weights - p) / 2
        noise = 4 * errors.std() / np.sqrt(len(errors))
        assert best - noise <= errors.mean() <= 1.15 * best + noise


def test_neighbours_are_seldom_drawn_together() -> None:
    """Of three tight groups of four, `local` draws one candidate each."""
    groups = np.repeat(np.eye(3), 4, axis=0)
    features = np.vstack([np.zeros(3), groups + 1e-3 * rng.normal(size=groups.shape)])
    gram = jnp.asarray(features @ features.T, jnp.float32)
    count = 500
    pools = selection.Pool(
        jnp.broadcast_to(gram, (count, 13, 13)),
        jnp.zeros((count, 12)),
        jnp.ones((count, 12), bool),
        jax.random.split(jax.random.key(0), count),
    )

    def count_groups(draw: str) -> float:
        picks = selection.select(pools, 3, Settings(criterion="sampled", draw=draw))
        return float(np.mean([len({*row}) for row in (np.asarray(picks.indices) // 4).tolist()]))

    assert count_groups("local") > 2.9
    assert count_groups("pivotal") < 2.5


@pytest.mark.parametrize("draw", draws.DRAWS)
def test_padding_changes_no_draw(draw: str) -> None:
    for scores in (SCORES["spread"], SCORES["tiny"]):
        plain, _ = draw_many(draw, scores, 3, 500)
        padded, _ = draw_many(draw, scores, 3, 500, padding=14)
        np.testing.assert_array_equal(plain.indices, padded.indices)
        np.testing.assert_array_equal(plain.valid, padded.valid)
        np.testing.assert_allclose(plain.weights, padded.weights, rtol=1e-5)


def test_effective_pool_and_certain_candidates() -> None:
    """exp(entropy) in float64, and candidates of inclusion probability 1 by their definition."""
    for scores in SCORES.values():
        for padding in (0, 3):
            padded = jnp.asarray(np.r_[scores, np.full(padding, np.nan)], jnp.float32)
            mask = jnp.arange(len(padded)) < len(scores)
            p = softmax(scores)
            entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
            got = draws.effective_pool(padded, mask)
            assert got == pytest.approx(np.exp(entropy), rel=1e-4)
            for n in (1, 3, 25):
                certain = (include(p, n) >= 1 - 1e-6).sum() / min(n, len(scores))
                assert draws.share_certain(padded, mask, n) == pytest.approx(certain)
    nothing = jnp.zeros(3), jnp.zeros(3, bool)
    assert draws.effective_pool(*nothing) == 1 and draws.share_certain(*nothing, 2) == 0


def test_an_empty_pool_gives_nothing() -> None:
    pool = selection.Pool(
        jnp.zeros((1, 4, 4)), jnp.zeros((1, 3)), jnp.zeros((1, 3), bool), jax.random.key(0)[None]
    )
    for draw in draws.DRAWS:
        picks = selection.select(pool, 2, Settings(criterion="sampled", draw=draw))
        assert not picks.valid.any() and not picks.weights.any()


def test_choices_of_the_configuration_are_the_draws() -> None:
    assert config_lib.CHOICES["selection.draw"] == tuple(draws.DRAWS)
    assert set(config_lib.FEATURE_DRAWS) < set(draws.DRAWS)
    local, plain = (Settings(criterion="sampled", draw=draw) for draw in ("local", "pivotal"))
    assert local.needs_features and not plain.needs_features
    assert not Settings(criterion="hardest", draw="local").needs_features


def test_rounding_decides_no_duel() -> None:
    """Two whose probabilities sum to 1 but for rounding end alike, on either side of it."""
    noise = jnp.linspace(0.0, 0.999, 50)
    for a in (0.2, 0.5, 0.9):
        ends = []
        for step in (-1e-6, 1e-6):
            first, second, stays, rest = draws.duel(
                jnp.full(50, a), jnp.full(50, 1 - a + step), noise
            )
            is_in = rest > 0.5  # What is left after the last duel is 0 or 1.
            ends.append((first | (stays & is_in), second | (~stays & is_in)))
        np.testing.assert_array_equal(ends[0], ends[1])
        assert (ends[0][0] != ends[0][1]).all()
