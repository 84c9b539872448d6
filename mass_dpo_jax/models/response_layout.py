"""How the responses of an example are laid out after the prompt: E groups of W tokens.

Two layouts, one code path:

- packed: one group, the responses end to end (E = 1, W = S); a token sees only its own response.
- rectangle: one group per response (E = C, W = R). Pays for long responses, where S x S scores
  would be mostly masked.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int


class Groups(NamedTuple):
    """Responses laid out in groups, all int32 [B, E, W].

    Attributes:
        tokens: token ids.
        segments: index of the candidate that a token belongs to, 0..C-1; C for padding.
        offsets: the token's index within its response, from 0.
    """

    tokens: Int[Array, "B E W"]
    segments: Int[Array, "B E W"]
    offsets: Int[Array, "B E W"]


class Picks(NamedTuple):
    """n candidates of each example, to train on.

    Attributes:
        candidate_ids: int32, 0..C-1.
        valid: whether each candidate is valid; those that are not count as absent.
        packed_length: static; room for the picked responses of any example.
    """

    candidate_ids: Int[Array, "B n"]
    valid: Bool[Array, "B n"]
    packed_length: int


def gather_candidates(
    responses: Int[Array, "B S"], response_lengths: Int[Array, "B C"], picks: Picks
) -> tuple[Int[Array, "B packed_length"], Int[Array, "B n"]]:
    """Takes the picked responses of packed ones and packs them again, padded right with 0.

    Returns:
        The packed responses, and their lengths.
    """
    lengths = jnp.take_along_axis(response_lengths, picks.candidate_ids, axis=1)
    lengths = jnp.where(picks.valid, lengths, 0)
    starts = jnp.take_along_axis(find_starts(response_lengths), picks.candidate_ids, axis=1)
    segments, offsets = _find_segments(lengths, picks.packed_length)
    sources = gather_per_token(starts, segments) + offsets
    tokens = jnp.take_along_axis(responses, sources, axis=1, mode="clip")
    return jnp.where(segments < lengths.shape[1], tokens, 0), lengths


def lay_out(
    layout: str,
    responses: Int[Array, "B S"],
    response_lengths: Int[Array, "B C"],
    max_response: int | None,
) -> Groups:
    """Lays packed responses out in groups.

    Raises:
        ValueError: an unknown layout, or a rectangle without its width `max_response`.
    """
    if layout == "packed":
        return lay_out_packed(responses, response_lengths)
    if layout != "rectangle":
        raise ValueError(f"layout: found {layout!r}, expected 'packed' or 'rectangle'")
    if max_response is None:
        raise ValueError("layout='rectangle' needs max_response")
    return lay_out_rectangle(responses, response_lengths, max_response)


def lay_out_packed(responses: Int[Array, "B S"], response_lengths: Int[Array, "B C"]) -> Groups:
    """Lays all responses out in one group, as they come."""
    segments, offsets = _find_segments(response_lengths, responses.shape[1])
    return Groups(responses[:, None], segments[:, None], offsets[:, None])


def lay_out_rectangle(
    responses: Int[Array, "B S"], response_lengths: Int[Array, "B C"], max_response: int
) -> Groups:
    """Lays every response out in a group of its own, R wide."""
    batch, num_candidates = response_lengths.shape
    offsets = jnp.arange(max_response)[None, None]
    sources = find_starts(response_lengths)[..., None] + offsets
    real = offsets < response_lengths[..., None]
    flat = sources.reshape(batch, -1)
    tokens = jnp.take_along_axis(responses, flat, axis=1, mode="clip").reshape(sources.shape)
    candidates = jnp.arange(num_candidates)[:, None]
    return Groups(
        jnp.where(real, tokens, 0),
        jnp.where(real, candidates, num_candidates),
        jnp.broadcast_to(offsets, sources.shape),
    )


def find_starts(lengths: Int[Array, "B n"]) -> Int[Array, "B n"]:
    """Returns the first token's index of each of the packed responses."""
    return jnp.cumsum(lengths, axis=1) - lengths


def _find_segments(
    lengths: Int[Array, "B n"], packed_length: int
) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
    """Returns each packed token's response (n behind the last one) and its offset in there."""
    indices = jnp.arange(packed_length)[None]
    ends = jnp.cumsum(lengths, axis=1)
    segments = jnp.sum(indices[..., None] >= ends[:, None, :], axis=-1)
    return segments, indices - gather_per_token(find_starts(lengths), segments)


def gather_per_token(values: Int[Array, "B n"], segments: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Looks up the value of each token's response; padding gets that of some response."""
    return jnp.take_along_axis(values, segments, axis=1, mode="clip")
