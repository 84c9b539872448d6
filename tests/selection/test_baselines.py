"""Criteria of other papers, against their definitions in NumPy."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mass_dpo_jax import selection
from mass_dpo_jax.selection import Settings


def pick(
    scores: np.ndarray, n: int, criterion: str, *, seed: int = 0, padding: int = 0, **changes: Any
) -> list[int]:
    """Returns the picks of one pool, whose features depend on its size alone."""
    size = len(scores)
    features = np.pad(make_features(size), ((0, padding), (0, 0)), constant_values=np.nan)
    gram = features @ features.T
    pool = selection.Pool(
        jnp.asarray(gram, jnp.float32),
        jnp.asarray(np.r_[scores, np.full(padding, np.nan)], jnp.float32),
        jnp.arange(size + padding) < size,
        jax.random.key(seed),
    )
    settings = Settings(criterion=criterion, **changes)
    batch = jax.tree.map(lambda x: x[None], pool)
    picks = jax.jit(selection.select, static_argnums=(1, 2))(batch, n, settings)
    indices, valid = np.asarray(picks.indices[0]), np.asarray(picks.valid[0])
    assert (indices[~valid] == 0).all() and not valid[int(valid.sum()) :].any()
    return indices[valid].tolist()


def make_features(size: int) -> np.ndarray:
    return np.random.default_rng(size).normal(size=(size + 1, 3))


def highest_cluster(scores: np.ndarray) -> set[int]:
    """The highest of the three intervals of sorted scores with the least sum of squares."""
    order = np.argsort(-scores, kind="stable")
    values = scores[order]
    splits = itertools.combinations_with_replacement(range(len(values) + 1), 2)

    def cost(i: int, j: int) -> float:
        parts = (part for part in np.split(values, [i, j]) if len(part))
        return float(sum(((part - part.mean()) ** 2).sum() for part in parts))

    costs = {(i, j): cost(i, j) for i, j in splits if i > 0}
    least = min(costs.values())
    return {*order[: max(i for (i, _), cost in costs.items() if cost <= least + 1e-9)].tolist()}


@pytest.mark.parametrize("seed", range(6))
def test_boundary_takes_what_is_not_below_the_chosen_response(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(-1.0, 1.0, 12)
    above = {*np.flatnonzero(scores >= 0).tolist()} or highest_cluster(scores)
    assert {*pick(scores, 12, "boundary")} == above
    few = pick(scores, 2, "boundary", seed=seed)
    assert {*few} <= above and len(few) == min(2, len(above))
    easy = scores - scores.max() - 0.1
    assert {*pick(easy, 12, "boundary")} == highest_cluster(easy)


def test_boundary_of_equal_and_single_scores() -> None:
    assert {*pick(np.full(5, -1.0), 5, "boundary")} == {0, 1, 2, 3, 4}
    assert pick(np.array([-3.0]), 2, "boundary") == [0]
    assert {*pick(np.array([-1.0, -9.0, -1.0, -9.0]), 4, "boundary")} == {0, 2}
    assert pick(np.array([np.nan, 0.0, np.nan]), 3, "boundary") == [1]


def test_topk_draws_uniformly_from_the_largest() -> None:
    scores = np.random.default_rng(1).normal(size=15)
    largest = np.argsort(-scores)[:5]
    counts = np.zeros(15)
    for seed in range(300):
        picks = pick(scores, 2, "topk", seed=seed, top=5)
        assert len({*picks}) == 2
        counts[picks] += 1
    assert counts.sum() == counts[largest].sum() == 600
    assert (np.abs(counts[largest] - 120) < 4 * np.sqrt(300 * 0.4 * 0.6)).all()
    assert {*pick(scores, 6, "topk", top=5)} == {*np.argsort(-scores)[:6].tolist()}
    assert {*pick(scores, 20, "topk", top=2)} == {*range(15)}


def test_topk_draws_from_what_equals_the_smallest_of_the_largest() -> None:
    def drawn(scores: list[float]) -> set[int]:
        return {
            i for seed in range(60) for i in pick(np.array(scores), 1, "topk", seed=seed, top=2)
        }

    assert drawn([0.0] * 5) == {0, 1, 2, 3, 4}  # As where the policy is the reference.
    assert drawn([1.0, 0.0, -1.0, 0.0]) == {0, 1, 3}
    assert drawn([1.0, np.nan, -1.0, 0.0]) == {0, 3}


def pam(distances: np.ndarray, n: int) -> set[int]:
    """PAM: greedy, then the best swap while it lowers the sum, at most 2 n times."""

    def total(medoids: list[int]) -> float:
        return float(distances[:, medoids].min(1).sum())

    everyone = range(len(distances))
    medoids: list[int] = []
    for _ in range(n):
        rest = [i for i in everyone if i not in medoids]
        medoids.append(min(rest, key=lambda i: total([*medoids, i])))
    for _ in range(2 * n):
        swaps = [
            [*medoids[:k], i, *medoids[k + 1 :]]
            for k in range(n)
            for i in everyone
            if i not in medoids
        ]
        best = min(swaps, key=total, default=medoids)
        if total(best) < total(medoids) * (1 - 1e-6):
            medoids = best
    return {*medoids}


@pytest.mark.parametrize("size", [4, 9, 14])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_kmedoids_is_pam(size: int, n: int) -> None:
    features = make_features(size)[1:]
    distances = np.sqrt(((features[:, None] - features) ** 2).sum(-1))
    picks = pick(np.zeros(size), n, "kmedoids")
    # Two candidates that are closest to each other are as good as medoids.
    found = distances[:, picks].min(1).sum()
    assert len(picks) == n
    assert found == pytest.approx(distances[:, list(pam(distances, n))].min(1).sum(), rel=1e-5)
    best = min(
        distances[:, list(medoids)].min(1).sum()
        for medoids in itertools.combinations(range(size), n)
    )
    assert found <= 1.1 * best


def test_kmedoids_takes_one_of_each_group() -> None:
    assert {*pick(np.zeros(2), 5, "kmedoids")} == {0, 1}
    assert Settings(criterion="kmedoids").needs_features
    groups = np.repeat(10 * np.eye(3), 4, axis=0) + 0.1 * np.random.default_rng(0).normal(
        size=(12, 3)
    )
    features = np.vstack([np.zeros(3), groups]).astype(np.float32)
    picks = selection.select_negatives(features, n=3, criterion="kmedoids")
    assert sorted((np.asarray(picks.indices) // 4).tolist()) == [0, 1, 2]


@pytest.mark.parametrize("criterion", ["topk", "boundary", "kmedoids"])
@pytest.mark.parametrize("n", [1, 3, 9])
def test_padding_and_masks_change_nothing(criterion: str, n: int) -> None:
    scores = np.random.default_rng(5).normal(-1, 1, 7)
    for seed in range(4):
        plain = pick(scores, n, criterion, seed=seed)
        assert plain == pick(scores, n, criterion, seed=seed, padding=5)
    assert pick(np.zeros(0), n, criterion, padding=3) == []
