"""Log-probabilities and features of all of a prompt's responses, the prompt encoded once.

Responses are laid out after the prompt in groups, see response_layout.py. Positions of every
response continue from its prompt's own length, and the logit of a response's first token comes from
the prompt's last token. Suffixes of names are shapes, in the letters of interfaces.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from mass_dpo_jax.models import attention as plain_attention
from mass_dpo_jax.models.decoder import Decoder
from mass_dpo_jax.models.interfaces import (
    Attend,
    Attention,
    LayerRecord,
    OutputTokens,
    ScoringRecord,
)
from mass_dpo_jax.models.logprobs import MAX_LOGITS, compute_token_logps
from mass_dpo_jax.models.precomputed import use_precomputed
from mass_dpo_jax.models.response_layout import Groups, lay_out


class CandidateScores(NamedTuple):
    """Scores of every candidate; zeros where there is none.

    Attributes:
        logps: log p(response | prompt), summed over tokens, float32.
        features: mean final hidden states, float32.
        record: the record that `replay.replay` needs.
    """

    logps: Float[Array, "B C"]
    features: Float[Array, "B C D"] | None = None
    record: ScoringRecord | None = None


class TokenSequence(NamedTuple):
    """The arguments of a `Decoder` for prompts followed by responses.

    Attributes:
        tokens: int32 [B, P + E * W].
        positions: int32 [B, P + E * W].
        attend: the attention function.
        outputs: the tokens that log-probabilities of responses are computed from.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    attend: Attend
    outputs: OutputTokens


def score(
    model: Decoder,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    responses: Int[Array, "B S"],
    response_lengths: Int[Array, "B C"],
    *,
    pooling: str | None,
    layout: str = "packed",
    max_response: int | None = None,
    candidate_chunk: int | None = None,
    max_logits: int = MAX_LOGITS,
    attention: Attention = plain_attention,
    record: bool = False,
) -> CandidateScores:
    """Scores C candidate responses of each prompt in one forward pass.

    Args:
        model: the decoder.
        prompts: token ids, right-padded.
        prompt_lengths: number of tokens of each prompt, at least 1.
        responses: token ids of each row's responses, end to end in candidate order,
            right-padded.
        response_lengths: number of tokens of each response; 0 where there is no such candidate.
        pooling: the tokens whose final hidden states (after the final norm) are averaged into
            features: "response", or "all" of prompt and response, end-of-sequence included; None
            for no features.
        layout: "packed" or "rectangle".
        max_response: R, static, at least the longest response. The rectangle needs it.
        candidate_chunk: number of candidates to run at a time with the rectangle, against the
            prompt's keys and values computed once; bounds memory for long responses.
        max_logits: maximum number of logits held at once on a device.
        attention: the module attention.py, or a `FusedAttention`.
        record: whether to also return the record that `replay.replay` needs to train; such a call
            is not to be differentiated.
    """
    if pooling not in ("response", "all", None):
        raise ValueError(f"pooling: found {pooling!r}, expected 'response', 'all' or None")
    if candidate_chunk is not None and layout == "packed":
        raise ValueError("candidate_chunk needs layout='rectangle'")
    groups = lay_out(layout, responses, response_lengths, max_response)
    run = model.record if record else lambda *args: (*model(*args), None)
    reduce = functools.partial(score_candidates, model, pooling=pooling, max_logits=max_logits)
    args = run, reduce, prompts, prompt_lengths, groups, response_lengths, attention
    if candidate_chunk is None or candidate_chunk >= response_lengths.shape[1]:
        return _score_at_once(*args, pooling == "all")
    return _score_in_chunks(*args, pooling == "all", candidate_chunk)


def _score_at_once(
    run: Callable,
    reduce: Callable,
    prompts_BP: Array,
    prompt_lengths_B: Array,
    groups: Groups,
    response_lengths_BC: Array,
    attention: Attention,
    with_prompts: bool,
) -> CandidateScores:
    """Scores all candidates together.

    Args:
        run: `Decoder.record`, or `Decoder.__call__` with None for the record.
        reduce: `score_candidates` with its settings.
        prompts_BP: see `score`.
        prompt_lengths_B: see `score`.
        groups: the responses.
        response_lengths_BC: see `score`.
        attention: see `score`.
        with_prompts: whether features need hidden states of the whole prompt.
    """
    sequence = build_sequence(prompts_BP, prompt_lengths_B, groups, attention)
    outputs = None if with_prompts else sequence.outputs
    hidden_BOD, _, layers = run(*sequence[:3], None, outputs)
    prompt_size = prompts_BP.shape[1] if with_prompts else 1
    prompt = Prompt(hidden_BOD[:, :prompt_size], prompt_lengths_B)
    scores, token_logps = reduce(prompt, hidden_BOD[:, prompt_size:], groups, response_lengths_BC)
    if layers is None:
        return scores
    if with_prompts:
        layers = layers.restrict_to(sequence.outputs)
    return scores._replace(record=ScoringRecord(layers, token_logps))


def _score_in_chunks(
    run: Callable,
    reduce: Callable,
    prompts_BP: Array,
    prompt_lengths_B: Array,
    groups: Groups,
    response_lengths_BC: Array,
    attention: Attention,
    with_prompts: bool,
    candidate_chunk: int,
) -> CandidateScores:
    """Scores some candidates of each prompt at a time; the groups are a rectangle's."""
    batch, num_candidates = response_lengths_BC.shape

    # 1. The prompts alone, whose keys and values all chunks share.
    positions_BP = jnp.broadcast_to(jnp.arange(prompts_BP.shape[1]), prompts_BP.shape)
    outputs = _make_outputs(prompts_BP.shape[1], prompt_lengths_B, None, attention)
    hidden, keys_values, prompt_layers = run(
        prompts_BP,
        positions_BP,
        attention.attend_causally,
        None,
        None if with_prompts else outputs,
    )
    prompt = Prompt(hidden, prompt_lengths_B)

    # 2. The responses, chunk by chunk.
    def score_chunk(
        chunk: tuple[Groups, Array],
    ) -> tuple[CandidateScores, LayerRecord | None, Array]:
        groups, lengths = chunk
        hidden, _, layers = run(
            groups.tokens.reshape(batch, -1),
            _compute_positions(prompt_lengths_B, groups),
            attention.make_response_attend(prompt_lengths_B, groups.segments),
            keys_values,
        )
        scores, token_logps = reduce(prompt, hidden, groups, lengths)
        return scores, layers, token_logps

    chunks = -(-num_candidates // candidate_chunk)

    def split(x: Array, fill: int) -> Array:  # [B, C, ...] -> [chunks, B, chunk, ...]
        num_padding = chunks * candidate_chunk - num_candidates
        widths = [(0, 0), (0, num_padding)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, widths, constant_values=fill)
        return jnp.moveaxis(x.reshape(batch, chunks, candidate_chunk, *x.shape[2:]), 1, 0)

    # Within a chunk candidates count from 0; padding has numbers from candidate_chunk on.
    first_candidate = jnp.arange(num_candidates)[None, :, None] // candidate_chunk * candidate_chunk
    local = jnp.where(
        groups.segments < num_candidates, groups.segments - first_candidate, candidate_chunk
    )
    stacked = Groups(
        split(groups.tokens, 0), split(local, candidate_chunk), split(groups.offsets, 0)
    )
    scores, layers, token_logps = jax.lax.map(score_chunk, (stacked, split(response_lengths_BC, 0)))

    # 3. One result and one record, as if they had been computed at once.
    def join(x: Array, axis: int = 0) -> Array:
        """Merges the first axis, chunks, into what is then axis + 1: candidates or tokens."""
        x = jnp.moveaxis(x, 0, axis + 1)
        size = x.shape[axis + 1] * x.shape[axis + 2]  # Not -1: an array may have no layers.
        return x.reshape(*x.shape[: axis + 1], size, *x.shape[axis + 3 :])

    scores = jax.tree.map(lambda x: join(x)[:, :num_candidates], scores)
    if layers is None:
        return scores
    if with_prompts:
        prompt_layers = prompt_layers.restrict_to(outputs)
    size = groups.tokens[0].size  # Without the candidates that filled up the last chunk.
    layers = jax.tree.map(
        lambda x, chunks: jnp.concatenate([x, join(chunks, chunks.ndim - 4)[..., :size, :]], -2),
        prompt_layers,
        layers,
    )
    return scores._replace(record=ScoringRecord(layers, join(token_logps)[:, :size]))


def build_sequence(
    prompts_BP: Int[Array, "B P"],
    prompt_lengths_B: Int[Array, " B"],
    groups: Groups,
    attention: Attention,
) -> TokenSequence:
    """Builds the input of a `Decoder`: prompts with groups of responses behind them."""
    size = prompts_BP.shape[1]
    positions_BP = jnp.broadcast_to(jnp.arange(size), prompts_BP.shape)
    response_tokens = groups.tokens.reshape(len(prompts_BP), -1)
    return TokenSequence(
        jnp.concatenate([prompts_BP, response_tokens], axis=1),
        jnp.concatenate([positions_BP, _compute_positions(prompt_lengths_B, groups)], axis=1),
        plain_attention.make_shared_prefix_attend(
            attention, size, prompt_lengths_B, groups.segments
        ),
        _make_outputs(size, prompt_lengths_B, groups, attention),
    )


def _make_outputs(
    prompt_size: int, prompt_lengths_B: Array, groups: Groups | None, attention: Attention
) -> OutputTokens:
    """Asks for the prompt's last token, which predicts each first one, and for all responses."""
    last_B = prompt_lengths_B - 1
    # It attends as a response of one token to the prompt before it.
    attend_last = attention.make_response_attend(last_B, jnp.zeros((len(last_B), 1, 1), jnp.int32))

    def attend(
        query_BOHd: Array, key_BTGd: Array, value_BTGd: Array, layer_input: Any, /
    ) -> tuple[Array, Any]:
        del layer_input
        keys_values = key_BTGd[:, :prompt_size], value_BTGd[:, :prompt_size]
        own_key, own_value = (
            jnp.take_along_axis(x, last_B[:, None, None, None], axis=1) for x in keys_values
        )
        attended, _ = attend_last(query_BOHd[:, :1], own_key, own_value, keys_values)
        if groups is None:
            return attended, keys_values
        attend_responses = attention.make_response_attend(prompt_lengths_B, groups.segments)
        key, value = (x[:, prompt_size:] for x in (key_BTGd, value_BTGd))
        responses, _ = attend_responses(query_BOHd[:, 1:], key, value, keys_values)
        return jnp.concatenate([attended, responses], axis=1), None

    return OutputTokens(last_B, prompt_size, attend)


def _compute_positions(prompt_lengths: Array, groups: Groups) -> Array:
    """Continues every response's positions [B, E * W] from its prompt's own length."""
    return (prompt_lengths[:, None, None] + groups.offsets).reshape(len(prompt_lengths), -1)


class Prompt(NamedTuple):
    """Final hidden states of prompts.

    Attributes:
        hidden: hidden states of all tokens, or of the last one alone (P = 1).
        lengths: number of real tokens.
    """

    hidden: Float[Array, "B P D"]
    lengths: Int[Array, " B"]


def score_candidates(
    model: Decoder,
    prompt: Prompt,
    hidden: Float[Array, "B tokens D"],
    groups: Groups,
    response_lengths: Int[Array, "B C"],
    *,
    pooling: str | None,
    max_logits: int,
    token_logps: Float[Array, "B tokens"] | None = None,
) -> tuple[CandidateScores, Float[Array, "B tokens"]]:
    """Computes log-probabilities and features from the responses' final hidden states.

    Returns:
        Sums and means over each candidate's tokens, and the log-probability of every token: those
        that were passed, if any, with the gradient of computing them.
    """
    batch, num_candidates = response_lengths.shape
    size = hidden.shape[-1]
    last = prompt.hidden
    if last.shape[1] > 1:
        last = jnp.take_along_axis(last, (prompt.lengths - 1)[:, None, None], axis=1)
    last = last[:, None]  # [B, 1, 1, D]
    grouped_BEWD = hidden.reshape(*groups.tokens.shape, size)
    previous = jnp.pad(grouped_BEWD, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1]
    previous = jnp.where((groups.offsets == 0)[..., None], last, previous)
    sharding = None if model.hidden_shardings is None else model.hidden_shardings.stream

    def compute(previous: Array, weights: Array, targets: Array) -> Array:
        return compute_token_logps(previous, weights, targets, max_logits, sharding)

    args = (
        previous.reshape(batch, -1, size),
        model.vocabulary_weights(),
        groups.tokens.reshape(batch, -1),
    )
    if token_logps is None:
        token_logps = compute(*args)
    else:
        token_logps = use_precomputed(compute, token_logps, *args)
    # Which tokens, [B, E * W, C], belong to which candidate.
    owner = groups.segments.reshape(batch, -1, 1) == jnp.arange(num_candidates)[None, None]
    logps = jnp.where(owner, token_logps[..., None], 0.0).sum(axis=1)
    if pooling is None:
        return CandidateScores(logps), token_logps

    features, count = _sum_hidden(owner, hidden), response_lengths
    if pooling == "all":
        real = jnp.arange(prompt.hidden.shape[1])[None] < prompt.lengths[:, None]
        features += _sum_hidden(real[..., None], prompt.hidden)
        count = count + prompt.lengths[:, None]
    exists = response_lengths > 0
    features = features / jnp.maximum(count, 1)[..., None]
    return CandidateScores(logps, jnp.where(exists[..., None], features, 0.0)), token_logps


def _sum_hidden(owner_BTC: Array, hidden_BTD: Array) -> Array:
    owner_BTC, hidden_BTD = owner_BTC.astype(jnp.float32), hidden_BTD.astype(jnp.float32)
    exact = jax.lax.Precision.HIGHEST  # Accelerators would round float32 operands.
    return jnp.einsum("btc,btd->bcd", owner_BTC, hidden_BTD, precision=exact)
