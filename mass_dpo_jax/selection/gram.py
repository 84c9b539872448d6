"""Gram matrices of one pool: the inner products of its features that criteria and designs use."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mass_dpo_jax.selection.types import Design

FEATURE_NORMS = ("none", "l2")
# Bounds of the squared norms over the ridge. Above the first, rounding moves a determinant's
# factors, which can be as small as 1, by more than a tenth. Greedy choice for an additive design
# compares the remainders of the norms themselves, so only overflow of their products bounds it.
MAX_SQUARED_NORM = 0.1 / float(np.finfo(np.float32).eps)
MAX_SQUARED_NORM_ADDITIVE = float(np.finfo(np.float32).max) ** 0.5


def normalize_features(
    features_RD: Float[Array, "*R D"], feature_norm: str
) -> Float[Array, "*R D"]:
    """Casts features to float32 and, for "l2", divides each by its norm."""
    features_RD = features_RD.astype(jnp.float32)
    if feature_norm == "l2":
        norms_R1 = jnp.sqrt(jnp.sum(features_RD**2, axis=-1, keepdims=True))
        # A norm that overflows must not pass for the direction 0.
        norms_R1 = jnp.where(jnp.isinf(norms_R1), jnp.nan, norms_R1)
        features_RD = features_RD / jnp.where(norms_R1 == 0, 1.0, norms_R1)
    return features_RD


def multiply(a: Array, b: Array) -> Array:
    """Multiplies in full float32; by default a GPU or TPU rounds the factors."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def compute_gram(
    features_CD: Float[Array, "C D"], mask_N: Bool[Array, " N"], feature_norm: str
) -> Float[Array, "C C"]:
    """Multiplies one example's features pairwise, after subtracting a common vector from them.

    No criterion depends on that vector, since all take differences of features. Hidden states share
    a component much larger than their differences, so it has to go before anything is multiplied:
    first one of the negatives (equal ones become exactly 0), then the mean of the remainders. The
    chosen response affects neither.

    Args:
        features_CD: h of the chosen response and of the N = C - 1 negatives.
        mask_N: True for the negatives that exist.
        feature_norm: "none", or "l2" to divide every h (not differences of them) by its norm.

    Returns:
        float32; 0 where masked.
    """
    features_CD = normalize_features(features_CD, feature_norm)
    present_C1 = jnp.pad(mask_N, (1, 0), constant_values=True)[:, None]
    origin_1D = features_CD[1 + jnp.argmax(mask_N)][None]
    features_CD = jnp.where(present_C1, features_CD - origin_1D, 0.0)
    # The mean as a product, since XLA on CPUs multiplies much faster than it sums over rows.
    shares_C = jnp.pad(mask_N, (1, 0)) / jnp.maximum(jnp.sum(mask_N), 1)
    mean_D = multiply(shares_C, features_CD)
    features_CD = jnp.where(present_C1, features_CD - mean_D[None], 0.0)
    return jnp.einsum("id,jd->ij", features_CD, features_CD, precision=lax.Precision.HIGHEST)


def from_origin(gram_CC: Float[Array, "C C"], origin: Int[Array, ""] | int) -> Float[Array, "C C"]:
    """Returns products of h_i - h_origin, from products of h: row and column `origin` are 0."""
    column_C = gram_CC[:, origin]
    return gram_CC - column_C[:, None] - column_C[None, :] + column_C[origin]


def weighted_gram(
    gram_CC: Float[Array, "C C"], weights_C: Float[Array, " C"]
) -> Float[Array, "C C"]:
    """Returns products of sqrt(w_i) (h_i - sum_j w_j h_j), from products of h.

    Args:
        gram_CC: products of h.
        weights_C: w >= 0, with sum 1 (or all 0: the result is 0).
    """
    # The weighted mean lies close to the heaviest candidate, so little cancels.
    gram_CC = from_origin(gram_CC, jnp.argmax(weights_C))
    mean_C = multiply(gram_CC, weights_C)
    centred_CC = gram_CC - mean_C[:, None] - mean_C[None, :] + multiply(weights_C, mean_C)
    roots_C = jnp.sqrt(weights_C)
    return roots_C[:, None] * roots_C[None, :] * centred_CC


def squared_distances(gram_CC: Float[Array, "C C"]) -> Float[Array, "C C"]:
    """Computes ||h_i - h_j||^2 from products of h."""
    norms_C = jnp.diagonal(gram_CC)
    return jnp.maximum(norms_C[:, None] + norms_C[None, :] - 2 * gram_CC, 0.0)


def log_det(matrix_kk: Float[Array, "k k"]) -> Float[Array, ""]:
    """Computes log det(I + M) of a small positive semi-definite M by elimination.

    The identity is never added, so that a small value keeps its digits.
    """

    def eliminate(k: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        rest_kk, total = state
        pivot = rest_kk[k, k]
        change_kk = jnp.outer(rest_kk[:, k], rest_kk[k, :]) / (1.0 + pivot)
        return rest_kk - change_kk, total + jnp.log1p(pivot)

    start = matrix_kk, jnp.zeros((), matrix_kk.dtype)
    return lax.fori_loop(0, matrix_kk.shape[0], eliminate, start)[1]


def norm_excess(design: Design) -> Float[Array, ""]:
    """Returns the largest squared norm over the ridge as a share of what float32 can resolve.

    Above 1, or NaN, rounding alone may decide a choice.
    """
    bound = MAX_SQUARED_NORM_ADDITIVE if design.value is None else MAX_SQUARED_NORM
    share = jnp.max(jnp.diagonal(design.gram)) / bound
    return jnp.where(jnp.isfinite(design.gram).all(), share, jnp.nan)
