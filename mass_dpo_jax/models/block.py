"""One layer of a decoder: attention and a gated MLP, each behind a norm and added to the stream."""

from __future__ import annotations

import functools
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

# From the name of a projection and the width of its input to what the input of its adapter is
# multiplied by, [tokens, width].
Dropout = Callable[[str, int], Array]
EMPTY: Mapping[str, Any] = MappingProxyType({})
ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * (offset + scale) over the last axis, computed in float32.

    A new norm multiplies by 1: its scale is 1 - offset.
    """

    def __init__(self, size: int, eps: float, dim: str | None, offset: float):
        self.scale = nnx.Param(jnp.full(size, 1.0 - offset, jnp.float32), dims=(dim,))
        self.size = size
        self.eps = eps
        self.offset = offset

    def __call__(self, x: Float[Array, "*tokens size"]) -> Float[Array, "*tokens size"]:
        """Returns x divided by its root mean square, times the scale."""
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale = jnp.expand_dims(self.scale[...] + self.offset, range(x.ndim - 1))
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

        def norm(name: str, size: int = config.hidden_size, dim: str | None = "embed") -> Any:
            if name not in config.family.norms:
                return None
            return RMSNorm(size, config.rms_norm_eps, dim, config.family.norm_offset)

        def head_norm(projection: str) -> Any:
            if not config.family.norms_all_heads:
                return norm(f"{projection}_norm", config.head_dim, None)
            (_, size), (_, dim) = config.projections[projection]
            return norm(f"{projection}_norm", size, dim)

        self.head_dim = config.head_dim
        self.query_scale = config.query_pre_attn_scalar**-0.5
        self.activation = ACTIVATIONS[config.activation]
        self.attention_norm = norm("attention_norm")
        self.query = linear("query")
        self.key = linear("key")
        self.value = linear("value")
        self.query_norm = head_norm("query")
        self.key_norm = head_norm("key")
        self.output = linear("output")
        self.attention_output_norm = norm("attention_output_norm")
        self.mlp_norm = norm("mlp_norm")
        self.gate = linear("gate")
        self.up = linear("up")
        self.down = linear("down")
        self.mlp_output_norm = norm("mlp_output_norm")

    def __call__(
        self,
        x: Float[Array, "tokens D"],
        cos: Float[Array, "B T half"],
        sin: Float[Array, "B T half"],
        attend: Callable,
        recorded: Mapping[str, Array] = EMPTY,
        adapters: Mapping[str, Mapping[str, Array]] = EMPTY,
        outputs: OutputTokens | None = None,
        dropout: Dropout | None = None,
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
            dropout: draws the masks of adapters' inputs; None: there are none.

        Returns:
            The stream [B * O, D], what `attend` keeps, and every projection that the backward pass
            needs: all but "down", unless a norm follows it.
        """
        projections = {}

        def project(name: str, y: Array) -> Array:
            linear = getattr(self, name)
            bias = None if linear.bias is None else linear.bias[...]
            factors = None
            if dropout is not None and name in adapters:
                factors = dropout(name, y.shape[-1])
            args = y, linear.kernel[...], bias, adapters.get(name), factors
            if name in recorded:
                return use_precomputed(_project, recorded[name], *args)
            return _project(*args)

        def project_and_keep(name: str, y: Array) -> Array:
            projections[name] = project(name, y)
            return projections[name]

        def split_heads(x: Array) -> Array:  # [B * T, H * d] -> [B, T, H, d]
            return x.reshape(len(cos), -1, x.shape[-1] // self.head_dim, self.head_dim)

        with jax.named_scope("attention"):
            y = _normalize(self.attention_norm, x)
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
            query = _normalize_heads(self.query_norm, query)
            key = _normalize_heads(self.key_norm, key)
            query = rotate(query, *angles, scale=self.query_scale)
            key = rotate(key, cos, sin)
            attended, kept = attend(query, key, value)
            y = project_and_keep("output", attended.reshape(x.shape[0], -1))
            x = x + _normalize(self.attention_output_norm, y)
        with jax.named_scope("mlp"):
            y = _normalize(self.mlp_norm, x)
            y = self.activation(project_and_keep("gate", y)) * project_and_keep("up", y)
            # The backward pass needs the result only if a norm follows.
            project_down = project if self.mlp_output_norm is None else project_and_keep
            x = x + _normalize(self.mlp_output_norm, project_down("down", y))
        return x, kept, projections


def _normalize(norm: RMSNorm | None, x: Array) -> Array:
    """Applies a norm, where the family has it."""
    return x if norm is None else norm(x)


def _normalize_heads(norm: RMSNorm | None, x: Array) -> Array:
    """Applies a norm to each head of x [B, T, H, d], or to all together, as large as it is."""
    return x if norm is None else norm(x.reshape(*x.shape[:2], -1, norm.size)).reshape(x.shape)


def _project(
    x: Array,
    weights: Any,
    bias: Array | None,
    adapter: Mapping[str, Array] | None,
    factors: Array | None,
) -> Array:
    """Returns x W + bias + ((factors * x) A) B of x [tokens, in], in its type."""
    y = matmul(x, weights)
    if bias is not None:
        y = y + bias.astype(x.dtype)[None]
    if adapter is None:
        return y
    if factors is not None:
        x = x * factors.astype(x.dtype)
    return y + (x @ adapter["a"].astype(x.dtype)) @ adapter["b"].astype(x.dtype)
