"""Attention in plain operations: causal text, and many responses after one prompt.

Scores and softmax are float32; the products run in the compute type. Keys and values are never
repeated for grouped heads: queries are split into G key/value heads of Q queries each instead.
Suffixes of names are shapes:

    B  examples                 H  query heads                        P  tokens of a prompt
    T  tokens in general        G  key/value heads                    E  groups of responses
    d  size of a head           Q  query heads of each, H / G         W  tokens of a group
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from mass_dpo_jax.models.interfaces import NO_LIMITS, Attend, Attention, Limits

# Finite, so that a query without keys gives a mean of garbage and not NaN.
MASKED = -1e30


def attend_causally(
    query_BTHd: Float[Array, "B T H d"],
    key_BTGd: Float[Array, "B T G d"],
    value_BTGd: Float[Array, "B T G d"],
    layer_input: Any = None,
    limits: Limits = NO_LIMITS,
    /,
) -> tuple[Float[Array, "B T H d"], tuple[Array, Array]]:
    """Lets every token see itself and those before it; keeps (keys, values). An `Attend`.

    Right padding needs no mask: no real token comes after it.
    """
    del layer_input
    batch, length = query_BTHd.shape[:2]
    query_BGEQWd, key_BGEWd, value_BGEWd = _put_heads_first(query_BTHd, key_BTGd, value_BTGd, 1)
    scores_BGEQWW = score("bgeqwd,bgesd->bgeqws", query_BGEQWd, key_BGEWd, limits)
    visible_WW = see_causally(length, limits)[(None,) * 4]
    scores_BGEQWW = jnp.where(visible_WW, scores_BGEQWW, MASKED)
    attended = _weigh_values([scores_BGEQWW], [value_BGEWd], ["bgeqws,bgesd->bgeqwd"])
    attended_BTHd = _put_tokens_first(attended.astype(query_BTHd.dtype), batch, length)
    return attended_BTHd, (key_BTGd, value_BTGd)


def see_causally(length: int, limits: Limits) -> Bool[Array, "T T"]:
    """Returns which tokens of a text each of them sees: itself and those before it."""
    visible = jnp.tri(length, dtype=bool)
    if limits.reach(length):
        return visible
    places = jnp.arange(length)
    return visible & limits.show(places[:, None] - places[None])


def see_prompt(
    prompt_size: int,
    prompt_lengths_B: Int[Array, " B"],
    offsets_BEW: Int[Array, "B E W"],
    limits: Limits,
) -> Bool[Array, "B E W P"]:
    """Returns which tokens of the prompt each token of a response sees; E = W = 1: all the same."""
    places_111P = jnp.arange(prompt_size)[None, None, None]
    lengths_B111 = prompt_lengths_B[:, None, None, None]
    real_B11P = places_111P < lengths_B111
    if limits.reach(prompt_size + offsets_BEW.shape[-1]):
        return real_B11P
    # Positions go on from the prompt's own length, wherever the token lies in its group.
    return real_B11P & limits.show(lengths_B111 + offsets_BEW[..., None] - places_111P)


def see_own(segments_BEW: Int[Array, "B E W"], limits: Limits) -> Bool[Array, "B E W W"]:
    """Returns which tokens of its group each one sees: those of its own segment, not after it.

    A segment's tokens lie side by side, so they are as far apart as their positions.
    """
    same_BEWW = segments_BEW[..., :, None] == segments_BEW[..., None, :]
    return same_BEWW & see_causally(segments_BEW.shape[-1], limits)[None, None]


def make_response_attend(
    prompt_lengths_B: Int[Array, " B"],
    segments_BEW: Int[Array, "B E W"],
    offsets_BEW: Int[Array, "B E W"],
    /,
) -> Attend:
    """Makes an `Attend` of responses to prompts.

    Its `layer_input` is the prompts' (keys, values) [B, P, G, d]. One softmax runs over both the
    prompt's keys and the response's own. Nothing is kept.

    Args:
        prompt_lengths_B: number of real tokens of each prompt.
        segments_BEW: index of the response that a token belongs to. Tokens see the prompt and what
            precedes them within their group *and* segment.
        offsets_BEW: index of a token within its response, which begins behind the prompt.
    """

    def attend(
        query_BTHd: Array, key_BTGd: Array, value_BTGd: Array, layer_input: Any, limits: Limits, /
    ) -> tuple[Array, None]:
        batch, length = query_BTHd.shape[:2]
        groups = segments_BEW.shape[1]
        prompt_key_BGPd, prompt_value_BGPd = (jnp.moveaxis(x, 2, 1) for x in layer_input)
        query_BGEQWd, key_BGEWd, value_BGEWd = _put_heads_first(
            query_BTHd, key_BTGd, value_BTGd, groups
        )

        prompt_scores_BGEQWP = score("bgeqwd,bgpd->bgeqwp", query_BGEQWd, prompt_key_BGPd, limits)
        visible_BEWP = see_prompt(prompt_key_BGPd.shape[2], prompt_lengths_B, offsets_BEW, limits)
        prompt_scores_BGEQWP = jnp.where(
            visible_BEWP[:, None, :, None], prompt_scores_BGEQWP, MASKED
        )

        response_scores_BGEQWW = score("bgeqwd,bgesd->bgeqws", query_BGEQWd, key_BGEWd, limits)
        response_scores_BGEQWW = jnp.where(
            see_own(segments_BEW, limits)[:, None, :, None], response_scores_BGEQWW, MASKED
        )

        attended = _weigh_values(
            [prompt_scores_BGEQWP, response_scores_BGEQWW],
            [prompt_value_BGPd, value_BGEWd],
            ["bgeqwp,bgpd->bgeqwd", "bgeqws,bgesd->bgeqwd"],
        )
        return _put_tokens_first(attended.astype(query_BTHd.dtype), batch, length), None

    return attend


def make_shared_prefix_attend(
    attention: Attention,
    prompt_size: int,
    prompt_lengths_B: Int[Array, " B"],
    segments_BEW: Int[Array, "B E W"],
    offsets_BEW: Int[Array, "B E W"],
) -> Attend:
    """Makes an `Attend` of P + E * W tokens: a prompt, causal, and groups of responses to it.

    Args:
        attention: the implementation.
        prompt_size: P, static.
        prompt_lengths_B: see `make_response_attend`.
        segments_BEW: see `make_response_attend`.
        offsets_BEW: see `make_response_attend`.
    """
    attend_responses = attention.make_response_attend(prompt_lengths_B, segments_BEW, offsets_BEW)

    def attend(
        query_BTHd: Array, key_BTGd: Array, value_BTGd: Array, layer_input: Any, limits: Limits, /
    ) -> tuple[Array, None]:
        del layer_input
        arrays = query_BTHd, key_BTGd, value_BTGd
        query, key, value = (x[:, :prompt_size] for x in arrays)
        prompt_BPHd, keys_values = attention.attend_causally(query, key, value, None, limits)
        query, key, value = (x[:, prompt_size:] for x in arrays)
        responses, _ = attend_responses(query, key, value, keys_values, limits)
        return jnp.concatenate([prompt_BPHd, responses], axis=1), None

    return attend


def score(spec: str, queries: Array, keys: Array, limits: Limits) -> Float[Array, "*scores"]:
    """Computes float32 scores of queries and keys by an einsum, and caps them softly."""
    scores = einsum_f32(spec, queries, keys)
    if limits.soft_cap is None:
        return scores
    return cap_softly(scores, limits.soft_cap)


def cap_softly(x: Array, cap: float) -> Array:
    """Returns cap * tanh(x / cap): nearly x where it is small, never beyond +-cap."""
    return cap * jnp.tanh(x / cap)


def _weigh_values(scores: list[Array], values: list[Array], products: list[str]) -> Array:
    """Applies one softmax over the last axes of all `scores` [B, G, E, Q, W, keys] to `values`."""
    # The maximum cancels in the quotient, so no gradient runs through it.
    highest = functools.reduce(jnp.maximum, [s.max(axis=-1, keepdims=True) for s in scores])
    highest = jax.lax.stop_gradient(highest)
    weights = [jnp.exp(s - highest) for s in scores]
    total = functools.reduce(jnp.add, [w.sum(axis=-1, keepdims=True) for w in weights])
    parts = [
        einsum_f32(product, w.astype(v.dtype), v)
        for product, w, v in zip(products, weights, values, strict=True)
    ]
    return functools.reduce(jnp.add, parts) / total


def _put_heads_first(
    query_BTHd: Array, key_BTGd: Array, value_BTGd: Array, groups: int
) -> tuple[Array, Array, Array]:
    """Reshapes queries to [B, G, E, Q, W, d], keys and values to [B, G, E, W, d].

    In this order every product here is a batched matrix product as it stands, and the scores, by
    far the largest arrays, are never transposed.
    """
    batch, tokens, kv_heads, size = key_BTGd.shape
    shape = batch, groups, tokens // groups, kv_heads
    query_BGEQWd = query_BTHd.reshape(*shape, -1, size).transpose(0, 3, 1, 4, 2, 5)
    key_BGEWd, value_BGEWd = (
        x.reshape(*shape, size).transpose(0, 3, 1, 2, 4) for x in (key_BTGd, value_BTGd)
    )
    return query_BGEQWd, key_BGEWd, value_BGEWd


def _put_tokens_first(x_BGEQWd: Array, batch: int, length: int) -> Array:
    """Reshapes to [B, E * W, G * Q, d]."""
    return x_BGEQWd.transpose(0, 2, 4, 1, 3, 5).reshape(batch, length, -1, x_BGEQWd.shape[-1])


def einsum_f32(spec: str, a: Array, b: Array) -> Float[Array, "*result"]:
    """Computes an einsum with a float32 result, whose backward products run in the operands' type.

    JAX's own rule would multiply a float32 cotangent with a bfloat16 operand, which accelerators
    do at float32 speed.
    """
    if a.dtype == jnp.float32:
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
    return _einsum_mixed(spec, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum_mixed(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _einsum_mixed_fwd(spec: str, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return _einsum_mixed(spec, a, b), (a, b)


def _einsum_mixed_bwd(
    spec: str, operands: tuple[Array, Array], cotangent: Array
) -> tuple[Array, ...]:
    _, vjp = jax.vjp(functools.partial(jnp.einsum, spec), *operands)
    return vjp(cotangent.astype(operands[0].dtype))


_einsum_mixed.defvjp(_einsum_mixed_fwd, _einsum_mixed_bwd)
