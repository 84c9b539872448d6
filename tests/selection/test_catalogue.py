"""Selection from a large pool against d x d inverses in float64, and against `select_negatives`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from mass_dpo_jax import selection
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.selection import catalogue, sharded_search, shards
from mass_dpo_jax.selection.catalogue import select_from_catalogue
from mass_dpo_jax.selection.search import TIE

pytestmark = pytest.mark.usefixtures("strict_jax")

SIZE, WIDTH, N = 603, 24, 12  # One shape for most tests, so that little is compiled.


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Several chunks and a short shortlist in pools that are quick to check."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "CPU_CHUNK_BYTES", 4 * WIDTH * 70)
        patch.setattr(sharded_search, "MIN_SHORTLIST", 16)
        yield


@functools.cache
def mesh(devices: int) -> Any:
    return jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])


one = functools.partial(select_from_catalogue, mesh=mesh(1))


def make_pool(
    seed: int, size: int = SIZE, offset: float = 30.0, decay: float = 0.5, spread: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features around a large common vector with a decaying spectrum, scores, and a chosen one."""
    rng = np.random.default_rng(seed)
    scale = np.arange(1, WIDTH + 1) ** -decay
    h = rng.normal(size=(size + 1, WIDTH)) * scale + offset * rng.normal(size=WIDTH)
    h = h.astype(np.float32)
    return h[1:], rng.normal(0, spread, size).astype(np.float32), h[0]


def oracle(
    features: np.ndarray,
    scores: np.ndarray,
    n: int,
    *,
    chosen: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    ridge: float = 0.1,
    feature_norm: str = "none",
    factor: float = 1.0,
) -> tuple[list[int], np.ndarray]:
    """Algorithm 1 as the paper writes it, in float64: H^-1 [D, D], one update for each choice."""
    mask = np.ones(len(features), bool) if mask is None else mask
    places = np.flatnonzero(mask)
    h, s = features[places].astype(np.float64), scores[places].astype(np.float64)
    c = None if chosen is None else chosen.astype(np.float64)
    if feature_norm == "l2":
        h /= np.linalg.norm(h, axis=1, keepdims=True)
        c = None if c is None else c / np.linalg.norm(c)
    p = np.exp(s - np.logaddexp.reduce(s))
    v = np.sqrt(p * factor)[:, None] * (h - (p @ h if c is None else c))
    inverse = np.eye(v.shape[1]) / ridge
    free = np.ones(len(v), bool)
    picks, gains = [], []
    for _ in range(min(n, len(v))):
        gain = np.where(free, np.einsum("id,de,ie->i", v, inverse, v, optimize=True), -1.0)
        i = int(gain.argmax())
        u = inverse @ v[i]
        inverse -= np.outer(u, u) / (1 + gain[i])
        free[i] = False
        picks.append(int(places[i]))
        gains.append(gain[i])
    return picks, np.array(gains)


def check(got: Any, want: tuple[list[int], np.ndarray], rtol: float = 1e-4) -> None:
    valid = np.asarray(got.valid)
    assert valid.tolist() == [True] * len(want[0]) + [False] * (len(valid) - len(want[0]))
    assert np.asarray(got.indices)[valid].tolist() == want[0]
    np.testing.assert_allclose(np.asarray(got.gains)[valid], want[1], rtol=rtol)
    assert not np.asarray(got.indices)[~valid].any() and not np.asarray(got.gains)[~valid].any()


@pytest.mark.parametrize("criterion", catalogue.CRITERIA)
@pytest.mark.parametrize(
    "how", [{}, {"ridge": 1e4}, {"ridge": 1e-6}, {"feature_norm": "l2", "ridge": 1e-3}]
)
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_picks_are_those_of_inverses_in_float64(
    criterion: str, how: dict[str, Any], spread: float
) -> None:
    features, scores, chosen = make_pool(1, spread=spread)
    contrast = chosen if criterion == "contrast" else None
    want = oracle(features, scores, N, chosen=contrast, **how)
    check(one(features, scores, n=N, chosen=chosen, criterion=criterion, **how), want)


@pytest.mark.parametrize(
    ("criterion", "how"),
    [
        ("pool_fisher", {"ridge": 1e-4, "fisher_scale": True, "beta": 0.5}),
        ("contrast", {"feature_norm": "l2", "ridge": 1e-2}),
    ],
)
def test_picks_are_those_of_select_negatives(criterion: str, how: dict[str, Any]) -> None:
    features, scores, chosen = make_pool(2)
    mask = np.random.default_rng(0).random(SIZE) < 0.7
    responses = np.concatenate([chosen[None], features])
    want = selection.select_negatives(responses, scores, mask, n=N, criterion=criterion, **how)
    got = one(features, scores, mask, n=N, chosen=chosen, criterion=criterion, **how)
    np.testing.assert_array_equal(got.indices, want.indices)
    np.testing.assert_allclose(got.gains, want.gains, rtol=1e-4)


@pytest.mark.parametrize("criterion", catalogue.CRITERIA)
def test_eight_devices_choose_what_one_does(criterion: str) -> None:
    assert len(jax.devices()) == 8
    features, scores, chosen = make_pool(3)
    mixed = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    for count in (SIZE, SIZE // 2, 3):
        mask = np.zeros(SIZE, bool)
        mask[np.random.default_rng(1).permutation(SIZE)[:count]] = True
        how: dict[str, Any] = {"n": N, "chosen": chosen, "criterion": criterion, "ridge": 1e-3}
        alone = one(features, scores, mask, **how)
        assert np.asarray(alone.valid).sum() == min(count, N)
        others = mixed if criterion == "contrast" else None
        got = select_from_catalogue(features, scores, mask, mesh=others, **how)
        np.testing.assert_array_equal(got.indices, alone.indices)
        np.testing.assert_array_equal(got.valid, alone.valid)
        scale = np.asarray(alone.gains).max()
        np.testing.assert_allclose(got.gains, alone.gains, rtol=1e-4, atol=1e-6 * scale)


def test_each_device_holds_its_own_part_and_none_is_gathered() -> None:
    arrays = np.zeros((SIZE, WIDTH), np.float32), np.zeros(SIZE, np.float32), np.ones(SIZE, bool)
    parts = [shards.shard_rows(mesh(8), x) for x in arrays]
    assert {shard.data.shape for shard in parts[0].addressable_shards} == {(76, WIDTH)}
    program = catalogue.search_greedily.lower(
        *parts, jnp.zeros(WIDTH), jnp.float32(1), N, "pool_fisher", "none", mesh(8)
    )
    text = program.compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text and "all-to-all" not in text
    assert f"[{8 * 76}," not in text


def sweeps(features: np.ndarray, scores: np.ndarray, ridge: float) -> int:
    parts = [shards.shard_rows(mesh(1), x) for x in (features, scores, np.ones(len(scores), bool))]
    static = N, "pool_fisher", "none", mesh(1)
    return int(
        catalogue.search_greedily(*parts, jnp.zeros(WIDTH), jnp.float32(1 / ridge), *static)[1]
    )


def test_bounds_save_sweeps_where_gains_fall_slowly_and_not_where_they_are_all_equal() -> None:
    features, scores, _ = make_pool(4)
    assert sweeps(features, scores, ridge=10.0) == 1
    # Gains fall from the first choice on, and only sweeps can tell whose.
    assert 1 < sweeps(features, 0 * scores, ridge=1e-6) < N
    # With more ties than the shortlist has room for, nobody outside can be left out.
    assert sweeps(np.ones((SIZE, WIDTH), np.float32), 0 * scores, ridge=0.1) == N


def test_of_equal_candidates_the_lowest_index_is_chosen() -> None:
    features, scores, chosen = make_pool(5, size=40)
    # Everybody 20 times: more copies than the shortlist has room for.
    many, weights = np.tile(features, (20, 1)), np.tile(scores, 20)
    how: dict[str, Any] = {"chosen": chosen, "criterion": "contrast", "ridge": 1e-3}
    got = one(many, weights, n=30, **how)
    indices = np.asarray(got.indices).tolist()
    assert len(set(indices)) == 30
    for k, index in enumerate(indices):  # Of all copies that were left, the first.
        assert all(copy in indices[:k] for copy in range(index % 40, index, 40))
    np.testing.assert_array_equal(
        one(np.ones((SIZE, WIDTH)), n=5).indices, np.arange(5)
    )  # Nobody gains anything.


@pytest.mark.parametrize(("apart", "first"), [(TIE / 8, 0), (64 * TIE, 1)])
def test_gains_closer_than_a_tie_go_by_index_and_others_by_size(apart: float, first: int) -> None:
    # Orthogonal candidates: gains are their squared norms, the second a little larger.
    features = np.diag([2.0, 2.0 * (1 + apart / 2), 1.0, 0.5]).astype(np.float32)
    got = one(features, n=2, chosen=np.zeros(4), criterion="contrast", ridge=1.0)
    assert np.asarray(got.indices).tolist() == [first, 1 - first]


def test_what_is_masked_has_no_say() -> None:
    features, scores, chosen = make_pool(6)
    mask = np.random.default_rng(2).random(SIZE) < 0.5
    for criterion in catalogue.CRITERIA:
        how: dict[str, Any] = {"n": N, "chosen": chosen, "criterion": criterion}
        clean = one(features, scores, mask, **how)
        contrast = chosen if criterion == "contrast" else None
        check(clean, oracle(features, scores, N, chosen=contrast, mask=mask))
        for garbage in (np.nan, np.inf, 1e30):
            dirty = features.copy(), scores.copy()
            for x in dirty:
                x[~mask] = garbage
            got = one(*dirty, mask, **how)
            np.testing.assert_array_equal(got.indices, clean.indices)
            np.testing.assert_array_equal(got.gains, clean.gains)


@pytest.mark.parametrize("valid", [0, 1, 5])
def test_fewer_candidates_than_asked_for(valid: int) -> None:
    features, scores, _ = make_pool(7)
    mask = np.zeros(SIZE, bool)
    mask[np.random.default_rng(3).permutation(SIZE)[:valid]] = True
    got = one(features, scores, mask, n=N, ridge=1e-2)
    if valid > 1:
        check(got, oracle(features, scores, N, mask=mask, ridge=1e-2), 1e-3)
    else:  # Alone, a candidate is the mean.
        assert np.asarray(got.valid).sum() == valid and not np.asarray(got.gains).any()
        assert np.asarray(got.indices)[0] == (np.argmax(mask) if valid else 0)


def test_more_asked_for_than_the_pool_has() -> None:
    features, scores, _ = make_pool(8, size=6)
    got = one(features, scores, n=9)
    assert sorted(np.asarray(got.indices)[:6].tolist()) == list(range(6))
    assert np.asarray(got.valid).tolist() == [True] * 6 + [False] * 3


@pytest.mark.parametrize("place", [0, 17])
def test_what_is_not_a_number_gains_nothing(place: int) -> None:
    features, scores, chosen = make_pool(9)
    broken = features.copy()
    broken[place, 3] = np.nan
    # The weighted mean is of all of them, so then nobody gains anything.
    for arrays in (
        (broken, scores),
        (features, np.where(np.arange(SIZE) == place, np.nan, 1.0)),
        (features * np.float32(1e20), scores),
    ):
        for norm in ("none", "l2"):
            with pytest.raises(UserError, match="features, scores or chosen: not finite, or too"):
                one(*arrays, n=N, feature_norm=norm)
    with pytest.raises(UserError, match="chosen: not finite"):
        one(features, scores, n=N, chosen=chosen * np.nan, criterion="contrast")
    one(features, scores, n=N, chosen=chosen * np.nan)  # Has no say.
    same = np.zeros_like(features)
    assert not np.asarray(one(same, scores, n=N).gains).any()  # Nothing to choose by, nor wrong.
    got = one(broken, scores, n=N, chosen=chosen, criterion="contrast")
    others = np.arange(SIZE) != place
    want = oracle(features, scores, SIZE, chosen=chosen)
    picks = [pick for pick in want[0] if others[pick]][:N]
    assert np.asarray(got.indices).tolist() == picks and np.isfinite(got.gains).all()


def test_a_large_common_vector_costs_no_digits() -> None:
    features, scores, _ = make_pool(10, offset=0.0)
    # Sums of these are exact, so the very same candidates lie around another point.
    features = np.round(features * 64) / 64
    want = oracle(features, scores, N, ridge=1e-4)
    check(one(features + np.float32(4096), scores, n=N, ridge=1e-4), want)


def test_a_peaked_policy_is_resolved() -> None:
    features, scores, _ = make_pool(11, offset=0.0)
    scores[4] = 25.0  # Nearly all the weight: the mean is its feature to the last digit.
    check(one(features, scores, n=N, ridge=1e-9), oracle(features, scores, N, ridge=1e-9), 1e-3)


def test_a_large_pool_in_float32_has_the_picks_of_float64() -> None:
    rng = np.random.default_rng(12)
    features = rng.normal(size=(20_000, 64)).astype(np.float32)
    scores = rng.normal(size=20_000).astype(np.float32)
    check(one(features, scores, n=30, ridge=1e-4), oracle(features, scores, 30, ridge=1e-4))


def test_bfloat16_features_are_read_in_float32() -> None:
    features, scores, _ = make_pool(13, offset=0.0)
    rounded = jnp.asarray(features, jnp.bfloat16)
    want = oracle(np.asarray(rounded, np.float32), scores, N, ridge=1e-3)
    check(one(rounded, scores, n=N, ridge=1e-3), want)


def test_arrays_of_any_kind(torch: Any) -> None:
    features, scores, _ = make_pool(14)
    want = np.asarray(one(features, scores, n=N).indices)
    assert len(set(want.tolist())) == N
    for convert in (jnp.asarray, torch.from_numpy, np.ndarray.tolist, np.float64):
        got = one(convert(features), convert(scores), n=N)
        np.testing.assert_array_equal(got.indices, want)


def test_mistakes_are_told() -> None:
    features, scores, chosen = make_pool(15, size=20)
    with pytest.raises(ValueError, match=r"scores and mask of shape \(20,\).*got \(19,\)"):
        one(features, scores[1:], n=3)
    with pytest.raises(ValueError, match=r"chosen of shape \(24,\).*\(23,\)"):
        one(features, n=3, chosen=chosen[1:], criterion="contrast")
    with pytest.raises(ValueError, match=r"N >= 2, and n >= 1: .* n = 0"):
        one(features, n=0)
    with pytest.raises(UserError, match="give chosen="):
        one(features, n=3, criterion="contrast")
    with pytest.raises(UserError, match="'set_fisher': expected one of pool_fisher, contrast"):
        one(features, n=3, criterion="set_fisher")
    with pytest.raises(UserError, match=r"^a setting of select_from_catalogue='seed': exp"):
        one(features, n=3, seed=1)
    with pytest.raises(UserError, match=r"^ridge=0\.0: expected a finite number"):
        one(features, n=3, ridge=0.0)
