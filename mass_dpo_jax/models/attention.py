"""What attends to what: plain causal text, and many responses behind one prompt.

Scores and softmax are float32; the products run in the compute type. Keys and values are never
repeated for grouped heads: queries are split into [KV heads, queries per KV head] instead.
Everywhere below k is a KV head, m a query head of it, g a group of responses, d the head's size.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from mass_dpo_jax.models.decoder import Attend

# Finite, so that a row with nothing to see gives a mean of garbage and not NaN.
MASKED = -1e30


class Attention(Protocol):
    """How to compute it: this module, or a `Fused` of fused_attention.py."""

    def causal(
        self, query: jax.Array, key: jax.Array, value: jax.Array, extra: Any = None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]: ...

    def behind_prompt(self, prompt_lengths: jax.Array, segments: jax.Array) -> Attend: ...


def causal(
    query: jax.Array, key: jax.Array, value: jax.Array, extra: Any = None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Every token sees itself and those before it; keeps (keys, values). An `Attend`.

    Right padding needs no mask: no real token comes after it.
    """
    del extra
    batch, length = query.shape[:2]
    grouped_query, grouped_key, grouped_value = _heads_first(query, key, value, groups=1)
    scores = einsum_f32("bkgmld,bkgsd->bkgmls", grouped_query, grouped_key)
    scores = jnp.where(jnp.tri(length, dtype=bool), scores, MASKED)
    seen = _attend([scores], [grouped_value], ["bkgmls,bkgsd->bkgmld"])
    return _tokens_first(seen.astype(query.dtype), batch, length), (key, value)


def behind_prompt(prompt_lengths: jax.Array, segments: jax.Array) -> Attend:
    """Responses to prompts whose (keys, values) [B, P, KV, K] are `extra`; keeps nothing.

    One softmax runs over both the prompt's keys and the response's own.

    Args:
      prompt_lengths: int32 [B], real tokens of each prompt.
      segments: int32 [B, G, L]: which response a token belongs to. Tokens see the prompt and what
        precedes them within their group *and* segment.
    """

    def attend(
        query: jax.Array, key: jax.Array, value: jax.Array, extra: Any
    ) -> tuple[jax.Array, None]:
        batch, length = query.shape[:2]
        groups, group_length = segments.shape[1:]
        prompt_key, prompt_value = (jnp.moveaxis(x, 2, 1) for x in extra)  # [B, KV, P, K]
        q, k, v = _heads_first(query, key, value, groups)

        to_prompt = einsum_f32("bkgmld,bkpd->bkgmlp", q, prompt_key)
        real = jnp.arange(prompt_key.shape[2])[None] < prompt_lengths[:, None]  # [B, P]
        to_prompt = jnp.where(real[:, None, None, None, None, :], to_prompt, MASKED)

        to_own = einsum_f32("bkgmld,bkgsd->bkgmls", q, k)
        same = segments[..., :, None] == segments[..., None, :]  # [B, G, L, L]
        same &= jnp.tri(group_length, dtype=bool)[None, None]
        to_own = jnp.where(same[:, None, :, None], to_own, MASKED)

        seen = _attend(
            [to_prompt, to_own],
            [prompt_value, v],
            ["bkgmlp,bkpd->bkgmld", "bkgmls,bkgsd->bkgmld"],
        )
        return _tokens_first(seen.astype(query.dtype), batch, length), None

    return attend


def shared_prefix(
    attention: Attention, prompt_size: int, prompt_lengths: jax.Array, segments: jax.Array
) -> Attend:
    """The first `prompt_size` tokens are the prompt, causal, the rest groups of responses to it.

    Args:
      attention: how.
      prompt_size: P, static.
      prompt_lengths, segments: see `behind_prompt`.

    Returns an `Attend` for [B, P + G * L] tokens that keeps nothing.
    """
    responses = attention.behind_prompt(prompt_lengths, segments)

    def attend(
        query: jax.Array, key: jax.Array, value: jax.Array, extra: Any
    ) -> tuple[jax.Array, None]:
        del extra
        q, k, v = (x[:, :prompt_size] for x in (query, key, value))
        prompt, keys_values = attention.causal(q, k, v)
        q, k, v = (x[:, prompt_size:] for x in (query, key, value))
        response, _ = responses(q, k, v, keys_values)
        return jnp.concatenate([prompt, response], axis=1), None

    return attend


def _attend(scores: list[jax.Array], values: list[jax.Array], products: list[str]) -> jax.Array:
    """One softmax over the last axes of all `scores` [b, k, g, m, l, keys], applied to `values`."""
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


def _heads_first(
    query: jax.Array, key: jax.Array, value: jax.Array, groups: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[B, G * L, heads, K] -> queries [B, KV, G, M, L, K], keys and values [B, KV, G, L, K].

    In this order every product below is a batched matrix product as it stands, and the scores,
    by far the largest arrays, are never transposed.
    """
    batch, tokens, kv_heads, size = key.shape
    length = tokens // groups
    query = query.reshape(batch, groups, length, kv_heads, -1, size).transpose(0, 3, 1, 4, 2, 5)
    key, value = (
        x.reshape(batch, groups, length, kv_heads, size).transpose(0, 3, 1, 2, 4)
        for x in (key, value)
    )
    return query, key, value


def _tokens_first(seen: jax.Array, batch: int, length: int) -> jax.Array:
    """[B, KV, G, M, L, K] -> [B, G * L, KV * M, K]."""
    return seen.transpose(0, 2, 4, 1, 3, 5).reshape(batch, length, -1, seen.shape[-1])


def einsum_f32(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum` with a float32 result, whose backward products run in the operands' type.

    JAX's own rule would multiply a float32 cotangent with a bfloat16 operand, which accelerators
    do at float32 speed.
    """
    if a.dtype == jnp.float32:
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
    return _einsum_mixed(spec, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum_mixed(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _einsum_mixed_fwd(
    spec: str, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _einsum_mixed(spec, a, b), (a, b)


def _einsum_mixed_bwd(
    spec: str, operands: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, ...]:
    _, vjp = jax.vjp(functools.partial(jnp.einsum, spec), *operands)
    return vjp(cotangent.astype(operands[0].dtype))


_einsum_mixed.defvjp(_einsum_mixed_fwd, _einsum_mixed_bwd)
