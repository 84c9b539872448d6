"""Criteria of other papers from 2025 and 2026, to compare with.

Each is the rule by which that paper chooses negatives, without the rest of its method: which loss
goes with it is `config.method`'s business.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from mass_dpo_jax.selection.criteria import order_by_score
from mass_dpo_jax.selection.draws import deal_uniforms
from mass_dpo_jax.selection.gram import squared_distances
from mass_dpo_jax.selection.registry import Settings, criterion, in_order
from mass_dpo_jax.selection.types import Pool, Selection


@criterion(
    "topk",
    needs_scoring=True,
    summary="drawn uniformly from the selection.top of the largest log-probabilities",
)
def topk(pool: Pool, n: int, settings: Settings) -> Selection:
    """Draws n uniformly from the K that the policy ranks highest, K = `selection.top` or n if more.

    The random choice spares false negatives, which the hardest of all would hit each time: RoDPO,
    arXiv 2603.29259. Those equal to the K-th are drawn from, too: their order in the data means
    nothing.
    """
    pool = _as_policy_ranks(pool)
    assert pool.scores is not None
    scores = jnp.where(pool.mask & ~jnp.isnan(pool.scores), pool.scores, -jnp.inf)
    largest, _ = lax.top_k(scores, min(max(settings.top, n), len(scores)))
    is_top = pool.mask & (scores >= largest[-1])
    return _draw_uniformly(pool, is_top, n)


@criterion(
    "boundary",
    needs_scoring=True,
    summary="those with a log-probability no less than the chosen response's; where there are "
    "none, those of the highest of three clusters of log-probabilities",
)
def boundary(pool: Pool, n: int, settings: Settings) -> Selection:
    """Selects negatives that the policy ranks at or above the chosen response; n at most.

    Where there are none, those in the highest of three clusters, here the clusters with the least
    sum of squares (DynamicPO, arXiv 2605.00327, runs k-means). The authors' program compares
    log-probabilities and not rewards, and so do we; it trains on all that it finds, and we thin out
    more than n at random. There may be fewer than n: the others count as too easy.
    """
    del settings
    pool = _as_policy_ranks(pool)
    assert pool.scores is not None
    ranks = jnp.argsort(order_by_score(pool))
    is_above = pool.mask & (pool.scores >= 0)
    is_highest = pool.mask & (ranks < _count_highest(pool, ranks))
    return _draw_uniformly(pool, jnp.where(is_above.any(), is_above, is_highest), n)


@criterion(
    "kmedoids",
    needs_scoring=True,
    needs_features=True,
    summary="medoids: those to which the pool's responses are closest in feature space",
)
def kmedoids(pool: Pool, n: int, settings: Settings) -> Selection:
    """Selects n medoids of the pool's features: the sum of distances to the nearest is small.

    A cover of the pool's meanings, as in AMPO (arXiv 2502.18293), whose score has no part in it.
    Candidates are added greedily, each where it lowers the sum most; then up to 2 n times the best
    swap of one pick for another candidate is made, if it lowers the sum (PAM, Kaufman and
    Rousseeuw, 1990).
    """
    del settings
    assert pool.gram is not None
    size = pool.mask.shape[0]
    distances = jnp.sqrt(squared_distances(pool.gram[1:, 1:]))
    # A model that has diverged has no distances, and its picks are the first candidates.
    distances = jnp.where(jnp.isfinite(distances), distances, 0.0)
    # What is masked needs no medoid, and is none.
    distances = jnp.where(pool.mask[:, None], distances, 0.0)
    far = 2 * jnp.max(distances) + 1.0
    slots = min(n, size)

    def total(picks: Array, filled: Array) -> Array:
        to_picks = jnp.where(filled, distances[:, picks], far)
        return jnp.sum(jnp.where(pool.mask, to_picks.min(axis=1, initial=far), 0.0))

    def sums_with(picks: Array, slot: Array, filled: Array) -> Array:
        """Returns the sum with each candidate in a slot, infinite where it cannot be picked."""
        sums = jax.vmap(lambda i: total(picks.at[slot].set(i), filled))(jnp.arange(size))
        is_taken = jnp.zeros(size, bool).at[picks].max(filled & (jnp.arange(slots) != slot))
        return jnp.where(pool.mask & ~is_taken, sums, jnp.inf)

    def add(k: Array, picks: Array) -> Array:
        return picks.at[k].set(jnp.argmin(sums_with(picks, k, jnp.arange(slots) <= k)))

    picks = lax.fori_loop(0, slots, add, jnp.zeros(slots, jnp.int32))
    filled = jnp.arange(slots) < pool.mask.sum()

    def swap(_: Array, picks: Array) -> Array:
        sums = lax.map(lambda slot: sums_with(picks, slot, filled), jnp.arange(slots))
        sums = jnp.where(filled[:, None], sums, jnp.inf)
        slot, candidate = jnp.unravel_index(jnp.argmin(sums), sums.shape)
        improves = sums[slot, candidate] < total(picks, filled) * (1 - 1e-6)
        return jnp.where(improves, picks.at[slot].set(candidate), picks)

    picks = lax.fori_loop(0, 2 * slots, swap, picks)
    is_pick = jnp.zeros(size, bool).at[picks].max(filled)
    return in_order(jnp.argsort(~is_pick, stable=True), is_pick, n)


def _as_policy_ranks(pool: Pool) -> Pool:
    """Returns the pool with the policy's own scores, where they are known, instead of rewards."""
    return pool if pool.policy_scores is None else pool._replace(scores=pool.policy_scores)


def _draw_uniformly(pool: Pool, allowed: Bool[Array, " N"], n: int) -> Selection:
    """Draws up to n of the allowed candidates; a candidate's number depends on its index only."""
    numbers = deal_uniforms(pool.key, allowed.shape[0])
    order = jnp.argsort(jnp.where(allowed, numbers, 2.0))
    return in_order(order, allowed, n)


def _count_highest(pool: Pool, ranks: Array) -> Array:
    """Counts the candidates in the highest of three clusters of scores.

    The clusters are intervals of the sorted scores with the least sum of squares around their
    means; among equally good ones those whose highest is largest, so equal scores stay together.
    """
    assert pool.scores is not None
    size, count = pool.mask.shape[0], pool.mask.sum()
    finite = jnp.where(jnp.isfinite(pool.scores) & pool.mask, pool.scores, 0.0)
    values = jnp.zeros(size).at[ranks].set(finite.astype(jnp.float32))
    real = jnp.arange(size) < count
    values = jnp.where(real, values - jnp.sum(values, where=real) / jnp.maximum(count, 1), 0.0)

    def sums_to(x: Float[Array, " N"]) -> Array:
        return jnp.pad(jnp.cumsum(x), (1, 0))

    first, second = sums_to(values), sums_to(values**2)
    ends = jnp.minimum(jnp.arange(size + 1), count)

    def spread(a: Array, b: Array) -> Array:
        """Computes the sum of squares of sorted values a..b-1 around their mean."""
        mean_part = (first[b] - first[a]) ** 2 / jnp.maximum(b - a, 1)
        return jnp.maximum(second[b] - second[a] - mean_part, 0.0)

    i, j = ends[1:, None], jnp.maximum(ends[None, 1:], ends[1:, None])
    costs = (
        spread(jnp.zeros_like(i), i) + spread(i, j) + spread(j, jnp.broadcast_to(count, j.shape))
    )
    best = costs.min(axis=1)
    tolerance = 1e-5 * second[-1]
    is_best = best <= best.min() + tolerance
    return jnp.max(jnp.where(is_best, ends[1:], 0))
