"""Losses of graded lists of responses, one value per example.

They take `grades` [B, C], larger for better, beside what `mass_dpo_jax.losses` says. Equal grades
are ties, which no loss here compares: a row of equal grades has loss 0 and gradient 0.

`weighted_pairs` is what pairwise losses have in common: a weight for every pair of a list, and the
logistic loss of its difference in reward. `lambda_weights` are those of LambdaLoss.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mass_dpo_jax.losses.masked import as_float32, log1p_sum_exp, masked_rewards


def pl_rank(
    log_ratios: Float[Array, "B C"],
    valid: Bool[Array, "B C"],
    beta: float,
    grades: Float[Array, "B C"],
    top: int,
) -> Float[Array, " B"]:
    r"""Computes the Plackett-Luce loss of a ranking: the best is chosen first, then the next, ...

    $$
    \ell = \sum_{i \in T} -\log \frac{\exp(\beta r_i)}{\exp(\beta r_i) + \sum_{j \in W_i}
           \exp(\beta r_j)}, \qquad W_i = \{j : g_j < g_i\}
    $$

    with $r$ the log-ratios, $g$ the grades, and $T$ the responses that fewer than `top` others are
    better than and that are better than some. Without ties it is the negative log-likelihood of the
    first `top` places of the ranking. Tied responses are each compared with the worse ones and
    never with each other (Breslow's approximation; the exact likelihood of a tie is a sum over all
    its orders). So with top = 1 and one best response it is the loss of `plackett_luce`, and with
    several best ones each of them is compared with the common negatives.

    Examples:
        >>> grades = jnp.array([[3.0, 2.0, 1.0]])
        >>> valid = jnp.ones((1, 3), bool)
        >>> print(pl_rank(jnp.zeros((1, 3)), valid, 0.1, grades, top=0))  # log 3 + log 2
        [1.7917595]
        >>> print(pl_rank(jnp.zeros((1, 3)), valid, 0.1, grades, top=1))
        [1.0986123]

    Args:
        log_ratios: nats.
        valid: True for the responses that count.
        beta: strength of the pull towards the reference, > 0.
        grades: larger for better.
        top: number of places that count, from the best; 0: all.

    Source: Rafailov et al. 2023, appendix A.3, for full rankings; Cai et al., "K-order Ranking
    Preference Optimization for Large Language Models", 2025, for the first K places.
    """
    rewards = masked_rewards(log_ratios, valid, beta)
    better = ordered_pairs(grades, valid)
    if top:  # Of those that fewer than `top` are better than.
        better &= (better.sum(axis=-2) < top)[..., None]
    return log1p_sum_exp(_differences(rewards, better), better).sum(axis=-1)


def lipo_lambda(
    log_ratios: Float[Array, "B C"],
    valid: Bool[Array, "B C"],
    beta: float,
    grades: Float[Array, "B C"],
) -> Float[Array, " B"]:
    r"""Computes LiPO-lambda's loss: DPO's over the pairs of a list, by their effect on its DCG.

    $$
    \ell = -\sum_{g_i > g_j} \lambda_{ij} \log \sigma\bigl(\beta (r_i - r_j)\bigr), \qquad
    \lambda_{ij} = \bigl|2^{g_i} - 2^{g_j}\bigr| \cdot
                   \left|\frac{1}{\log_2(1 + \tau_i)} - \frac{1}{\log_2(1 + \tau_j)}\right|
    $$

    with $\tau$ the places in the order of the rewards, see `lambda_weights`. With one pair of
    grades 1 and 0 it is 0.369 times DPO's.

    Examples:
        >>> print(lipo_lambda(
        ...     jnp.zeros((1, 2)), jnp.ones((1, 2), bool), 0.1, jnp.array([[1.0, 0.0]])))
        [0.25582]

    Args:
        log_ratios: nats.
        valid: True for the responses that count.
        beta: strength of the pull towards the reference, > 0.
        grades: larger for better; in [0, 1], as the gains grow exponentially with them.

    Source: Liu et al., "LiPO: Listwise Preference Optimization through Learning-to-Rank", 2024,
    Eq. 8. It leaves the logarithm's base open; that of DCG is 2, also in the library they used.
    """
    weights = lambda_weights(masked_rewards(log_ratios, valid, beta), valid, grades)
    return weighted_pairs(log_ratios, valid, beta, grades, weights)


def tree_po(
    log_ratios: Float[Array, "B C"],
    valid: Bool[Array, "B C"],
    beta: float,
    grades: Float[Array, "B C"],
) -> Float[Array, " B"]:
    r"""Computes the list loss of Tree Preference Optimization on whole responses.

    $$
    \ell = -\frac{2}{m (m - 1)} \sum_{g_i > g_j} \lambda_{ij}
           \log \sigma\bigl(\beta (r_i - r_j)\bigr)
    $$

    for the m responses that leave a prompt's tree of steps, with the weights of `lambda_weights`:
    the loss of `lipo_lambda`, averaged over pairs, so that large trees count no more than small
    ones. Steps that two responses share have the same tokens and the same context: they cancel in
    $r_i - r_j$, in value and gradient.

    Not to be confused with Triple Preference Optimization, the "TPO" of TRL.

    Of the paper's definition the list of responses with their grades and the weighted pairs are
    here, its "adaptive step reward" is not: that weights the log-ratio of each step by 1 + the
    cosine between its mean hidden state and that of the same step in the best response, for which
    the data has to mark the steps. Checked against the paper's abstract and the authors' code
    (github.com/MrBlankness/TPO), without the paper's formulas. The code averages over pairs without
    weights; it also takes -log sigma of beta times that average, whose descent would raise it, and
    reads the log-probabilities of all tokens at the first position. Neither is done here.

    Examples:
        >>> grades = jnp.array([[1.0, 0.5, 0.5]])
        >>> print(tree_po(jnp.zeros((1, 3)), jnp.ones((1, 3), bool), 0.1, grades))
        [0.08539345]

    Args:
        log_ratios: nats.
        valid: True for the responses that count.
        beta: strength of the pull towards the reference, > 0.
        grades: larger for better; in [0, 1], as the gains grow exponentially with them.

    Source: Liao, Chu and Wang, "TPO: Aligning Large Language Models with Multi-branch & Multi-step
    Preference Trees", 2024.
    """
    responses = valid.sum(axis=-1)
    pairs = jnp.maximum(responses * (responses - 1) // 2, 1)
    return lipo_lambda(log_ratios, valid, beta, grades) / pairs


def weighted_pairs(
    log_ratios: Float[Array, "B C"],
    valid: Bool[Array, "B C"],
    beta: float,
    grades: Float[Array, "B C"],
    weights: Float[Array, "B C C"],
) -> Float[Array, " B"]:
    r"""Computes $-\sum_{g_i > g_j} w_{ij} \log \sigma(\beta (r_i - r_j))$.

    Args:
        log_ratios: nats.
        valid: True for the responses that count.
        beta: strength of the pull towards the reference, > 0.
        grades: larger for better.
        weights: w, taken as constants.
    """
    rewards = masked_rewards(log_ratios, valid, beta)
    better = ordered_pairs(grades, valid)
    weights = jnp.where(better, jax.lax.stop_gradient(as_float32(weights)), 0.0)
    return jnp.sum(weights * jax.nn.softplus(_differences(rewards, better)), axis=(-2, -1))


def _differences(
    rewards: Float[Array, "B C"], pairs: Bool[Array, "B C C"]
) -> Float[Array, "B C C"]:
    """Returns reward j - reward i at [:, i, j], 0 where they are no pair."""
    return jnp.where(pairs, rewards[:, None, :] - rewards[:, :, None], 0.0)


def ordered_pairs(grades: Float[Array, "B C"], valid: Bool[Array, "B C"]) -> Bool[Array, "B C C"]:
    """Returns whether response i is better than response j, at [:, i, j]; both must be valid."""
    return (grades[:, :, None] > grades[:, None, :]) & valid[:, :, None] & valid[:, None, :]


def lambda_weights(
    rewards: Float[Array, "B C"], valid: Bool[Array, "B C"], grades: Float[Array, "B C"]
) -> Float[Array, "B C C"]:
    """Computes by how much the DCG of a list changes where two responses change places.

    That is the difference of their gains, 2^grade - 1, times the difference of the discounts,
    1 / log2(1 + place), of their places in the order of rewards. It depends on the rewards by their
    order only, so it has no gradient.

    Args:
        rewards: of any scale.
        valid: True for the responses that count; pairs with others have weight 0.
        grades: larger for better.
    """
    gains = jnp.exp2(jnp.where(valid, as_float32(grades), 0.0))
    discounts = 1.0 / jnp.log2(1.0 + places(rewards, valid, grades))
    pairs = valid[:, :, None] & valid[:, None, :]
    change = jnp.abs(gains[:, :, None] - gains[:, None, :])
    change *= jnp.abs(discounts[:, :, None] - discounts[:, None, :])
    return jax.lax.stop_gradient(jnp.where(pairs, change, 0.0))


def places(
    rewards: Float[Array, "B C"], valid: Bool[Array, "B C"], grades: Float[Array, "B C"]
) -> Int[Array, "B C"]:
    """Returns the places 1, 2, ... of the valid responses in the order of their rewards.

    Of equal rewards the worst response comes first, as ties count as mistakes in all metrics; then
    the first column. So the places of a list differ where all rewards are equal, as they are where
    the policy is the reference: else all weights would be 0 there, and nothing would be learnt.
    """
    columns = jnp.arange(rewards.shape[-1])
    keys = (jnp.broadcast_to(columns, rewards.shape), as_float32(grades), -rewards, ~valid)
    order = jnp.lexsort(keys, axis=-1)
    return jnp.argsort(order, axis=-1) + 1
