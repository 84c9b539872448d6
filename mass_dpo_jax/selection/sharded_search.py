"""Greedy search for an additive design among candidates that are split over devices.

With the chosen vectors v_s and H = I + sum_s v_s v_s' (everything over the ridge),

    H^-1 = I - sum_k w_k w_k',    w_k = H_{k-1}^-1 v_s / sqrt(1 + gain_s),

w_k for the k-th choice, so a candidate's gain v' H^-1 v falls by (w_k' v)^2 at each choice: one
product of the features with a vector, an incremental Cholesky factorization of I + G_SS whose
columns need not be kept.

Gains only fall. So those of the last *sweep* over all candidates bound all later ones, and between
sweeps only a *shortlist* of the most promising is kept up to date. As long as the best of it is
above every bound outside, nothing else can be chosen; otherwise the next sweep makes up for the
choices that were missed and makes a new shortlist. Where gains fall so fast that every choice needs
a sweep, this is the dense method.

Shapes have m = N / devices for the candidates of a device, l for its shortlist and r for a chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mass_dpo_jax.selection.gram import multiply, normalize_features
from mass_dpo_jax.selection.search import TIE, add_pick, empty_selection
from mass_dpo_jax.selection.types import Selection

SHORTLIST_SHARE = 32  # Between sweeps one candidate in so many is kept exact,
MIN_SHORTLIST = 1024  # and at least so many.
CPU_CHUNK_BYTES = 2**21  # Float32 features read at a time: what stays in a CPU core's cache;
CHUNK_BYTES = 2**26  # on accelerators.
EXCLUDED = -1.0  # The gain of candidates that must not be chosen (again); others' are >= 0.
NO_INDEX = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Shard:
    """The candidates of one device, inside `shard_map` over `axes`.

    Attributes:
        features: [m, D], of any type.
        roots: float32 [m], square roots of what multiplies v v': the weight over the ridge.
        origin: float32 [D], subtracted from every feature first.
        mean: float32 [D], subtracted from the remainder.
        feature_norm: the same as in `Settings`.
        axes: axes of the mesh.
    """

    features: Float[Array, "m D"]
    roots: Float[Array, " m"]
    origin: Float[Array, " D"]
    mean: Float[Array, " D"]
    feature_norm: str
    axes: tuple[str, ...]

    @property
    def size(self) -> int:
        """M."""
        return self.features.shape[0]

    @property
    def first(self) -> Array:
        """The index of this device's first candidate among all N."""
        return lax.axis_index(self.axes) * self.size

    def read(self, features: Array) -> Array:
        """Returns features [..., D] as `gram.normalize_features` does."""
        return normalize_features(features, self.feature_norm)

    def design_vectors(self, features_rD: Array, roots_r: Array) -> Array:
        """Computes design vectors over the root of the ridge, [r, D]; 0 without weight."""
        roots_r1 = roots_r[:, None]
        centred_rD = self.read(features_rD) - self.origin[None] - self.mean[None]
        return jnp.where(roots_r1 > 0, roots_r1 * centred_rD, 0.0)

    def broadcast_from_owner(self, index: Array, make: Callable[[Array], Array]) -> Array:
        """Computes `make(local index)` on the device that owns an index, for all devices: [D]."""
        local = index - self.first
        is_owner = (local >= 0) & (local < self.size)
        value_D = make(jnp.clip(local, 0, self.size - 1))
        return lax.psum(jnp.where(is_owner, value_D, 0.0), self.axes)

    def find_best(self, gains: Array, local_indices: Array) -> tuple[Array, Array]:
        """Finds the largest gain on any device, and the lowest index that has it or ties."""
        largest = lax.pmax(jnp.max(gains), self.axes)
        ties = (gains >= 0) & (gains >= largest * (1 - TIE))
        indices = jnp.where(ties, self.first + local_indices, NO_INDEX)
        return largest, lax.pmin(jnp.min(indices), self.axes)


class _Choices(NamedTuple):
    """The selection so far, replicated on every device.

    Attributes:
        made: int32, how many.
        picks: [n].
        inverse: float32 [n, D], the w_k of H^-1; 0 for choices to come.
    """

    made: Array
    picks: Selection
    inverse: Array


class _Shortlist(NamedTuple):
    """The candidates of a device whose gains are kept exact.

    Attributes:
        indices: int32 [l], counted from the first of this device.
        vectors: float32 [l, D], design vectors.
        gains: float32 [l]; or `EXCLUDED`.
        outside: float32, no other gain of this device is above it.
    """

    indices: Array
    vectors: Array
    gains: Array
    outside: Array


def search_shard(
    shard: Shard, mask_m: Bool[Array, " m"], n: int
) -> tuple[Selection, Int[Array, ""]]:
    """Selects n candidates greedily on all devices; returns the number of sweeps beside them."""
    indices_m = jnp.arange(shard.size)

    def choose_from_list(state: tuple) -> tuple:
        choices, shortlist, _ = state
        best = shard.find_best(shortlist.gains, shortlist.indices)
        return _choose(shard, choices, shortlist, *best)

    def sweep(state: tuple) -> tuple:
        choices, gains_m, swept, sweeps = state
        gains_m = _sweep(shard, gains_m, swept, choices)
        swept = choices.made
        # Over all candidates: there may be more ties than the shortlist has room for.
        best = shard.find_best(gains_m, indices_m)
        # Loops, since a conditional would copy its operands at every choice.
        start = _choose(shard, choices, _make_shortlist(shard, gains_m), *best)
        choices, _, _ = lax.while_loop(lambda x: (x[0].made < n) & x[2], choose_from_list, start)
        return choices, gains_m, swept, sweeps + 1

    zero = jnp.int32(0)
    choices = _Choices(zero, empty_selection(n), jnp.zeros((n, shard.features.shape[1])))
    start = choices, jnp.where(mask_m, 0.0, EXCLUDED), zero, zero
    choices, _, _, sweeps = lax.while_loop(lambda x: x[0].made < n, sweep, start)
    return choices.picks, sweeps


def subtract_mean(shard: Shard, weights_m: Float[Array, " m"]) -> Shard:
    """Returns the shard with the weighted mean over all devices as what is subtracted."""
    # The mean lies close to the heaviest candidate, so with that as origin little cancels.
    weights_m = jnp.where(weights_m > 0, weights_m, 0.0)
    heaviest = shard.find_best(weights_m, jnp.arange(shard.size))[1]
    origin_D = shard.broadcast_from_owner(heaviest, lambda i: shard.read(shard.features[i]))
    shifted = dataclasses.replace(shard, origin=origin_D)

    def add(total_D: Array, chunk: _Chunk) -> Array:
        weights_r = jnp.where(chunk.is_new, chunk.take(weights_m), 0.0)
        differences_rD = shifted.design_vectors(chunk.take(shard.features), jnp.sign(weights_r))
        return total_D + multiply(weights_r, differences_rD)

    mean_D = lax.psum(_fold_chunks(shard, add, shard.mean), shard.axes)
    return dataclasses.replace(shifted, mean=mean_D)


class _Chunk(NamedTuple):
    """Consecutive candidates of a device.

    Attributes:
        start: the first of them.
        is_new: bool [r], False for those that the chunk before had too.
    """

    start: Array
    is_new: Array

    def take(self, x: Array) -> Array:
        """Returns the chunk's rows of x [m, ...]."""
        return lax.dynamic_slice_in_dim(x, self.start, self.is_new.shape[0])

    def put(self, x_m: Array, values_r: Array) -> Array:
        """Returns x [m] with the chunk's values replaced."""
        values_r = jnp.where(self.is_new, values_r, self.take(x_m))
        return lax.dynamic_update_slice_in_dim(x_m, values_r, self.start, 0)


def _fold_chunks(shard: Shard, step: Callable[[Array, _Chunk], Array], start: Array) -> Array:
    """Folds `step` over all candidates, in chunks that stay small in float32."""
    chunk_bytes = CPU_CHUNK_BYTES if jax.default_backend() == "cpu" else CHUNK_BYTES
    chunks = -(-shard.size * 4 * shard.features.shape[1] // chunk_bytes)
    rows = -(-shard.size // min(chunks, shard.size))
    offsets_r = jnp.arange(rows)

    def fold(i: Array, state: Array) -> Array:
        # The last chunk begins earlier, so that all have the same size without a padded copy.
        begin = jnp.minimum(i * rows, shard.size - rows)
        return step(state, _Chunk(begin, begin + offsets_r >= i * rows))

    return lax.fori_loop(0, -(-shard.size // rows), fold, start)


def _sweep(shard: Shard, gains_m: Array, swept: Array, choices: _Choices) -> Array:
    """Returns all gains after the choices that were made, from those after the first `swept`."""
    chosen_n = choices.picks.indices - shard.first
    chosen_n = jnp.where(choices.picks.valid & (chosen_n >= 0), chosen_n, shard.size)
    gains_m = gains_m.at[chosen_n].set(EXCLUDED, mode="drop")

    def step(gains_m: Array, chunk: _Chunk) -> Array:
        vectors_rD = shard.design_vectors(chunk.take(shard.features), chunk.take(shard.roots))
        gains_r = chunk.take(gains_m)
        # With H = I, before the first choice, gains are squared norms.
        norms_r = lax.cond(
            choices.made == 0, _squared_norms, lambda v: jnp.zeros(len(v)), vectors_rD
        )
        gains_r = jnp.where(gains_r >= 0, gains_r + norms_r, EXCLUDED)

        def lower(k: Array, gains_r: Array) -> Array:
            return _lower_gains(gains_r, vectors_rD, choices.inverse[k])

        return chunk.put(gains_m, lax.fori_loop(swept, choices.made, lower, gains_r))

    return _fold_chunks(shard, step, gains_m)


def _squared_norms(vectors: Array) -> Array:
    norms = jnp.sum(vectors**2, axis=1)
    return jnp.where(norms > 0, norms, 0.0)


def _lower_gains(gains: Array, vectors: Array, w_D: Array) -> Array:
    """Returns gains after one more choice, which added w w' to I - H^-1."""
    new_gains = gains - multiply(vectors, w_D) ** 2
    # Rounding can leave a small negative number where nothing is left to gain. A NaN, from a model
    # that has diverged, is no gain either.
    return jnp.where(gains >= 0, jnp.where(new_gains > 0, new_gains, 0.0), EXCLUDED)


def shortlist_size(size: int) -> int:
    """Returns how many of a device's candidates are on its shortlist."""
    return min(size, max(MIN_SHORTLIST, size // SHORTLIST_SHARE))


def _make_shortlist(shard: Shard, gains_m: Array) -> _Shortlist:
    room = shortlist_size(shard.size)
    gains, indices = lax.top_k(gains_m, min(room + 1, shard.size))
    outside = gains[room] if room < shard.size else jnp.float32(EXCLUDED)
    indices_l = indices[:room]
    vectors_lD = shard.design_vectors(shard.features[indices_l], shard.roots[indices_l])
    return _Shortlist(indices_l, vectors_lD, gains[:room], outside)


def _choose(
    shard: Shard, choices: _Choices, shortlist: _Shortlist, gain: Array, index: Array
) -> tuple[_Choices, _Shortlist, Array]:
    """Adds a candidate to the choices; returns also whether the shortlist has the next one.

    Args:
        gain: that of the candidate; `EXCLUDED` says that none is left.
    """
    k, picks, inverse_nD = choices
    valid = gain >= 0
    gain = jnp.where(valid, gain, 0.0)
    v_D = shard.broadcast_from_owner(
        index, lambda i: shard.design_vectors(shard.features[i, None], shard.roots[i, None])[0]
    )
    w_D = (v_D - multiply(multiply(inverse_nD, v_D), inverse_nD)) / jnp.sqrt(1 + gain)
    w_D = jnp.where(gain > 0, w_D, 0.0)
    picks = add_pick(picks, k, index, valid, gain)
    left_l = jnp.where(shard.first + shortlist.indices == index, EXCLUDED, shortlist.gains)
    shortlist = shortlist._replace(gains=_lower_gains(left_l, shortlist.vectors, w_D))
    largest = lax.pmax(jnp.max(shortlist.gains), shard.axes)
    is_listed = lax.pmax(shortlist.outside, shard.axes) < largest * (1 - TIE)
    return _Choices(k + 1, picks, inverse_nD.at[k].set(w_D)), shortlist, is_listed
