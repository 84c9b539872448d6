"""One layer of a decoder: attention and a gated MLP, each behind a norm and added to the stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.models.precomputed import known
from mass_dpo_jax.models.quantize import product
from mass_dpo_jax.models.rotary import rotate

# Products with weights whose values the rest of a layer needs, by the names of `Block`'s fields.
PRODUCTS = ("query", "key", "value", "output", "gate", "up")


# Of all tokens in the last layer too, since those that are wanted attend to them.
OF_ALL = ("key", "value")


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in float32."""

    def __init__(self, size: int, eps: float, dim: str | None):
        self.scale = nnx.Param(jnp.ones(size, jnp.float32), dims=(dim,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale = jnp.expand_dims(self.scale[...], range(x.ndim - 1))
        return (wide * inverse * scale).astype(x.dtype)


class Linear(nnx.Module):
    """The weights [in, out] of a product, float32; or what `frozen.store` made of them."""

    def __init__(
        self, shape: tuple[int, int], dims: tuple[str, str], deviation: float, rngs: nnx.Rngs
    ):
        value = nnx.initializers.normal(deviation)(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(value, dims=dims)


class Block(nnx.Module):
    """One layer: attention and a gated MLP, each behind a norm and added to the stream."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        def linear(name: str) -> Linear:
            return Linear(*config.products[name], config.initializer_range, rngs)

        embed, eps = config.hidden_size, config.rms_norm_eps
        self.head_dim = config.head_dim
        self.attention_norm = RMSNorm(embed, eps, "embed")
        self.query = linear("query")
        self.key = linear("key")
        self.value = linear("value")
        self.query_norm = RMSNorm(config.head_dim, eps, None) if config.qk_norm else None
        self.key_norm = RMSNorm(config.head_dim, eps, None) if config.qk_norm else None
        self.output = linear("output")
        self.mlp_norm = RMSNorm(embed, eps, "embed")
        self.gate = linear("gate")
        self.up = linear("up")
        self.down = linear("down")

    def __call__(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        attend: Callable,
        products: Mapping[str, jax.Array] = MappingProxyType({}),
        adapters: Mapping[str, Mapping[str, jax.Array]] = MappingProxyType({}),
        pick: Callable[[jax.Array], jax.Array] | None = None,
    ) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
        """One layer on [B * T, D].

        Tokens are one axis here: on CPU, XLA's weight gradients over two axes take half as long
        again.

        Args:
          x: [B * T, D].
          cos, sin: float32 [B, T, K / 2], the rotary angles'.
          attend: see `Attend`, without `extra`.
          products: [B * T, ...], those of `PRODUCTS` that are known already.
          adapters: this layer's, by the names of the products that they add to.
          pick: of `Ends`, if only these tokens are wanted; keys and values are still of all.

        Returns:
          x [B * t, D], what `attend` keeps, and all of `PRODUCTS`.
        """
        found = {}

        def apply(name: str, y: jax.Array) -> jax.Array:
            args = y, getattr(self, name).kernel[...], adapters.get(name)
            if name in products:
                return known(_product, products[name], *args)
            return _product(*args)

        def recorded(name: str, y: jax.Array) -> jax.Array:
            found[name] = apply(name, y)
            return found[name]

        def heads(x: jax.Array) -> jax.Array:  # [B * T, H * K] -> [B, T, H, K]
            return x.reshape(len(cos), -1, x.shape[-1] // self.head_dim, self.head_dim)

        y = self.attention_norm(x)
        key, value = heads(recorded("key", y)), heads(recorded("value", y))
        angles = cos, sin
        if pick is not None:
            x, y = (pick(z.reshape(*cos.shape[:2], -1)).reshape(-1, z.shape[-1]) for z in (x, y))
            angles = pick(cos), pick(sin)
        query = heads(recorded("query", y))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query = rotate(query, *angles, scale=self.head_dim**-0.5)
        key = rotate(key, cos, sin)
        seen, kept = attend(query, key, value)
        x = x + recorded("output", seen.reshape(x.shape[0], -1))
        y = self.mlp_norm(x)
        x = x + apply("down", jax.nn.silu(recorded("gate", y)) * recorded("up", y))
        return x, kept, found


def _product(
    x: jax.Array, weights: Any, adapter: Mapping[str, jax.Array] | None = None
) -> jax.Array:
    """x W + (x A) B of x [tokens, in], in its type."""
    y = product(x, weights)
    if adapter is None:
        return y
    return y + (x @ adapter["a"].astype(x.dtype)) @ adapter["b"].astype(x.dtype)
