"""Log-probabilities and features of all of a prompt's responses, the prompt encoded once.

Responses lie behind their prompt in G groups of L tokens. Two layouts, one code path:

- packed: one group, the responses end to end (G = 1, L = S); a token sees only its own response.
- rectangle: one group a response (G = C, L = R). Worth it for long responses, where S x S scores
  would be mostly masked.

Positions of every response continue from its prompt's own length, and the logit of a response's
first token comes from the prompt's last token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mass_dpo_jax.models import attention as plain_attention
from mass_dpo_jax.models.attention import Attention
from mass_dpo_jax.models.decoder import Attend, Decoder, Ends
from mass_dpo_jax.models.decoder import Record as Layers
from mass_dpo_jax.models.logprobs import MAX_LOGITS, token_logps
from mass_dpo_jax.models.precomputed import known


class Record(NamedTuple):
    """What `replay` needs of a forward pass."""

    layers: Layers
    logps: jax.Array  # float32 [B, G * L], of every response token


class Scored(NamedTuple):
    """Of every candidate; zeros where there is none."""

    logps: jax.Array  # float32 [B, C]: log p(response | prompt), summed over tokens
    features: jax.Array | None = None  # float32 [B, C, D]: mean final hidden state
    record: Record | None = None


class Picks(NamedTuple):
    """K candidates of each row."""

    candidates: jax.Array  # int32 [B, K], values in 0..C-1
    valid: jax.Array  # bool [B, K]; candidates that are not count as absent
    size: int  # static; must hold the picked responses of every row


class Groups(NamedTuple):
    """Responses laid out in groups, all int32 [B, G, L]."""

    tokens: jax.Array
    segments: jax.Array  # the candidate a token belongs to, 0..C-1; padding is C
    offsets: jax.Array  # place within its response, from 0


def score(
    model: Decoder,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    responses: jax.Array,
    response_lengths: jax.Array,
    *,
    pooling: str | None,
    layout: str = "packed",
    max_response: int | None = None,
    candidate_chunk: int | None = None,
    max_logits: int = MAX_LOGITS,
    attention: Attention = plain_attention,
    record: bool = False,
) -> Scored:
    """Scores C candidate responses of each prompt in one forward pass.

    Args:
      model: the decoder.
      prompts: int32 [B, P], right-padded.
      prompt_lengths: int32 [B], at least 1.
      responses: int32 [B, S], each row's responses end to end in candidate order, right-padded.
      response_lengths: int32 [B, C]; 0 means that there is no such candidate.
      pooling: features are the mean of the final hidden states (after the final norm) over the
        "response" or over "all" of prompt and response, end-of-sequence included; None: none.
      layout: "packed" or "rectangle".
      max_response: R, static, at least the longest response. The rectangle needs it.
      candidate_chunk: with the rectangle, the number of candidates to run at a time, against the
        prompt's keys and values computed once; bounds memory for long responses.
      max_logits: logits held at once on a device.
      attention: how: models/attention.py, or a `Fused` of models/fused_attention.py.
      record: also what `replay` needs, with which to train; not to be differentiated.
    """
    if pooling not in ("response", "all", None):
        raise ValueError(f"pooling: found {pooling!r}, expected 'response', 'all' or None")
    if candidate_chunk is not None and layout == "packed":
        raise ValueError("candidate_chunk needs layout='rectangle'")
    groups = _groups(layout, responses, response_lengths, max_response)
    batch, prompt_size = prompts.shape
    num_candidates = response_lengths.shape[1]
    run: Any = model.record if record else lambda *args: (*model(*args), None)
    whole = pooling == "all"  # Else of the prompt only the last token's state is wanted.
    if candidate_chunk is None or candidate_chunk >= num_candidates:
        tokens, positions, attend, ends = _sequence(prompts, prompt_lengths, groups, attention)
        hidden, _, layers = run(tokens, positions, attend, None, None if whole else ends)
        prompt, hidden = _split(hidden, prompt_size if whole else 1, prompt_lengths)
        scored, logps = _per_candidate(
            model, prompt, hidden, groups, response_lengths, pooling, max_logits
        )
        if layers is None:
            return scored
        return scored._replace(record=Record(layers.only(ends) if whole else layers, logps))

    positions = jnp.broadcast_to(jnp.arange(prompt_size), prompts.shape)
    ends = _ends(prompt_size, prompt_lengths, None, attention)
    attend = attention.causal
    hidden, keys_values, of_prompt = run(prompts, positions, attend, None, None if whole else ends)
    prompt, _ = _split(hidden, hidden.shape[1], prompt_lengths)

    def score_chunk(chunk: tuple[Groups, jax.Array]) -> tuple[Scored, Layers | None, jax.Array]:
        groups, lengths = chunk
        hidden, _, layers = run(
            groups.tokens.reshape(batch, -1),
            _positions(prompt_lengths, groups),
            attention.behind_prompt(prompt_lengths, groups.segments),
            keys_values,
        )
        scored, logps = _per_candidate(model, prompt, hidden, groups, lengths, pooling, max_logits)
        return scored, layers, logps

    chunks = -(-num_candidates // candidate_chunk)

    def cut(x: jax.Array, fill: int) -> jax.Array:  # [B, C, ...] -> [chunks, B, chunk, ...]
        missing = chunks * candidate_chunk - num_candidates
        widths = [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, widths, constant_values=fill)
        return jnp.moveaxis(x.reshape(batch, chunks, candidate_chunk, *x.shape[2:]), 1, 0)

    # Within a chunk candidates count from 0; padding is whatever is not below candidate_chunk.
    first = jnp.arange(num_candidates)[None, :, None] // candidate_chunk * candidate_chunk
    local = jnp.where(groups.segments < num_candidates, groups.segments - first, candidate_chunk)
    stacked = Groups(cut(groups.tokens, 0), cut(local, candidate_chunk), cut(groups.offsets, 0))
    scored, layers, logps = jax.lax.map(score_chunk, (stacked, cut(response_lengths, 0)))

    def join(x: jax.Array, axis: int = 0) -> jax.Array:
        """The first axis, chunks, becomes part of what is then axis + 1: candidates or tokens."""
        x = jnp.moveaxis(x, 0, axis + 1)
        size = x.shape[axis + 1] * x.shape[axis + 2]  # -1 needs a layer in the record's loop.
        return x.reshape(*x.shape[: axis + 1], size, *x.shape[axis + 3 :])

    scored = jax.tree.map(lambda x: join(x)[:, :num_candidates], scored)
    if not record:
        return scored
    if whole:
        of_prompt = of_prompt.only(ends)
    size = groups.tokens[0].size  # Without the places that filled up the last chunk.
    layers = jax.tree.map(
        lambda x, chunks: jnp.concatenate([x, join(chunks, chunks.ndim - 4)[..., :size, :]], -2),
        of_prompt,
        layers,
    )
    return scored._replace(record=Record(layers, join(logps)[:, :size]))


def replay(
    model: Decoder,
    record: Record,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    responses: jax.Array,
    response_lengths: jax.Array,
    picks: Picks | None = None,
    *,
    layout: str = "packed",
    max_response: int | None = None,
    max_logits: int = MAX_LOGITS,
    attention: Attention = plain_attention,
) -> jax.Array:
    """`score(...).logps` of some of the candidates, from a record of `score` on all of them.

    The numbers are those of the record, and only the backward pass computes anything, on the
    prompt and these responses: equal to the gradient of scoring them alone.

    Args:
      model: with the weights that were recorded.
      record: of `score` with the same batch, layout and max_response.
      prompts, prompt_lengths, responses, response_lengths: of all candidates, see `score`.
      picks: K candidates of each row; None: all of them.
      layout, max_response, max_logits, attention: see `score`.

    Returns:
      float32 [B, K], 0 where a pick is not valid.
    """
    batch, prompt_size = prompts.shape
    if picks is None:
        lengths, places, found = response_lengths, None, record.logps
        groups = _groups(layout, responses, lengths, max_response)
    else:
        picked, lengths = gather_candidates(responses, response_lengths, picks)
        groups = _groups(layout, picked, lengths, max_response)
        # Where every response begins among those of the pool.
        if layout == "packed":
            first = jnp.take_along_axis(_starts(response_lengths), picks.candidates, axis=1)
        else:
            assert max_response is not None
            first = picks.candidates * max_response
        segments, offsets = (x.reshape(batch, -1) for x in groups[1:])
        places = _at(first, segments) + offsets
        found = jnp.take_along_axis(record.logps, places, axis=1, mode="clip")
        of_prompt = jnp.broadcast_to(jnp.arange(prompt_size), prompts.shape)
        places = jnp.concatenate([of_prompt, prompt_size + places], axis=1)
    sequence = _sequence(prompts, prompt_lengths, groups, attention)
    hidden = model.replay(record.layers, places, *sequence)
    prompt, hidden = _split(hidden, 1, prompt_lengths)
    return _per_candidate(model, prompt, hidden, groups, lengths, None, max_logits, found)[0].logps


def _sequence(
    prompts: jax.Array, prompt_lengths: jax.Array, groups: Groups, attention: Attention
) -> tuple[jax.Array, jax.Array, Attend, Ends]:
    """What a `Decoder` takes: tokens and positions [B, P + G * L], what attends to what, and whose
    final hidden states are wanted."""
    size = prompts.shape[1]
    positions = jnp.broadcast_to(jnp.arange(size), prompts.shape)
    return (
        jnp.concatenate([prompts, groups.tokens.reshape(len(prompts), -1)], axis=1),
        jnp.concatenate([positions, _positions(prompt_lengths, groups)], axis=1),
        plain_attention.shared_prefix(attention, size, prompt_lengths, groups.segments),
        _ends(size, prompt_lengths, groups, attention),
    )


def _ends(
    prompt_size: int, prompt_lengths: jax.Array, groups: Groups | None, attention: Attention
) -> Ends:
    """The prompt's last token, from which each response's first one is predicted, and all of the
    responses, if there are any."""
    last = prompt_lengths - 1
    # As a response to the prompt before it.
    alone = attention.behind_prompt(last, jnp.zeros((len(last), 1, 1), jnp.int32))

    def attend(
        query: jax.Array, key: jax.Array, value: jax.Array, extra: Any
    ) -> tuple[jax.Array, Any]:
        del extra
        keys_values = key[:, :prompt_size], value[:, :prompt_size]
        own_key, own_value = (
            jnp.take_along_axis(x, last[:, None, None, None], axis=1) for x in keys_values
        )
        seen, _ = alone(query[:, :1], own_key, own_value, keys_values)
        if groups is None:
            return seen, keys_values
        responses = attention.behind_prompt(prompt_lengths, groups.segments)
        key, value = (x[:, prompt_size:] for x in (key, value))
        behind, _ = responses(query[:, 1:], key, value, keys_values)
        return jnp.concatenate([seen, behind], axis=1), None

    return Ends(last, prompt_size, attend)


def _positions(prompt_lengths: jax.Array, groups: Groups) -> jax.Array:
    """[B, G * L]: a response's continue from its prompt's own length."""
    return (prompt_lengths[:, None, None] + groups.offsets).reshape(len(prompt_lengths), -1)


def gather_candidates(
    responses: jax.Array, response_lengths: jax.Array, picks: Picks
) -> tuple[jax.Array, jax.Array]:
    """Picks K candidates of every row and packs their responses end to end again.

    Args:
      responses: int32 [B, S], packed.
      response_lengths: int32 [B, C].

    Returns:
      responses int32 [B, size], right-padded with 0, and their lengths int32 [B, K].
    """
    lengths = jnp.take_along_axis(response_lengths, picks.candidates, axis=1)
    lengths = jnp.where(picks.valid, lengths, 0)
    starts = jnp.take_along_axis(_starts(response_lengths), picks.candidates, axis=1)
    segments, offsets = _segments(lengths, picks.size)
    sources = _at(starts, segments) + offsets
    tokens = jnp.take_along_axis(responses, sources, axis=1, mode="clip")
    return jnp.where(segments < lengths.shape[1], tokens, 0), lengths


def _groups(
    layout: str, responses: jax.Array, response_lengths: jax.Array, max_response: int | None
) -> Groups:
    if layout == "packed":
        return pack(responses, response_lengths)
    if layout != "rectangle":
        raise ValueError(f"layout: found {layout!r}, expected 'packed' or 'rectangle'")
    if max_response is None:
        raise ValueError("layout='rectangle' needs max_response")
    return rectangle(responses, response_lengths, max_response)


def pack(responses: jax.Array, response_lengths: jax.Array) -> Groups:
    """One group of all responses, as they come: [B, S] -> [B, 1, S]."""
    segments, offsets = _segments(response_lengths, responses.shape[1])
    return Groups(responses[:, None], segments[:, None], offsets[:, None])


def rectangle(responses: jax.Array, response_lengths: jax.Array, max_response: int) -> Groups:
    """One group a response: [B, S] -> [B, C, R]."""
    batch, num_candidates = response_lengths.shape
    offsets = jnp.arange(max_response)[None, None]
    sources = _starts(response_lengths)[..., None] + offsets
    real = offsets < response_lengths[..., None]
    flat = sources.reshape(batch, -1)
    tokens = jnp.take_along_axis(responses, flat, axis=1, mode="clip").reshape(sources.shape)
    candidates = jnp.arange(num_candidates)[:, None]
    return Groups(
        jnp.where(real, tokens, 0),
        jnp.where(real, candidates, num_candidates),
        jnp.broadcast_to(offsets, sources.shape),
    )


def _starts(lengths: jax.Array) -> jax.Array:
    return jnp.cumsum(lengths, axis=1) - lengths


def _segments(lengths: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Of `size` places in which pieces of `lengths` [B, K] lie end to end: the piece at each place
    (K behind the last one) and the offset within it, both int32 [B, size]."""
    places = jnp.arange(size)[None]
    ends = jnp.cumsum(lengths, axis=1)
    segments = jnp.sum(places[..., None] >= ends[:, None, :], axis=-1)
    return segments, places - _at(_starts(lengths), segments)


def _at(values: jax.Array, segments: jax.Array) -> jax.Array:
    """values [B, K] of each place's piece; padding gets some piece's."""
    return jnp.take_along_axis(values, segments, axis=1, mode="clip")


class _Prompt(NamedTuple):
    hidden: jax.Array  # [B, P, D], or of the last token alone, [B, 1, D]
    lengths: jax.Array  # int32 [B]


def _split(hidden: jax.Array, size: int, prompt_lengths: jax.Array) -> tuple[_Prompt, jax.Array]:
    """The hidden states of the prompt, which come first, and of the responses [B, G * L, D]."""
    return _Prompt(hidden[:, :size], prompt_lengths), hidden[:, size:]


def _per_candidate(
    model: Decoder,
    prompt: _Prompt,
    hidden: jax.Array,
    groups: Groups,
    response_lengths: jax.Array,
    pooling: str | None,
    max_logits: int,
    found: jax.Array | None = None,
) -> tuple[Scored, jax.Array]:
    """Sums and means over each candidate's tokens; hidden [B, G * L, D] are the responses'.

    Returns also the tokens' log-probs [B, G * L]; they are `found` where they are known already.
    """
    batch, num_candidates = response_lengths.shape
    size = hidden.shape[-1]
    last = prompt.hidden
    if last.shape[1] > 1:
        last = jnp.take_along_axis(last, (prompt.lengths - 1)[:, None, None], axis=1)
    last = last[:, None]  # [B, 1, 1, D]
    grouped = hidden.reshape(*groups.tokens.shape, size)
    before = jnp.pad(grouped, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1]
    before = jnp.where((groups.offsets == 0)[..., None], last, before)
    rows = None if model.splits is None else model.splits.stream

    def compute(before: jax.Array, weights: jax.Array, targets: jax.Array) -> jax.Array:
        return token_logps(before, weights, targets, max_logits, rows)

    args = (
        before.reshape(batch, -1, size),
        model.vocabulary_weights(),
        groups.tokens.reshape(batch, -1),
    )
    of_tokens = compute(*args) if found is None else known(compute, found, *args)
    # [B, G * L, C]: which tokens are whose.
    owner = groups.segments.reshape(batch, -1, 1) == jnp.arange(num_candidates)[None, None]
    logps = jnp.where(owner, of_tokens[..., None], 0.0).sum(axis=1)
    if pooling is None:
        return Scored(logps), of_tokens

    def total(owner: jax.Array, hidden: jax.Array) -> jax.Array:
        owner, hidden = owner.astype(jnp.float32), hidden.astype(jnp.float32)
        exact = jax.lax.Precision.HIGHEST  # accelerators would round float32 operands
        return jnp.einsum("btc,btd->bcd", owner, hidden, precision=exact)

    features, count = total(owner, hidden), response_lengths
    if pooling == "all":
        real = jnp.arange(prompt.hidden.shape[1])[None] < prompt.lengths[:, None]
        features += total(real[..., None], prompt.hidden)
        count = count + prompt.lengths[:, None]
    present = response_lengths > 0
    features = features / jnp.maximum(count, 1)[..., None]
    return Scored(logps, jnp.where(present[..., None], features, 0.0)), of_tokens
