"""Preference losses on arrays of log-ratios, one value a prompt.

Every loss takes `log_ratios` [B, 1 + n]: the log-probability of each response under the policy
minus that under the reference, the chosen response in column 0. `valid` has the same shape and
says which entries count; the others may hold anything, NaN and infinities included, and reach
neither the values nor the gradients. A row whose chosen response is not valid, or that has no
valid negative, has loss 0 and gradient 0. Computed in float32, whatever the input's precision.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def plackett_luce(log_ratios: jax.Array, valid: jax.Array, beta: float) -> jax.Array:
    r"""Plackett-Luce loss: the chosen response is the first among itself and its negatives.

    .. math::
        \ell = -\log \frac{\exp(\beta r_0)}{\exp(\beta r_0) + \sum_{i \in S} \exp(\beta r_i)}
             = -\log \sigma\Bigl(-\log \sum_{i \in S} \exp\bigl(\beta (r_i - r_0)\bigr)\Bigr)

    with :math:`r` the log-ratios and :math:`S` the valid negatives. It is the loss of S-DPO, and of
    MASS-DPO on the set it selects. With one negative it is DPO's. At zero log-ratios, where the
    policy is the reference, it is :math:`\log(1 + |S|)` whatever the data.

    >>> log_ratios = jnp.array([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, jnp.nan]])
    >>> valid = jnp.array([[True, True, True, True], [True, True, True, False]])
    >>> print(plackett_luce(log_ratios, valid, beta=0.1))
    [1.3862944 1.0986123]

    Args:
        log_ratios: [B, 1 + n], nats; the chosen response in column 0.
        valid: bool [B, 1 + n].
        beta: strength of the pull towards the reference, > 0.

    Returns:
        float32 [B].

    Source: Chen et al., "On Softmax Direct Preference Optimization for Recommendation", 2024;
    the form by log-sum-exp avoids the overflow of exponentiating log-ratios.
    """
    scores, negatives = _scores(log_ratios, valid, beta)
    # The largest score is taken out of the sum, and softplus keeps small losses exact. A row
    # without negatives counts zeros instead and is dropped at the end: log(0) never occurs.
    some = negatives.any(axis=-1)
    counted = negatives | ~some[:, None]
    loss = jax.nn.softplus(jax.nn.logsumexp(scores, axis=-1, where=counted))
    return jnp.where(some, loss, 0.0)


def dpo(log_ratios: jax.Array, valid: jax.Array, beta: float) -> jax.Array:
    r"""DPO loss: the chosen response is preferred to one negative.

    .. math::
        \ell = -\log \sigma\bigl(\beta (r_0 - r_1)\bigr)

    >>> print(dpo(jnp.array([[1.0, 1.0]]), jnp.array([[True, True]]), beta=0.5))
    [0.6931472]

    Args:
        log_ratios: [B, 2], nats; the chosen response in column 0.
        valid: bool [B, 2].
        beta: strength of the pull towards the reference, > 0.

    Returns:
        float32 [B].

    Raises:
        ValueError: there is not exactly one negative.

    Source: Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a
    Reward Model", 2023.
    """
    if log_ratios.shape[-1] != 2:
        raise ValueError(f"dpo takes log_ratios of shape [B, 2], got {log_ratios.shape}")
    scores, negatives = _scores(log_ratios, valid, beta)
    return jnp.where(negatives[:, 0], jax.nn.softplus(scores[:, 0]), 0.0)


def supervised(logps_chosen: jax.Array, num_tokens: jax.Array) -> jax.Array:
    r"""Supervised loss: the negative log-likelihood of the chosen response, per token.

    .. math::
        \ell = -\frac{1}{T} \sum_{t=1}^{T} \log \pi(y_t \mid x, y_{<t})

    Args:
        logps_chosen: [B], nats, summed over the response's tokens, end-of-sequence included.
        num_tokens: int [B], T; a row with 0 tokens has loss 0 and gradient 0.

    Returns:
        float32 [B], nats per token.
    """
    present = num_tokens > 0
    logps = jnp.where(present, _at_least_float32(logps_chosen), 0.0)
    return -logps / jnp.maximum(num_tokens, 1)


def _scores(log_ratios: jax.Array, valid: jax.Array, beta: float) -> tuple[jax.Array, jax.Array]:
    """Scores beta (r_i - r_0) of the negatives, 0 where not valid; and which of them count."""
    if log_ratios.shape != valid.shape:
        raise ValueError(f"log_ratios {log_ratios.shape} and valid {valid.shape} differ in shape")
    # Up to the `where` everything is linear, so its zero gradient meets no NaN on the way back.
    # What is not linear comes after it.
    rewards = beta * _at_least_float32(log_ratios)
    negatives = valid[:, 1:] & valid[:, :1]
    return jnp.where(negatives, rewards[:, 1:] - rewards[:, :1], 0.0), negatives


def _at_least_float32(x: jax.Array) -> jax.Array:
    """Half precision becomes float32; float64, where a test has enabled it, stays."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
