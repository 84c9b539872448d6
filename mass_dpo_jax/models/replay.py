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
from mass_dpo_jax.models.decoder import Decoder, slice_layer, unflatten_tokens
from mass_dpo_jax.models.interfaces import (
    KEY_VALUE,
    Attention,
    LayerRecord,
    ScoringRecord,
)
from mass_dpo_jax.models.logprobs import MAX_LOGITS
from mass_dpo_jax.models.response_layout import (
    Groups,
    Picks,
    find_starts,
    gather_candidates,
    gather_per_token,
    lay_out,
)
from mass_dpo_jax.models.shared_prefix import (
    Prompt,
    TokenSequence,
    build_sequence,
    score_candidates,
)


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
) -> Float[Array, "B n"]:
    """Returns recorded log-probabilities of picked candidates, to be differentiated.

    Their gradient equals that of scoring the picks alone.

    Args:
        model: the decoder, with the weights that were recorded.
        record: the record of `score` with the same batch, layout and max_response.
        picks: candidates of each example; None for all of them.

    Other arguments: as passed to `score` when recording, with the responses of all candidates.

    Returns:
        float32, 0 where a pick is not valid.
    """
    if picks is None:
        lengths, indices_BT, token_logps = response_lengths, None, record.logps
        groups = lay_out(layout, responses, lengths, max_response)
    else:
        picked, lengths = gather_candidates(responses, response_lengths, picks)
        groups = lay_out(layout, picked, lengths, max_response)
        sources = _find_sources(layout, response_lengths, picks, groups, max_response)
        token_logps = jnp.take_along_axis(record.logps, sources, axis=1, mode="clip")
        indices_BP = jnp.broadcast_to(jnp.arange(prompts.shape[1]), prompts.shape)
        indices_BT = jnp.concatenate([indices_BP, prompts.shape[1] + sources], axis=1)
    sequence = build_sequence(prompts, prompt_lengths, groups, attention)
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
    output_indices_BO = None
    if indices_BT is not None:  # The recorded output before those from `start` on is the prompt's.
        start = sequence.outputs.start
        output_indices_BO = jnp.pad(indices_BT[:, start:] - start + 1, ((0, 0), (1, 0)))
    layers, has_positions = model.get_layers()
    # What is not trained stays out of the function that is differentiated.
    trained = {"adapters": layers.pop("adapters")} if model.lora else layers
    frozen = layers if model.lora else {}
    passes = _Replay(model, record, indices_BT, output_indices_BO, sequence, frozen, has_positions)

    def primal(trained: Any, embedded: Array) -> Array:
        del trained, embedded
        return passes.look_up_output()

    def forward(trained: Any, embedded: Array) -> tuple[Array, Any]:
        return primal(trained, embedded), trained

    apply_layers = jax.custom_vjp(primal)
    apply_layers.defvjp(forward, passes.differentiate)
    hidden = apply_layers(trained, model.embed_tokens(sequence.tokens))
    return model.norm(unflatten_tokens(hidden, len(sequence.tokens)))


@dataclasses.dataclass(frozen=True, eq=False)
class _Replay:
    """The two passes of `replay_layers` through the layers.

    Attributes:
        output_indices_BO: indices of the sequence's output tokens among those of the record.
        frozen: stacked weights of the layers that are not trained.
        has_positions: whether each layer has rotary positions.

    Other attributes: as passed to `replay_layers`.
    """

    model: Decoder
    record: LayerRecord
    indices_BT: Array | None
    output_indices_BO: Array | None
    sequence: TokenSequence
    frozen: dict[str, Any]
    has_positions: Array

    def look_up_output(self) -> Array:
        """Looks up what the last layer gave: [B * O, D]."""
        return _gather_tokens(self.record.output, self.output_indices_BO)

    def differentiate(self, trained: Any, output_grad: Array) -> tuple[Any, Array]:
        """Runs the layers backwards.

        Args:
            trained: stacked weights to differentiate with respect to.
            output_grad: gradient of the last layer's output, [B * O, D].

        Returns:
            Gradients of the trained weights and of the first layer's input.
        """
        record, (_, positions, attend, outputs) = self.record, self.sequence
        indices, output_indices = self.indices_BT, self.output_indices_BO

        # The last layer, which computes on other tokens than the rest.
        last = self.model.config.num_layers - 1
        projections = {
            name: _gather_tokens(x, indices if name in KEY_VALUE else output_indices)
            for name, x in record.last_projections.items()
        }
        apply_last = self.model.make_layer(positions, attend, outputs)
        layer_grads, output_grad = self._differentiate_layer(
            apply_last, last, trained, output_grad, record.last_input, projections
        )
        weight_grads = jax.tree.map(jnp.zeros_like, trained)
        carry = output_grad, jax.tree.map(_make_setter(last), weight_grads, layer_grads)
        apply_layer = self.model.make_layer(positions, attend)

        def step(carry: tuple[Array, Any], recorded: Any) -> tuple[Any, None]:
            output_grad, weight_grads = carry
            i, inputs, projections = recorded
            projections = {name: _gather_tokens(x, indices) for name, x in projections.items()}
            layer_grads, output_grad = self._differentiate_layer(
                apply_layer, i, trained, output_grad, inputs, projections
            )
            return (output_grad, jax.tree.map(_make_setter(i), weight_grads, layer_grads)), None

        recorded = jnp.arange(last), record.inputs, record.projections
        (output_grad, weight_grads), _ = jax.lax.scan(step, carry, recorded, reverse=True)
        return weight_grads, output_grad

    def _differentiate_layer(
        self,
        apply_layer: Callable,
        i: Array | int,
        trained: Any,
        output_grad: Array,
        inputs_BTD: Array,
        projections: dict[str, Array],
    ) -> tuple[Any, Array]:
        """Returns gradients of layer i's trained weights and of its input."""
        frozen, has_positions = slice_layer((self.frozen, self.has_positions), i)

        def apply(weights: Any, x: Array) -> Array:
            return apply_layer((weights | frozen, has_positions), x, projections)[0]

        weights = slice_layer(trained, i)
        _, vjp = jax.vjp(apply, weights, _gather_tokens(inputs_BTD, self.indices_BT))
        return vjp(output_grad)


def _gather_tokens(x: Array, indices: Array | None) -> Array:
    """Takes tokens out of [B, T, size]: [B * tokens, size]."""
    if indices is not None:
        x = jnp.take_along_axis(x, indices[..., None], axis=1, mode="clip")
    return x.reshape(-1, x.shape[-1])


def _make_setter(i: Array | int) -> Callable[[Array, Array], Array]:
    return lambda stack, x: jax.lax.dynamic_update_index_in_dim(stack, x, i, 0)
