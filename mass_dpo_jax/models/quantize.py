"""How weights that are not trained are stored: in fewer bits than float32, and how to compute
with them.

4-bit NormalFloat (`nf4`, QLoRA's type) has 16 values that are denser near 0, times a float32 scale
for every 64 weights that a sum runs over: 4.5 bits a weight. `int8` has a scale for each of a
product's outputs. Both are `qwix.QArray`s, whose parts are split over devices as arrays are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from jax.typing import DTypeLike

TILE = 64  # Weights that share a scale; fewer where they are no multiple of it.


def store(path: Sequence[str], weights: jax.Array, kind: str) -> Any:
    """Frozen weights in the type that they are kept in.

    Args:
      path: where they are in `nnx.state(model, nnx.Param)`.
      weights: an array.
      kind: what `config.model.lora.base` can be. Only the weights of layers' products are
        quantized; embedding and head are bfloat16 then. Norms stay float32, whatever the kind.
    """
    if kind == "float32" or path[-1] == "scale":
        return weights.astype(jnp.float32)
    if kind == "bfloat16" or path[-1] != "kernel":
        return weights.astype(jnp.bfloat16)
    # Layer by layer: while the nearest of 16 values is searched, there are 16 numbers a weight.
    return jax.lax.map(functools.partial(_quantize, kind=kind), weights.astype(jnp.float32))


def _quantize(weights: jax.Array, kind: str) -> qwix.QArray:
    """[in, out]."""
    if kind == "int8":
        return qwix.quantize(weights, jnp.int8, channelwise_axes=(1,))
    tile = math.gcd(weights.shape[0], TILE)
    return qwix.quantize(weights, kind, channelwise_axes=(1,), tiled_axes={0: tile})


def dense(weights: Any, dtype: DTypeLike) -> jax.Array:
    """Stored weights as an array."""
    if isinstance(weights, qwix.QArray):
        weights = qwix.dequantize(weights)
    return weights.astype(dtype)


def product(x: jax.Array, weights: Any) -> jax.Array:
    """x [tokens, in] times stored weights [in, out], in the type of x."""

    def compute(x: jax.Array, weights: Any) -> jax.Array:
        return x @ dense(weights, x.dtype)

    if isinstance(weights, qwix.QArray):
        # The backward pass makes them dense again instead of keeping all layers' copies.
        compute = jax.checkpoint(compute)
    return compute(x, weights)
