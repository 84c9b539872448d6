"""One decoder-only transformer for Llama 3, Qwen3 and SmolLM3, as a Flax NNX module.

All layers are one `Block` whose parameters are stacked along a leading layer axis and which
`jax.lax.scan` applies once a layer: compile time does not grow with depth. What attends to what is
the caller's: a function `attend` gets queries, keys and values of every layer. So the same layers
run plain causal text (`attention.causal`) and prompts that many responses share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.block import OF_ALL, Block, RMSNorm
from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.models.lora import Adapters, Lora
from mass_dpo_jax.models.rotary import rope_frequencies

# (queries [B, t, H, K], keys [B, T, KV, K], values [B, T, KV, K], extra) -> (what the queries saw
# [B, t, H, K], what to keep of this layer); t = T but for `Ends`. `extra` is this layer's slice of
# the pytree that was given to `Decoder.__call__`, or None. Queries are already scaled by 1/sqrt(K).
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]

REMAT = ("dots", "full")


class Ends(NamedTuple):
    """The tokens whose final hidden states are wanted: one of each row, and all from `start` on.

    The last layer computes no more for the others than their keys and values.

    one: int32 [B].
    start: static.
    attend: see `Attend`; queries are of these t = 1 + T - start tokens, keys and values of all T.
    """

    one: jax.Array
    start: int
    attend: Attend

    def pick(self, x: jax.Array) -> jax.Array:
        """[B, T, size] -> [B, t, size]."""
        one = jnp.take_along_axis(x, self.one[:, None, None], axis=1, mode="clip")
        return jnp.concatenate([one, x[:, self.start :]], axis=1)


class Record(NamedTuple):
    """What a forward pass leaves behind so that `Decoder.replay` need not repeat it.

    inputs: [num_layers - 1, B, T, D] of each layer but the last.
    products: [num_layers - 1, B, T, ...] by name, of `PRODUCTS`; with remat "full" there are none.
    last_input: [B, T, D] of the last layer.
    last_products: its [B, T, ...] or, but for `OF_ALL`, [B, t, ...] of the `Ends`.
    output: [B, t, D] of the last layer, before the final norm.
    """

    inputs: jax.Array
    products: dict[str, jax.Array]
    last_input: jax.Array
    last_products: dict[str, jax.Array]
    output: jax.Array

    def only(self, ends: Ends) -> Record:
        """A record of all tokens, as if these had been wanted."""
        products = {
            name: x if name in OF_ALL else ends.pick(x) for name, x in self.last_products.items()
        }
        return self._replace(last_products=products, output=ends.pick(self.output))


class Splits(NamedTuple):
    """How hidden states [B * T, D] are split over devices."""

    embedded: NamedSharding  # As they come out of the embedding table: along D, as the table is.
    stream: NamedSharding  # Between layers: whole rows, as prompts are.


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
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
        extra: Any = None,
        ends: Ends | None = None,
    ) -> tuple[jax.Array, Any]:
        """Final hidden states, after the final norm. To train, `record` and `replay` are meant: the
        gradient of this keeps all of every layer, and adds up all layers' weights for each.

        Args:
          tokens: int32 [B, T].
          positions: int32 [B, T], each token's own position: any order, repeats allowed.
          attend: see `Attend`.
          extra: a pytree of arrays [num_layers, ...] or None; `attend` gets each layer's slice.
          ends: which tokens are wanted; None: all.

        Returns:
          hidden [B, t, D] in the compute type, and what `attend` kept, stacked over layers.
        """
        hidden, kept, _ = self._run(tokens, positions, attend, extra, ends, recording=False)
        return hidden, kept

    def record(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
        extra: Any = None,
        ends: Ends | None = None,
    ) -> tuple[jax.Array, Any, Record]:
        """As `__call__`, and what `replay` needs, by `remat`; not to be differentiated."""
        return self._run(tokens, positions, attend, extra, ends, recording=True)

    def _run(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
        extra: Any,
        ends: Ends | None,
        *,
        recording: bool,
    ) -> tuple[jax.Array, Any, Any]:
        layers, last = self._layers(), self.config.num_layers - 1
        by_token = functools.partial(_by_token, rows=len(tokens))

        def keep(products: dict[str, jax.Array]) -> dict[str, jax.Array]:
            if self.remat == "full":
                return {}
            # Else XLA for GPUs (of jax 0.11) computes a product twice: into the record, and for
            # what the layer does with it.
            return jax.tree.map(by_token, jax.lax.optimization_barrier(products))

        layer = self._layer(positions, attend)

        def apply(x: jax.Array, i: jax.Array) -> tuple[jax.Array, Any]:
            y, kept, products = layer(_slice(layers, i), x, {}, _slice(extra, i))
            return y, (kept, (by_token(x), keep(products)) if recording else None)

        x, (kept, recorded) = jax.lax.scan(apply, self._embed(tokens), jnp.arange(last))
        # Outside of the loop, since it computes on other tokens.
        layer = self._layer(positions, attend, ends)
        y, of_last, products = layer(_slice(layers, last), x, {}, _slice(extra, last))
        kept = jax.tree.map(lambda xs, x: jnp.concatenate([xs, x[None]]), kept, of_last)
        y = by_token(y)
        record = None
        if recorded is not None:
            record = Record(recorded[0], recorded[1], by_token(x), keep(products), y)
        return self.norm(y), kept, record

    def replay(
        self,
        record: Record,
        places: jax.Array | None,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
        ends: Ends,
    ) -> jax.Array:
        """`__call__` on some tokens of a pass that was recorded with the same weights.

        Forward, this looks up the last hidden states. Backward, each layer runs on what was
        recorded of these tokens: with remat "full" it is computed again from its input, else only
        attention and what is done value by value.

        Args:
          record: of T tokens, with `Ends` of the same `one` and `start`.
          places: int32 [B, t], which of them, the first `ends.start` among them as they are; None:
            all.
          tokens, positions: int32 [B, t], theirs. All that they attend to has to be among them.
          attend: see `Attend`.
          ends: which of these are wanted.

        Returns:
          hidden [B, e, D] of the `ends`, as `__call__`.
        """
        wanted = None
        if places is not None:  # Of the recorded ends, the first is the one before `start`.
            wanted = jnp.pad(places[:, ends.start :] - ends.start + 1, ((0, 0), (1, 0)))
        last = self.config.num_layers - 1

        def here(x: Any, places: jax.Array | None) -> Any:  # [B, T, size] -> [B * t, size]
            if places is not None:
                x = jnp.take_along_axis(x, places[..., None], axis=1, mode="clip")
            return x.reshape(-1, x.shape[-1])

        def output(weights: Any, x: jax.Array) -> jax.Array:
            del weights, x
            return here(record.output, wanted)

        def forward(weights: Any, x: jax.Array) -> tuple[jax.Array, Any]:
            return output(weights, x), weights

        def backward(weights: Any, gradient: jax.Array) -> tuple[Any, jax.Array]:
            def of_layer(
                layer: Callable, i: jax.Array | int, gradient: jax.Array, inputs: Any, products: Any
            ) -> tuple[Any, jax.Array]:
                (others, has_positions), mine = _slice(fixed, i), _slice(weights, i)
                _, vjp = jax.vjp(
                    lambda w, x: layer((w | others, has_positions), x, products)[0],
                    mine,
                    here(inputs, places),
                )
                return vjp(gradient)

            def apply(carry: tuple[jax.Array, Any], scanned: Any) -> tuple[Any, None]:
                gradient, found = carry
                i, inputs, products = scanned
                products = {name: here(x, places) for name, x in products.items()}
                of_weights, gradient = of_layer(layer, i, gradient, inputs, products)
                return (gradient, jax.tree.map(_set(i), found, of_weights)), None

            products = {
                name: here(x, places if name in OF_ALL else wanted)
                for name, x in record.last_products.items()
            }
            layer = self._layer(positions, attend, ends)
            of_weights, gradient = of_layer(layer, last, gradient, record.last_input, products)
            found = jax.tree.map(jnp.zeros_like, weights)
            carry = gradient, jax.tree.map(_set(last), found, of_weights)
            layer = self._layer(positions, attend)
            scanned = jnp.arange(last), record.inputs, record.products
            (gradient, found), _ = jax.lax.scan(apply, carry, scanned, reverse=True)
            return found, gradient

        replayed = jax.custom_vjp(output)
        replayed.defvjp(forward, backward)
        stack, has_positions = self._layers()
        # What is not trained stays out of the function that is differentiated.
        trained = {"adapters": stack.pop("adapters")} if self.lora else stack
        fixed = (stack if self.lora else {}, has_positions)
        hidden = replayed(trained, self._embed(tokens))
        return self.norm(_by_token(hidden, len(tokens)))

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

    def _layer(self, positions: jax.Array, attend: Attend, ends: Ends | None = None) -> Callable:
        """Any of the layers, `ends` being for the last: (a slice of `_layers`, x [B * T, D], known
        products, extra) -> (x, what `attend` keeps, products)."""
        if ends is not None:
            attend = ends.attend
        angles = positions[..., None] * rope_frequencies(self.config)[None, None]
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        definition, _ = nnx.split(self.blocks)

        def layer(
            of_layer: tuple[Any, jax.Array], x: jax.Array, products: Any, extra: Any = None
        ) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
            weights, has_positions = of_layer
            adapters = {} if self.lora is None else self.lora.scaled(weights["adapters"])
            x, kept, products = nnx.merge(definition, weights["blocks"])(
                x,
                jnp.where(has_positions, cos, 1.0),
                jnp.where(has_positions, sin, 0.0),
                lambda query, key, value: attend(query, key, value, extra),
                products,
                adapters,
                None if ends is None else ends.pick,
            )
            return self._stream(x), kept, products

        return layer

    def vocabulary_weights(self) -> jax.Array:
        """The float32 [V, D] weights that turn hidden states into logits; tied: the embedding."""
        return self.embed[...] if self.head is None else self.head[...]


def _by_token(x: jax.Array, rows: int) -> jax.Array:
    """[B * T, size] -> [B, T, size]."""
    return x.reshape(rows, -1, x.shape[-1])


def _slice(stack: Any, i: jax.Array | int) -> Any:
    """Of a pytree of arrays [num_layers, ...] a layer's.

    Of a layer that is known, each behind a barrier: XLA would round all layers' weights to the
    dtype of computation and take one's of them. One barrier for all would give frozen weights
    gradients.
    """

    def part(x: jax.Array) -> jax.Array:
        found = jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
        return jax.lax.optimization_barrier(found) if isinstance(i, int) else found

    return jax.tree.map(part, stack)


def _set(i: jax.Array | int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    return lambda stack, x: jax.lax.dynamic_update_index_in_dim(stack, x, i, 0)


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
