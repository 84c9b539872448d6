"""One decoder-only transformer for Llama 3, Qwen3 and SmolLM3, as a Flax NNX module.

All layers are one `Block` whose parameters are stacked along a leading layer axis and which
`jax.lax.scan` applies once a layer: compile time does not grow with depth. What attends to what is
the caller's: a function `attend` gets queries, keys and values of every layer. So the same layers
run plain causal text (`attention.causal`) and prompts that many responses share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.adapters import Adapters, Lora
from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.models.frozen import product
from mass_dpo_jax.models.known import known

# (queries [B, T, H, K], keys [B, T, KV, K], values [B, T, KV, K], extra) -> (what the queries saw
# [B, T, H, K], what to keep of this layer). `extra` is this layer's slice of the pytree that was
# given to `Decoder.__call__`, or None. Queries are already scaled by 1 / sqrt(K).
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]

REMAT = ("dots", "full")

# Products with weights whose values the rest of a layer needs, by the names of `Block`'s fields.
PRODUCTS = ("query", "key", "value", "output", "gate", "up")


class Record(NamedTuple):
    """What a forward pass leaves behind so that `Decoder.replay` need not repeat it.

    inputs: [num_layers, B, T, D] of each layer.
    products: [num_layers, B, T, ...] by name, of `PRODUCTS`; with remat "full" there are none.
    last: [B, T, D], of the last layer, before the final norm.
    """

    inputs: jax.Array
    products: dict[str, jax.Array]
    last: jax.Array


class Splits(NamedTuple):
    """How hidden states [B * T, D] are split over devices."""

    embedded: NamedSharding  # As they come out of the embedding table: along D, as the table is.
    stream: NamedSharding  # Between layers: whole rows, as prompts are.


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in float32."""

    def __init__(self, size: int, eps: float, dim: str | None):
        self.scale = nnx.Param(jnp.ones(size, jnp.float32), dims=(dim,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * inverse * self.scale[...]).astype(x.dtype)


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

        Returns:
          x [B * T, D], what `attend` keeps, and all of `PRODUCTS`.
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

        y = self.attention_norm(x)
        split = (*cos.shape[:2], -1, self.head_dim)
        query = recorded("query", y).reshape(split)
        key = recorded("key", y).reshape(split)
        value = recorded("value", y).reshape(split)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query = rotate(query, cos, sin, scale=self.head_dim**-0.5)
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


class Decoder(nnx.Module):
    """Token ids in, final hidden states out; the vocabulary projection is `logprobs.py`'s.

    Parameters are float32. `dtype` is the compute type: weights are cast where they are used, one
    layer at a time, while norms, rotary angles and softmax stay in float32. `remat` says what
    `record` keeps of a layer for the backward pass: "dots" (its input, and its products with
    weights), "full" (its input only: the layer is computed again).

    `splits` says how hidden states lie on several devices; None: as the compiler likes. Where
    weights are split it likes to split hidden states in the same way, and then every device
    computes on the tokens of the whole batch.

    With `lora`, adapters are what trains and all other parameters are frozen: they may be other
    types than float32 (models/frozen.py).

    Every parameter names its dimensions in its metadata, e.g. dims=("layer", "embed", "mlp").
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        remat: str = "full",
        splits: Splits | None = None,
        lora: Lora | None = None,
    ):
        if remat not in REMAT:
            raise UserError(f"remat: found {remat!r}, expected one of {', '.join(REMAT)}")
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.remat = remat
        self.splits = splits
        self.lora = lora

        def vocabulary() -> nnx.Param:
            init = nnx.initializers.normal(config.initializer_range)
            value = init(rngs.params(), (config.vocab_size, config.hidden_size), jnp.float32)
            return nnx.Param(value, dims=("vocab", "embed"))

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.embed = vocabulary()
        self.blocks = stack(rngs)
        for _, parameter in nnx.to_flat_state(nnx.state(self.blocks, nnx.Param)):
            parameter.set_metadata(dims=("layer", *parameter.get_metadata("dims")))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, "embed")
        self.head = None if config.tie_embeddings else vocabulary()
        self.adapters = None if lora is None else Adapters(config, lora, rngs=rngs)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, attend: Attend, extra: Any = None
    ) -> tuple[jax.Array, Any]:
        """Final hidden states, after the final norm. To train, `record` and `replay` are meant: the
        gradient of this keeps all of every layer.

        Args:
          tokens: int32 [B, T].
          positions: int32 [B, T], each token's own position: any order, repeats allowed.
          attend: see `Attend`.
          extra: a pytree of arrays [num_layers, ...] or None; `attend` gets each layer's slice.

        Returns:
          hidden [B, T, D] in the compute type, and what `attend` kept, stacked over layers.
        """
        layer = self._layer(positions, attend)

        def apply(x: jax.Array, scanned: Any) -> tuple[jax.Array, Any]:
            weights, has_positions, extra = scanned
            x, kept, _ = layer(weights, x, has_positions, {}, extra)
            return x, kept

        x, kept = jax.lax.scan(apply, self._embed(tokens), (*self._layers(), extra))
        return self.norm(x).reshape(*tokens.shape, -1), kept

    def record(
        self, tokens: jax.Array, positions: jax.Array, attend: Attend, extra: Any = None
    ) -> tuple[jax.Array, Any, Record]:
        """As `__call__`, and what `replay` needs, by `remat`; not to be differentiated."""
        layer = self._layer(positions, attend)

        def apply(x: jax.Array, scanned: Any) -> tuple[jax.Array, Any]:
            weights, has_positions, extra = scanned
            y, kept, products = layer(weights, x, has_positions, {}, extra)
            return y, (kept, x, {} if self.remat == "full" else products)

        x = self._embed(tokens)
        x, (kept, *found) = jax.lax.scan(apply, x, (*self._layers(), extra))

        def by_token(x: jax.Array) -> jax.Array:  # [..., B * T, size] -> [..., B, T, size]
            return x.reshape(*x.shape[:-2], *tokens.shape, x.shape[-1])

        record = Record(*jax.tree.map(by_token, (*found, x)))
        return self.norm(record.last), kept, record

    def replay(
        self,
        record: Record,
        places: jax.Array | None,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
    ) -> jax.Array:
        """`__call__` on some tokens of a pass that was recorded with the same weights.

        Forward, this looks up the last hidden states. Backward, each layer runs on what was
        recorded of these tokens: with remat "full" it is computed again from its input, else only
        attention and what is done value by value.

        Args:
          record: of T tokens.
          places: int32 [B, t], which of them; None: all.
          tokens, positions: int32 [B, t], theirs. All that they attend to has to be among them.
          attend: see `Attend`.

        Returns:
          hidden [B, t, D], as `__call__`.
        """
        layer = self._layer(positions, attend)

        def here(x: jax.Array) -> jax.Array:  # [B, T, size] -> [B * t, size]
            if places is not None:
                x = jnp.take_along_axis(x, places[..., None], axis=1, mode="clip")
            return x.reshape(-1, x.shape[-1])

        def last(weights: Any, x: jax.Array) -> jax.Array:
            del weights, x
            return here(record.last)

        def forward(weights: Any, x: jax.Array) -> tuple[jax.Array, Any]:
            return last(weights, x), weights

        def backward(weights: Any, gradient: jax.Array) -> tuple[Any, jax.Array]:
            def apply(gradient: jax.Array, scanned: Any) -> tuple[jax.Array, Any]:
                weights, fixed, has_positions, inputs, products = scanned
                products = jax.tree.map(here, products)
                _, vjp = jax.vjp(
                    lambda w, x: layer(w | fixed, x, has_positions, products)[0],
                    weights,
                    here(inputs),
                )
                of_weights, gradient = vjp(gradient)
                return gradient, of_weights

            of_record = (has_positions, record.inputs, record.products)
            gradient, of_weights = jax.lax.scan(
                apply, gradient, (weights, fixed, *of_record), reverse=True
            )
            return of_weights, gradient

        replayed = jax.custom_vjp(last)
        replayed.defvjp(forward, backward)
        fixed, has_positions = self._layers()
        # What is not trained stays out of the function that is differentiated.
        weights = {"adapters": fixed.pop("adapters")} if self.lora else fixed
        fixed = fixed if self.lora else {}
        return self.norm(replayed(weights, self._embed(tokens))).reshape(*tokens.shape, -1)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        """[B, T] -> [B * T, D] in the compute type."""
        x = self.embed[...][tokens.reshape(-1)].astype(self.dtype)
        if self.splits is not None:
            x = jax.lax.with_sharding_constraint(x, self.splits.embedded)
        return self._stream(x)

    def _stream(self, x: jax.Array) -> jax.Array:
        if self.splits is None:
            return x
        return jax.lax.with_sharding_constraint(x, self.splits.stream)

    def _layers(self) -> tuple[dict[str, Any], jax.Array]:
        """What differs between layers: weights, and whether there are rotary positions."""
        weights: dict[str, Any] = {"blocks": nnx.split(self.blocks)[1]}
        if self.adapters is not None:
            weights["adapters"] = nnx.to_pure_dict(nnx.state(self.adapters))
        return weights, jnp.asarray(self.config.rope_layers)

    def _layer(self, positions: jax.Array, attend: Attend) -> Callable:
        """Any of the layers: (weights, x [B * T, D], has_positions, known products, extra) ->
        (x, what `attend` keeps, products)."""
        angles = positions[..., None] * rope_frequencies(self.config)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        definition, _ = nnx.split(self.blocks)

        def layer(
            weights: Any, x: jax.Array, has_positions: jax.Array, products: Any, extra: Any = None
        ) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
            adapters = {} if self.lora is None else self.lora.scaled(weights["adapters"])
            x, kept, products = nnx.merge(definition, weights["blocks"])(
                x,
                jnp.where(has_positions, cos, 1.0),
                jnp.where(has_positions, sin, 0.0),
                lambda query, key, value: attend(query, key, value, extra),
                products,
                adapters,
            )
            return self._stream(x), kept, products

        return layer

    def vocabulary_weights(self) -> jax.Array:
        """The float32 [V, D] weights that turn hidden states into logits; tied: the embedding."""
        return self.embed[...] if self.head is None else self.head[...]


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, scale: float = 1.0) -> jax.Array:
    """Rotary positions in float32: x [B, T, H, K], whose halves are the pairs' two coordinates,
    times `scale`; cos, sin [B, T, K / 2]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None] * scale, sin[:, :, None] * scale
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def rope_frequencies(config: DecoderConfig) -> jax.Array:
    """Radians per position, float32 [head_dim / 2].

    Llama 3's scaling divides slow frequencies by `factor`, leaves fast ones and blends between:
    with w = original context / wavelength, fast is w > high_freq_factor, slow w < low_freq_factor.
    It applies at any length, below the original context too.
    """
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    waves = scaling.original_max_positions * frequencies / (2 * jnp.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    blend = jnp.clip((waves - scaling.low_freq_factor) / span, 0.0, 1.0)
    return frequencies * (blend + (1.0 - blend) / scaling.factor)


def abstract_decoder(
    config: DecoderConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: str = "full",
    splits: Splits | None = None,
    lora: Lora | None = None,
) -> Decoder:
    """A Decoder whose parameters are shapes only: to plan shardings before any array exists."""
    return nnx.eval_shape(
        lambda: Decoder(
            config, rngs=nnx.Rngs(0), dtype=dtype, remat=remat, splits=splits, lora=lora
        )
    )


def param_dims(params: nnx.State) -> nnx.State:
    """The names of every parameter's dimensions, for `params = nnx.state(model, nnx.Param)`.

    The result has the structure of `params` with a tuple of names (None: unnamed) in the place of
    every array, so `jax.tree.map(lambda array, dims: ..., params, param_dims(params))` works.
    """
    return jax.tree.map(
        lambda parameter: parameter.replace(parameter.get_metadata("dims")),
        params,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
