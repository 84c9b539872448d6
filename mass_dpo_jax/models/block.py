"""One layer of a decoder: attention and a gated MLP, each behind a norm and added to the stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.models.interfaces import OutputTokens
from mass_dpo_jax.models.precomputed import use_precomputed
from mass_dpo_jax.models.quantize import matmul
from mass_dpo_jax.models.rotary import rotate

EMPTY: Mapping[str, Any] = MappingProxyType({})


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in float32."""

    def __init__(self, size: int, eps: float, dim: str | None):
        self.scale = nnx.Param(jnp.ones(size, jnp.float32), dims=(dim,))
        self.eps = eps

    def __call__(self, x: Float[Array, "*tokens size"]) -> Float[Array, "*tokens size"]:
        """Returns x divided by its root mean square, times the scale."""
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale = jnp.expand_dims(self.scale[...], range(x.ndim - 1))
        return (wide * inverse * scale).astype(x.dtype)


class Linear(nnx.Module):
    """The weights [in, out] of a projection: float32, or what `quantize` made of them.

    Some have a bias [out] besides, float32.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        dims: tuple[str, str],
        deviation: float,
        has_bias: bool,
        rngs: nnx.Rngs,
    ):
        value = nnx.initializers.normal(deviation)(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(value, dims=dims)
        self.bias = nnx.Param(jnp.zeros(shape[1], jnp.float32), dims=dims[1:]) if has_bias else None


class Block(nnx.Module):
    """One layer, on [B * T, D].

    Tokens are one axis here: on CPU, XLA's weight gradients over two axes take half as long again.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        def linear(name: str) -> Linear:
            has_bias = name in config.family.biases
            return Linear(*config.projections[name], config.initializer_range, has_bias, rngs)

        def norm(name: str, size: int, dim: str | None) -> RMSNorm | None:
            return RMSNorm(size, eps, dim) if name in config.family.norms else None

        embed, eps = config.hidden_size, config.rms_norm_eps
        self.head_dim = config.head_dim
        self.attention_norm = RMSNorm(embed, eps, "embed")
        self.query = linear("query")
        self.key = linear("key")
        self.value = linear("value")
        self.query_norm = norm("query_norm", config.head_dim, None)
        self.key_norm = norm("key_norm", config.head_dim, None)
        self.output = linear("output")
        self.mlp_norm = RMSNorm(embed, eps, "embed")
        self.gate = linear("gate")
        self.up = linear("up")
        self.down = linear("down")

    def __call__(
        self,
        x: Float[Array, "tokens D"],
        cos: Float[Array, "B T half"],
        sin: Float[Array, "B T half"],
        attend: Callable,
        recorded: Mapping[str, Array] = EMPTY,
        adapters: Mapping[str, Mapping[str, Array]] = EMPTY,
        outputs: OutputTokens | None = None,
    ) -> tuple[Array, Any, dict[str, Array]]:
        """Applies the layer.

        Args:
            x: the residual stream.
            cos: cosines of the rotary angles.
            sin: sines of the rotary angles.
            attend: an `Attend` without `layer_input`.
            recorded: projections [B * T, ...] of an earlier pass, which are not computed again.
            adapters: this layer's adapters, by the names of the projections that they add to.
            outputs: the only tokens for which the last layer computes more than keys and values.

        Returns:
            The stream [B * O, D], what `attend` keeps, and every projection but "down".
        """
        projections = {}

        def project(name: str, y: Array) -> Array:
            linear = getattr(self, name)
            bias = None if linear.bias is None else linear.bias[...]
            args = y, linear.kernel[...], bias, adapters.get(name)
            if name in recorded:
                return use_precomputed(_project, recorded[name], *args)
            return _project(*args)

        def project_and_keep(name: str, y: Array) -> Array:
            projections[name] = project(name, y)
            return projections[name]

        def split_heads(x: Array) -> Array:  # [B * T, H * d] -> [B, T, H, d]
            return x.reshape(len(cos), -1, x.shape[-1] // self.head_dim, self.head_dim)

        with jax.named_scope("attention"):
            y = self.attention_norm(x)
            key = split_heads(project_and_keep("key", y))
            value = split_heads(project_and_keep("value", y))
            angles = cos, sin
            if outputs is not None:
                gather = outputs.gather
                x, y = (
                    gather(z.reshape(*cos.shape[:2], -1)).reshape(-1, z.shape[-1]) for z in (x, y)
                )
                angles = gather(cos), gather(sin)
            query = split_heads(project_and_keep("query", y))
            if self.query_norm is not None and self.key_norm is not None:
                query, key = self.query_norm(query), self.key_norm(key)
            query = rotate(query, *angles, scale=self.head_dim**-0.5)
            key = rotate(key, cos, sin)
            attended, kept = attend(query, key, value)
            x = x + project_and_keep("output", attended.reshape(x.shape[0], -1))
        with jax.named_scope("mlp"):
            y = self.mlp_norm(x)
            hidden = jax.nn.silu(project_and_keep("gate", y)) * project_and_keep("up", y)
            return x + project("down", hidden), kept, projections


def _project(
    x: Array, weights: Any, bias: Array | None, adapter: Mapping[str, Array] | None
) -> Array:
    """Returns x W + bias + (x A) B of x [tokens, in], in its type."""
    y = matmul(x, weights)
    if bias is not None:
        y = y + bias.astype(x.dtype)
    if adapter is None:
        return y
    return y + (x @ adapter["a"].astype(x.dtype)) @ adapter["b"].astype(x.dtype)
