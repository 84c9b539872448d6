"""Rotary positions: pairs of a head's coordinates, turned by angles that grow with the position."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from mass_dpo_jax.models.positions import LinearScaling, Scaling


def rotate(
    x: Float[Array, "B T H d"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    scale: float = 1.0,
) -> Float[Array, "B T H d"]:
    """Rotates in float32, and multiplies by `scale`; the halves of x are the pairs' coordinates."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None] * scale, sin[:, :, None] * scale
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def compute_rope_frequencies(
    head_dim: int, theta: float, scaling: Scaling | None
) -> Float[Array, " half"]:
    """Computes radians per position, float32 [d / 2].

    Linear scaling divides all of them by `factor`.
    Llama 3's scaling divides slow frequencies by `factor`, leaves fast ones and blends between:
    with w = original context / wavelength, fast is w > high_freq_factor, slow w < low_freq_factor.
    It applies at any length, below the original context too.
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    waves = scaling.original_max_positions * frequencies / (2 * jnp.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    blend = jnp.clip((waves - scaling.low_freq_factor) / span, 0.0, 1.0)
    return frequencies * (blend + (1.0 - blend) / scaling.factor)
