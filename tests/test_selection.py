"""Selection against the d x d form in float64, brute force, and its own promises."""

from __future__ import annotations

import doctest
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mass_dpo_jax import config as config_lib
from mass_dpo_jax import designs, selection, theory
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.selection import Settings
from mass_dpo_jax.training.methods import make_method

SIZE, DIMENSION = 11, 6  # one shape for most tests, so that little is compiled


class Pool(NamedTuple):
    """A batch of pools before their features become Gram matrices."""

    features: Any
    scores: Any
    mask: Any
    key: Any


def to_select(pools, how):
    gram = None if pools.features is None else selection.grams(pools.features, pools.mask, how)
    return selection.Pool(gram, pools.scores, pools.mask, pools.key)


@functools.partial(jax.jit, static_argnums=(1, 2))
def run(pools, n, how):
    return selection.select(to_select(pools, how), n, how)


def make_pool(seed, *, size=SIZE, dimension=DIMENSION, valid=None, offset=0.0, spread=1.0):
    """A batch of one pool with `valid` negatives at random places (None: all)."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(size + 1, dimension)) + offset * rng.normal(size=dimension)
    mask = np.zeros(size, bool)
    mask[rng.permutation(size)[:valid]] = True
    return Pool(
        features.astype(np.float32)[None],
        rng.normal(0, spread, (1, size)).astype(np.float32),
        mask[None],
        jax.random.split(jax.random.key(seed), 1),
    )


def design(pool, ridge=0.1, feature_norm="none"):
    """Design vectors over sqrt(ridge) of the one pool in a batch, float64, masked rows left out;
    and the places of the others."""
    places = np.flatnonzero(pool.mask[0])
    h = pool.features[0, 1:][places].astype(np.float64)
    if feature_norm == "l2":
        h /= np.linalg.norm(h, axis=1, keepdims=True)
    scores = pool.scores[0][places].astype(np.float64)
    p = np.exp(scores - np.logaddexp.reduce(scores))
    return np.sqrt(p / ridge)[:, None] * (h - p @ h), places


def logdet(vectors):
    return np.linalg.slogdet(np.eye(vectors.shape[1]) + vectors.T @ vectors)[1]


def picks(pool, n, how=None):
    """Valid picks and their gains of the one pool in a batch, as NumPy."""
    got = jax.tree.map(lambda x: np.asarray(x[0]), run(pool, n, how or Settings()))
    assert got.indices.shape == got.valid.shape == got.gains.shape == (n,)
    assert (got.indices[~got.valid] == 0).all() and (got.gains[~got.valid] == 0).all()
    return got.indices[got.valid].tolist(), got.gains[got.valid]


pools = st.builds(
    make_pool,
    st.integers(0, 2**31),
    valid=st.integers(0, SIZE),
    offset=st.sampled_from([0.0, 10.0, 100.0]),
    spread=st.sampled_from([0.0, 1.0, 5.0]),
)
counts = st.sampled_from([1, 4])
all_settings = st.sampled_from(
    [Settings(), Settings(ridge=0.01), Settings(ridge=10.0), Settings(feature_norm="l2")]
)


@settings(deadline=None, max_examples=40)
@given(pools, counts, all_settings)
def test_every_pick_adds_the_most_and_its_gain_is_the_growth_of_the_determinant(pool, n, how):
    vectors, places = design(pool, how.ridge, how.feature_norm)
    chosen, gains = picks(pool, n, how)
    assert len(chosen) == min(n, len(places)) == len(set(chosen))
    assert set(chosen) <= set(places.tolist())
    position = {place: row for row, place in enumerate(places.tolist())}
    scale = max((vectors**2).sum(1).max(initial=0.0), 1e-3)
    for k, pick in enumerate(chosen):
        before = [position[c] for c in chosen[:k]]
        base = logdet(vectors[before])
        free = [row for row in range(len(places)) if row not in before]
        growth = {row: np.expm1(logdet(vectors[[*before, row]]) - base) for row in free}
        assert growth[position[pick]] >= max(growth.values()) - 2e-5 * scale
        assert gains[k] == pytest.approx(growth[position[pick]], rel=1e-3, abs=2e-5 * scale)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), counts, st.sampled_from([0.0, 100.0]))
def test_picks_are_those_of_algorithm_1_with_inverses_in_float64(seed, n, offset):
    pool = make_pool(seed, offset=offset)
    features = pool.features[0].astype(np.float64)
    want, want_gains = theory.algorithm_1(
        features[1:] - features[0], pool.scores[0].astype(np.float64), n, ridge=0.1
    )
    chosen, gains = picks(pool, n)
    if chosen != want:  # only where two candidates are as good as each other
        first = next(k for k in range(n) if chosen[k] != want[k])
        assert gains[first] == pytest.approx(want_gains[first], rel=1e-4)
    else:
        np.testing.assert_allclose(gains, want_gains, rtol=1e-3)


def test_nearly_all_picks_agree_with_float64_at_the_width_of_a_real_model():
    batch = [make_pool(s, size=19, dimension=512, offset=20.0) for s in range(50)]
    many = jax.tree.map(lambda *x: jnp.concatenate(x), *batch)
    got = np.asarray(run(many, 3, Settings()).indices)
    want = []
    for pool in batch:
        vectors, _ = design(pool)
        want.append(theory.greedy(vectors, 3, ridge=1.0)[0])
    assert (got == np.array(want)).all(axis=1).mean() >= 0.98


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(0, SIZE), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_what_is_masked_changes_nothing(seed, valid, garbage):
    pool = make_pool(seed, valid=valid)
    features, scores = pool.features.copy(), pool.scores.copy()
    features[0, 1:][~pool.mask[0]] = garbage
    scores[~pool.mask] = garbage
    for how in (Settings(), Settings(feature_norm="l2", fisher_scale=True)):
        clean = picks(pool, 3, how)
        dirty = picks(pool._replace(features=features, scores=scores), 3, how)
        assert clean[0] == dirty[0]
        np.testing.assert_array_equal(clean[1], dirty[1])
        assert np.isfinite(dirty[1]).all()


@settings(deadline=None, max_examples=30)
@given(pools)
def test_the_order_of_candidates_does_not_matter(pool):
    chosen, gains = picks(pool, 3)
    order = np.random.default_rng(0).permutation(SIZE)
    shuffled = pool._replace(
        features=pool.features[:, np.concatenate([[0], 1 + order])],
        scores=pool.scores[:, order],
        mask=pool.mask[:, order],
    )
    again, again_gains = picks(shuffled, 3)
    scale = max(gains.max(initial=0.0), 1e-3)
    np.testing.assert_allclose(again_gains[:1], gains[:1], rtol=1e-4, atol=1e-5 * scale)
    if np.allclose(again_gains, gains, rtol=1e-4, atol=1e-5 * scale):
        vectors, places = design(pool)
        lookup = {place: row for row, place in enumerate(places.tolist())}
        ours = logdet(vectors[[lookup[c] for c in chosen]])
        theirs = logdet(vectors[[lookup[int(order[c])] for c in again]])
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(0, SIZE - 1), st.integers(0, SIZE - 1))
def test_of_identical_candidates_the_first_is_taken_and_one_is_enough(seed, first, second):
    first, second = sorted((first, second))
    pool = make_pool(seed, spread=0.0)
    pool.features[0, 1 + second] = pool.features[0, 1 + first] = 30.0  # far out: the first pick
    chosen, gains = picks(pool, 5)
    assert chosen[0] == first
    if first < second and second in chosen:
        # What the copy still adds, g / (1 + g) < 1, was the most that was left.
        k = chosen.index(second)
        vectors, _ = design(pool)
        base = logdet(vectors[chosen[:k]])
        growth = [np.expm1(logdet(vectors[[*chosen[:k], j]]) - base) for j in range(SIZE)]
        rest = [g for j, g in enumerate(growth) if j not in chosen[:k]]
        assert growth[second] >= max(rest) - 1e-2
        assert gains[k] < 1.01


def test_a_copy_is_not_taken_while_something_different_adds_more():
    pool = make_pool(0)._replace(scores=np.zeros((1, SIZE), np.float32))
    pool.features[0, 1:] = 0.0
    pool.features[0, [2, 3, 4], 0] = 10.0  # candidates 1, 2, 3 are one response, the longest
    pool.features[0, 6, 1] = 3.0  # candidate 5 is another, shorter one
    assert picks(pool, 2)[0] == [1, 5]


def test_ties_go_to_the_lowest_index():
    pool = make_pool(0)
    pool.features[:] = 1.0
    assert picks(pool, 3)[0] == [0, 1, 2]
    pool.mask[0, [0, 2]] = False
    assert picks(pool, 3)[0] == [1, 3, 4]


@pytest.mark.parametrize("size", [7, 19])
def test_ties_in_exact_arithmetic_are_ties_whatever_the_rounding(size):
    pool = make_pool(0, size=size, dimension=size)
    pool.features[0, 1:] = 3 * np.eye(size)  # a regular simplex: every order is as good
    pool.scores[:] = 0.3
    assert picks(pool, 5)[0] == [0, 1, 2, 3, 4]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([0.5, 4.0]))
def test_ridge_and_feature_scale_are_one_knob(seed, scale):
    pool = make_pool(seed)
    chosen, gains = picks(pool, 3, Settings(ridge=0.1))
    scaled = pool._replace(features=pool.features * np.float32(scale))
    again, again_gains = picks(scaled, 3, Settings(ridge=0.1 * scale**2))
    np.testing.assert_allclose(again_gains, gains, rtol=1e-4)
    assert again == chosen


def test_l2_divides_the_hidden_states_and_not_their_differences():
    pool = make_pool(3, offset=5.0)
    norms = np.linalg.norm(pool.features, axis=-1, keepdims=True)
    unit = pool._replace(features=pool.features / norms)
    chosen, gains = picks(pool, 3, Settings(feature_norm="l2"))
    again, again_gains = picks(unit, 3, Settings(feature_norm="none"))
    assert chosen == again
    np.testing.assert_allclose(gains, again_gains, rtol=1e-3)


def test_equation_11_divides_the_ridge_by_its_factor():
    pool = make_pool(4)
    beta = 0.5
    z = -np.logaddexp.reduce(pool.scores[0].astype(np.float64))
    factor = beta**2 / (1 + np.exp(z))  # beta^2 (1 - sigma(Z))
    chosen, gains = picks(pool, 3, Settings(fisher_scale=True, beta=beta))
    again, again_gains = picks(pool, 3, Settings(ridge=0.1 / factor))
    assert chosen == again
    np.testing.assert_allclose(gains, again_gains, rtol=1e-4)


def test_the_factor_of_equation_11_at_the_reference():
    factor = selection.fisher_factor(jnp.zeros(19), jnp.ones(19, bool), beta=0.1)
    assert float(factor) == pytest.approx(0.0095, rel=1e-5)


def test_the_chosen_response_has_no_say():
    pool = make_pool(5)
    other = pool._replace(features=pool.features.copy(), scores=pool.scores + np.float32(0.5))
    other.features[0, 0] = 1e6
    (chosen, gains), (again, again_gains) = picks(pool, 3), picks(other, 3)
    assert chosen == again
    np.testing.assert_allclose(gains, again_gains, rtol=1e-4)


@pytest.mark.parametrize("score", [1e4, -1e4])
def test_extreme_scores_still_give_distinct_negatives(score):
    pool = make_pool(6)
    pool.scores[0, 2:4] = score
    for fisher_scale in (False, True):
        chosen, gains = picks(pool, 5, Settings(fisher_scale=fisher_scale))
        assert len(set(chosen)) == 5 and np.isfinite(gains).all()


def test_a_diverged_model_does_not_shrink_the_set():
    pool = make_pool(6, valid=7)
    pool.features[0, 1 + np.flatnonzero(pool.mask[0])[3]] = np.nan
    chosen, _ = picks(pool, 4)
    assert len(set(chosen)) == 4 and pool.mask[0, chosen].all()


@pytest.mark.parametrize("name", list(selection.CRITERIA))
def test_a_batch_is_its_prompts_one_by_one_and_jit_changes_nothing(name):
    batch = [make_pool(s, valid=v) for s, v in enumerate([0, 1, 4, SIZE])]
    many = jax.tree.map(lambda *x: jnp.concatenate(x), *batch)
    how, n = Settings(criterion=name), SIZE
    one = jax.jit(selection.CRITERIA[name].choose, static_argnums=(1, 2))
    together, eager = run(many, n, how), selection.select(to_select(many, how), n, how)
    np.testing.assert_array_equal(together.indices, eager.indices)
    assert np.asarray(together.valid).sum(1).tolist() == [0, 1, 4, SIZE]
    for b, pool in enumerate(batch):
        alone = one(jax.tree.map(lambda x: x[0], to_select(pool, how)), n, how)
        np.testing.assert_array_equal(together.indices[b], alone.indices)
        np.testing.assert_array_equal(together.valid[b], alone.valid)
        np.testing.assert_allclose(together.gains[b], alone.gains, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(selection.CRITERIA))
def test_more_negatives_than_the_pool_has_places_are_all_that_exist(name):
    pool = make_pool(7, valid=6)
    got = run(pool, SIZE + 3, Settings(criterion=name))
    assert got.indices.shape == (1, SIZE + 3)
    assert got.valid[0].tolist() == [True] * 6 + [False] * (SIZE - 3)
    assert sorted(got.indices[got.valid].tolist()) == np.flatnonzero(pool.mask[0]).tolist()
    assert (got.indices[~got.valid] == 0).all()


def test_all_keeps_the_order_and_refuses_to_drop_any():
    pool = make_pool(8, valid=7)._replace(features=None, scores=None)
    got = run(pool, SIZE, Settings(criterion="all"))
    assert got.indices[0, :7].tolist() == np.flatnonzero(pool.mask[0]).tolist()
    with pytest.raises(ValueError, match="n >= N = 11"):
        run(pool, 3, Settings(criterion="all"))


def draw(mask, keys, n):
    pools = Pool(None, None, jnp.broadcast_to(mask, (len(keys), len(mask))), keys)
    got = run(pools, n, Settings(criterion="random"))
    return np.asarray(got.indices), np.asarray(got.valid)


def test_random_is_uniform_distinct_and_reproducible():
    mask = np.array([True, False, True, True, True, True, False, True])
    keys = jax.random.split(jax.random.key(0), 6000)
    indices, valid = draw(mask, keys, 3)
    assert valid.all() and mask[indices].all()
    assert (np.diff(np.sort(indices, axis=1), axis=1) > 0).all()
    np.testing.assert_array_equal(indices, draw(mask, keys, 3)[0])
    for place in range(3):  # each pick on its own is uniform over the 6 valid negatives
        frequency = np.bincount(indices[:, place], minlength=8)[mask] / len(keys)
        assert np.abs(frequency - 1 / 6).max() < 5 * np.sqrt(1 / 6 * 5 / 6 / len(keys))


def test_random_does_not_depend_on_padding_and_grows_by_adding():
    keys = jax.random.split(jax.random.key(1), 50)
    mask = np.array([True] * 4 + [False] + [True] * 3)
    short, _ = draw(mask, keys, 5)
    padded, _ = draw(np.concatenate([mask, np.zeros(9, bool)]), keys, 5)
    np.testing.assert_array_equal(short, padded)
    np.testing.assert_array_equal(short[:, :2], draw(mask, keys, 2)[0])


DESIGNS = ["pool_fisher", "contrast", "set_fisher"]


def values_of(pool, name, ridge=0.1):
    """The float64 value of a set of places, by the d x d forms of theory.py."""
    features, scores = pool.features[0].astype(np.float64), pool.scores[0].astype(np.float64)
    if name == "set_fisher":
        return lambda places: theory.set_logdet(features, scores, list(places), ridge)
    if name == "contrast":
        vectors = theory.contrast_vectors(features, scores)
    else:
        vectors = theory.pool_fisher_vectors(features[1:], scores)
    gram = vectors @ vectors.T / ridge
    return lambda places: theory.logdet(gram, list(places))


def best_of(value, n):
    return max(map(value, itertools.combinations(range(SIZE), n)))


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 100.0]), st.sampled_from([0.0, 1.0, 30.0]))
@pytest.mark.parametrize("name", DESIGNS)
def test_searches_against_brute_force_in_float64(name, seed, offset, spread):
    pool = make_pool(seed, offset=offset, spread=spread)
    value, n = values_of(pool, name), 3
    found = {}
    for how in ("greedy", "exchange", "exhaustive"):
        chosen, gains = picks(pool, n, Settings(criterion=name, search=how))
        found[how] = value(chosen)
        assert len(set(chosen)) == n
        assert np.log1p(gains).sum() == pytest.approx(found[how], rel=1e-3, abs=1e-3)
        if how == "greedy":
            for k, pick in enumerate(chosen):  # the most that could be added, at every step
                most = max(value([*chosen[:k], j]) for j in range(SIZE) if j not in chosen[:k])
                assert value([*chosen[:k], pick]) >= most - 1e-3 * (1 + abs(most))
    best = best_of(value, n)
    rounding = 1e-3 * (1 + abs(best))
    assert found["exhaustive"] == pytest.approx(best, abs=rounding)
    assert found["greedy"] - rounding <= found["exchange"] <= best + rounding
    if name != "set_fisher":
        assert found["greedy"] >= (1 - 1 / np.e) * best - rounding


@pytest.mark.parametrize("name", DESIGNS)
def test_exchange_improves_some_greedy_sets_and_never_spoils_one(name):
    batch = [make_pool(s, dimension=3) for s in range(200)]
    many = jax.tree.map(lambda *x: jnp.concatenate(x), *batch)
    totals = {
        how: np.log1p(run(many, 3, Settings(criterion=name, search=how)).gains).sum(1)
        for how in ("greedy", "exchange")
    }
    gain = totals["exchange"] - totals["greedy"]
    assert gain.min() > -1e-4 and gain.max() > 1e-3


def test_greedy_is_not_optimal_and_the_exhaustive_search_is():
    # Lemma 4.3's counterexample through Algorithm 1's own centring.
    features = np.array([[0, 0], [-0.5, -0.7], [0.4, -0.7], [0, 0.6], [0, 0.9]], np.float32)
    scores, offset = np.zeros((1, 4), np.float32), 2 * np.log(0.1)
    values = []
    for how in ("greedy", "exhaustive"):
        got = selection.select_negatives(features, scores[0], n=2, search=how)
        values.append(float(np.log1p(got.gains).sum()) + offset)
    assert values == pytest.approx([-2.851, -2.617], abs=1e-3)


@pytest.mark.parametrize("name", ["contrast", "set_fisher", "hardest"])
@pytest.mark.parametrize("search", designs.SEARCHES)
def test_what_is_masked_changes_nothing_for_the_other_criteria(name, search):
    for valid in (0, 2, 7):
        pool = make_pool(valid, valid=valid)
        how = Settings(criterion=name, search=search)
        clean = picks(pool, 3, how)
        for garbage in (np.nan, np.inf, -np.inf):
            features, scores = pool.features.copy(), pool.scores.copy()
            features[0, 1:][~pool.mask[0]] = garbage
            scores[~pool.mask] = garbage
            dirty = picks(pool._replace(features=features, scores=scores), 3, how)
            assert clean[0] == dirty[0] and len(clean[0]) == min(3, valid)
            np.testing.assert_array_equal(clean[1], dirty[1])


@pytest.mark.parametrize("name", ["contrast", "set_fisher"])
def test_the_other_criteria_look_at_the_chosen_response(name):
    pool = make_pool(5)
    moved = pool._replace(features=pool.features.copy())
    moved.features[0, 0] += 10 * (pool.features[0, 4] - pool.features[0, 0])
    how = Settings(criterion=name)
    assert set(picks(pool, 3, how)[0]) != set(picks(moved, 3, how)[0])


@pytest.mark.parametrize("name", DESIGNS)
def test_a_peaked_policy_is_resolved(name):
    # One candidate takes nearly all the weight: what is left is far below a float's last digit of
    # the Gram matrix, unless that candidate is the origin.
    pool = make_pool(3, offset=100.0)
    pool.scores[0, 4] = 25.0
    value = values_of(pool, name)
    chosen, _ = picks(pool, 2, Settings(criterion=name))
    most = max(value([j]) for j in range(SIZE))
    assert value(chosen[:1]) >= (1 - 1e-3) * most


def test_hardest_takes_the_largest_scores():
    pool = make_pool(2, valid=6)
    scores = np.where(pool.mask[0], pool.scores[0], -np.inf)
    assert picks(pool, 4, Settings(criterion="hardest"))[0] == np.argsort(-scores)[:4].tolist()
    pool.scores[0, np.argmax(scores)] = np.nan  # a diverged model's is the last of the valid ones
    assert len(picks(pool, 6, Settings(criterion="hardest"))[0]) == 6


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("spread", [0.0, 2.0, 60.0])
def test_drawn_weights_estimate_any_sum_over_the_pool(replacement, spread):
    pool = make_pool(1, valid=9, spread=spread)
    draws, n = 20_000, 3
    how = Settings(criterion="sampled", replacement=replacement)
    many = selection.Pool(
        None,
        jnp.broadcast_to(pool.scores[0], (draws, SIZE)),
        jnp.broadcast_to(pool.mask[0], (draws, SIZE)),
        jax.random.split(jax.random.key(0), draws),
    )
    got = jax.jit(selection.select, static_argnums=(1, 2))(many, n, how)
    got = jax.tree.map(np.asarray, got)
    assert pool.mask[0][got.indices[got.valid]].all()
    assert (got.weights[~got.valid] == 0).all()
    scores = np.where(pool.mask[0], pool.scores[0].astype(np.float64), -np.inf)
    p = np.exp(scores - np.logaddexp.reduce(scores))
    estimate = np.zeros((draws, SIZE))
    np.add.at(estimate, (np.arange(draws)[:, None], got.indices), got.weights)
    error = estimate.std(0) / np.sqrt(draws)
    assert (np.abs(estimate.mean(0) - p) < 5 * error + 1e-4).all()
    if replacement:
        np.testing.assert_allclose(got.weights.sum(1), 1.0, rtol=1e-6)
    else:
        assert (got.valid.sum(1) == n).all()


def test_frozen_features_are_a_gram_matrix():
    pool = make_pool(11, offset=50.0)
    how = Settings(criterion="contrast")
    moved = pool._replace(features=pool.features + np.float32(7.0))
    a, b = (np.asarray(to_select(x, how).gram[0]) for x in (pool, moved))
    centred = pool.features[0] - pool.features[0, 1:].mean(0)
    np.testing.assert_allclose(a, centred @ centred.T, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)  # what is common to all has no say


@functools.partial(jax.jit, static_argnums=(1, 2))
def diagnose(pools, n, how):
    pools = to_select(pools, how)
    return selection.diagnostics(pools, selection.select(pools, n, how), how)


def test_diagnostics():
    batch = [make_pool(s, valid=v, dimension=40) for s, v in enumerate([SIZE, 5])]
    many = jax.tree.map(lambda *x: jnp.concatenate(x), *batch)
    got = diagnose(many, 3, Settings())
    names = "random_overlap logdet max_norm_ridge effective_rank optimality".split()
    assert set(got) == {f"selection/{name}" for name in names}
    assert 0 <= got["selection/random_overlap"] <= 1
    assert 1 - 1 / np.e <= got["selection/optimality"] <= 1 + 1e-6
    assert got["selection/max_norm_ridge"] > 0 and 1 < got["selection/effective_rank"] < SIZE
    got = diagnose(many, 3, Settings(search="exhaustive"))
    assert got["selection/optimality"] == pytest.approx(1.0)
    hard = Settings(criterion="hardest")
    got = diagnose(many, 3, hard)
    assert set(got) == {"selection/random_overlap"}
    # All of a pool is what random takes too.
    assert diagnose(many, SIZE, hard)["selection/random_overlap"] == 1.0


def test_the_library_call_takes_arrays_of_any_kind(torch):
    pool = make_pool(12)
    features, scores = pool.features[0], pool.scores[0]
    want = selection.select_negatives(features, scores, n=3, criterion="contrast", ridge=0.5)
    assert want.indices.shape == (3,) and want.valid.all()
    for convert in (jnp.asarray, torch.from_numpy, np.ndarray.tolist):
        got = selection.select_negatives(
            convert(features), convert(scores), n=3, criterion="contrast", ridge=0.5
        )
        np.testing.assert_array_equal(got.indices, want.indices)
    batch = selection.select_negatives(np.stack([features] * 2), n=2, mask=pool.mask[[0, 0]])
    assert batch.indices.shape == (2, 2)
    assert torch.from_dlpack(batch.indices).tolist() == np.asarray(batch.indices).tolist()
    with pytest.raises(ValueError, match=r"shape \(11,\): got \(10,\)"):
        selection.select_negatives(features, scores[:10], n=3)
    with pytest.raises(ValueError, match="n = 0"):
        selection.select_negatives(features, n=0)
    with pytest.raises(UserError, match=r"'criterium' .* 'criterion'"):
        selection.select_negatives(features, n=1, criterium="random")


def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(selection).failed == 0
    assert doctest.testmod(selection).attempted > 0


def test_an_exhaustive_search_of_too_many_sets_is_refused():
    pool = make_pool(0, size=60)
    with pytest.raises(UserError, match=r"34220 sets of 3 of 60 .* 20000"):
        run(pool, 3, Settings(search="exhaustive"))


def test_a_criterion_is_one_function(monkeypatch):
    monkeypatch.setattr(selection, "CRITERIA", dict(selection.CRITERIA))

    @selection.criterion("easiest", needs_scoring=True)
    def easiest(pool, n, settings):
        _, order = jax.lax.top_k(jnp.where(pool.mask, -pool.scores, -jnp.inf), n)
        return designs.nothing(n)._replace(indices=order, valid=pool.mask[order])

    @selection.design("norms")
    def norms(pool, settings):
        return designs.Design(jnp.diag(jnp.diagonal(pool.gram)[1:]))

    pool = make_pool(9)
    how = Settings(criterion="easiest")
    got = selection.select(to_select(pool, how), 2, how)
    assert got.indices[0].tolist() == np.argsort(pool.scores[0])[:2].tolist()
    assert how.needs_scoring and not how.needs_features
    how = Settings(criterion="norms", search="exchange")
    got = selection.select(to_select(pool, how), 2, how)
    centred = pool.features[0, 1:] - pool.features[0, 1:].mean(0)
    assert got.indices[0].tolist() == np.argsort(-(centred**2).sum(1))[:2].tolist()
    assert how.needs_features


def test_only_criteria_that_read_scores_need_a_scoring_pass():
    need = {name for name in selection.CRITERIA if Settings(criterion=name).needs_scoring}
    assert need == {"pool_fisher", "contrast", "set_fisher", "hardest", "sampled"}
    need = {name for name in selection.CRITERIA if Settings(criterion=name).needs_features}
    assert need == {"pool_fisher", "contrast", "set_fisher"}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("criterion", "pool_fischer", "selection.criterion='pool_fischer' .* 'pool_fisher'"),
        ("feature_norm", "L2", "selection.feature_norm='L2' .* 'l2'"),
        ("ridge", 0.0, "selection.ridge must be > 0"),
        ("ridge", float("nan"), "selection.ridge must be > 0"),
        ("beta", -1.0, "beta must be > 0"),
    ],
)
def test_settings_that_cannot_be_are_errors_in_one_line(field, value, message):
    with pytest.raises(UserError, match=message):
        Settings(**{field: value})


def test_grams_one_by_one_are_those_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one CPU device prompts go one after another."""
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(5, 7, 33)) + 100, jnp.float32)
    mask = jnp.asarray(rng.random((5, 6)) < 0.7).at[0].set(False)
    found = {}
    for devices in (1, 8):
        monkeypatch.setattr(jax, "device_count", lambda devices=devices: devices)
        found[devices] = selection.grams(features, mask, Settings())
        text = str(jax.make_jaxpr(lambda h, m: selection.grams(h, m, Settings()))(features, mask))
        assert ("scan" in text) == (devices == 1)
    np.testing.assert_allclose(found[1], found[8], rtol=1e-6, atol=1e-6)


def test_a_registered_criterion_is_known_to_configurations(monkeypatch):
    monkeypatch.setattr(selection, "CRITERIA", dict(selection.CRITERIA))
    config = config_lib.default()
    config.selection.criterion = "last"
    with pytest.raises(UserError, match="'last': expected one of pool_fisher,"):
        config_lib.check(config)

    @selection.criterion("last", needs_scoring=False)
    def last(pool, n, settings):
        places = jnp.arange(pool.mask.shape[0])
        return selection.in_order(jnp.argsort(jnp.where(pool.mask, -places, 1)), pool.mask, n)

    config_lib.check(config)
    method = make_method(config, largest_pool=4)
    mask = np.array([[True, True, True, False], [True, False, False, False]])
    found = selection.select_negatives(np.zeros((2, 5, 3)), mask=mask, n=2, criterion="last")
    np.testing.assert_array_equal(found.indices, [[2, 1], [0, 0]])
    np.testing.assert_array_equal(found.valid, [[True, True], [True, False]])
    assert method.selection.criterion == "last" and not method.selection.needs_scoring
    # Draws with weights are of use to one loss only, which brings its own criterion.
    config.selection.criterion = "sampled"
    with pytest.raises(UserError, match="expected one of"):
        config_lib.check(config)
