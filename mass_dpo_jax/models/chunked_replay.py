"""The gradient of a loss on many responses of each prompt, in the memory of a few.

A loss sees a response through its log-probability alone. So its gradient is sum_i w_i d logp_i with
w_i = dL / dlogp_i, and every w_i is known from a forward pass that keeps nothing:

    1 prompt     prompt -> layers -> last hidden state, keys and values of all layers  (recorded)
    2 weights    K responses at a time, behind the prompt's keys and values -> logps -> w
    3 responses  K at a time: the same again, recorded, and at once backwards from
                 sum_i w_i logp_i. Three sums grow: gradients of the weights, of the prompt's keys
                 and values, and of its last hidden state, which predicts first tokens
    4 prompt     backwards, once, from the last two sums

The result is the gradient of all responses at once, but for rounding. What is held at a time is the
record of the prompt and of K responses, however many there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, UInt32

from mass_dpo_jax.models import attention as plain_attention
from mass_dpo_jax.models.candidate_scores import Prompt, score_candidates
from mass_dpo_jax.models.decoder import Decoder, unflatten_tokens
from mass_dpo_jax.models.dropout import DropoutKeys
from mass_dpo_jax.models.interfaces import Attention, LayerRecord
from mass_dpo_jax.models.logprobs import MAX_LOGITS
from mass_dpo_jax.models.replay import LayerReplay, split_layers
from mass_dpo_jax.models.response_layout import Groups, Picks, deal, gather_lengths, lay_out_picks
from mass_dpo_jax.models.token_sequence import (
    TokenSequence,
    build_prompt_sequence,
    build_response_sequence,
)

LAYERS = ("blocks", "adapters")  # The parts of a decoder's weights that are stacked over layers.


class _Sums(NamedTuple):
    """Gradients added up over the chunks.

    Attributes:
        layers: of the layers' trained weights, as `split_layers` gives them.
        outer: of the other trained weights.
        keys_values: of the prompts' keys and values, [L, B, P, G, d], float32.
        last: of the final hidden states of the prompts' last tokens, [B, 1, D], float32.
    """

    layers: Any
    outer: Any
    keys_values: Any
    last: Array


class _Run(NamedTuple):
    """A model at work on a batch.

    Attributes:
        model: the decoder.
        rebuild: a function from the trained weights outside of the layers to the decoder.
        outer: these weights.
        last: final hidden states of the prompts' last tokens.
        keys_values: the prompts' keys and values, [L, B, P, G, d].

    Other attributes: as passed to `value_and_grad`.
    """

    model: Decoder
    rebuild: Callable[[Any], Decoder]
    outer: Any
    last: Array
    keys_values: tuple[Array, Array]
    prompt_lengths: Array
    responses: Array
    response_lengths: Array
    layout: str
    max_response: int | None
    max_logits: int
    attention: Attention
    dropout: Array | None

    def score(self, picks: Picks) -> Float[Array, "B K"]:
        """Returns log-probabilities of a chunk."""
        groups, lengths, sequence = self._lay_out(picks)
        hidden, _ = self.model(*sequence[:3], self.keys_values, None, sequence.dropout_keys)
        return self._compute_logps(self.model, self.last, hidden, groups, lengths)

    def add_responses(self, sums: _Sums, layers: Any, picks: Picks, logp_grads: Array) -> _Sums:
        """Adds a chunk's gradients.

        Args:
            sums: the gradients so far.
            layers: the layers' trained weights.
            picks: the chunk.
            logp_grads: the gradient of each log-probability, [B, K].
        """
        groups, lengths, sequence = self._lay_out(picks)
        _, _, record = self.model.record(
            *sequence[:3], self.keys_values, None, sequence.dropout_keys
        )

        def compute_logps(outer: Any, last: Array, output: Array) -> Array:
            model = self.rebuild(outer)
            hidden = model.norm(unflatten_tokens(output, len(lengths)))
            # Nobody reads the values, so they are not computed.
            values = jnp.zeros(sequence.tokens.shape, jnp.float32)
            return self._compute_logps(model, last, hidden, groups, lengths, values)

        output = record.output.reshape(-1, record.output.shape[-1])
        _, vjp = jax.vjp(compute_logps, self.outer, self.last, output)
        outer_grads, last_grad, output_grad = vjp(logp_grads)
        sums = sums._replace(outer=_add(sums.outer, outer_grads), last=_add(sums.last, last_grad))
        return self._add_layers(sums, layers, sequence, record, output_grad, self.keys_values)

    def add_prompts(
        self, sums: _Sums, layers: Any, sequence: TokenSequence, record: LayerRecord
    ) -> _Sums:
        """Adds the gradients of the prompts, from the sums of all chunks.

        Args:
            sums: the gradients of all responses.
            layers: the layers' trained weights.
            sequence: the prompts.
            record: their record.
        """

        def compute_last(outer: Any, output: Array) -> Array:
            return self.rebuild(outer).norm(unflatten_tokens(output, len(self.last)))

        output = record.output.reshape(-1, record.output.shape[-1])
        _, vjp = jax.vjp(compute_last, self.outer, output)
        outer_grads, output_grad = vjp(sums.last.astype(self.last.dtype))
        sums = sums._replace(outer=_add(sums.outer, outer_grads))
        return self._add_layers(sums, layers, sequence, record, output_grad, None)

    def _add_layers(
        self,
        sums: _Sums,
        layers: Any,
        sequence: TokenSequence,
        record: LayerRecord,
        output_grad: Array,
        keys_values: Any,
    ) -> _Sums:
        """Goes backwards through the layers and the embedding.

        Responses add to the gradients of the prompts' keys and values; prompts, which have no
        `keys_values`, start from them.
        """
        frozen = split_layers(self.model)[1]
        passes = LayerReplay(self.model, frozen, record, sequence, None, keys_values)
        if keys_values is None:
            kept = jax.tree.map(lambda x, y: x.astype(y.dtype), sums.keys_values, self.keys_values)
            added, input_grad = passes.differentiate(layers, output_grad, kept, (sums.layers, None))
            sums = sums._replace(layers=added[0])
        else:
            added, input_grad = passes.differentiate(
                layers, output_grad, None, (sums.layers, sums.keys_values)
            )
            sums = sums._replace(layers=added[0], keys_values=added[1])
        _, vjp = jax.vjp(
            lambda outer: self.rebuild(outer).embed_tokens(sequence.tokens), self.outer
        )
        return sums._replace(outer=_add(sums.outer, *vjp(input_grad)))

    def _lay_out(self, picks: Picks) -> tuple[Groups, Array, TokenSequence]:
        arrays = self.responses, self.response_lengths, picks
        groups, lengths = lay_out_picks(self.layout, *arrays, self.max_response)
        keys = None if self.dropout is None else DropoutKeys(self.dropout, picks.candidate_ids)
        sequence = build_response_sequence(self.prompt_lengths, groups, self.attention, keys)
        return groups, lengths, sequence

    def _compute_logps(
        self,
        model: Decoder,
        last: Array,
        hidden: Array,
        groups: Groups,
        lengths: Array,
        values: Array | None = None,
    ) -> Array:
        scores, _ = score_candidates(
            model,
            Prompt(last, self.prompt_lengths),
            hidden,
            groups,
            lengths,
            pooling=None,
            max_logits=self.max_logits,
            token_logps=values,
        )
        return scores.logps


def _add(sums: Any, terms: Any) -> Any:
    return jax.tree.map(lambda x, y: x + y.astype(x.dtype), sums, terms)


def value_and_grad(
    loss: Callable[[Array], tuple[Array, Any]],
    build: Callable[[Any], Decoder],
    trained: Any,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    responses: Int[Array, "B S"],
    response_lengths: Int[Array, "B C"],
    picks: Picks,
    at_a_time: int,
    logps: Float[Array, "B n"] | None = None,
    *,
    layout: str = "packed",
    max_response: int | None = None,
    max_logits: int = MAX_LOGITS,
    attention: Attention = plain_attention,
    dropout: UInt32[Array, "B words"] | None = None,
) -> tuple[tuple[Array, Any], Any]:
    """Computes a loss on picked candidates and its gradient, a few candidates at a time.

    Args:
        loss: a function from log-probabilities [B, n], 0 where a pick is not valid, to a scalar and
            anything else.
        build: a function from the trained weights to the decoder.
        trained: nested dicts of weights.
        picks: the candidates in the loss.
        at_a_time: the most candidates of a prompt that are differentiated together.
        logps: the picks' log-probabilities with these weights, where they are known; None computes
            them.
        dropout: key data of each example for the adapters' dropout; None: none.

    Other arguments: as for `shared_prefix.score`.

    Returns:
        What `loss` returns, and the gradient, a tree like `trained`.
    """
    outer = {name: x for name, x in trained.items() if name not in LAYERS}
    stacked = {name: x for name, x in trained.items() if name in LAYERS}
    layers, restore = jax.vjp(lambda x: split_layers(build({**outer, **x}))[0], stacked)
    # 1. The prompts, recorded.
    model = build(trained)
    keys = None if dropout is None else DropoutKeys(dropout, picks.candidate_ids)
    prompt = build_prompt_sequence(prompts, prompt_lengths, attention, keys)
    last, keys_values, record = model.record(*prompt[:3], None, prompt.outputs, prompt.dropout_keys)
    run = _Run(
        model,
        lambda outer: build({**stacked, **outer}),
        outer,
        last,
        keys_values,
        prompt_lengths,
        responses,
        response_lengths,
        layout,
        max_response,
        max_logits,
        attention,
        dropout,
    )
    # 2. The weight of each response.
    lengths = gather_lengths(response_lengths, picks)
    chunks = deal(layout, lengths, at_a_time, max_response, picks.packed_length)
    dealt = chunks.split(picks.candidate_ids), chunks.split(picks.valid)
    if logps is None:
        scored = jax.lax.map(lambda x: run.score(Picks(x[0], x[1], chunks.packed_length)), dealt)
        logps = chunks.join(scored, lengths.shape[1])
    value, weights = jax.value_and_grad(loss, has_aux=True)(logps)
    # 3. The responses, backwards as far as the prompts.
    wide = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (keys_values, last))
    zeros = _Sums(*jax.tree.map(jnp.zeros_like, (layers, outer)), *wide)

    def add_chunk(sums: _Sums, chunk: tuple[Array, Array, Array]) -> tuple[_Sums, None]:
        picks = Picks(chunk[0], chunk[1], chunks.packed_length)
        return run.add_responses(sums, layers, picks, chunk[2]), None

    sums, _ = jax.lax.scan(add_chunk, zeros, (*dealt, chunks.split(weights)))
    # 4. The prompts, backwards.
    sums = run.add_prompts(sums, layers, prompt, record)
    return value, {**sums.outer, **restore(sums.layers)[0]}
