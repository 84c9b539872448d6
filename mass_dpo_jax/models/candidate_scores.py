"""From final hidden states of responses to the log-probability and the feature of each of them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from mass_dpo_jax.models.decoder import Decoder
from mass_dpo_jax.models.interfaces import ScoringRecord
from mass_dpo_jax.models.logprobs import compute_token_logps
from mass_dpo_jax.models.precomputed import use_precomputed
from mass_dpo_jax.models.response_layout import Groups


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
        return compute_token_logps(
            previous, weights, targets, max_logits, sharding, model.config.logit_soft_cap
        )

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
