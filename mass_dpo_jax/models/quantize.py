"""Frozen weights in fewer bits than float32, and products with them.

4-bit NormalFloat (`nf4`, QLoRA's type) has 16 values that are denser near 0, times a float32 scale
for every 64 weights that a sum runs over: 4.5 bits a weight. `int8` has a scale for each output of
a projection. Both are `qwix.QArray`s, whose parts are split over devices as arrays are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

TILE = 64  # Weights that share a scale; fewer where their number is no multiple of it.


def quantize(path: Sequence[str], weights: Float[Array, "*dims"], stored_type: str) -> Any:
    """Converts frozen weights to the type that they are kept in.

    Args:
        path: their path in `nnx.state(model, nnx.Param)`.
        weights: the float weights.
        stored_type: a value of `config.model.lora.base`. Only projections are quantized; embedding
            and head are bfloat16 then. Norms and biases stay float32, whatever the type.
    """
    if stored_type == "float32" or path[-1] in ("scale", "bias"):
        return weights.astype(jnp.float32)
    if stored_type == "bfloat16" or path[-1] != "kernel":
        return weights.astype(jnp.bfloat16)
    # One layer at a time: the search for the nearest of 16 values holds 16 numbers per weight.
    return jax.lax.map(
        functools.partial(_quantize_matrix, stored_type=stored_type), weights.astype(jnp.float32)
    )


def _quantize_matrix(weights: Float[Array, "inputs outputs"], stored_type: str) -> qwix.QArray:
    if stored_type == "int8":
        return qwix.quantize(weights, jnp.int8, channelwise_axes=(1,))
    tile = math.gcd(weights.shape[0], TILE)
    return qwix.quantize(weights, stored_type, channelwise_axes=(1,), tiled_axes={0: tile})


def dequantize(weights: Any, dtype: DTypeLike) -> Float[Array, "*dims"]:
    """Returns weights of any stored type as an array."""
    if isinstance(weights, qwix.QArray):
        weights = qwix.dequantize(weights)
    return weights.astype(dtype)


def matmul(x: Float[Array, "tokens inputs"], weights: Any) -> Float[Array, "tokens outputs"]:
    """Multiplies by weights [inputs, outputs] of any stored type, in the type of x."""

    def compute(x: Array, weights: Any) -> Array:
        return x @ dequantize(weights, x.dtype)

    if isinstance(weights, qwix.QArray):
        # The backward pass dequantizes again instead of keeping every layer's copy.
        compute = jax.checkpoint(compute)
    return compute(x, weights)
