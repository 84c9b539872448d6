"""One decoder-only transformer for all families of families.py, as a Flax NNX module.

All layers are one `Block` whose parameters are stacked along a leading layer axis and which
`jax.lax.scan` applies layer by layer: compile time does not grow with depth. The caller supplies
the attention pattern: its `Attend` gets queries, keys and values of every layer. So the same layers
run plain causal text (`attention.attend_causally`) and prompts that many responses share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int, UInt32

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.block import Block, Dropout, RMSNorm
from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.models.dropout import draw_factors
from mass_dpo_jax.models.interfaces import (
    KEY_VALUE,
    Attend,
    HiddenShardings,
    LayerKinds,
    LayerRecord,
    Limits,
    OutputTokens,
)
from mass_dpo_jax.models.lora import Adapters, Lora
from mass_dpo_jax.models.positions import Scaling
from mass_dpo_jax.models.rotary import compute_rope_frequencies

REMAT = ("dots", "full")


class Decoder(nnx.Module):
    """Token ids in, final hidden states out; logprobs.py projects to the vocabulary.

    Parameters are float32. Every one names its dimensions in its metadata, e.g.
    dims=("layer", "embed", "mlp").

    Args:
        config: the architecture.
        rngs: the random state that parameters are drawn from.
        dtype: the compute type: weights are cast where they are used, one layer at a time, while
            norms, rotary angles and softmax stay in float32.
        remat: the part of a layer that `record` keeps for the backward pass: "dots" (its input and
            its projections) or "full" (its input only: the layer is computed again).
        hidden_shardings: the split of hidden states over several devices; None lets the compiler
            choose. Where weights are split it tends to split hidden states in the same way, and
            then every device computes on the tokens of the whole batch.
        lora: the form of the adapters, which are trained while all other parameters are frozen and
            may have other types than float32 (quantize.py); None: no adapters.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        remat: str = "full",
        hidden_shardings: HiddenShardings | None = None,
        lora: Lora | None = None,
    ):
        if remat not in REMAT:
            raise UserError(f"remat: found {remat!r}, expected one of {', '.join(REMAT)}")
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.remat = remat
        self.hidden_shardings = hidden_shardings
        self.lora = lora

        def make_vocabulary() -> nnx.Param:
            init = nnx.initializers.normal(config.initializer_range)
            value = init(rngs.params(), (config.vocab_size, config.hidden_size), jnp.float32)
            return nnx.Param(value, dims=("vocab", "embed"))

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def make_blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.embed = make_vocabulary()
        self.blocks = make_blocks(rngs)
        for _, parameter in nnx.to_flat_state(nnx.state(self.blocks, nnx.Param)):
            parameter.set_metadata(dims=("layer", *parameter.get_metadata("dims")))
        offset = config.family.norm_offset
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, "embed", offset)
        self.head = None if config.tie_embeddings else make_vocabulary()
        self.adapters = None if lora is None else Adapters(config, lora, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attend: Attend,
        layer_inputs: Any = None,
        outputs: OutputTokens | None = None,
        dropout_keys: UInt32[Array, "B T words"] | None = None,
    ) -> tuple[Float[Array, "B O D"], Any]:
        """Returns hidden states after the final norm, in the compute type.

        Do not differentiate this; train through `record` and replay.py. Its gradient would keep
        all activations of every layer and accumulate a full-size weight gradient per layer.

        Args:
            tokens: token ids.
            positions: each token's own position: any order, repeats allowed.
            attend: attention function of every layer, see `Attend`.
            layer_inputs: a pytree of arrays [L, ...] or None; `attend` gets each layer's slice.
            outputs: the tokens to return; None for all.
            dropout_keys: key data of each token, for the masks of adapters' inputs; None, as
                everywhere but in training: no dropout.

        Returns:
            The hidden states, and what `attend` kept, stacked over layers.
        """
        hidden, attend_outputs, _ = self._run(
            tokens, positions, attend, layer_inputs, outputs, dropout_keys, recording=False
        )
        return hidden, attend_outputs

    def record(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attend: Attend,
        layer_inputs: Any = None,
        outputs: OutputTokens | None = None,
        dropout_keys: UInt32[Array, "B T words"] | None = None,
    ) -> tuple[Float[Array, "B O D"], Any, LayerRecord]:
        """Computes what `__call__` does, and also returns what replay.py needs, by `remat`."""
        return self._run(
            tokens, positions, attend, layer_inputs, outputs, dropout_keys, recording=True
        )

    def _run(
        self,
        tokens: Array,
        positions: Array,
        attend: Attend,
        layer_inputs: Any,
        outputs: OutputTokens | None,
        dropout_keys: Array | None,
        *,
        recording: bool,
    ) -> tuple[Array, Any, Any]:
        layers, last = self.get_layers(), self.config.num_layers - 1
        unflatten = functools.partial(unflatten_tokens, rows=len(tokens))

        def select_projections(projections: dict[str, Array]) -> dict[str, Array]:
            if self.remat == "full":
                return {}
            # Without this barrier XLA:GPU (jax 0.11) computes each projection twice, once for the
            # record and once for the layer.
            return jax.tree.map(unflatten, jax.lax.optimization_barrier(projections))

        apply_layer = self.make_layer(positions, attend, dropout_keys=dropout_keys)

        def step(x: Array, i: Array) -> tuple[Array, Any]:
            y, attend_outputs, projections = apply_layer(
                slice_layer(layers, i),
                x,
                recorded_projections={},
                layer_input=slice_layer(layer_inputs, i),
            )
            return y, (
                attend_outputs,
                (unflatten(x), select_projections(projections)) if recording else None,
            )

        x, (attend_outputs, recorded) = jax.lax.scan(
            step, self.embed_tokens(tokens), jnp.arange(last)
        )
        # The last layer is outside of the loop, since it computes on other tokens.
        apply_layer = self.make_layer(positions, attend, outputs, dropout_keys)
        y, last_attend_outputs, projections = apply_layer(
            slice_layer(layers, last),
            x,
            recorded_projections={},
            layer_input=slice_layer(layer_inputs, last),
        )
        attend_outputs = jax.tree.map(
            lambda xs, x: jnp.concatenate([xs, x[None]]), attend_outputs, last_attend_outputs
        )
        y = unflatten(y)
        record = None
        if recorded is not None:
            record = LayerRecord(
                recorded[0], recorded[1], unflatten(x), select_projections(projections), y
            )
        return self.norm(y), attend_outputs, record

    @jax.named_scope("embed")
    def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "tokens D"]:
        """Looks embeddings up, and scales them if the family does; in the compute type."""
        x = self.embed[...][tokens.reshape(-1)].astype(self.dtype)
        if self.config.family.scales_embeddings:
            # Rounded to the compute type, as transformers rounds it.
            x *= jnp.float32(self.config.hidden_size**0.5).astype(self.dtype)
        if self.hidden_shardings is not None:
            x = jax.lax.with_sharding_constraint(x, self.hidden_shardings.embedded)
        return self._constrain(x)

    def _constrain(self, x: Array) -> Array:
        if self.hidden_shardings is None:
            return x
        return jax.lax.with_sharding_constraint(x, self.hidden_shardings.stream)

    def get_layers(self) -> tuple[dict[str, Any], LayerKinds]:
        """Returns what differs between layers: weights and kinds."""
        weights: dict[str, Any] = {"blocks": nnx.split(self.blocks)[1]}
        if self.adapters is not None:
            weights["adapters"] = nnx.to_pure_dict(nnx.state(self.adapters))
        kinds = LayerKinds(
            jnp.arange(self.config.num_layers),
            jnp.asarray(self.config.rope_layers),
            jnp.asarray(self.config.local_layers),
        )
        return weights, kinds

    def make_layer(
        self,
        positions: Int[Array, "B T"],
        attend: Attend,
        outputs: OutputTokens | None = None,
        dropout_keys: UInt32[Array, "B T words"] | None = None,
    ) -> Callable:
        """Makes the function of any layer; `outputs` is for the last.

        Returns:
            From (a slice of `get_layers`, x [B * T, D], recorded projections, a slice of
            `layer_inputs`) to (x, what `attend` keeps, projections).
        """
        if outputs is not None:
            attend = outputs.attend
        config = self.config

        def compute_turns(theta: float, scaling: Scaling | None) -> tuple[Array, Array]:
            frequencies = compute_rope_frequencies(config.head_dim, theta, scaling)
            angles = positions[..., None] * frequencies[None, None]
            return jnp.cos(angles), jnp.sin(angles)

        turns = local_turns = compute_turns(config.rope.theta, config.rope.scaling)
        if config.rope.local_theta is not None:
            local_turns = compute_turns(config.rope.local_theta, None)
        definition, _ = nnx.split(self.blocks)

        def apply_layer(
            layer: tuple[Any, LayerKinds],
            x: Array,
            recorded_projections: Any,
            layer_input: Any = None,
        ) -> tuple[Array, Any, dict[str, Array]]:
            weights, kind = layer
            cos, sin = turns
            if config.rope.local_theta is not None:
                cos, sin = (jnp.where(kind.is_local, *pair) for pair in zip(local_turns, turns))
            limits = Limits(config.window, kind.is_local, config.attention_soft_cap)
            adapters = {} if self.lora is None else self.lora.scale_adapters(weights["adapters"])
            dropout = self._make_dropout(dropout_keys, kind.number, outputs)
            x, attend_outputs, projections = nnx.merge(definition, weights["blocks"])(
                x,
                jnp.where(kind.has_positions, cos, 1.0),
                jnp.where(kind.has_positions, sin, 0.0),
                lambda query, key, value: attend(query, key, value, layer_input, limits),
                recorded_projections,
                adapters,
                outputs,
                dropout,
            )
            return self._constrain(x), attend_outputs, projections

        return apply_layer

    def _make_dropout(
        self, keys: Array | None, layer: Array, outputs: OutputTokens | None
    ) -> Dropout | None:
        """Makes the `Dropout` of a layer; None: nothing is dropped."""
        if keys is None or self.lora is None or not self.lora.dropout:
            return None
        targets, rate, words = self.lora.targets, self.lora.dropout, keys.shape[-1]
        few = keys if outputs is None else outputs.gather(keys)

        def draw(name: str, size: int) -> Array:
            tokens = keys if name in KEY_VALUE else few
            number = layer * len(targets) + targets.index(name)
            return draw_factors(tokens.reshape(-1, words), number, size, rate)

        return draw

    def vocabulary_weights(self) -> Float[Array, "V D"]:
        """Returns the float32 weights that turn hidden states into logits; tied: the embedding."""
        return self.embed[...] if self.head is None else self.head[...]


def unflatten_tokens(x: Float[Array, "tokens size"], rows: int) -> Float[Array, "rows T size"]:
    """Reshapes [B * T, size] to [B, T, size]."""
    return x.reshape(rows, -1, x.shape[-1])


def slice_layer(stack: Any, i: Array | int) -> Any:
    """Slices one layer out of a pytree of arrays [L, ...].

    A static index puts a barrier around each array: otherwise XLA casts the whole stack before
    slicing. (One barrier around all of them would give frozen weights gradients.)
    """

    def take(x: Array) -> Array:
        part = jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
        return jax.lax.optimization_barrier(part) if isinstance(i, int) else part

    return jax.tree.map(take, stack)


def abstract_decoder(
    config: DecoderConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: str = "full",
    hidden_shardings: HiddenShardings | None = None,
    lora: Lora | None = None,
) -> Decoder:
    """Makes a Decoder whose parameters are only shapes, to plan shardings before any exists."""
    settings: Any = {"remat": remat, "hidden_shardings": hidden_shardings, "lora": lora}
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, **settings))


def param_dims(params: nnx.State) -> nnx.State:
    """Returns the names of all dimensions, for `params = nnx.state(model, nnx.Param)`.

    The result has the structure of `params` with a tuple of names (None: unnamed) in place of every
    array, so `jax.tree.map(lambda array, dims: ..., params, param_dims(params))` works.
    """
    return jax.tree.map(
        lambda parameter: parameter.replace(parameter.get_metadata("dims")),
        params,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
