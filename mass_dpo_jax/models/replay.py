"""Training from the record of a scoring pass, whose numbers are those of the forward pass.

A step scores all C candidates of a prompt, picks n of them, and trains on the picks with the same
weights. So the scoring pass is the forward pass of training, and `replay` is differentiated in its
place: forward it looks up what was recorded, backward it computes on the prompt and picks only.

    scoring pass, shared_prefix.score(record=True): prompt and all C responses
    ---------------------------------------------------------------------------------------
    tokens -> embed -> layer 1 -> ... -> layer L-1 -> layer L -> norm -> log-probabilities
                        |                 |            |    |             |
    recorded           inputs            inputs    last_input  output     logps of tokens
                       (projections)     (...)  (last_projections)

    replay, forward: prompt and picks
    ---------------------------------------------------------------------------------------
    tokens -> embed                      output, looked up -> norm -> logps, looked up

    replay, backward
    ---------------------------------------------------------------------------------------
    gradient of  <- layer 1 <- ... <- layer L-1 <- layer L <- norm <- logits again, in chunks
    embed and     each layer runs again on its recorded input: with remat "full" all of it,
    weights       with "dots" only attention and what is done value by value, since its
                  projections are looked up, too (precomputed.py)

The custom_vjp is in `replay_layers`; it also keeps the gradients of frozen weights from being
computed. Suffixes of names are shapes, in the letters of interfaces.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from mass_dpo_jax.models import attention as plain_attention
from mass_dpo_jax.models.candidate_scores import Prompt, score_candidates
from mass_dpo_jax.models.decoder import Decoder, slice_layer, unflatten_tokens
from mass_dpo_jax.models.dropout import DropoutKeys
from mass_dpo_jax.models.interfaces import (
    KEY_VALUE,
    Attention,
    LayerKinds,
    LayerRecord,
    ScoringRecord,
)
from mass_dpo_jax.models.logprobs import MAX_LOGITS
from mass_dpo_jax.models.response_layout import (
    Groups,
    Picks,
    find_starts,
    gather_per_token,
    lay_out,
    lay_out_picks,
)
from mass_dpo_jax.models.token_sequence import TokenSequence, build_sequence


@jax.named_scope("replay")
def replay(
    model: Decoder,
    record: ScoringRecord,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    responses: Int[Array, "B S"],
    response_lengths: Int[Array, "B C"],
    picks: Picks | None = None,
    *,
    layout: str = "packed",
    max_response: int | None = None,
    max_logits: int = MAX_LOGITS,
    attention: Attention = plain_attention,
    dropout: DropoutKeys | None = None,
) -> Float[Array, "B n"]:
    """Returns recorded log-probabilities of picked candidates, to be differentiated.

    Their gradient equals that of scoring the picks alone.

    Args:
        model: the decoder, with the weights that were recorded.
        record: the record of `score` with the same batch, layout and max_response.
        picks: candidates of each example; None for all of them.
        dropout: the keys that were recorded with; then there are no `picks`.

    Other arguments: as passed to `score` when recording, with the responses of all candidates.

    Returns:
        float32, 0 where a pick is not valid.
    """
    if picks is None:
        lengths, indices_BT, token_logps = response_lengths, None, record.logps
        groups = lay_out(layout, responses, lengths, max_response)
    else:
        groups, lengths = lay_out_picks(layout, responses, response_lengths, picks, max_response)
        sources = _find_sources(layout, response_lengths, picks, groups, max_response)
        token_logps = jnp.take_along_axis(record.logps, sources, axis=1, mode="clip")
        indices_BP = jnp.broadcast_to(jnp.arange(prompts.shape[1]), prompts.shape)
        indices_BT = jnp.concatenate([indices_BP, prompts.shape[1] + sources], axis=1)
    sequence = build_sequence(prompts, prompt_lengths, groups, attention, dropout)
    hidden_BOD = replay_layers(model, record.layers, indices_BT, sequence)
    scores, _ = score_candidates(
        model,
        Prompt(hidden_BOD[:, :1], prompt_lengths),
        hidden_BOD[:, 1:],
        groups,
        lengths,
        pooling=None,
        max_logits=max_logits,
        token_logps=token_logps,
    )
    return scores.logps


def _find_sources(
    layout: str, lengths_BC: Array, picks: Picks, groups: Groups, max_response: int | None
) -> Array:
    """Finds the recorded response token of each token of the picks, [B, E * W]."""
    if layout == "packed":
        starts_Bn = jnp.take_along_axis(find_starts(lengths_BC), picks.candidate_ids, axis=1)
    else:
        assert max_response is not None
        starts_Bn = picks.candidate_ids * max_response
    segments, offsets = (x.reshape(len(lengths_BC), -1) for x in groups[1:])
    return gather_per_token(starts_Bn, segments) + offsets


def replay_layers(
    model: Decoder,
    record: LayerRecord,
    indices_BT: Int[Array, "B T"] | None,
    sequence: TokenSequence,
) -> Float[Array, "B O D"]:
    """Returns final hidden states of some recorded tokens, to be differentiated.

    Args:
        model: the decoder, with the weights that were recorded.
        record: the layers' record; its outputs have the same `first` and `start` as the sequence's.
        indices_BT: indices of the sequence's tokens in the record; the prompt's come first and
            are the recorded ones in order. None for all of the record.
        sequence: the tokens. All that they attend to has to be among them.
    """
    trained, frozen = split_layers(model)
    passes = LayerReplay(model, frozen, record, sequence, indices_BT)

    def primal(trained: Any, embedded: Array) -> Array:
        del trained, embedded
        return passes.look_up_output()

    def forward(trained: Any, embedded: Array) -> tuple[Array, Any]:
        return primal(trained, embedded), trained

    def backward(trained: Any, output_grad: Array) -> tuple[Any, Array]:
        (weight_grads, _), input_grad = passes.differentiate(trained, output_grad)
        return weight_grads, input_grad

    apply_layers = jax.custom_vjp(primal)
    apply_layers.defvjp(forward, backward)
    hidden = apply_layers(trained, model.embed_tokens(sequence.tokens))
    return model.norm(unflatten_tokens(hidden, len(sequence.tokens)))


def split_layers(model: Decoder) -> tuple[Any, tuple[Any, LayerKinds]]:
    """Returns the layers' stacked weights: the trained; and the others, with the layers' kinds.

    What is not trained stays out of the function that is differentiated.
    """
    layers, kinds = model.get_layers()
    if model.lora is None:
        return layers, ({}, kinds)
    return {"adapters": layers.pop("adapters")}, (layers, kinds)


@dataclasses.dataclass(frozen=True, eq=False)
class LayerReplay:
    """The two passes through recorded layers: forward, looked up, and backward.

    Attributes:
        model: the decoder, with the weights that were recorded.
        frozen: what `split_layers` gives beside the trained weights.
        record: the layers' record.
        sequence: the tokens. All that they attend to is among them, or in `layer_inputs`.
        indices_BT: see `replay_layers`.
        layer_inputs: what the decoder was called with.
    """

    model: Decoder
    frozen: tuple[Any, LayerKinds]
    record: LayerRecord
    sequence: TokenSequence
    indices_BT: Array | None = None
    layer_inputs: Any = None

    @property
    def _output_indices_BO(self) -> Array | None:
        """Indices of the sequence's output tokens among those of the record."""
        if self.indices_BT is None:
            return None
        assert self.sequence.outputs is not None
        # The recorded output before those from `start` on is the prompt's.
        start = self.sequence.outputs.start
        return jnp.pad(self.indices_BT[:, start:] - start + 1, ((0, 0), (1, 0)))

    def look_up_output(self) -> Array:
        """Looks up what the last layer gave: [B * O, D]."""
        return _gather_tokens(self.record.output, self._output_indices_BO)

    def differentiate(
        self, trained: Any, output_grad: Array, kept_grads: Any = None, sums: Any = None
    ) -> tuple[tuple[Any, Any], Array]:
        """Runs the layers backwards.

        Args:
            trained: stacked weights to differentiate with respect to.
            output_grad: gradient of the last layer's output, [B * O, D].
            kept_grads: gradients of what `attend` keeps of every layer, [L, ...].
            sums: gradients of the trained weights and of `layer_inputs` to add to; None: none.

        Returns:
            Gradients of the trained weights and of `layer_inputs`, in the types of `sums`; and of
            the first layer's input.
        """
        record, (_, positions, attend, outputs, keys) = self.record, self.sequence
        indices, output_indices = self.indices_BT, self._output_indices_BO
        put = _make_setter if sums is None else _make_adder
        if sums is None:
            sums = jax.tree.map(jnp.zeros_like, (trained, self.layer_inputs))

        # The last layer, which may compute on other tokens than the rest.
        last = self.model.config.num_layers - 1
        projections = {
            name: _gather_tokens(x, indices if name in KEY_VALUE else output_indices)
            for name, x in record.last_projections.items()
        }
        apply_last = self.model.make_layer(positions, attend, outputs, keys)
        layer_grads, output_grad = self._differentiate_layer(
            apply_last, last, trained, (output_grad, kept_grads), record.last_input, projections
        )
        carry = output_grad, jax.tree.map(put(last), sums, layer_grads)
        apply_layer = self.model.make_layer(positions, attend, dropout_keys=keys)

        def step(carry: tuple[Array, Any], recorded: Any) -> tuple[Any, None]:
            output_grad, sums = carry
            i, inputs, projections = recorded
            projections = {name: _gather_tokens(x, indices) for name, x in projections.items()}
            layer_grads, output_grad = self._differentiate_layer(
                apply_layer, i, trained, (output_grad, kept_grads), inputs, projections
            )
            return (output_grad, jax.tree.map(put(i), sums, layer_grads)), None

        recorded = jnp.arange(last), record.inputs, record.projections
        (output_grad, sums), _ = jax.lax.scan(step, carry, recorded, reverse=True)
        return sums, output_grad

    def _differentiate_layer(
        self,
        apply_layer: Callable,
        i: Array | int,
        trained: Any,
        grads: tuple[Array, Any],
        inputs_BTD: Array,
        projections: dict[str, Array],
    ) -> tuple[tuple[Any, Any], Array]:
        """Differentiates layer i.

        Args:
            apply_layer: see `Decoder.make_layer`.
            i: index of the layer.
            trained: see `differentiate`.
            grads: gradient of its output, and of what is kept of all layers.
            inputs_BTD: its recorded input.
            projections: its recorded projections.

        Returns:
            Gradients of its trained weights and its slice of `layer_inputs`; and of its input.
        """
        frozen, kind = slice_layer(self.frozen, i)

        def apply(weights: Any, layer_input: Any, x: Array) -> tuple[Array, Any]:
            layer = weights | frozen, kind
            return apply_layer(layer, x, projections, layer_input)[:2]

        weights, layer_input, kept_grad = (
            slice_layer(x, i) for x in (trained, self.layer_inputs, grads[1])
        )
        x = _gather_tokens(inputs_BTD, self.indices_BT)
        _, vjp = jax.vjp(apply, weights, layer_input, x)
        weight_grads, layer_input_grad, input_grad = vjp((grads[0], kept_grad))
        return (weight_grads, layer_input_grad), input_grad


def _gather_tokens(x: Array, indices: Array | None) -> Array:
    """Takes tokens out of [B, T, size]: [B * tokens, size]."""
    if indices is not None:
        x = jnp.take_along_axis(x, indices[..., None], axis=1, mode="clip")
    return x.reshape(-1, x.shape[-1])


def _make_setter(i: Array | int) -> Callable[[Array, Array], Array]:
    return lambda stack, x: jax.lax.dynamic_update_index_in_dim(stack, x, i, 0)


def _make_adder(i: Array | int) -> Callable[[Array, Array], Array]:
    return lambda stack, x: stack.at[i].add(x.astype(stack.dtype))
