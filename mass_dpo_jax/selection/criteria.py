"""The built-in criteria, each on the pool of one example.

They see features only through the example's Gram matrix, so of frozen features nothing else has to
be kept. docs/results.md compares them on language models.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mass_dpo_jax.selection.draws import DRAWS, deal_uniforms
from mass_dpo_jax.selection.gram import from_origin, log_det, weighted_gram
from mass_dpo_jax.selection.registry import Settings, criterion, design, in_order
from mass_dpo_jax.selection.types import Design, Pool, Selection


@design(
    "pool_fisher",
    summary="those with the most Fisher information: greedily, so that the log-determinant of "
    "ridge * I + sum_i p_i v_i v_i' over the selected set is large, where p is the softmax of the "
    "pool's rewards and v_i a negative's pooled hidden state minus the pool's weighted mean "
    "(MASS-DPO's Algorithm 1)",
)
def pool_fisher(pool: Pool, settings: Settings) -> Design:
    """Makes the design of MASS-DPO's Algorithm 1: D-optimal on the pool's Fisher information.

    v_i = sqrt(p_i) (h_i - sum_j p_j h_j) with p the softmax of the scores over the valid pool. In
    the paper's terms h_i is phi_i: the chosen response's feature is in every phi and in their mean,
    and cancels. With `fisher_scale` the factor beta^2 (1 - sigma(Z)) of Eq. 11 multiplies v v',
    where Z = -log sum_i exp(score_i) over the pool.
    """
    assert pool.gram is not None and pool.scores is not None
    weights_N = pool_weights(pool.scores, pool.mask)
    return Design(_scale(weighted_gram(pool.gram[1:, 1:], weights_N), pool, settings))


@design(
    "contrast",
    summary="selected so that the log-determinant of ridge * I + sum_i p_i v_i v_i' over the "
    "selected set is large, where p is the softmax of the pool's rewards and v_i a negative's "
    "pooled hidden state minus that of the chosen response",
)
def contrast(pool: Pool, settings: Settings) -> Design:
    """Makes a design as `pool_fisher` does, with v_i = sqrt(p_i) (h_i - h_chosen).

    It is not centred, so the chosen response counts. sum_i v_i v_i' is the pool's
    Cov_p(phi) + phi_bar phi_bar': Lemma 4.2's Hessian with the dropped term put back whole.
    """
    assert pool.gram is not None and pool.scores is not None
    roots_N = jnp.sqrt(pool_weights(pool.scores, pool.mask))
    products_NN = from_origin(pool.gram, 0)[1:, 1:]
    return Design(_scale(roots_N[:, None] * roots_N[None, :] * products_NN, pool, settings))


@design(
    "set_fisher",
    summary="selected so that the log-determinant of ridge * I + the exact Hessian of the loss on "
    "the selected set is large",
)
def set_fisher(pool: Pool, settings: Settings) -> Design:
    """Makes a D-optimal design on the exact Hessian of the trained loss, on T = S + {chosen}.

    That Hessian is beta^2 Cov_q(h), q the softmax of the rewards over T: Lemma 4.2 with nothing
    dropped. The value of S is log det(I + Cov_q(h) / ridge), by the (n + 1) x (n + 1) products of
    sqrt(q_i) (h_i - sum_T q_j h_j). q depends on S, so the value may fall as S grows, and greedy
    sets have no guarantee. With `fisher_scale` beta^2 multiplies the covariance.
    """
    assert pool.gram is not None and pool.scores is not None
    gram_CC = pool.gram / settings.ridge * (settings.beta**2 if settings.fisher_scale else 1.0)
    rewards_C = jnp.pad(pool.scores.astype(jnp.float32), (1, 0))

    def value(indices: Array, valid: Array) -> Array:
        members = jnp.pad(indices + 1, (1, 0))
        present = jnp.pad(valid, (1, 0), constant_values=True)
        weights = pool_weights(rewards_C[members], present)
        return log_det(weighted_gram(gram_CC[members[:, None], members], weights))

    weights_C = pool_weights(rewards_C, jnp.pad(pool.mask, (1, 0), constant_values=True))
    return Design(weighted_gram(gram_CC, weights_C), value)


@criterion("hardest", needs_scoring=True, summary="those of the largest reward")
def hardest(pool: Pool, n: int, settings: Settings) -> Selection:
    """Selects the n negatives with the largest scores."""
    del settings
    return in_order(order_by_score(pool), pool.mask, n)


@criterion("sampled", needs_scoring=True, weighted=True)
def sampled(pool: Pool, n: int, settings: Settings) -> Selection:
    """Draws n by the pool weights p, weighted for an unbiased estimate of sum_i p_i f(i)."""
    draw = DRAWS[settings.draw](pool, n)
    order = jnp.argsort(~draw.drawn, stable=True)
    picks = in_order(order, jnp.arange(order.shape[0]) < draw.drawn.sum(), n)
    return picks._replace(weights=jnp.where(picks.valid, draw.weights[picks.indices], 0.0))


@criterion("random", needs_scoring=False, summary="at random")
def random(pool: Pool, n: int, settings: Settings) -> Selection:
    """Draws n distinct negatives uniformly.

    The same key and negatives give the same picks, however far the pool is padded: the number a
    candidate draws depends on the key and its index only.
    """
    del settings
    size = pool.mask.shape[0]
    numbers = deal_uniforms(pool.key, size)
    _, order = lax.top_k(jnp.where(pool.mask, numbers, -1.0), size)
    return in_order(order, pool.mask, n)


@criterion("all", needs_scoring=False, summary="all of the pool")
def every(pool: Pool, n: int, settings: Settings) -> Selection:
    """Selects every negative, in order; n must be at least N."""
    del settings
    if n < pool.mask.shape[0]:
        raise ValueError(f"criterion all needs n >= N = {pool.mask.shape[0]}, got n = {n}")
    return in_order(jnp.argsort(~pool.mask, stable=True), pool.mask, n)


def order_by_score(pool: Pool) -> Int[Array, " N"]:
    """Orders candidates by score, the largest first; NaN come last of the valid ones, then masked.

    Ties go to the lowest index.
    """
    assert pool.scores is not None
    scores = jnp.where(jnp.isnan(pool.scores), -jnp.inf, pool.scores)
    return jnp.lexsort((jnp.arange(scores.shape[0]), -scores, ~pool.mask))


def pool_weights(scores: Float[Array, " N"], mask: Bool[Array, " N"]) -> Float[Array, " N"]:
    """Computes the softmax of the valid scores: 0 where masked, all 0 if none is valid."""
    scores = jnp.where(mask, scores.astype(jnp.float32), 0.0)
    weights = jnp.where(mask, jnp.exp(scores - jnp.max(scores, where=mask, initial=-jnp.inf)), 0.0)
    return weights / jnp.maximum(jnp.sum(weights), 1.0)  # The sum is >= 1 unless all are masked.


def pool_loss(scores: Float[Array, "*B N"], mask: Bool[Array, "*B N"]) -> Float[Array, "*B"]:
    """Computes the loss -log sigma(Z) on the whole pool, with Z = -log sum_i exp(score_i)."""
    scores = jnp.where(mask, scores.astype(jnp.float32), -jnp.inf)
    return jax.nn.softplus(jax.nn.logsumexp(scores, axis=-1))


def fisher_factor(
    scores: Float[Array, " N"], mask: Bool[Array, " N"], beta: float
) -> Float[Array, ""]:
    """Computes beta^2 (1 - sigma(Z)), with Z = -log sum_i exp(score_i) over the valid pool.

    1 - sigma(Z) is the probability that the model does not rank the chosen response first. At the
    reference it is N / (N + 1): with beta = 0.1 and N = 19 the factor is 0.0095.
    """
    scores = jnp.where(mask, scores.astype(jnp.float32), -jnp.inf)
    return beta**2 * jax.nn.sigmoid(jax.nn.logsumexp(scores))


def _scale(products_NN: Array, pool: Pool, settings: Settings) -> Array:
    """Returns G of an additive design, 0 where masked."""
    assert pool.scores is not None
    present_NN = pool.mask[:, None] & pool.mask[None, :]
    gram_NN = jnp.where(present_NN, products_NN / settings.ridge, 0.0)
    if settings.fisher_scale:
        gram_NN *= fisher_factor(pool.scores, pool.mask, settings.beta)
    return gram_NN
