"""How the responses of an example are laid out after the prompt: E groups of W tokens.

Two layouts, one code path:

- packed: one group, the responses end to end (E = 1, W = S); a token sees only its own response.
- rectangle: one group per response (E = C, W = R). Pays for long responses, where S x S scores
  would be mostly masked.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int, Shaped


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


class Chunks(NamedTuple):
    """Which of C candidates are computed together: m chunks of K.

    Attributes:
        columns: int32, numbers of candidates, 0..C-1; C where a chunk has no more.
        packed_length: static; room for the responses of any chunk.
    """

    columns: Int[Array, "m B K"]
    packed_length: int

    def split(self, x: Shaped[Array, "B C"]) -> Shaped[Array, "m B K"]:
        """Deals a table's columns out; zeros fill up chunks."""
        padded = jnp.pad(x, ((0, 0), (0, 1)))
        return jax.vmap(lambda columns: jnp.take_along_axis(padded, columns, axis=1))(self.columns)

    def join(self, x: Shaped[Array, "m B K *rest"], count: int) -> Shaped[Array, "B C *rest"]:
        """Puts what was computed for each chunk back in order; `count` is C, static."""
        batch = x.shape[1]
        columns = jnp.moveaxis(self.columns, 0, 1).reshape(batch, -1)
        places = jnp.argsort(columns, axis=1)[:, :count]
        x = jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])
        return jnp.take_along_axis(x, places.reshape(*places.shape, *(1,) * (x.ndim - 2)), axis=1)


def measure_chunks(
    layout: str, count: int, at_a_time: int, max_response: int, packed_length: int
) -> tuple[int, int, int]:
    """Computes the sizes of chunks of nearly `at_a_time` candidates, as few as possible.

    Args:
        layout: "packed" or "rectangle".
        count: number of candidates, C.
        at_a_time: the most candidates of a chunk.
        max_response: R, at least the longest response.
        packed_length: S, at least the sum of any row's lengths.

    Returns:
        Number of chunks m, candidates of each K, and room for the responses of any, in tokens.
    """
    num_chunks = -(-count // at_a_time)
    size = -(-count // num_chunks)
    room = size * max_response
    if layout != "rectangle":
        room = min(room, packed_length // num_chunks + max_response)
    return num_chunks, size, room


def deal(
    layout: str,
    lengths: Int[Array, "B C"],
    at_a_time: int,
    max_response: int | None,
    packed_length: int,
) -> Chunks:
    """Divides candidates into chunks.

    A rectangle's are dealt in order. Packed ones are dealt out by length, the longest first, like
    cards: m chunks of a row with S tokens then have at most S / m + R tokens each, since a chunk's
    share of every round but the first is at most the mean of the round before.

    Args:
        layout: see `measure_chunks`.
        lengths: lengths of the candidates; 0 where there is none.
        at_a_time: see `measure_chunks`.
        max_response: see `measure_chunks`; static.
        packed_length: see `measure_chunks`; static.

    Raises:
        ValueError: no `max_response`.
    """
    if max_response is None:
        raise ValueError("candidates in chunks need max_response")
    batch, count = lengths.shape
    num_chunks, size, room = measure_chunks(layout, count, at_a_time, max_response, packed_length)
    is_rectangle = layout == "rectangle"
    in_order = jnp.broadcast_to(jnp.arange(count), lengths.shape)
    order = in_order if is_rectangle else jnp.argsort(-lengths, axis=1)
    order = jnp.pad(order, ((0, 0), (0, num_chunks * size - count)), constant_values=count)
    if is_rectangle:
        columns = order.reshape(batch, num_chunks, size).transpose(1, 0, 2)
    else:
        columns = order.reshape(batch, size, num_chunks).transpose(2, 0, 1)
    return Chunks(columns, room)


def lay_out_picks(
    layout: str,
    responses: Int[Array, "B S"],
    response_lengths: Int[Array, "B C"],
    picks: Picks,
    max_response: int | None,
) -> tuple[Groups, Int[Array, "B n"]]:
    """Takes picked responses out of packed ones and lays them out; also returns their lengths."""
    picked, lengths = gather_candidates(responses, response_lengths, picks)
    return lay_out(layout, picked, lengths, max_response), lengths


def gather_lengths(response_lengths: Int[Array, "B C"], picks: Picks) -> Int[Array, "B n"]:
    """Looks up the lengths of picked responses; 0 where a pick is not valid."""
    lengths = jnp.take_along_axis(response_lengths, picks.candidate_ids, axis=1)
    return jnp.where(picks.valid, lengths, 0)


def gather_candidates(
    responses: Int[Array, "B S"], response_lengths: Int[Array, "B C"], picks: Picks
) -> tuple[Int[Array, "B packed_length"], Int[Array, "B n"]]:
    """Takes the picked responses of packed ones and packs them again, padded right with 0.

    Returns:
        The packed responses, and their lengths.
    """
    lengths = gather_lengths(response_lengths, picks)
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
