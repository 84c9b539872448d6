"""What a block of r vectors V [r, D] would add to the log-determinant of H: det(I + V H^-1 V').

Shapes have c candidates with a block each.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mass_dpo_jax.selection.gram import multiply

MAX_UNROLLED = 8  # Vectors of a block whose determinant is computed by unrolled elimination.


def multiply_pairs(vectors_crD: Float[Array, "c r D"]) -> Float[Array, "c r r"]:
    """Computes the inner products of each block's vectors."""
    if vectors_crD.shape[1] == 1:
        return jnp.sum(vectors_crD**2, axis=2)[..., None]
    return jnp.einsum("crd,csd->crs", vectors_crD, vectors_crD, precision=lax.Precision.HIGHEST)


def lower_blocks(
    blocks_crr: Float[Array, "c r r"], vectors_crD: Float[Array, "c r D"], w_rD: Float[Array, "r D"]
) -> Float[Array, "c r r"]:
    """Returns V H^-1 V' after one more choice, which added w' w to I - H^-1."""
    products_crr = multiply(vectors_crD, w_rD.T)
    return blocks_crr - jnp.sum(products_crr[:, :, None] * products_crr[:, None], axis=3)


def compute_gains(blocks_crr: Float[Array, "c r r"]) -> Float[Array, " c"]:
    """Computes det(I + V H^-1 V')^(1/r) - 1."""
    rank = blocks_crr.shape[1]
    if rank > MAX_UNROLLED:
        roots_crr = jnp.linalg.cholesky(blocks_crr + jnp.eye(rank)[None])
        logs_c = 2 * jnp.log(jnp.diagonal(roots_crr, axis1=1, axis2=2)).mean(1)
        return clip_gains(jnp.expm1(logs_c))
    # By elimination, which never adds the identity: small gains keep their digits. Candidates come
    # last, so that they are computed side by side.
    rest_rrc, pivots = jnp.moveaxis(blocks_crr, 0, 2), []
    for _ in range(rank):
        column_rc = rest_rrc[:, 0]
        pivots.append(clip_gains(column_rc[0]))
        ratios_rc = column_rc[1:] / (1 + pivots[-1][None])
        rest_rrc = rest_rrc[1:, 1:] - column_rc[1:, None] * ratios_rc[None]
    if rank == 1:
        return pivots[0]
    return jnp.expm1(jnp.log1p(jnp.stack(pivots)).mean(0))


def clip_gains(gains: Array) -> Array:
    """Replaces what is not above 0 by 0.

    Rounding can leave a small negative number where nothing is left to gain. A NaN, from a model
    that has diverged, is no gain either.
    """
    return jnp.where(gains > 0, gains, 0.0)
