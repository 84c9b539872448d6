"""Searches one pool for the n candidates that maximise a log-determinant.

A design gives every set S of candidates a value, log det(I + M_S), where M_S is made of inner
products of the candidates' features over the ridge. It is *additive* if M_S is a block of one
matrix, M_S = G_SS, with G_ij = v_i' v_j / ridge and v_i the design vector of candidate i, d numbers
made of its features. Then H = ridge I + sum over S of v v' has log det H = d log ridge + value,
the value grows with S, each candidate adds less the larger S is, and a greedy set reaches 1 - 1/e
of the best one's value.

Nothing here is d x d. Greedy choice for an additive design is the paper's Sherman-Morrison update
seen from the candidates: v_i' H^-1 v_i is the diagonal of

    G - G_S' (I + G_SS)^-1 G_S

and one more candidate s changes that by the rank-1 term g g' / (1 + g_s), g its column s.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from mass_dpo_jax.selection.gram import log_det
from mass_dpo_jax.selection.types import Design, Selection, Value

TIE = 4e-6  # Relative: what a float32 sum over some thousand features loses.


def search_greedily(design: Design, mask_N: Bool[Array, " N"], n: int) -> Selection:
    """Selects n candidates one by one, each time the one that raises the value most.

    Args:
        design: design of N candidates.
        mask_N: True for candidates that may be chosen, each at most once.
        n: number of candidates to select; static.

    Returns:
        A `Selection`; ties go to the lowest index, and values that differ by rounding are ties.
    """
    if design.value is None:
        return _search_gram(design.gram, mask_N, n)
    return _search_values(design.value, mask_N, n)


def _search_gram(gram_NN: Float[Array, "N N"], mask_N: Bool[Array, " N"], n: int) -> Selection:
    """Searches greedily by the diagonal of G, which each choice updates."""

    def choose(k: Array, state: tuple) -> tuple:
        gram_NN, free_N, picks = state
        # Rounding can leave a small negative number where nothing is left to gain. A NaN, from a
        # model that has diverged, is no gain either: the set must not shrink and hide it.
        gains_N = jnp.diagonal(gram_NN)
        gains_N = jnp.where(gains_N > 0, gains_N, 0.0)
        largest = jnp.max(gains_N, where=free_N, initial=0.0)
        best = jnp.argmax(free_N & (gains_N >= largest * (1 - TIE)))
        column_N = gram_NN[:, best]
        gain = gains_N[best]
        picks = add_pick(picks, k, best, free_N[best], gain)
        gram_NN = gram_NN - jnp.outer(column_N, column_N) / (1.0 + gain)
        return gram_NN, free_N.at[best].set(False), picks

    return lax.fori_loop(0, n, choose, (gram_NN, mask_N, empty_selection(n)))[-1]


def _search_values(value: Value, mask_N: Bool[Array, " N"], n: int) -> Selection:
    """Searches greedily by values of whole sets, for designs that are not additive."""
    candidates_N = jnp.arange(mask_N.shape[0], dtype=jnp.int32)

    def choose(k: Array, state: tuple) -> tuple:
        free_N, picks, best_value = state
        valid_n = picks.valid.at[k].set(True)
        values_N = jax.vmap(lambda j: value(picks.indices.at[k].set(j), valid_n))(candidates_N)
        values_N = _rank(values_N, free_N)
        best = _first_best(values_N)
        is_free = free_N[best]
        picks = add_pick(picks, k, best, is_free, jnp.expm1(values_N[best] - best_value))
        return free_N.at[best].set(False), picks, jnp.where(is_free, values_N[best], best_value)

    return lax.fori_loop(0, n, choose, (mask_N, empty_selection(n), jnp.float32(0)))[1]


def search_exhaustively(design: Design, mask_N: Bool[Array, " N"], n: int) -> Selection:
    """Selects the best set of n by looking at every one; arguments as in `search_greedily`."""
    size, set_size = mask_N.shape[0], min(n, mask_N.shape[0])
    sets_Sn = jnp.asarray(np.array(list(itertools.combinations(range(size), set_size)), np.int32))
    valid_Sn = mask_N[sets_Sn]
    # With fewer than n candidates, only the set that has them all counts.
    full_S = valid_Sn.sum(1) == jnp.minimum(set_size, mask_N.sum())

    def value(indices_n: Array, valid_n: Array) -> Array:
        if design.value is not None:
            return design.value(indices_n, valid_n)
        block_nn = design.gram[indices_n[:, None], indices_n]
        return log_det(jnp.where(valid_n[:, None] & valid_n[None, :], block_nn, 0.0))

    best = _first_best(_rank(jax.vmap(value)(sets_Sn, valid_Sn), full_S))
    order_n = jnp.argsort(~valid_Sn[best], stable=True)
    indices_n, valid_n = (jnp.pad(x[best][order_n], (0, n - set_size)) for x in (sets_Sn, valid_Sn))
    indices_n, steps_n = jnp.where(valid_n, indices_n, 0), jnp.arange(n)
    values_n = jax.vmap(lambda k: value(indices_n, valid_n & (steps_n <= k)))(steps_n)
    gains_n = jnp.where(valid_n, jnp.expm1(jnp.diff(values_n, prepend=0.0)), 0.0)
    return empty_selection(n)._replace(indices=indices_n, valid=valid_n, gains=gains_n)


def empty_selection(n: int) -> Selection:
    """Returns a selection with room for n and nothing in it."""
    zeros_n = jnp.zeros(n, jnp.float32)
    return Selection(jnp.zeros(n, jnp.int32), jnp.zeros(n, jnp.bool_), zeros_n, zeros_n)


def add_pick(picks: Selection, k: Array, index: Array, valid: Array, gain: Array) -> Selection:
    """Returns the picks with a candidate in place k."""
    return picks._replace(
        indices=picks.indices.at[k].set(jnp.where(valid, index, 0).astype(jnp.int32)),
        valid=picks.valid.at[k].set(valid),
        gains=picks.gains.at[k].set(jnp.where(valid, gain, 0.0)),
    )


def _rank(values: Array, allowed: Array) -> Array:
    """Replaces values that are not allowed by -inf, and NaN by the worst of the allowed ones."""
    worst = jnp.finfo(values.dtype).min
    return jnp.where(allowed, jnp.where(jnp.isnan(values), worst, values), -jnp.inf)


def _first_best(values: Array) -> Array:
    """Returns the lowest index whose value is the largest, up to rounding.

    Values are sums of log(1 + gain), each with a rounding of its own size.
    """
    largest = jnp.max(values)
    magnitude = jnp.abs(largest)
    return jnp.argmax(values >= largest - TIE * (magnitude + jnp.minimum(magnitude, 1.0)))
