"""What a decoder runs: prompts with all their responses, prompts alone, or responses alone.

Suffixes of names are shapes, in the letters of interfaces.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from mass_dpo_jax.models import attention as plain_attention
from mass_dpo_jax.models.dropout import DropoutKeys
from mass_dpo_jax.models.interfaces import Attend, Attention, Limits, OutputTokens
from mass_dpo_jax.models.response_layout import Groups


class TokenSequence(NamedTuple):
    """The arguments of a `Decoder` for some tokens of each prompt.

    Attributes:
        tokens: int32 [B, T].
        positions: int32 [B, T].
        attend: the attention function.
        outputs: the tokens that log-probabilities of responses are computed from; None: all.
        dropout_keys: key data of each token, [B, T, words]; None: no dropout.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    attend: Attend
    outputs: OutputTokens | None
    dropout_keys: Array | None = None


def build_sequence(
    prompts_BP: Int[Array, "B P"],
    prompt_lengths_B: Int[Array, " B"],
    groups: Groups,
    attention: Attention,
    dropout: DropoutKeys | None = None,
) -> TokenSequence:
    """Builds the input of a `Decoder`: prompts with groups of responses behind them."""
    size = prompts_BP.shape[1]
    positions_BP = jnp.broadcast_to(jnp.arange(size), prompts_BP.shape)
    response_tokens = groups.tokens.reshape(len(prompts_BP), -1)
    keys = None
    if dropout is not None:
        response_keys = dropout.make_response_keys(groups.segments, groups.offsets)
        keys = jnp.concatenate([dropout.make_prompt_keys(size), response_keys], axis=1)
    return TokenSequence(
        jnp.concatenate([prompts_BP, response_tokens], axis=1),
        jnp.concatenate([positions_BP, _compute_positions(prompt_lengths_B, groups)], axis=1),
        plain_attention.make_shared_prefix_attend(
            attention, size, prompt_lengths_B, groups.segments, groups.offsets
        ),
        _make_outputs(size, prompt_lengths_B, groups, attention),
        keys,
    )


def build_prompt_sequence(
    prompts_BP: Int[Array, "B P"],
    prompt_lengths_B: Int[Array, " B"],
    attention: Attention,
    dropout: DropoutKeys | None = None,
) -> TokenSequence:
    """Builds prompts alone, whose keys and values every layer keeps; the output is the last one."""
    positions_BP = jnp.broadcast_to(jnp.arange(prompts_BP.shape[1]), prompts_BP.shape)
    outputs = _make_outputs(prompts_BP.shape[1], prompt_lengths_B, None, attention)
    keys = None if dropout is None else dropout.make_prompt_keys(prompts_BP.shape[1])
    return TokenSequence(prompts_BP, positions_BP, attention.attend_causally, outputs, keys)


def build_response_sequence(
    prompt_lengths_B: Int[Array, " B"],
    groups: Groups,
    attention: Attention,
    dropout: DropoutKeys | None = None,
) -> TokenSequence:
    """Builds responses alone; `layer_inputs` of the decoder are their prompts' keys and values."""
    return TokenSequence(
        groups.tokens.reshape(len(prompt_lengths_B), -1),
        _compute_positions(prompt_lengths_B, groups),
        attention.make_response_attend(prompt_lengths_B, groups.segments, groups.offsets),
        None,
        None if dropout is None else dropout.make_response_keys(groups.segments, groups.offsets),
    )


def _make_outputs(
    prompt_size: int, prompt_lengths_B: Array, groups: Groups | None, attention: Attention
) -> OutputTokens:
    """Asks for the prompt's last token, which predicts each first one, and for all responses."""
    last_B = prompt_lengths_B - 1
    # It attends as a response of one token to the prompt before it.
    zeros = jnp.zeros((len(last_B), 1, 1), jnp.int32)
    attend_last = attention.make_response_attend(last_B, zeros, zeros)

    def attend(
        query_BOHd: Array, key_BTGd: Array, value_BTGd: Array, layer_input: Any, limits: Limits, /
    ) -> tuple[Array, Any]:
        del layer_input
        keys_values = key_BTGd[:, :prompt_size], value_BTGd[:, :prompt_size]
        own_key, own_value = (
            jnp.take_along_axis(x, last_B[:, None, None, None], axis=1) for x in keys_values
        )
        attended, _ = attend_last(query_BOHd[:, :1], own_key, own_value, keys_values, limits)
        if groups is None:
            return attended, keys_values
        attend_responses = attention.make_response_attend(
            prompt_lengths_B, groups.segments, groups.offsets
        )
        key, value = (x[:, prompt_size:] for x in (key_BTGd, value_BTGd))
        responses, _ = attend_responses(query_BOHd[:, 1:], key, value, keys_values, limits)
        return jnp.concatenate([attended, responses], axis=1), None

    return OutputTokens(last_B, prompt_size, attend)


def _compute_positions(prompt_lengths: Array, groups: Groups) -> Array:
    """Continues every response's positions [B, E * W] from its prompt's own length."""
    return (prompt_lengths[:, None, None] + groups.offsets).reshape(len(prompt_lengths), -1)
