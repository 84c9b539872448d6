"""Log-probabilities and features of all of a prompt's responses, the prompt encoded once.

Responses are laid out after the prompt in groups, see response_layout.py. Positions of every
response continue from its prompt's own length, and the logit of a response's first token comes from
the prompt's last token. Suffixes of names are shapes, in the letters of interfaces.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from mass_dpo_jax.models import attention as plain_attention
from mass_dpo_jax.models.candidate_scores import CandidateScores, Prompt, score_candidates
from mass_dpo_jax.models.decoder import Decoder
from mass_dpo_jax.models.dropout import DropoutKeys
from mass_dpo_jax.models.interfaces import Attention, LayerRecord, ScoringRecord
from mass_dpo_jax.models.logprobs import MAX_LOGITS
from mass_dpo_jax.models.response_layout import Groups, Picks, deal, lay_out, lay_out_picks
from mass_dpo_jax.models.token_sequence import (
    build_prompt_sequence,
    build_response_sequence,
    build_sequence,
)


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
    dropout: DropoutKeys | None = None,
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
        max_response: R, static, at least the longest response. The rectangle needs it, and
            `candidate_chunk`.
        candidate_chunk: the most candidates to run at a time, against the prompt's keys and values
            computed once; bounds memory for long responses.
        max_logits: maximum number of logits held at once on a device.
        attention: the module attention.py, or a `FusedAttention`.
        record: whether to also return the record that `replay.replay` needs to train; such a call
            is not to be differentiated.
        dropout: keys of the adapters' dropout, for training; None: none.

    Raises:
        ValueError: an argument that does not exist, or does not go with the others.
    """
    if pooling not in ("response", "all", None):
        raise ValueError(f"pooling: found {pooling!r}, expected 'response', 'all' or None")
    run = model.record if record else lambda *args: (*model(*args), None)
    reduce = functools.partial(score_candidates, model, pooling=pooling, max_logits=max_logits)
    if candidate_chunk is None or candidate_chunk >= response_lengths.shape[1]:
        groups = lay_out(layout, responses, response_lengths, max_response)
        return _score_at_once(
            run,
            reduce,
            prompts,
            prompt_lengths,
            groups,
            response_lengths,
            attention,
            pooling == "all",
            dropout,
        )
    if record and layout != "rectangle":
        raise ValueError("a record of candidates in chunks needs layout='rectangle'")
    arrays = prompts, prompt_lengths, responses, response_lengths
    static = layout, max_response, candidate_chunk
    return _score_in_chunks(run, reduce, arrays, static, attention, pooling == "all", dropout)


def _score_at_once(
    run: Callable,
    reduce: Callable,
    prompts_BP: Array,
    prompt_lengths_B: Array,
    groups: Groups,
    response_lengths_BC: Array,
    attention: Attention,
    with_prompts: bool,
    dropout: DropoutKeys | None,
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
        dropout: see `score`.
    """
    sequence = build_sequence(prompts_BP, prompt_lengths_B, groups, attention, dropout)
    outputs = None if with_prompts else sequence.outputs
    hidden_BOD, _, layers = run(*sequence[:3], None, outputs, sequence.dropout_keys)
    prompt_size = prompts_BP.shape[1] if with_prompts else 1
    prompt = Prompt(hidden_BOD[:, :prompt_size], prompt_lengths_B)
    scores, token_logps = reduce(prompt, hidden_BOD[:, prompt_size:], groups, response_lengths_BC)
    if layers is None:
        return scores
    if with_prompts:
        assert sequence.outputs is not None
        layers = layers.restrict_to(sequence.outputs)
    return scores._replace(record=ScoringRecord(layers, token_logps))


def _score_in_chunks(
    run: Callable,
    reduce: Callable,
    arrays: tuple[Array, Array, Array, Array],
    static: tuple[str, int | None, int],
    attention: Attention,
    with_prompts: bool,
    dropout: DropoutKeys | None,
) -> CandidateScores:
    """Scores some candidates of each prompt at a time.

    Args:
        run: see `_score_at_once`.
        reduce: see `_score_at_once`.
        arrays: prompts, their lengths, responses, their lengths, as for `score`.
        static: layout, max_response and candidate_chunk, as for `score`.
        attention: see `score`.
        with_prompts: whether features need hidden states of the whole prompt.
        dropout: see `score`.
    """
    prompts_BP, prompt_lengths_B, responses_BS, response_lengths_BC = arrays
    layout, max_response, candidate_chunk = static
    num_candidates, packed_length = response_lengths_BC.shape[1], responses_BS.shape[1]
    chunks = deal(layout, response_lengths_BC, candidate_chunk, max_response, packed_length)

    # 1. The prompts alone, whose keys and values all chunks share.
    sequence = build_prompt_sequence(prompts_BP, prompt_lengths_B, attention, dropout)
    outputs = None if with_prompts else sequence.outputs
    hidden, keys_values, prompt_layers = run(*sequence[:3], None, outputs, sequence.dropout_keys)
    prompt = Prompt(hidden, prompt_lengths_B)

    # 2. The responses, chunk by chunk.
    def score_chunk(columns_BK: Array) -> tuple[CandidateScores, LayerRecord | None, Array]:
        picks = Picks(columns_BK, columns_BK < num_candidates, chunks.packed_length)
        groups, lengths = lay_out_picks(
            layout, responses_BS, response_lengths_BC, picks, max_response
        )
        keys = dropout
        if keys is not None:
            numbers = jnp.take_along_axis(keys.candidate_ids, columns_BK, axis=1, mode="clip")
            keys = keys._replace(candidate_ids=numbers)
        sequence = build_response_sequence(prompt_lengths_B, groups, attention, keys)
        hidden, _, layers = run(*sequence[:3], keys_values, None, sequence.dropout_keys)
        scores, token_logps = reduce(prompt, hidden, groups, lengths)
        return scores, layers, token_logps

    scores, layers, token_logps = jax.lax.map(score_chunk, chunks.columns)

    # 3. One result and one record, as if they had been computed at once.
    scores = jax.tree.map(lambda x: chunks.join(x, num_candidates), scores)
    if layers is None:
        return scores
    assert max_response is not None and sequence.outputs is not None
    if with_prompts:
        prompt_layers = prompt_layers.restrict_to(sequence.outputs)
    size = num_candidates * max_response  # Without what filled up the last chunk.
    layers = jax.tree.map(
        lambda x, chunks: jnp.concatenate(
            [x, _join_tokens(chunks, chunks.ndim - 4)[..., :size, :]], -2
        ),
        prompt_layers,
        layers,
    )
    return scores._replace(record=ScoringRecord(layers, _join_tokens(token_logps)[:, :size]))


def _join_tokens(x: Array, axis: int = 0) -> Array:
    """Merges the first axis, chunks, into what is then axis + 1: the tokens of all of them."""
    x = jnp.moveaxis(x, 0, axis + 1)
    size = x.shape[axis + 1] * x.shape[axis + 2]  # Not -1: an array may have no layers.
    return x.reshape(*x.shape[: axis + 1], size, *x.shape[axis + 3 :])
