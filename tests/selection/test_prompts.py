"""Selection of prompts against d x d matrices in float64, brute force and pairs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.selection import prompts, sharded_search, shards
from mass_dpo_jax.selection.prompts import information_vectors, measure_gaps, select_prompts

pytestmark = pytest.mark.usefixtures("strict_jax")

SIZE, NEGATIVES, WIDTH = 203, 3, 12  # One shape for most tests, so that little is compiled.
Array = np.ndarray


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Several chunks, a short shortlist and little room between rebasings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "CPU_CHUNK_BYTES", 4 * NEGATIVES * WIDTH * 30)
        patch.setattr(sharded_search, "MIN_SHORTLIST", 16)
        patch.setattr(sharded_search, "MIN_ROOM", 30)
        yield


@functools.cache
def mesh(devices: int) -> Any:
    return jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])


one = functools.partial(select_prompts, mesh=mesh(1))


def make_sets(
    seed: int, size: int = SIZE, negatives: int = NEGATIVES, decay: float = 0.5
) -> tuple[Array, Array, Array]:
    """Features around a common vector with a decaying spectrum, scores, and a mask."""
    rng = np.random.default_rng(seed)
    scale = np.arange(1.0, WIDTH + 1) ** -decay
    features = rng.normal(size=(size, 1 + negatives, WIDTH)) * scale + 3 * rng.normal(size=WIDTH)
    scores = rng.normal(size=(size, negatives))
    mask = rng.random((size, negatives)) < 0.8
    mask[:, 0] = True
    return features.astype(np.float32), scores.astype(np.float32), mask


def information(features: Array, scores: Array, mask: Array) -> Array:
    """The Hessian of each prompt's loss over beta^2, float64 [M, D, D]: Cov_q(h) by definition."""
    hessians = []
    for h, s, exists in zip(features.astype(float), scores.astype(float), mask, strict=True):
        members = np.flatnonzero(np.append(True, exists))
        rewards = np.append(0.0, s)[members]
        q = np.exp(rewards - np.logaddexp.reduce(rewards))
        centred = h[members] - q @ h[members]
        hessians.append(np.einsum("c,cd,ce->de", q, centred, centred))
    return np.array(hessians)


def oracle(hessians: Array, k: int, ridge: float) -> tuple[list[int], Array]:
    """Greedy choice by determinants [D, D] of all sums, in float64."""
    total, free = ridge * np.eye(hessians.shape[1]), set(range(len(hessians)))
    picks, growths = [], []
    for _ in range(k):
        value = np.linalg.slogdet(total)[1]
        values = {i: np.linalg.slogdet(total + hessians[i])[1] - value for i in free}
        best = max(values, key=values.__getitem__)
        picks.append(best)
        growths.append(values[best])
        total = total + hessians[best]
        free.remove(best)
    return picks, np.array(growths)


@pytest.mark.parametrize("k", [3, 150])  # Fewer vectors than D, and many more.
@pytest.mark.parametrize("ridge", [0.1, 1e-5])
def test_picks_are_those_of_determinants_in_float64(k: int, ridge: float) -> None:
    sets = make_sets(0)
    got = one(*sets, k=k, ridge=ridge)
    picks, growths = oracle(information(*sets), k, ridge)
    assert got.indices.tolist() == picks
    assert got.values is not None
    np.testing.assert_allclose(got.values, growths, rtol=2e-5)


def test_small_gains_keep_their_digits() -> None:
    """The last ones are a millionth of the first: their differences would have none left."""
    sets = make_sets(12, size=120, decay=1.5)
    got = one(*sets, k=120, ridge=1e-6)
    picks, growths = oracle(information(*sets), 120, 1e-6)
    assert got.values is not None
    np.testing.assert_allclose(got.values, growths, rtol=1e-3)
    assert sum(map(np.not_equal, got.indices, picks)) <= 4  # Two pairs of near ties.


@pytest.mark.parametrize("negatives", [1, 9])  # 9: the determinant of a block by Cholesky.
def test_blocks_of_other_sizes(negatives: int) -> None:
    sets = make_sets(1, size=60, negatives=negatives)
    got = one(*sets, k=25, ridge=1e-3)
    picks, growths = oracle(information(*sets), 25, 1e-3)
    assert got.indices.tolist() == picks
    assert got.values is not None
    np.testing.assert_allclose(got.values, growths, rtol=1e-4)


def test_the_greedy_set_is_close_to_the_best_of_all_sets() -> None:
    sets = make_sets(2, size=12)
    hessians, ridge = information(*sets), 0.1

    def value(members: Any) -> float:
        total = ridge * np.eye(WIDTH) + hessians[list(members)].sum(0)
        return float(np.linalg.slogdet(total)[1] - WIDTH * np.log(ridge))

    best = max(map(value, itertools.combinations(range(12), 4)))
    got = one(*sets, k=4, ridge=ridge)
    assert (1 - 1 / np.e) * best <= value(got.indices.tolist()) <= best * (1 + 1e-12)
    assert got.values is not None
    assert got.values.sum() == pytest.approx(value(got.indices.tolist()), rel=1e-5)


def test_everything_is_chosen_in_the_end_and_once() -> None:
    features, scores, mask = make_sets(3, size=40)
    got = one(features, scores, mask, k=40)
    assert sorted(got.indices.tolist()) == list(range(40))
    assert one(features, scores, mask, k=7).indices.tolist() == got.indices[:7].tolist()


def test_eight_devices_choose_what_one_does() -> None:
    sets = make_sets(4)
    for k in (3, 60):
        alone, got = one(*sets, k=k, ridge=1e-3), select_prompts(*sets, k=k, ridge=1e-3)
        np.testing.assert_array_equal(got.indices, alone.indices)


def test_information_vectors_are_a_root_of_the_hessian() -> None:
    sets = make_sets(5)
    vectors = np.asarray(information_vectors(*map(jnp.asarray, sets)), float)
    assert vectors.shape == (SIZE, NEGATIVES, WIDTH) and not vectors[~sets[2]].any()
    want = information(*sets)
    got = np.einsum("mrd,mre->mde", vectors, vectors)
    np.testing.assert_allclose(got, want, atol=1e-5 * abs(want).max())


def test_a_pair_has_the_information_of_active_learning_for_dpo() -> None:
    features, scores, _ = make_sets(6, negatives=1)
    mask = jnp.ones(scores.shape, bool)
    vectors = information_vectors(jnp.asarray(features), jnp.asarray(scores), mask)[:, 0]
    sigma = 1 / (1 + np.exp(-scores.astype(float)))
    phi = features[:, 1].astype(float) - features[:, 0]
    np.testing.assert_allclose(vectors, np.sqrt(sigma * (1 - sigma)) * phi, atol=1e-5)


def test_features_of_other_lengths_are_alike_under_l2() -> None:
    features, scores, mask = make_sets(7)
    longer = features * np.random.default_rng(0).uniform(0.5, 2, (SIZE, 1 + NEGATIVES, 1))
    got = [one(x, scores, mask, k=9, feature_norm="l2").indices for x in (features, longer)]
    np.testing.assert_array_equal(*got)


def test_what_is_masked_has_no_say() -> None:
    features, scores, mask = make_sets(8)
    clean = one(features, scores, mask, k=20)
    for garbage in (np.nan, np.inf, 1e30):
        dirty = features.copy(), scores.copy()
        dirty[0][:, 1:][~mask], dirty[1][~mask] = garbage, garbage
        np.testing.assert_array_equal(one(*dirty, mask, k=20).indices, clean.indices)
        np.testing.assert_array_equal(
            one(*dirty, mask, k=20, by="uncertain").indices,
            one(features, scores, mask, k=20, by="uncertain").indices,
        )


def test_uncertain_takes_the_smallest_gaps_to_the_hardest_negative() -> None:
    _, scores, mask = make_sets(9)
    gaps = [abs(max(s[m])) for s, m in zip(scores, mask, strict=True)]
    got = select_prompts(None, scores, mask, k=30, by="uncertain")
    assert got.indices.tolist() == np.argsort(gaps)[:30].tolist()
    np.testing.assert_array_equal(got.values, np.sort(gaps)[:30].astype(np.float32))
    mask[5] = False  # Nothing to compare with.
    assert measure_gaps(jnp.asarray(scores), jnp.asarray(mask))[5] == np.inf


def test_equal_gaps_go_by_chance_and_as_random_draws() -> None:
    zeros = np.zeros((50, 2))
    got, want = (
        select_prompts(None, zeros, k=20, by=by, seed=3).indices for by in ("uncertain", "random")
    )
    assert got.tolist() == want.tolist() != list(range(20))


def test_random_is_uniform_and_another_one_for_each_draw() -> None:
    counts = np.zeros(10)
    for draw in range(2000):
        indices = prompts.choose_at_random(10, 3, 0, draw).indices
        assert len({*indices.tolist()}) == 3
        counts[indices] += 1
    assert abs(counts / 2000 - 0.3).max() < 0.05
    again, other = (prompts.choose_at_random(100, 20, seed).indices for seed in (1, 2))
    assert again.tolist() == prompts.choose_at_random(100, 20, 1).indices.tolist()
    assert again.tolist() != other.tolist()


def test_arrays_of_any_kind(torch: Any) -> None:
    features, scores, mask = make_sets(10)
    want = one(features, scores, mask, k=9).indices
    got = one(torch.from_numpy(features), torch.from_numpy(scores), torch.from_numpy(mask), k=9)
    np.testing.assert_array_equal(got.indices, want)


def test_mistakes_are_told() -> None:
    features, scores, _ = make_sets(11, size=20)
    for by, name in (("design", "features"), ("uncertain", "scores"), ("random", "features")):
        with pytest.raises(UserError, match=f"by='{by}' needs {name}"):
            select_prompts(k=3, by=by)
    with pytest.raises(ValueError, match=r"k=21: expected 1 to 20"):
        one(features, k=21)
    with pytest.raises(ValueError, match=r"scores and mask \[M, C - 1\]: got .*\(19, 3\)"):
        one(features, scores[1:], k=3)
    with pytest.raises(ValueError, match=r"features \[M, C, D\] with C >= 2"):
        one(features[:, :1], k=3)
    with pytest.raises(
        UserError, match=r"^by='hardest': expected one of design, uncertain, random"
    ):
        one(features, k=3, by="hardest")
    with pytest.raises(UserError, match=r"^a setting of select_prompts='n': exp"):
        one(features, k=3, n=3)
    with pytest.raises(UserError, match=r"^ridge=0\.0: expected"):
        one(features, k=3, ridge=0.0)
    with pytest.raises(UserError, match="no prompt has any information"):
        one(np.ones_like(features), k=3)
    for garbage in (np.nan, 1e30):
        broken = features.copy()
        broken[7, 1, 2] = garbage
        with pytest.raises(UserError, match=r"^prompt 7: features or scores that are not finite"):
            one(broken, scores, k=3)
    broken = scores.copy()
    broken[4, 0] = np.nan
    with pytest.raises(UserError, match=r"^prompt 4: "):
        one(features, broken, k=3)
    with pytest.raises(UserError, match=r"^prompt 4: scores that are not finite"):
        select_prompts(None, broken, k=3, by="uncertain")


def test_the_ways_are_those_of_the_setting() -> None:
    assert config_lib.CHOICES["selection.prompts"] == ("all", *prompts.WAYS)
