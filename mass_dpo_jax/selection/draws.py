"""Random draws of n negatives with weights, so that sums over the pool are estimated without bias.

A draw gives a set S and weights w with E[sum over S of w_i f(i)] = sum_i p_i f(i), for any f and
the pool weights p. Its error on gradients g_i is (w - p)' K (w - p), with K_ij = g_i' g_j. The
gradient of a negative's reward contains the chosen response's, so weights that do not sum to 1
would scale that by a random number; all of these sum to 1.

`partition` draws one candidate from each of n cells. `pivotal` and `local` draw n different ones,
each with the probability pi_i of `inclusion_probabilities`, and w_i = p_i / pi_i. They start from
all pi and let candidates duel in pairs, which moves probability from one of the two to the other,
its mean unchanged, until one of them is drawn or out (Deville and Tille, "Unequal probability
sampling without replacement through a splitting method", 1998).
Whoever meets whom, the error is at most that of n independent draws (Chauvet and Ruiz-Gazen, arXiv
1609.02688). What a candidate is dealt depends on the key and its index only, so padding does not
change a draw.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from mass_dpo_jax.selection.gram import multiply, squared_distances
from mass_dpo_jax.selection.search import TIE
from mass_dpo_jax.selection.types import Pool

CERTAIN = 1 - 1e-6  # Inclusion probabilities from here on are 1, up to rounding.


class Draw(NamedTuple):
    """A draw from one pool.

    Attributes:
        drawn: whether each candidate is drawn; no more than n are.
        weights: w, 0 where not drawn; its sum is 1 unless the pool is empty.
    """

    drawn: Bool[Array, " N"]
    weights: Float[Array, " N"]


class Inclusion(NamedTuple):
    """How probable each candidate is in a draw of n different ones.

    Attributes:
        probabilities: pi; the sum is min(n, number of candidates).
        weights: p_i / pi_i, the weight of a candidate that is drawn.
    """

    probabilities: Float[Array, " N"]
    weights: Float[Array, " N"]


def draw_pivotal(pool: Pool, n: int) -> Draw:
    """Draws n different candidates by duels in random order, as a knockout tournament."""
    inclusion = inclusion_probabilities(_log_weights(pool.scores, pool.mask), n)
    drawn = hold_tournament(inclusion.probabilities, pool.mask, pool.key)
    return _weigh(drawn, inclusion.weights, pool.mask)


def hold_tournament(
    pi: Float[Array, " N"], mask: Bool[Array, " N"], key: Key[Array, ""]
) -> Bool[Array, " N"]:
    """Draws each candidate with its probability pi, and as many as the sum of all is."""
    size = mask.shape[0]
    # A shuffle with masked candidates last: the others meet as if those were not there.
    order = jnp.lexsort((deal_uniforms(jax.random.fold_in(key, 0), size), ~mask))
    rounds = max(size - 1, 0).bit_length()
    players = jnp.pad(order, (0, 2**rounds - size), constant_values=size)
    pi = jnp.pad(pi, (0, 1))[players]
    drawn = jnp.zeros(size + 1, bool)
    for number in range(rounds):
        noise = deal_uniforms(jax.random.fold_in(key, number + 1), len(pi) // 2)
        left_drawn, right_drawn, left_stays, pi = duel(pi[::2], pi[1::2], noise)
        drawn = drawn.at[players[::2]].max(left_drawn).at[players[1::2]].max(right_drawn)
        players = jnp.where(left_stays, players[::2], players[1::2])
    # All probability is with the last one: 0 or 1, up to rounding.
    return drawn.at[players].max(pi > 0.5)[:size] & mask


def draw_local(pool: Pool, n: int) -> Draw:
    """Draws n different candidates by duels between nearest neighbours in feature space.

    Similar candidates seldom are drawn together (Grafstrom, Lundstrom and Schelin, "Spatially
    balanced sampling through the pivotal method", 2012). Needs the pool's Gram matrix.
    """
    assert pool.gram is not None
    inclusion = inclusion_probabilities(_log_weights(pool.scores, pool.mask), n)
    size = pool.mask.shape[0]
    distances = squared_distances(pool.gram[1:, 1:])
    # A model that has diverged has no neighbours; its draw is a draw all the same.
    distances = jnp.where(jnp.isnan(distances), jnp.inf, distances)
    tolerance = TIE * jnp.max(
        jnp.diagonal(pool.gram), where=jnp.pad(pool.mask, (1, 0)), initial=0.0
    )
    turns = deal_uniforms(jax.random.fold_in(pool.key, 0), size)
    noise = deal_uniforms(jax.random.fold_in(pool.key, 1), size)

    def duel_once(step: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        pi, undecided = state
        first = jnp.argmin(jnp.where(undecided, turns, 2.0))
        others = undecided.at[first].set(False)
        # An index without candidate counts as infinitely far, beyond any real distance.
        to_first = jnp.where(others, jnp.minimum(distances[first], 1e38), jnp.inf)
        # The same response may be in a pool twice: rounding must not tell which one is nearest.
        nearest = jnp.argmax(to_first <= to_first.min() + tolerance)
        first_drawn, nearest_drawn, first_stays, rest = duel(pi[first], pi[nearest], noise[step])
        stays = jnp.where(first_stays, first, nearest)
        has_two = others.any()
        after = pi.at[first].set(first_drawn.astype(pi.dtype))
        after = after.at[nearest].set(nearest_drawn.astype(pi.dtype)).at[stays].set(rest)
        pi = jnp.where(has_two, after, pi)
        left = jnp.where(first_stays, nearest, first)
        return pi, jnp.where(has_two, undecided.at[left].set(False), undecided)

    state = inclusion.probabilities, pool.mask
    pi, _ = lax.fori_loop(0, max(size - 1, 0), duel_once, state)
    return _weigh(pi > 0.5, inclusion.weights, pool.mask)


def draw_independent(pool: Pool, n: int) -> Draw:
    """Draws n times, each time from all; one that comes k times has the weight k / n."""
    log_p = _log_weights(pool.scores, pool.mask)
    size = log_p.shape[0]
    noise = jax.vmap(
        lambda i: jax.random.gumbel(jax.random.fold_in(pool.key, i), (n,), jnp.float32)
    )(jnp.arange(size))
    drawn = jnp.argmax(log_p[:, None] + noise, axis=0)
    counts = jnp.zeros(size, jnp.int32).at[drawn].add(pool.mask[drawn])
    return Draw(counts > 0, counts / n)


def draw_partition(pool: Pool, n: int) -> Draw:
    """Draws one candidate from each of n cells of the pool, weighted by the mass of its cell.

    The cells are made so that the weighted distances of features within them are small: a greedy
    max n-cut, improved in two passes. Half of each distance is the same for all pairs, which keeps
    features that say little about gradients from doing harm. docs/theory.md has the derivation.
    """
    assert pool.gram is not None
    log_p = _log_weights(pool.scores, pool.mask)
    size, p = log_p.shape[0], jnp.exp(log_p)
    distances = squared_distances(pool.gram[1:, 1:])
    distances = jnp.where(jnp.isfinite(distances), distances, 0.0)
    ties = p[:, None] * p[None, :] * distances
    # sum_ij p_i p_j D_ij is 2 tr Cov_p; that of distances which are all 2 is 2 (1 - sum p_i^2).
    uniform = 2 * (p[:, None] * p[None, :]) * (1 - jnp.eye(size))
    ties = ties / jnp.maximum(ties.sum(), jnp.finfo(p.dtype).tiny) + uniform / jnp.maximum(
        uniform.sum(), jnp.finfo(p.dtype).tiny
    )
    order = jnp.lexsort((jnp.arange(size), -ties.sum(1), ~pool.mask))

    def place(step: Array, cells: Array) -> Array:
        i = order[step % size]
        in_cells = (cells[:, None] == jnp.arange(n)[None, :]).astype(p.dtype).at[i].set(0.0)
        costs = multiply(ties[i], in_cells)
        # An empty cell is as good as any that costs nothing, and lets one more be drawn.
        costs = jnp.where(in_cells.any(0), costs, -1.0)
        return cells.at[i].set(jnp.where(pool.mask[i], jnp.argmin(costs), n))

    cells = lax.fori_loop(0, 3 * size, place, jnp.full(size, n))
    noise = jax.vmap(lambda i: jax.random.gumbel(jax.random.fold_in(pool.key, i)))(jnp.arange(size))
    in_cells = cells[:, None] == jnp.arange(n)[None, :]
    # Weights that vanish in float32 are as good as each other; a cell may have no others.
    numbers = jnp.where(in_cells, (jnp.maximum(log_p, -1e30) + noise)[:, None], -jnp.inf)
    masses = jnp.sum(jnp.where(in_cells, p[:, None], 0.0), axis=0)
    picks = jnp.where(in_cells.any(0), jnp.argmax(numbers, axis=0), size)
    drawn = jnp.zeros(size + 1, bool).at[picks].set(True)[:size]
    weights = jnp.zeros(size + 1, p.dtype).at[picks].set(masses)[:size]
    return _weigh(drawn, weights, pool.mask)


DRAWS = {
    "pivotal": draw_pivotal,
    "local": draw_local,
    "partition": draw_partition,
    "independent": draw_independent,
}


def inclusion_probabilities(log_p: Float[Array, " N"], n: int) -> Inclusion:
    """Computes pi_i = m p_i / rest, at most 1.

    A candidate that would come to 1 or more is certain; m and rest are the places and the mass that
    the certain ones leave to the others. Everything is relative to that rest, so n are drawn also
    where all but one of the weights vanish in float32.

    Args:
        log_p: logarithms of the pool weights; -inf for what cannot be drawn.
        n: number of candidates to draw; static.
    """
    order = jnp.argsort(-log_p)
    sorted_log_p = log_p[order]
    log_rest = lax.cumlogsumexp(sorted_log_p, reverse=True)
    left = jnp.maximum(n - jnp.arange(log_p.shape[0]), 0)
    # The k-th largest is certain if all before it are and it takes a whole one of n - k places.
    takes_all = jnp.log(left) + sorted_log_p >= log_rest + jnp.log(CERTAIN)
    is_certain = jnp.cumprod(takes_all & jnp.isfinite(sorted_log_p)).astype(bool)
    count = is_certain.sum()
    log_rest = jnp.append(log_rest, -jnp.inf)[count]
    places = jnp.maximum(n - count, 1)
    share = jnp.where(jnp.isfinite(log_rest), jnp.exp(sorted_log_p - log_rest), 0.0)
    pi = jnp.where(is_certain, 1.0, jnp.minimum(places * share, 1.0))
    weights = jnp.where(is_certain, jnp.exp(sorted_log_p), jnp.exp(log_rest) / places)
    pi = jnp.where(n > count, pi, is_certain)
    back = jnp.argsort(order)
    return Inclusion(pi[back], weights[back])


def effective_pool(scores: Float[Array, " N"], mask: Bool[Array, " N"]) -> Float[Array, ""]:
    """Computes exp(entropy of p): N where all weights are equal, 1 where one has all.

    With no more than n, a draw of n is nearly exact, and more negatives would not help.
    """
    log_p = _log_weights(scores, mask)
    p = jnp.exp(log_p)
    return jnp.exp(-jnp.sum(jnp.where(p > 0, p * log_p, 0.0)))


def share_certain(scores: Float[Array, " N"], mask: Bool[Array, " N"], n: int) -> Float[Array, ""]:
    """Computes the share of a pivotal draw's n candidates that every draw has."""
    probabilities = inclusion_probabilities(_log_weights(scores, mask), n).probabilities
    certain = jnp.sum(mask & (probabilities >= CERTAIN))
    return certain / jnp.maximum(jnp.minimum(n, mask.sum()), 1)


def duel(
    a: Float[Array, "*K"], b: Float[Array, "*K"], noise: Float[Array, "*K"]
) -> tuple[Bool[Array, "*K"], Bool[Array, "*K"], Bool[Array, "*K"], Float[Array, "*K"]]:
    """Decides one of each two candidates, the means of both probabilities unchanged.

    Args:
        a: inclusion probabilities of the ones.
        b: those of the others.
        noise: uniform in [0, 1).

    Returns:
        Whether the one is drawn; whether the other is; whether the one goes on, undecided; and the
        probability of the one that goes on.
    """
    total = a + b
    loses = total < 1  # One of them is out; else one of them is drawn.
    # The probability that the one does better: goes on where the other is out, or is drawn. Where
    # the total is 1 both cases come to the same, so rounding does not decide a draw.
    if_out = a / jnp.where(total > 0, total, 1.0)
    room = 2 - total
    if_drawn = jnp.where(room > 0, (1 - b) / jnp.where(room > 0, room, 1.0), 1.0)
    wins = noise < jnp.where(loses, if_out, if_drawn)
    stays = wins == loses
    return ~loses & ~stays, ~loses & stays, stays, jnp.where(loses, total, total - 1)


def _log_weights(scores: Array | None, mask: Array) -> Float[Array, " N"]:
    assert scores is not None
    scores = jnp.where(mask, scores.astype(jnp.float32), -jnp.inf)
    return jnp.where(mask, jax.nn.log_softmax(scores), -jnp.inf)


def deal_uniforms(key: Key[Array, ""], size: int) -> Float[Array, " size"]:
    """Deals a number in [0, 1) to each index, which depends on the key and the index only."""
    return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(jnp.arange(size))


def _weigh(drawn: Array, weights: Array, mask: Array) -> Draw:
    drawn = drawn & mask
    return Draw(drawn, jnp.where(drawn, weights, 0.0))
