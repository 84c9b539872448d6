"""Algorithm 1 against the d x d form in float64 and its own promises; what all criteria share."""

from __future__ import annotations

import doctest
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mass_dpo_jax import selection, theory
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.selection import Design, Settings, criteria, registry
from mass_dpo_jax.selection import batch as batch_lib
from mass_dpo_jax.selection.catalogue import select_from_catalogue
from mass_dpo_jax.selection.search import search_greedily
from tests.support.helpers import slow
from tests.support.pools import SIZE, Pool, make_pool, picks, run, run_exhaustively, to_select

pytestmark = pytest.mark.usefixtures("strict_jax")


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


def test_what_rounding_adds_to_a_gain_decides_nothing():
    """The first of two that differ by the last digit of a float32, and not the larger one."""
    for larger in (1 + 2**-23, 1 + 2**-20):
        gram = jnp.diag(jnp.array([0.5, 1.0, larger, 0.9], jnp.float32))
        chosen = search_greedily(Design(gram), jnp.ones(4, bool), 2)
        assert chosen.indices.tolist() == [1, 2]
    gram = jnp.diag(jnp.array([1.0, 1.001], jnp.float32))
    assert search_greedily(Design(gram), jnp.ones(2, bool), 1).indices.tolist() == [1]


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
    factor = criteria.fisher_factor(jnp.zeros(19), jnp.ones(19, bool), beta=0.1)
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


@pytest.mark.parametrize("name", list(registry.CRITERIA))
def test_a_batch_is_its_prompts_one_by_one_and_jit_changes_nothing(name):
    batch = [make_pool(s, valid=v) for s, v in enumerate([0, 1, 4, SIZE])]
    many = jax.tree.map(lambda *x: jnp.concatenate(x), *batch)
    how, n = Settings(criterion=name), SIZE
    takes_all = name != "boundary"  # Which takes no more than are hard.
    one = jax.jit(registry.CRITERIA[name].choose, static_argnums=(1, 2))
    together, eager = run(many, n, how), selection.select(to_select(many, how), n, how)
    np.testing.assert_array_equal(together.indices, eager.indices)
    assert not takes_all or np.asarray(together.valid).sum(1).tolist() == [0, 1, 4, SIZE]
    for b, pool in enumerate(batch):
        alone = one(jax.tree.map(lambda x: x[0], to_select(pool, how)), n, how)
        np.testing.assert_array_equal(together.indices[b], alone.indices)
        np.testing.assert_array_equal(together.valid[b], alone.valid)
        np.testing.assert_allclose(together.gains[b], alone.gains, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in registry.CRITERIA if name != "boundary"])
def test_more_negatives_than_the_pool_has_places_are_all_that_exist(name):
    pool = make_pool(7, valid=6)
    got = run(pool, SIZE + 3, Settings(criterion=name))
    assert got.indices.shape == (1, SIZE + 3)
    assert got.valid[0].tolist() == [True] * 6 + [False] * (SIZE - 3)
    assert sorted(got.indices[got.valid].tolist()) == np.flatnonzero(pool.mask[0]).tolist()
    assert (got.indices[~got.valid] == 0).all()


def test_frozen_features_are_a_gram_matrix():
    pool = make_pool(11, offset=50.0)
    how = Settings(criterion="contrast")
    moved = pool._replace(features=pool.features + np.float32(7.0))
    a, b = (np.asarray(to_select(x, how).gram[0]) for x in (pool, moved))
    centred = pool.features[0] - pool.features[0, 1:].mean(0)
    np.testing.assert_allclose(a, centred @ centred.T, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)  # what is common to all has no say


@functools.partial(jax.jit, static_argnums=(1, 2))
def diagnose_run(pools, n, how):
    pools = to_select(pools, how)
    return selection.diagnose(pools, selection.select(pools, n, how), how)


def test_diagnostics():
    batch = [make_pool(s, valid=v, dimension=40) for s, v in enumerate([SIZE, 5])]
    many = jax.tree.map(lambda *x: jnp.concatenate(x), *batch)
    got = diagnose_run(many, 3, Settings())
    scores = "selection/random_overlap", "selection/effective_pool", "selection/certain"
    names = "logdet max_norm_ridge effective_rank optimality".split()
    assert set(got) == {*scores, *(f"selection/{name}" for name in names)}
    assert 0 <= got["selection/random_overlap"] <= 1
    assert 1 - 1 / np.e <= got["selection/optimality"] <= 1 + 1e-6
    assert got["selection/max_norm_ridge"] > 0 and 1 < got["selection/effective_rank"] < SIZE
    best = run_exhaustively(many, 3, Settings())
    got = selection.diagnose(to_select(many, Settings()), best, Settings())
    assert got["selection/optimality"] == pytest.approx(1.0)
    hard = Settings(criterion="hardest")
    got = diagnose_run(many, 3, hard)
    assert set(got) == set(scores)
    # Of 60 negatives there are 34,220 sets of 3: too many to look for the best.
    assert "selection/optimality" not in diagnose_run(make_pool(0, size=60), 3, Settings())
    # All of a pool is what random takes too.
    assert diagnose_run(many, SIZE, hard)["selection/random_overlap"] == 1.0


def test_draws_do_not_meet_themselves_in_the_overlap_with_random():
    """At the reference, where all weights are equal, a drawn set is a random one: n / N of it is in
    another such set, not all of it."""
    rows, n = 400, 3
    pools = selection.Pool(
        None,
        jnp.zeros((rows, SIZE)),
        jnp.ones((rows, SIZE), bool),
        jax.random.split(jax.random.key(5), rows),
    )
    for draw in ("pivotal", "independent"):
        how = Settings(criterion="sampled", draw=draw)
        chosen = selection.select(pools, n, how)
        overlap = float(selection.diagnose(pools, chosen, how)["selection/random_overlap"])
        assert overlap == pytest.approx(n / SIZE, abs=0.06)  # Four standard errors.


@pytest.mark.parametrize("name", ["pool_fisher", "contrast", "set_fisher"])
def test_every_product_of_a_design_is_in_full_float32(name):
    """GPUs and TPUs round the factors of others."""
    pool = make_pool(0)
    how = Settings(criterion=name)
    text = str(jax.make_jaxpr(lambda pool: run(pool, 3, how))(pool))
    products = text.count("dot_general[")
    assert products and text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products


@pytest.mark.parametrize(
    ("search", "ridge"),
    [(run, 10.0), (run_exhaustively, 1e4), slow(run, 0.1), slow(run, 1e4)],
)
def test_small_values_choose_as_large_ones_do(search, ridge):
    """Values of 1e-2 down to 1e-8: sums of log(1 + something small) once had no digits left, and
    whatever differed by less than 4e-6 was a tie."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, SIZE + 1, 16)).astype(np.float32)
    scores = rng.normal(0, 0.3, (60, SIZE)).astype(np.float32)
    how = Settings("set_fisher", ridge, feature_norm="l2", fisher_scale=True)
    keys = jax.random.split(jax.random.key(0), 60)
    found = search(Pool(features, scores, jnp.ones(scores.shape, bool), keys), 2, how)
    same, values = 0, []
    for row in range(60):
        h = features[row].astype(np.float64)
        h /= np.linalg.norm(h, axis=1, keepdims=True)
        args = h, scores[row].astype(np.float64)
        chosen = found.indices[row].tolist()
        value = theory.set_logdet(*args, chosen, ridge / 0.01)
        if search is run:
            same += chosen == list(theory.set_fisher(*args, 2, ridge=ridge / 0.01)[0])
        else:
            pairs = itertools.combinations(range(SIZE), 2)
            best = max(theory.set_logdet(*args, list(pair), ridge / 0.01) for pair in pairs)
            same += value >= best * 0.999
        values.append(float(np.log1p(np.float64(found.gains[row])).sum()) / value)
    assert same >= 59
    np.testing.assert_allclose(values, 1.0, rtol=1e-3)


def test_equal_candidates_are_ties_however_small_their_value():
    features = np.zeros((6, 8), np.float32)
    features[1:, 0] = [2, 1, 2, 1, 2]
    pool = Pool(features[None], jnp.zeros((1, 5)), jnp.ones((1, 5), bool), jax.random.key(0)[None])
    for ridge, search in ((1e7, run), (1e3, run_exhaustively)):
        assert picks(pool, 1, Settings("set_fisher", ridge), search)[0] == [0]


def test_slices_and_tensors_with_a_gradient_are_read(torch):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(3, 12, 8)).astype(np.float32)
    scores, mask = rng.normal(size=(3, 5)).astype(np.float32), rng.random((3, 5)) < 0.8
    mask[:, :2] = True
    want = selection.select_negatives(features[:, :6], scores, mask, n=2, criterion="contrast")
    h = torch.from_numpy(features)
    wide = torch.zeros(3, 10, dtype=torch.bool)
    wide[:, ::2] = torch.from_numpy(mask)
    with_gradient = torch.nn.Parameter(h.clone())
    for same in (
        h[:, :6],
        h.transpose(0, 1).contiguous().transpose(0, 1)[:, :6],
        with_gradient[:, :6],
        (with_gradient * 1.0)[:, :6],
        h[:, :6].double(),
        features[:, :6],
        list(h[:, :6]),
    ):
        found = selection.select_negatives(
            same, torch.from_numpy(scores).requires_grad_(), wide[:, ::2], n=2,
            criterion="contrast",
        )  # fmt: skip
        np.testing.assert_array_equal(found.indices, want.indices)
    halves = selection.select_negatives(h[:, :6].bfloat16(), scores, mask, n=2)
    rounded = jnp.asarray(features[:, :6]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(
        halves.indices, selection.select_negatives(rounded, scores, mask, n=2).indices
    )
    expanded = selection.select_negatives(h[:1, :6].expand(3, 6, 8), n=2)
    assert (np.asarray(expanded.indices) == np.asarray(expanded.indices)[0]).all()
    from mass_dpo_jax import select_from_catalogue

    many = select_from_catalogue(with_gradient[0, 1:11:3], n=2)
    some = select_from_catalogue(features[0, 1:11:3], n=2)
    np.testing.assert_array_equal(many.indices, some.indices)


class OnAnotherDevice:
    """A tensor that JAX cannot look at where it is, and that says so as PyTorch's do."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **_):
        raise RuntimeError("Unknown device type 7")

    def __dlpack_device__(self):
        return 7, 0

    def detach(self):
        return self

    contiguous = detach

    def cpu(self):
        return jnp.asarray(self._array)


def test_a_tensor_of_a_device_that_jax_does_not_see_is_copied():
    features = make_pool(3).features[0]
    found = selection.select_negatives(OnAnotherDevice(features), n=3)
    np.testing.assert_array_equal(found.indices, selection.select_negatives(features, n=3).indices)


def test_what_is_no_array_of_real_numbers_is_one_line(torch):
    h = torch.randn(4, 3)
    for wrong, name in (
        (h.to(torch.complex64), "Tensor"),
        (h.to("meta"), "Tensor"),
        (h.to_sparse(), "Tensor"),
        (np.ones((4, 3), complex), "ndarray"),
        (np.full((4, 3), None), "ndarray"),
        (np.full((4, 3), "a"), "ndarray"),
        ([[1.0, 2.0], [3.0]], "list"),
        ("features.npy", "str"),
        (None, "NoneType"),
    ):
        with pytest.raises(UserError, match=f"^features: {name}: not read as an array of real n"):
            selection.select_negatives(wrong, n=1)
    with pytest.raises(UserError, match=r"^scores: Tensor: not read"):
        selection.select_negatives(h, torch.zeros(3, device="meta"), n=1)


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
    with pytest.raises(UserError, match=r"'criterium': .*; did you mean criterion\?"):
        selection.select_negatives(features, n=1, criterium="random")


@pytest.mark.parametrize("name", ["pool_fisher", "set_fisher", "hardest"])
def test_the_library_refuses_what_no_choice_can_be_made_by(name):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(3, 6, 8)).astype(np.float32)
    scores = rng.normal(size=(3, 5)).astype(np.float32)

    def choose(which=slice(None)):
        found = selection.select_negatives(features[which], scores[which], n=2, criterion=name)
        return found.indices.tolist()

    want = choose()
    scores[1, 3] = np.nan
    with pytest.raises(UserError, match=r"^features\[1\]: features or scores .* not finite"):
        choose()
    assert choose([0, 2]) == [want[0], want[2]]
    if name == "hardest":  # Knows no features.
        return
    scores[1, 3], features[2] = 0, features[2] * 1e12
    with pytest.raises(UserError, match=rf"^features\[2\]: .* too far apart to choose by {name}"):
        choose()
    with pytest.raises(UserError, match=r"^features: .* expected less, as with"):
        choose(2)


@pytest.mark.usefixtures("own_criteria")
@pytest.mark.parametrize("module", [batch_lib, registry])
def test_the_examples_in_docstrings_run(module):
    assert doctest.testmod(module).failed == 0
    assert doctest.testmod(module).attempted > 0


@pytest.mark.usefixtures("shapes_unchecked")
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "criterion",
            "pool_fischer",
            "criterion='pool_fischer': .* did you mean pool_fisher",
        ),
        ("feature_norm", "L2", "selection.feature_norm='L2': .* did you mean l2"),
        ("criterion", None, "selection.criterion=None: expected one of pool_fisher, .*, kmedoids$"),
        ("ridge", 0.0, "^ridge=0.0: expected a finite number above 0"),
        ("ridge", float("nan"), "^ridge=nan: expected a finite number above 0"),
        ("ridge", np.inf, "^ridge=inf: expected a finite number above 0"),
        ("ridge", "0.1", "^ridge='0.1': expected a finite number above 0"),
        ("ridge", None, "^ridge=None: expected a finite number above 0"),
        ("beta", -1.0, "^beta=-1.0: expected a finite number above 0"),
        ("beta", True, "^beta=True: expected a finite number above 0"),
        ("fisher_scale", "False", "^fisher_scale='False': expected True or False"),
        ("fisher_scale", 0, "^fisher_scale=0: expected True or False"),
        ("draw", "local2", "^selection.draw='local2': .* did you mean local"),
    ],
)
def test_settings_that_cannot_be_are_errors_in_one_line(field, value, message):
    with pytest.raises(UserError, match=message):
        Settings(**{field: value})


@pytest.mark.usefixtures("shapes_unchecked")
def test_numbers_of_any_library_are_settings_with_the_same_programs():
    ridge = np.float32(0.25)
    for number in (ridge, np.array(ridge), jnp.array(ridge)):
        found = Settings(ridge=number, fisher_scale=np.True_)
        assert found == Settings(ridge=0.25, fisher_scale=True) and type(found.ridge) is float


@pytest.mark.usefixtures("shapes_unchecked")
def test_what_is_no_whole_number_or_no_mask_is_refused():
    features = np.random.default_rng(0).normal(size=(2, 5, 3))
    for n in (2.0, "2", None, 2.5):
        for select in (selection.select_negatives, select_from_catalogue):
            with pytest.raises(UserError, match=f"^n={n!r}: expected a whole number"):
                select(features[0], n=n)
    with pytest.raises(UserError, match=r"^seed=0.5: expected a whole number"):
        selection.select_negatives(features, n=2, seed=0.5)
    indices, added, shares = [[0, 1, 2, 3]] * 2, [[0, -np.inf, 0, 0]] * 2, np.full((2, 4), 0.5)
    for mask in (indices, added, shares, np.full((2, 4), np.nan)):
        with pytest.raises(UserError, match=r"^mask: expected bool, or 1 where"):
            selection.select_negatives(features, mask=mask, n=2)
        with pytest.raises(UserError, match=r"^mask: expected bool"):
            select_from_catalogue(features[0, 1:], mask=np.asarray(mask)[0], n=2)
    there = np.array([[True, False, True, True], [False, True, True, False]])
    expected = selection.select_negatives(features, mask=there, n=np.int64(2)).indices
    for mask in (there.astype(int), there.astype(np.float32), there.tolist()):
        found = selection.select_negatives(features, mask=mask, n=jnp.int32(2)).indices
        assert (found == expected).all()


def test_grams_one_by_one_are_those_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one CPU device prompts go one after another."""
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(5, 7, 33)) + 100, jnp.float32)
    mask = jnp.asarray(rng.random((5, 6)) < 0.7).at[0].set(False)
    found = {}
    for devices in (1, 8):
        monkeypatch.setattr(jax, "device_count", lambda devices=devices: devices)
        found[devices] = selection.compute_grams(features, mask, Settings())
        text = str(
            jax.make_jaxpr(lambda h, m: selection.compute_grams(h, m, Settings()))(features, mask)
        )
        assert ("scan" in text) == (devices == 1)
    np.testing.assert_allclose(found[1], found[8], rtol=1e-6, atol=1e-6)
