"""The criteria that come with the package, each from the pool of one prompt.

They see features through one Gram matrix per prompt, so that is all that has to be kept of features
that are frozen. They are compared on language models in docs/results.md.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from mass_dpo_jax.selection import designs
from mass_dpo_jax.selection.designs import Design, Selection
from mass_dpo_jax.selection.registry import Pool, Settings, criterion, design, in_order


@design(
    "pool_fisher",
    summary="those with the most Fisher information: greedily, so that the log-determinant of "
    "ridge * I + sum_i p_i v_i v_i' over the selected set is large, where p is the softmax of the "
    "pool's rewards and v_i a negative's pooled hidden state minus the pool's weighted mean "
    "(MASS-DPO's Algorithm 1)",
)
def pool_fisher(pool: Pool, settings: Settings) -> Design:
    """Algorithm 1 of MASS-DPO: D-optimal design on the pool's Fisher information.

    v_i = sqrt(p_i) (h_i - sum_j p_j h_j) with p the softmax of the scores over the valid pool. In
    the paper's terms h_i is phi_i: the chosen response's feature is in every phi and in their mean,
    and cancels. With `fisher_scale` the factor beta^2 (1 - sigma(Z)) of Eq. 11 multiplies v v',
    where Z = -log sum_i exp(score_i) over the pool.
    """
    assert pool.gram is not None and pool.scores is not None
    weights = pool_weights(pool.scores, pool.mask)
    return Design(_scaled(designs.weighted_gram(pool.gram[1:, 1:], weights), pool, settings))


@design(
    "contrast",
    summary="selected so that the log-determinant of ridge * I + sum_i p_i v_i v_i' over the "
    "selected set is large, where p is the softmax of the pool's rewards and v_i a negative's "
    "pooled hidden state minus that of the chosen response",
)
def contrast(pool: Pool, settings: Settings) -> Design:
    """As `pool_fisher`, with v_i = sqrt(p_i) (h_i - h_chosen): not centred, so the chosen response
    counts. sum_i v_i v_i' is the pool's Cov_p(phi) + phi_bar phi_bar', which is Lemma 4.2's Hessian
    with the dropped term put back whole."""
    assert pool.gram is not None and pool.scores is not None
    roots = jnp.sqrt(pool_weights(pool.scores, pool.mask))
    products = designs.from_origin(pool.gram, 0)[1:, 1:]
    return Design(_scaled(roots[:, None] * roots[None, :] * products, pool, settings))


@design(
    "set_fisher",
    summary="selected so that the log-determinant of ridge * I + the exact Hessian of the loss on "
    "the selected set is large",
)
def set_fisher(pool: Pool, settings: Settings) -> Design:
    """D-optimal design on the exact Hessian of the loss that is trained, on T = S + {chosen}.

    That Hessian is beta^2 Cov_q(h), q the softmax of the rewards over T: Lemma 4.2 with nothing
    dropped. The value of S is log det(I + Cov_q(h) / ridge), by the (n + 1) x (n + 1) products of
    sqrt(q_i) (h_i - sum_T q_j h_j). q depends on S, so the value may fall as S grows, and greedy
    sets have no guarantee. With `fisher_scale` beta^2 multiplies the covariance.
    """
    assert pool.gram is not None and pool.scores is not None
    gram = pool.gram / settings.ridge * (settings.beta**2 if settings.fisher_scale else 1.0)
    rewards = jnp.pad(pool.scores.astype(jnp.float32), (1, 0))

    def value(indices: jax.Array, valid: jax.Array) -> jax.Array:
        everyone = jnp.pad(indices + 1, (1, 0))
        present = jnp.pad(valid, (1, 0), constant_values=True)
        share = pool_weights(rewards[everyone], present)
        return designs.log_det(designs.weighted_gram(gram[everyone[:, None], everyone], share))

    everyone = pool_weights(rewards, jnp.pad(pool.mask, (1, 0), constant_values=True))
    return Design(designs.weighted_gram(gram, everyone), value)


@criterion("hardest", needs_scoring=True, summary="those of the largest reward")
def hardest(pool: Pool, n: int, settings: Settings) -> Selection:
    """The n negatives with the largest scores."""
    del settings
    assert pool.scores is not None
    scores = jnp.where(jnp.isnan(pool.scores), -jnp.inf, pool.scores)
    # Masked ones after the valid ones, whatever those score.
    order = jnp.lexsort((jnp.arange(scores.shape[0]), -scores, ~pool.mask))
    return in_order(order, pool.mask, n)


@criterion("sampled", needs_scoring=True, weighted=True)
def sampled(pool: Pool, n: int, settings: Settings) -> Selection:
    """n draws from the pool weights p, weighted for an unbiased estimate of sum_i p_i f(i).

    With `replacement`: n independent draws, each with weight 1/n; a candidate drawn k times comes
    once, with weight k/n. Without: the n largest of log p_i + Gumbel noise, and with kappa the
    largest of the others, candidate i has weight p_i / (1 - exp(-exp(log p_i - kappa))), its
    probability to be drawn given kappa: see Kool, van Hoof and Welling, "Stochastic Beams and Where
    to Find Them", 2019. A pool of n or fewer then gives the sum itself.
    """
    assert pool.scores is not None
    size = pool.mask.shape[0]
    logs = jax.nn.log_softmax(jnp.where(pool.mask, pool.scores.astype(jnp.float32), -jnp.inf))
    logs = jnp.where(pool.mask, logs, -jnp.inf)
    # As in `random`: a candidate's noise depends on the key and its index only.
    noise = jax.vmap(
        lambda i: jax.random.gumbel(jax.random.fold_in(pool.key, i), (n,), jnp.float32)
    )(jnp.arange(size))
    if settings.replacement:
        drawn = jnp.argmax(logs[:, None] + noise, axis=0)
        counts = jnp.zeros(size, jnp.int32).at[drawn].add(pool.mask[drawn])
        order = jnp.argsort(-counts, stable=True)
        weights = counts / n
        count = jnp.sum(counts > 0)
    else:
        perturbed = logs + noise[:, 0]
        values, order = lax.top_k(jnp.pad(perturbed, (0, 1), constant_values=-jnp.inf), size + 1)
        order = order[:size]
        kappa = values[min(n, size)]
        # p / (1 - exp(-exp(x))) with x = log p - kappa is exp(kappa) where exp(x) vanishes, but
        # with kappa = -inf, where everyone is drawn, it is p.
        exponential = jnp.exp(jnp.minimum(logs - kappa, 80.0))
        included = -jnp.expm1(-exponential)
        weights = jnp.where(exponential > 1e-30, jnp.exp(logs) / included, jnp.exp(kappa))
        weights = jnp.where(jnp.isneginf(kappa), jnp.exp(logs), weights)
        count = jnp.sum(pool.mask)
    chosen = in_order(order, jnp.arange(size) < count, n)
    return chosen._replace(weights=jnp.where(chosen.valid, weights[chosen.indices], 0.0))


@criterion("random", needs_scoring=False, summary="at random")
def random(pool: Pool, n: int, settings: Settings) -> Selection:
    """n distinct negatives, uniformly. The same key and negatives give the same picks, however far
    the pool is padded: the number a candidate draws depends on the key and its index only."""
    del settings
    size = pool.mask.shape[0]
    draws = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(pool.key, i)))(
        jnp.arange(size)
    )
    _, order = lax.top_k(jnp.where(pool.mask, draws, -1.0), size)
    return in_order(order, pool.mask, n)


@criterion("all", needs_scoring=False, summary="all of the pool")
def every(pool: Pool, n: int, settings: Settings) -> Selection:
    """Every negative, in order; n must be at least N."""
    del settings
    if n < pool.mask.shape[0]:
        raise ValueError(f"criterion all needs n >= N = {pool.mask.shape[0]}, got n = {n}")
    return in_order(jnp.argsort(~pool.mask, stable=True), pool.mask, n)


def pool_weights(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax of the scores over the valid ones: [N], 0 where masked, all 0 if none is."""
    scores = jnp.where(mask, scores.astype(jnp.float32), 0.0)
    weights = jnp.where(mask, jnp.exp(scores - jnp.max(scores, where=mask, initial=-jnp.inf)), 0.0)
    return weights / jnp.maximum(jnp.sum(weights), 1.0)  # the sum is >= 1 unless all are masked


def pool_loss(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """The Plackett-Luce loss -log sigma(Z) on the whole pool, Z = -log sum_i exp(score_i)."""
    scores = jnp.where(mask, scores.astype(jnp.float32), -jnp.inf)
    return jax.nn.softplus(jax.nn.logsumexp(scores, axis=-1))


def fisher_factor(scores: jax.Array, mask: jax.Array, beta: float) -> jax.Array:
    """beta^2 (1 - sigma(Z)) with Z = -log sum_i exp(score_i) over the valid pool: a scalar.

    1 - sigma(Z) is the probability that the model does not rank the chosen response first. At the
    reference it is N / (N + 1): with beta = 0.1 and N = 19 the factor is 0.0095.
    """
    scores = jnp.where(mask, scores.astype(jnp.float32), -jnp.inf)
    return beta**2 * jax.nn.sigmoid(jax.nn.logsumexp(scores))


def _scaled(products: jax.Array, pool: Pool, settings: Settings) -> jax.Array:
    """G of an additive design, 0 where masked."""
    assert pool.scores is not None
    gram = jnp.where(pool.mask[:, None] & pool.mask[None, :], products / settings.ridge, 0.0)
    if settings.fisher_scale:
        gram *= fisher_factor(pool.scores, pool.mask, settings.beta)
    return gram
