"""Which n of N candidates have a large determinant: Gram matrices and searches. One pool at a time.

A design gives every set S of candidates a value, log det(I + M_S), where M_S is made of inner
products of the candidates' features over the ridge. It is *additive* if M_S is a block of one
matrix, M_S = G_SS: then H = ridge I + sum over S of v v' has log det H = d log ridge + value, the
value grows with S, each candidate adds the less the larger S is, and a greedy set reaches 1 - 1/e
of the best one's value.

Nothing here is d x d. Greedy choice for an additive design is the paper's Sherman-Morrison update
seen from the candidates: v_i' H^-1 v_i is the diagonal of

    G - G_S' (I + G_SS)^-1 G_S

and one more candidate s changes that by the rank-1 term g g' / (1 + g_s), g its column s.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mass_dpo_jax.errors import UserError

TIE = 4e-6  # Relative: what a float32 sum over some thousand features loses.
MOST_SETS = 20_000  # The exhaustive search refuses to look at more.
SEARCHES = ("greedy", "exchange", "exhaustive")


# Squared norms over the ridge. Above the first, rounding moves a determinant's factors, which can
# be as small as 1, by more than a tenth. Greedy choice compares what is left of the norms
# themselves, to any size, until products overflow: above the second.
MOST = 0.1 / float(np.finfo(np.float32).eps)
MOST_ADDITIVE = float(np.finfo(np.float32).max) ** 0.5


class Selection(NamedTuple):
    """The chosen negatives of one prompt, in the order of choice."""

    indices: jax.Array
    """int32 [n], 0 <= index < N; 0 where not valid."""
    valid: jax.Array
    """bool [n]: False where there were fewer than n to choose, always at the end."""
    gains: jax.Array
    """float32 [n]: log(1 + gain) is by how much a candidate increased the value of the set before
    it. For an additive design that is v' H^-1 v at the moment of choice, and greedy's first is
    max ||v||^2 / ridge. 0 where not valid, and for criteria without a value."""
    weights: jax.Array
    """float32 [n]: what makes sum_k weights_k f(indices_k) an unbiased estimate of the pool's
    sum_i p_i f(i), for criterion `sampled`; 0 for the others."""


Value = Callable[[jax.Array, jax.Array], jax.Array]


class Design(NamedTuple):
    """What a criterion maximises.

    value: of a set, from indices int32 [n] and valid bool [n]; None for an additive design, whose
        value is log det(I + G_SS).
    gram: [K, K], G: the whole pool's design vectors' products over the ridge.
    """

    gram: jax.Array
    value: Value | None = None


def gram_matrix(features: jax.Array, mask: jax.Array, feature_norm: str) -> jax.Array:
    """Inner products of one prompt's features, less a vector that is common to all of them.

    No criterion depends on that vector: they all take differences of features. Hidden states share
    a component much larger than their differences, so it must be gone before anything is
    multiplied: first one of the negatives (equal ones become exactly 0), then the mean of what is
    left of them. The chosen response decides about neither.

    Args:
        features: [C, D], h of the chosen response and of the N = C - 1 negatives.
        mask: bool [N], which negatives exist.
        feature_norm: "none", or "l2" to divide every h (never a difference of them) by its norm.

    Returns:
        float32 [C, C]; 0 where masked.
    """
    features = features.astype(jnp.float32)
    if feature_norm == "l2":
        norms = jnp.sqrt(jnp.sum(features**2, axis=-1, keepdims=True))
        norms = jnp.where(jnp.isinf(norms), jnp.nan, norms)  # Not a direction that is 0.
        features = features / jnp.where(norms == 0, 1.0, norms)
    present = jnp.pad(mask, (1, 0), constant_values=True)[:, None]
    features = jnp.where(present, features - features[1 + jnp.argmax(mask)][None], 0.0)
    # A product, since XLA sums over rows on a CPU much more slowly than it multiplies.
    shares = jnp.pad(mask, (1, 0)) / jnp.maximum(jnp.sum(mask), 1)
    mean = jnp.matmul(shares, features, precision=lax.Precision.HIGHEST)
    features = jnp.where(present, features - mean[None], 0.0)
    # In full float32: by default a GPU or TPU rounds the factors.
    return jnp.einsum("id,jd->ij", features, features, precision=lax.Precision.HIGHEST)


def from_origin(gram: jax.Array, origin: jax.Array | int) -> jax.Array:
    """Products of h_i - h_origin, from products of h: [C, C]. Row and column `origin` are 0."""
    column = gram[:, origin]
    return gram - column[:, None] - column[None, :] + column[origin]


def weighted_gram(gram: jax.Array, weights: jax.Array) -> jax.Array:
    """Products of sqrt(w_i) (h_i - sum_j w_j h_j), from products of h: [C, C].

    Args:
        gram: [C, C].
        weights: [C], >= 0, with sum 1 (or all 0: the result is 0).
    """
    # From the heaviest candidate the weighted mean is not far, so little cancels.
    gram = from_origin(gram, jnp.argmax(weights))
    mean = jnp.matmul(gram, weights, precision=lax.Precision.HIGHEST)
    middle = jnp.matmul(weights, mean, precision=lax.Precision.HIGHEST)
    centred = gram - mean[:, None] - mean[None, :] + middle
    roots = jnp.sqrt(weights)
    return roots[:, None] * roots[None, :] * centred


def excess(design: Design) -> jax.Array:
    """The largest squared norm over the ridge, as a share of what float32 has the digits for: above
    1, or NaN, what is found by rounding alone may be chosen."""
    most = MOST_ADDITIVE if design.value is None else MOST
    largest = jnp.max(jnp.diagonal(design.gram)) / most
    return jnp.where(jnp.isfinite(design.gram).all(), largest, jnp.nan)


def log_det(matrix: jax.Array) -> jax.Array:
    """log det(I + M) of a small positive semi-definite M [k, k], by elimination.

    The identity is never added, so that a small value keeps its digits.
    """

    def step(k: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rest, total = state
        pivot = rest[k, k]
        change = jnp.outer(rest[:, k], rest[k, :]) / (1.0 + pivot)
        return rest - change, total + jnp.log1p(pivot)

    return lax.fori_loop(0, matrix.shape[0], step, (matrix, jnp.zeros((), matrix.dtype)))[1]


def search(design: Design, mask: jax.Array, n: int, how: str) -> Selection:
    """n candidates whose set has a large value.

    Args:
        design: of N candidates.
        mask: bool [N], candidates that may be chosen; each is chosen at most once.
        n: how many; static.
        how: "greedy"; "exchange", which then swaps a chosen with another candidate, the best swap
            first, as long as that raises the value; "exhaustive", the best set of all.

    Returns:
        A `Selection`; ties go to the lowest index, and values that differ by rounding are ties.

    Raises:
        UserError: more than `MOST_SETS` sets to look at.
    """
    gram = design.gram
    value = design.value or (lambda indices, valid: log_det(_block(gram, indices, valid)))
    if how == "exhaustive":
        return _exhaustive(value, mask, n)
    chosen = _greedy(value, mask, n) if design.value else greedy(gram, mask, n)
    return _exchange(value, chosen, mask) if how == "exchange" else chosen


def greedy(gram: jax.Array, mask: jax.Array, n: int) -> Selection:
    """Greedily maximises log det(I + G_SS): n times the candidate with the largest gain.

    Args:
        gram: [N, N], symmetric and positive semi-definite: design vectors' products over the ridge.
        mask: bool [N].
        n: how many; static.
    """

    def step(k: jax.Array, state: tuple) -> tuple:
        gram, free, chosen = state
        # Rounding can leave a small negative number where nothing is left to gain. A NaN, of a
        # model that has diverged, is no gain either: the set must not shrink and hide it.
        diagonal = jnp.diagonal(gram)
        diagonal = jnp.where(diagonal > 0, diagonal, 0.0)
        most = jnp.max(diagonal, where=free, initial=0.0)
        best = jnp.argmax(free & (diagonal >= most * (1 - TIE)))
        column = gram[:, best]
        gain = diagonal[best]
        chosen = _add(chosen, k, best, free[best], gain)
        return gram - jnp.outer(column, column) / (1.0 + gain), free.at[best].set(False), chosen

    return lax.fori_loop(0, n, step, (gram, mask, nothing(n)))[-1]


def nothing(n: int) -> Selection:
    """An empty selection with room for n."""
    zeros = jnp.zeros(n, jnp.float32)
    return Selection(jnp.zeros(n, jnp.int32), jnp.zeros(n, jnp.bool_), zeros, zeros)


def _add(
    chosen: Selection, k: jax.Array, best: jax.Array, valid: jax.Array, gain: jax.Array
) -> Selection:
    return chosen._replace(
        indices=chosen.indices.at[k].set(jnp.where(valid, best, 0).astype(jnp.int32)),
        valid=chosen.valid.at[k].set(valid),
        gains=chosen.gains.at[k].set(jnp.where(valid, gain, 0.0)),
    )


def _block(gram: jax.Array, indices: jax.Array, valid: jax.Array) -> jax.Array:
    """G_SS, 0 where not valid."""
    return jnp.where(valid[:, None] & valid[None, :], gram[indices[:, None], indices], 0.0)


def _comparable(values: jax.Array, allowed: jax.Array) -> jax.Array:
    """-inf where not allowed; a NaN is the worst of the allowed ones."""
    worst = jnp.finfo(values.dtype).min
    return jnp.where(allowed, jnp.where(jnp.isnan(values), worst, values), -jnp.inf)


def _rounding(value: jax.Array) -> jax.Array:
    """By how much values near this one may differ and be the same: they are sums of logarithms of
    1 + gain, each with a rounding of its own size."""
    size = jnp.abs(value)
    return TIE * (size + jnp.minimum(size, 1.0))


def _first_best(values: jax.Array) -> jax.Array:
    """The lowest index whose value is the largest, but for rounding."""
    most = jnp.max(values)
    return jnp.argmax(values >= most - _rounding(most))


def _greedy(value: Value, mask: jax.Array, n: int) -> Selection:
    """Greedy choice by values of whole sets, for designs that are not additive."""
    candidates = jnp.arange(mask.shape[0], dtype=jnp.int32)

    def step(k: jax.Array, state: tuple) -> tuple:
        free, chosen, before = state
        valid = chosen.valid.at[k].set(True)
        values = jax.vmap(lambda j: value(chosen.indices.at[k].set(j), valid))(candidates)
        values = _comparable(values, free)
        best = _first_best(values)
        some = free[best]
        chosen = _add(chosen, k, best, some, jnp.expm1(values[best] - before))
        return free.at[best].set(False), chosen, jnp.where(some, values[best], before)

    return lax.fori_loop(0, n, step, (mask, nothing(n), jnp.float32(0)))[1]


def _exchange(value: Value, chosen: Selection, mask: jax.Array) -> Selection:
    """Swaps a chosen with another candidate as long as that raises the value: the best swap first.

    Rounding cannot make it go round in circles: a swap has to gain more than a tie.
    """
    n, size = chosen.indices.shape[0], mask.shape[0]
    valid = chosen.valid
    candidates = jnp.arange(size, dtype=jnp.int32)

    def swapped(indices: jax.Array) -> jax.Array:
        """Values [n * N] of the sets with candidate j in place of number k."""
        rows = jax.vmap(
            lambda k: jax.vmap(lambda j: value(indices.at[k].set(j), valid))(candidates)
        )(jnp.arange(n))
        free = mask & ~jnp.zeros(size, bool).at[indices].max(valid)
        return _comparable(rows, valid[:, None] & free[None, :]).ravel()

    def step(state: tuple) -> tuple:
        indices, before, _ = state
        values = swapped(indices)
        best = _first_best(values)
        better = values[best] > before + _rounding(before)
        after = indices.at[best // size].set((best % size).astype(jnp.int32))
        return (
            jnp.where(better, after, indices),
            jnp.where(better, values[best], before),
            better,
        )

    start = (chosen.indices, value(chosen.indices, valid), jnp.bool_(True))
    indices = lax.while_loop(lambda state: state[2], step, start)[0]
    return _with_gains(value, indices, valid)


def _exhaustive(value: Value, mask: jax.Array, n: int) -> Selection:
    size = mask.shape[0]
    room = min(n, size)
    if math.comb(size, room) > MOST_SETS:
        raise UserError(
            f"selection.search=exhaustive: {math.comb(size, room)} sets of {n} of {size} "
            f"negatives, at most {MOST_SETS} are looked at"
        )
    sets = jnp.asarray(np.array(list(itertools.combinations(range(size), room)), np.int32))
    present = mask[sets]
    # Where there are fewer than n candidates, the set that has them all.
    full = present.sum(1) == jnp.minimum(room, mask.sum())
    values = _comparable(jax.vmap(value)(sets, present), full)
    best = _first_best(values)
    order = jnp.argsort(~present[best], stable=True)
    indices, valid = (jnp.pad(x[best][order], (0, n - room)) for x in (sets, present))
    return _with_gains(value, jnp.where(valid, indices, 0), valid)


def _with_gains(value: Value, indices: jax.Array, valid: jax.Array) -> Selection:
    places = jnp.arange(indices.shape[0])
    values = jax.vmap(lambda k: value(indices, valid & (places <= k)))(places)
    gains = jnp.expm1(jnp.diff(values, prepend=0.0))
    empty = nothing(indices.shape[0])
    return empty._replace(indices=indices, valid=valid, gains=jnp.where(valid, gains, 0.0))
