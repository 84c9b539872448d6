"""Searches and the criteria beside Algorithm 1's, against brute force in float64."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mass_dpo_jax import config as config_lib
from mass_dpo_jax import config_checks, selection, theory
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.selection import Design, Settings, registry
from mass_dpo_jax.selection.search import empty_selection
from mass_dpo_jax.training.method_config import make_method
from tests.support.pools import SIZE, Pool, make_pool, picks, run, run_exhaustively, to_select

pytestmark = pytest.mark.usefixtures("strict_jax")

DESIGNS = ["pool_fisher", "contrast", "set_fisher"]


def _chosen(indices, valid=None):
    indices = jnp.asarray(indices)
    valid = jnp.ones(indices.shape, bool) if valid is None else valid
    return empty_selection(len(indices))._replace(indices=indices, valid=valid)


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda p, n: selection.in_order(jnp.argsort(-p.scores), p.mask, n), r"chose \[0, 3\]"),
        (lambda p, n: selection.in_order(jnp.argsort(p.scores), p.mask, n), "chose .*0, .*"),
        (lambda p, n: _chosen([4] * n), r"chose \[4, 4\] as valid; expected others, each once"),
        (lambda p, n: _chosen(jnp.arange(n) + 4), r"chose \[4, 5, 6, 7, 8\]"),
        (lambda p, n: _chosen(jnp.arange(n) - 1), r"chose \[-1, 0\]"),
        (lambda p, n: _chosen([1, 2]), r"asked for 5 of 6, gives indices int32\[2\]"),
        (lambda p, n: _chosen(jnp.argsort(~p.mask)), r"asked for 2 of 6, .*int32\[6\]"),
        (lambda p, n: _chosen(jnp.ones(n)), r"float32\[2\].* expected integers and bool \[2\]"),
    ],
)
@pytest.mark.usefixtures("own_criteria")
def test_a_criterion_that_chooses_what_it_must_not_is_refused(choose, message):
    selection.criterion("mine", needs_scoring=True)(lambda pool, n, settings: choose(pool, n))
    for _ in range(2):
        with pytest.raises(UserError, match=f"^criterion 'mine': .*{message}"):
            Settings(criterion="mine")


@pytest.mark.usefixtures("own_criteria")
def test_a_criterion_may_choose_fewer_and_its_own_errors_are_its_own():
    selection.criterion("one", needs_scoring=True)(
        lambda p, n, _: _chosen(jnp.argsort(~p.mask)[:n], jnp.arange(n) < 1)
    )
    selection.criterion("broken", needs_scoring=True)(lambda p, n, _: 1 / 0)
    found = selection.select_negatives(np.eye(4), n=2, criterion="one")
    assert found.valid.tolist() == [True, False]
    with pytest.raises(ZeroDivisionError):
        selection.select_negatives(np.eye(4), n=2, criterion="broken")


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
    values = {}
    for search in (run, run_exhaustively):
        chosen, gains = picks(pool, n, Settings(criterion=name), search)
        values[search] = value(chosen)
        assert len(set(chosen)) == n
        assert np.log1p(gains).sum() == pytest.approx(values[search], rel=1e-3, abs=1e-3)
        if search is run:
            for k, pick in enumerate(chosen):  # the most that could be added, at every step
                most = max(value([*chosen[:k], j]) for j in range(SIZE) if j not in chosen[:k])
                assert value([*chosen[:k], pick]) >= most - 1e-3 * (1 + abs(most))
    best = best_of(value, n)
    rounding = 1e-3 * (1 + abs(best))
    assert values[run_exhaustively] == pytest.approx(best, abs=rounding)
    assert values[run] <= best + rounding
    if name != "set_fisher":
        assert values[run] >= (1 - 1 / np.e) * best - rounding


def test_greedy_is_not_optimal_and_the_exhaustive_search_is():
    # Lemma 4.3's counterexample through Algorithm 1's own centring.
    features = np.array([[0, 0], [-0.5, -0.7], [0.4, -0.7], [0, 0.6], [0, 0.9]], np.float32)
    pool = Pool(features[None], jnp.zeros((1, 4)), jnp.ones((1, 4), bool), jax.random.key(0)[None])
    values = [
        np.log1p(picks(pool, 2, search=search)[1]).sum() for search in (run, run_exhaustively)
    ]
    assert values + 2 * np.log(0.1) == pytest.approx([-2.851, -2.617], abs=1e-3)


@pytest.mark.parametrize("offset", [-200.0, 0.0, 200.0])
def test_pool_weights_are_a_softmax_wherever_scores_lie(offset):
    scores = jnp.array([offset + 1.0, 0.0, offset, jnp.nan])
    weights = selection.pool_weights(scores, jnp.array([True, False, True, False]))
    share = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(weights, [share, 0.0, 1 - share, 0.0], rtol=1e-5)
    assert not selection.pool_weights(scores, jnp.zeros(4, bool)).any()


def test_an_exhaustive_search_takes_n_where_fewer_have_a_larger_value():
    # Copies of the chosen response with larger scores lower the share of the one that differs.
    features, scores = np.zeros((5, 2), np.float32), np.array([3.0, 0.0, 3.0, 3.0], np.float32)
    features[2, 0] = 10.0
    alone, both, copies = (
        theory.set_logdet(features, scores, s, 0.1) for s in ([1], [0, 1], [0, 2])
    )
    assert alone > both > copies
    mask = jnp.array([[True, True, True, False]])
    pool = Pool(features[None], scores[None], mask, jax.random.key(0)[None])
    assert picks(pool, 2, Settings(criterion="set_fisher"), run_exhaustively)[0] == [0, 1]


@pytest.mark.parametrize(
    ("name", "search"),
    [
        ("contrast", run),
        ("set_fisher", run),
        ("hardest", run),
        ("contrast", run_exhaustively),
        ("set_fisher", run_exhaustively),
    ],
)
def test_what_is_masked_changes_nothing_for_the_other_criteria(name, search):
    for valid in (0, 2, 7):
        pool = make_pool(valid, valid=valid)
        how = Settings(criterion=name)
        clean = picks(pool, 3, how, search)
        for garbage in (np.nan, np.inf, -np.inf):
            features, scores = pool.features.copy(), pool.scores.copy()
            features[0, 1:][~pool.mask[0]] = garbage
            scores[~pool.mask] = garbage
            dirty = picks(pool._replace(features=features, scores=scores), 3, how, search)
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


@pytest.mark.usefixtures("own_criteria")
def test_a_criterion_is_one_function():
    @selection.criterion("easiest", needs_scoring=True)
    def easiest(pool, n, settings):
        _, order = jax.lax.top_k(jnp.where(pool.mask, -pool.scores, -jnp.inf), n)
        return empty_selection(n)._replace(indices=order, valid=pool.mask[order])

    @selection.design("norms")
    def norms(pool, settings):
        return Design(jnp.diag(jnp.diagonal(pool.gram)[1:]))

    pool = make_pool(9)
    how = Settings(criterion="easiest")
    got = selection.select(to_select(pool, how), 2, how)
    assert got.indices[0].tolist() == np.argsort(pool.scores[0])[:2].tolist()
    assert how.needs_scoring and not how.needs_features
    how = Settings(criterion="norms")
    got = selection.select(to_select(pool, how), 2, how)
    centred = pool.features[0, 1:] - pool.features[0, 1:].mean(0)
    assert got.indices[0].tolist() == np.argsort(-(centred**2).sum(1))[:2].tolist()
    assert how.needs_features


def test_only_criteria_that_read_scores_need_a_scoring_pass():
    need = {name for name in registry.CRITERIA if Settings(criterion=name).needs_scoring}
    scores = {"hardest", "sampled", "topk", "boundary"}
    assert need == {"pool_fisher", "contrast", "set_fisher", "kmedoids", *scores}
    need = {name for name in registry.CRITERIA if Settings(criterion=name).needs_features}
    assert need == {"pool_fisher", "contrast", "set_fisher", "kmedoids"}


@pytest.mark.usefixtures("own_criteria")
def test_a_registered_criterion_is_known_to_configurations():
    config = config_lib.default()
    config.selection.criterion = "last"
    with pytest.raises(UserError, match="'last': expected one of pool_fisher,"):
        config_checks.check(config)

    @selection.criterion("last", needs_scoring=False)
    def last(pool, n, settings):
        places = jnp.arange(pool.mask.shape[0])
        return selection.in_order(jnp.argsort(jnp.where(pool.mask, -places, 1)), pool.mask, n)

    config_checks.check(config)
    method = make_method(config, largest_pool=4)
    mask = np.array([[True, True, True, False], [True, False, False, False]])
    found = selection.select_negatives(np.zeros((2, 5, 3)), mask=mask, n=2, criterion="last")
    np.testing.assert_array_equal(found.indices, [[2, 1], [0, 0]])
    np.testing.assert_array_equal(found.valid, [[True, True], [True, False]])
    assert method.selection.criterion == "last" and not method.selection.needs_scoring
    # Draws with weights are of use to one loss only, which brings its own criterion.
    config.selection.criterion = "sampled"
    with pytest.raises(UserError, match="expected one of"):
        config_checks.check(config)


def test_the_names_of_the_package_are_taken():
    assert set(registry.BUILT_IN) == set(registry.CRITERIA)
    before = dict(registry.CRITERIA)
    for name in registry.BUILT_IN:
        for register in (
            selection.criterion(name, needs_scoring=False),
            selection.design(name),
        ):
            with pytest.raises(UserError, match=f"^criterion '{name}' comes with the package"):
                register(lambda pool, settings: None)
    assert before == registry.CRITERIA
    assert selection.names() == config_lib.CHOICES["selection.criterion"]


@pytest.mark.usefixtures("own_criteria")
def test_a_criterion_that_is_registered_again_is_used():
    """As in a notebook, whose cell is run again: programs compiled for the first one are not."""
    features = np.eye(5, dtype=np.float32) * np.arange(1, 6)[:, None]

    def chosen():
        return selection.select_negatives(features, n=2, criterion="mine").indices.tolist()

    def in_order(sign, needs_scoring=False):
        @selection.criterion("mine", needs_scoring=needs_scoring)
        def mine(pool, n, settings):
            places = jnp.where(pool.mask, sign * jnp.arange(pool.mask.shape[0]), 99)
            return selection.in_order(jnp.argsort(places), pool.mask, n)

    in_order(1)
    first = Settings(criterion="mine")
    assert chosen() == [0, 1]
    in_order(-1)
    assert chosen() == [3, 2]
    in_order(1, needs_scoring=True)
    assert chosen() == [0, 1]
    again = Settings(criterion="mine")
    assert first != again and hash(first) != hash(again) and again.needs_scoring
    assert not first.needs_scoring
    with pytest.raises(UserError, match="'mine' was registered again"):
        first.check_current()
    again.check_current()

    for scale, want in ((1.0, [3, 2]), (-1.0, [0, 1])):  # A design in the place of a choice.

        @selection.design("mine")
        def mine(pool, settings, scale=scale):
            return Design(jnp.diag(jnp.diagonal(pool.gram)[1:] ** scale))

        assert chosen() == want
