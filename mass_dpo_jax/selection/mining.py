"""Negatives from a whole catalogue: the best-scored items of each prompt, and draws among them.

The scores of M prompts and N items are never together in memory: a block of prompts meets a block
of items, and only the best K of each prompt are kept. Suffixes of names are shapes:

    B  prompts of a block     N  items of the catalogue     I  items of a block
    K  items kept, best first
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from mass_dpo_jax.selection.draws import hold_tournament, inclusion_probabilities

ITEMS_AT_A_TIME = 16384
DRAWS = ("softmax", "uniform", "top")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Which items may be negatives of a prompt whose chosen response has the score c.

    Attributes:
        first: the first rank allowed, from 0; positives (a prompt's chosen responses and the items
            of its history) have no rank.
        last: the rank after the last one allowed.
        margin: the score must be at most c - margin; None: anything.
        relative_margin: the score must be at most c - relative_margin |c|; None: anything.
        max_score: the score must be at most this; None: anything.
    """

    first: int
    last: int
    margin: float | None = None
    relative_margin: float | None = None
    max_score: float | None = None

    @property
    def need_chosen(self) -> bool:
        """Whether the chosen response's score matters."""
        return self.margin is not None or self.relative_margin is not None

    def allow(self, scores: np.ndarray, chosen: float | None) -> np.ndarray:
        """Returns which scores are low enough, bool, for a chosen response with its score."""
        ceiling = np.inf if self.max_score is None else self.max_score
        if chosen is not None and self.margin is not None:
            ceiling = min(ceiling, chosen - self.margin)
        if chosen is not None and self.relative_margin is not None:
            ceiling = min(ceiling, chosen - self.relative_margin * abs(chosen))
        return scores <= ceiling


def rank_items(
    score_block: Callable[[slice], Array], valid: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the best k items of each prompt, best first; of equal scores the lower index first.

    Args:
        score_block: from a range of items to their scores float32 [B, I].
        valid: bool [N], which items may be ranked.
        k: the number to keep; where fewer are valid, the last ones have the score -inf.

    Returns:
        Their scores float32 [B, K] and indices int32 [B, K], K = min(k, N).
    """
    total = len(valid)
    k = min(k, total)
    best: tuple[Array, Array] | None = None
    for start in range(0, total, ITEMS_AT_A_TIME):
        part = slice(start, min(start + ITEMS_AT_A_TIME, total))
        scores = score_block(part)
        scores = jnp.where(jnp.asarray(valid[part]), scores, -jnp.inf)
        best = _merge(best, scores, jnp.int32(start), k)
    assert best is not None
    return np.asarray(best[0]), np.asarray(best[1])


@functools.partial(jax.jit, static_argnums=3)
def _merge(
    best: tuple[Array, Array] | None, scores_BI: Array, start: Array, k: int
) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    indices_BI = jnp.broadcast_to(
        start + jnp.arange(scores_BI.shape[1], dtype=jnp.int32), scores_BI.shape
    )
    if best is not None:  # The earlier ones first: top_k takes the first of equal scores.
        scores_BI = jnp.concatenate([best[0], scores_BI], axis=1)
        indices_BI = jnp.concatenate([best[1], indices_BI], axis=1)
    scores_BK, places_BK = lax.top_k(scores_BI, min(k, scores_BI.shape[1]))
    return scores_BK, jnp.take_along_axis(indices_BI, places_BK, axis=1)


@functools.partial(jax.jit, static_argnums=(2, 3))
def draw_items(
    scores_BK: Array, mask_BK: Array, n: int, how: str, temperature: Array, keys_B: Array
) -> tuple[Array, Array, Array]:
    """Draws n different items for each prompt.

    `softmax` and `uniform` are pivotal draws from p = softmax(scores / temperature) or p equal for
    all items that may be drawn: an item is drawn with the probability pi and then has the weight
    p / pi. So the mean over draws of the weighted sum of any f is sum_i p_i f(i), and that of the
    sum of f(i) / pi_i over the drawn items is the sum of f over all items with p > 0.

    Args:
        scores_BK: scores, best first.
        mask_BK: bool, which items may be drawn.
        n: number of items.
        how: one of `DRAWS`; `top` takes the first n, with pi = 1 and equal weights.
        temperature: divides the scores of `softmax`.
        keys_B: a key for each prompt.

    Returns:
        drawn, bool [B, K]; pi, float32 [B, K]; and weights, float32 [B, K], 0 where not drawn.
    """
    if how == "top":
        drawn_BK = mask_BK & (jnp.cumsum(mask_BK, axis=1) <= n)
        share_B1 = 1 / jnp.maximum(drawn_BK.sum(1, keepdims=True), 1)
        return drawn_BK, drawn_BK.astype(jnp.float32), jnp.where(drawn_BK, share_B1, 0.0)
    logits_BK = scores_BK / temperature if how == "softmax" else jnp.zeros_like(scores_BK)

    def draw(logits: Array, mask: Array, key: Array) -> tuple[Array, Array, Array]:
        log_p = jnp.where(mask, jax.nn.log_softmax(jnp.where(mask, logits, -jnp.inf)), -jnp.inf)
        pi, weights = inclusion_probabilities(log_p, n)
        drawn = hold_tournament(pi, mask, key)
        return drawn, pi, jnp.where(drawn, weights, 0.0)

    return jax.vmap(draw)(logits_BK, mask_BK, keys_B)
