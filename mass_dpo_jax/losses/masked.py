"""Arithmetic on arrays of which some entries do not count and may hold anything."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def negative_scores(
    log_ratios: Float[Array, "B C"], valid: Bool[Array, "B C"], beta: float
) -> tuple[Float[Array, "B C-1"], Bool[Array, "B C-1"]]:
    """Returns beta (r_i - r_0) of the negatives, 0 where they do not count, and which count."""
    rewards = masked_rewards(log_ratios, valid, beta)
    negatives = valid[:, 1:] & valid[:, :1]
    return jnp.where(negatives, rewards[:, 1:] - rewards[:, :1], 0.0), negatives


def masked_rewards(
    log_ratios: Float[Array, "B C"], valid: Bool[Array, "B C"], beta: float
) -> Float[Array, "B C"]:
    """Returns beta r, 0 where a response does not count.

    Up to the `where` everything is linear, so its zero gradient meets no NaN on the way back.
    Everything that is not linear comes after it.

    Raises:
        ValueError: the shapes differ.
    """
    if log_ratios.shape != valid.shape:
        raise ValueError(f"log_ratios {log_ratios.shape} and valid {valid.shape} differ in shape")
    return jnp.where(valid, beta * as_float32(log_ratios), 0.0)


def log1p_sum_exp(
    scores: Float[Array, "... n"], counts: Bool[Array, "... n"]
) -> Float[Array, " ..."]:
    """Computes log(1 + sum exp(score)) over the scores that count; 0 where there are none.

    Softplus keeps small values exact.
    """
    value = jax.nn.softplus(log_sum_exp(scores, counts))
    return jnp.where(counts.any(axis=-1), value, 0.0)


def log_sum_exp(
    scores: Float[Array, "... n"], counts: Bool[Array, "... n"]
) -> Float[Array, " ..."]:
    """Computes log sum exp(score) over the scores that count.

    The largest score is taken out of the sum. A sum without terms is one over all scores instead,
    which the caller drops: log(0) never occurs.
    """
    included = counts | ~counts.any(axis=-1, keepdims=True)
    return jax.nn.logsumexp(scores, axis=-1, where=included)


def masked_mean(values: Float[Array, "B n"], counts: Bool[Array, "B n"]) -> Float[Array, " B"]:
    """Averages over the values that count; 0 where there are none."""
    total = jnp.sum(jnp.where(counts, values, 0.0), axis=-1)
    return total / jnp.maximum(counts.sum(axis=-1), 1)


def as_float32(x: Float[Array, " ..."]) -> Float[Array, " ..."]:
    """Casts half precision to float32; float64, which tests enable, stays as it is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
