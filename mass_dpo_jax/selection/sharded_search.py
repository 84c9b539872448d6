"""Greedy search for an additive design among candidates that are split over devices.

A candidate adds the vectors v of its block, r of them, to H = I + sum v v' (everything over the
ridge): a response adds one, a prompt as many as it has negatives. Its gain is the growth of log det
H, that is log det(I + V H^-1 V'), V its block [r, D]. As long as few vectors w have been added,

    H^-1 = I - sum_k w_k w_k',    w_k = H_{k-1}^-1 v_k / sqrt(1 + v_k' H_{k-1}^-1 v_k),

so a candidate's r x r products V H^-1 V' fall by (V w_k) (V w_k)' for each: one product of the
features with a vector, an incremental Cholesky factorization of I + G_SS whose columns need not be
kept.

Gains only fall (log det is submodular). So those of the last *sweep* over all candidates bound all
later ones, and between sweeps only a *shortlist* of the most promising is kept up to date. As long
as the best of it is above every bound outside, nothing else can be chosen; otherwise the next sweep
makes up for the choices that were missed and makes a new shortlist. Where gains fall so fast that
every choice needs a sweep, this is the dense method.

A search that adds more than D vectors *rebases* at each sweep: it changes to coordinates in which H
is I again, and begins with no w. Its sweeps compute gains anew instead of subtracting from those of
the first, of which next to nothing is left after so many choices.

Shapes have m = N / devices for the candidates of a device, l for its shortlist, c for a chunk, r
for the vectors of a block and R for the vectors added since the last rebasing.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mass_dpo_jax.selection.blocks import compute_gains, lower_blocks, multiply_pairs
from mass_dpo_jax.selection.gram import multiply
from mass_dpo_jax.selection.search import TIE, add_pick, empty_selection
from mass_dpo_jax.selection.shards import Chunk, Shard, fold_chunks
from mass_dpo_jax.selection.types import Selection

SHORTLIST_SHARE = 32  # Between sweeps one candidate in so many is kept exact,
MIN_SHORTLIST = 1024  # and at least so many.
MIN_ROOM = 1024  # Vectors that may be added before a rebasing, or D if that is more.
MAX_FALL = 16.0  # So often may gains be divided before one: differences of them lose these digits.
EXCLUDED = -1.0  # The gain of candidates that must not be chosen (again); others' are >= 0.


class _Choices(NamedTuple):
    """The selection so far, replicated on every device.

    Attributes:
        made: int32, how many.
        picks: [n].
        swept: int32, how many had been made at the last sweep.
        inverse: float32 [R, D], the w_k of H^-1; 0 for those to come.
        added: float32 [R, D], the vectors added since the last rebasing; None without rebasing.
        whitening: float32 [D, D], the coordinates: a vector becomes whitening @ v. None likewise.
    """

    made: Array
    picks: Selection
    swept: Array
    inverse: Array
    added: Array | None
    whitening: Array | None

    def change_coordinates(self, vectors: Float[Array, "*c D"]) -> Float[Array, "*c D"]:
        """Returns vectors in the coordinates of the last rebasing."""
        return vectors if self.whitening is None else multiply(vectors, self.whitening.T)


class _Shortlist(NamedTuple):
    """The candidates of a device whose gains are kept exact.

    Attributes:
        indices: int32 [l], counted from the first of this device.
        vectors: float32 [l, r, D], design vectors.
        blocks: float32 [l, r, r], V H^-1 V'.
        gains: float32 [l]; or `EXCLUDED`.
        outside: float32, no other gain of any device is above it.
    """

    indices: Array
    vectors: Array
    blocks: Array
    gains: Array
    outside: Array


def search_shard(
    shard: Shard, mask_m: Bool[Array, " m"], n: int
) -> tuple[Selection, Int[Array, ""]]:
    """Selects n candidates greedily on all devices; returns the number of sweeps beside them.

    A gain is the geometric mean of the r factors of the determinant's growth, less 1: with r = 1
    v' H^-1 v, and the value grows by r log(1 + gain). The product itself could overflow.
    """
    _, rank, width = shard.shape
    indices_m = jnp.arange(shard.size)
    rebases = n * rank > width
    room = min(n, -(-max(MIN_ROOM, width) // rank)) if rebases else n

    def goes_on(state: tuple) -> Array:
        choices, shortlist, largest = state
        is_listed = (choices.made < n) & (shortlist.outside < largest * (1 - TIE))
        if rebases:
            is_listed &= choices.made - choices.swept < room
            is_listed &= largest * MAX_FALL >= choices.picks.gains[choices.swept]
        return is_listed

    def choose_from_list(state: tuple) -> tuple:
        choices, shortlist, largest = state
        index = shard.find_first(shortlist.gains, shortlist.indices, largest)
        return _choose(shard, choices, shortlist, index, largest)

    def sweep(state: tuple) -> tuple:
        choices, gains_m, blocks_m, sweeps = state
        if rebases:
            choices = _rebase(choices)
        gains_m, blocks_m = _sweep(shard, gains_m, blocks_m, choices)
        choices = choices._replace(swept=choices.made)
        shortlist = _make_shortlist(shard, gains_m, blocks_m, choices)
        # Over all candidates: there may be more ties than the shortlist has room for.
        largest = shard.find_largest(gains_m)
        index = shard.find_first(gains_m, indices_m, largest)
        # Loops, since a conditional would copy its operands at every choice.
        start = _choose(shard, choices, shortlist, index, largest)
        choices, _, _ = lax.while_loop(goes_on, choose_from_list, start)
        return choices, gains_m, blocks_m, sweeps + 1

    zero, rows_RD = jnp.int32(0), jnp.zeros((room * rank, width))
    added = (rows_RD, jnp.eye(width)) if rebases else (None, None)
    choices = _Choices(zero, empty_selection(n), zero, rows_RD, *added)
    blocks_m = None if rebases else jnp.zeros((shard.size, rank, rank))
    start = choices, jnp.where(mask_m, 0.0, EXCLUDED), blocks_m, zero
    choices, _, _, sweeps = lax.while_loop(lambda x: x[0].made < n, sweep, start)
    return choices.picks, sweeps


def _rebase(choices: _Choices) -> _Choices:
    """Changes to coordinates in which H, as it is now, is I.

    In the present ones H = I + A'A, A the vectors added. With [I; A] = QR it is R'R, so R'^-1 v are
    the coordinates sought: no square is formed, whose rounding would drown the identity.
    """
    assert choices.added is not None and choices.whitening is not None
    identity = jnp.eye(choices.added.shape[1])
    root = jnp.linalg.qr(jnp.concatenate([identity, choices.added]), mode="r")
    whitening = jax.scipy.linalg.solve_triangular(root, choices.whitening, trans=1)
    nothing = jnp.zeros_like(choices.added)
    return choices._replace(whitening=whitening, inverse=nothing, added=nothing)


def _sweep(
    shard: Shard, gains_m: Array, blocks_m: Array | None, choices: _Choices
) -> tuple[Array, Array | None]:
    """Returns all gains after the choices that were made, from those after the last sweep.

    Args:
        gains_m: at the last sweep, or `EXCLUDED`.
        blocks_m: float32 [m, r, r], at the last sweep; None to compute them anew, after a rebasing.
        choices: the choices.
    """
    chosen_n = choices.picks.indices - shard.first
    chosen_n = jnp.where(choices.picks.valid & (chosen_n >= 0), chosen_n, shard.size)
    gains_m = gains_m.at[chosen_n].set(EXCLUDED, mode="drop")
    rank = shard.shape[1]

    def lower(k: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        vectors_crD, blocks_crr = state
        w_rD = lax.dynamic_slice_in_dim(choices.inverse, k * rank, rank)
        return vectors_crD, lower_blocks(blocks_crr, vectors_crD, w_rD)

    def step(state: tuple[Array, Array | None], chunk: Chunk) -> tuple[Array, Array | None]:
        gains_m, blocks_m = state
        vectors_crD = choices.change_coordinates(shard.read(chunk.take))
        if blocks_m is None:
            blocks_crr = multiply_pairs(vectors_crD)
        else:
            blocks_crr = chunk.take(blocks_m)
            # Before the first choice, H = I.
            blocks_crr += lax.cond(
                choices.made == 0, multiply_pairs, lambda v: jnp.zeros_like(blocks_crr), vectors_crD
            )
            start = vectors_crD, blocks_crr
            _, blocks_crr = lax.fori_loop(choices.swept, choices.made, lower, start)
            blocks_m = chunk.put(blocks_m, blocks_crr)
        new_gains_c = jnp.where(chunk.take(gains_m) >= 0, compute_gains(blocks_crr), EXCLUDED)
        return chunk.put(gains_m, new_gains_c), blocks_m

    gains_m, blocks_m = fold_chunks(shard, step, (gains_m, blocks_m))
    return gains_m, blocks_m


def shortlist_size(size: int, rank: int = 1) -> int:
    """Returns how many of a device's candidates are on its shortlist, fewer where blocks are."""
    return min(size, max(MIN_SHORTLIST, size // (SHORTLIST_SHARE * rank**2)))


def _make_shortlist(
    shard: Shard, gains_m: Array, blocks_m: Array | None, choices: _Choices
) -> _Shortlist:
    room = shortlist_size(shard.size, shard.shape[1])
    gains, indices = lax.top_k(gains_m, min(room + 1, shard.size))
    outside = gains[room] if room < shard.size else jnp.float32(EXCLUDED)
    indices_l = indices[:room]
    vectors_lrD = choices.change_coordinates(shard.read(lambda x: x[indices_l]))
    blocks_lrr = multiply_pairs(vectors_lrD) if blocks_m is None else blocks_m[indices_l]
    outside = shard.find_largest(outside)
    return _Shortlist(indices_l, vectors_lrD, blocks_lrr, gains[:room], outside)


def _choose(
    shard: Shard, choices: _Choices, shortlist: _Shortlist, index: Array, gain: Array
) -> tuple[_Choices, _Shortlist, Array]:
    """Adds a candidate to the choices; returns also the largest gain of the shortlists after it.

    Args:
        gain: that of the candidate; `EXCLUDED` says that none is left.
    """
    valid = gain >= 0
    gain = jnp.where(valid, gain, 0.0)
    block_rD = choices.change_coordinates(shard.broadcast_from_owner(index, shard.read))
    # Without a gain there is no direction either, but what rounding has left of it.
    block_rD = jnp.where(gain > 0, block_rD, 0.0)
    rank = len(block_rD)
    first = rank * (choices.made if choices.added is None else choices.made - choices.swept)

    def add_vector(j: Array, inverse_RD: Array) -> Array:
        v_D = block_rD[j]
        products_R = multiply(inverse_RD, v_D)
        u_D = v_D - multiply(products_R, inverse_RD)
        gain = jnp.maximum(multiply(v_D, v_D) - jnp.sum(products_R**2), 0.0)
        return inverse_RD.at[first + j].set(u_D / jnp.sqrt(1 + gain))

    choices = choices._replace(
        made=choices.made + 1,
        picks=add_pick(choices.picks, choices.made, index, valid, gain),
        inverse=lax.fori_loop(0, rank, add_vector, choices.inverse),
    )
    if choices.added is not None:
        added = lax.dynamic_update_slice_in_dim(choices.added, block_rD, first, 0)
        choices = choices._replace(added=added)
    w_rD = lax.dynamic_slice_in_dim(choices.inverse, first, rank)
    is_chosen = shard.first + shortlist.indices == index
    blocks_lrr = lower_blocks(shortlist.blocks, shortlist.vectors, w_rD)
    gains_l = jnp.where(is_chosen | (shortlist.gains < 0), EXCLUDED, compute_gains(blocks_lrr))
    shortlist = shortlist._replace(blocks=blocks_lrr, gains=gains_l)
    return choices, shortlist, shard.find_largest(gains_l)
