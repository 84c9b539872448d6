"""Losses of one chosen response against rejected ones, one value per example.

The order of the rejected ones, the negatives, does not matter. `mass_dpo_jax.losses` describes the
inputs.

`preference_loss` is what most of them share: a way to combine the negatives, a link (the function
that turns the chosen response's lead over them into a loss), and margins for that lead. `dpo`,
`dpo_k`, `dmpo`, `odpo` and `plackett_luce` are special cases.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mass_dpo_jax.losses.masked import as_float32, log_sum_exp, masked_mean, negative_scores

LINKS = ("logistic", "hinge", "squared", "robust")
AGGREGATIONS = ("softmax", "pairs", "mean")


def preference_loss(
    log_ratios: Float[Array, "B C"],
    valid: Bool[Array, "B C"],
    beta: float,
    aggregation: str = "softmax",
    link: str = "logistic",
    label_smoothing: float = 0.0,
    margins: Float[Array, "B C-1"] | None = None,
) -> Float[Array, " B"]:
    r"""Computes a loss of the chosen response's lead over its negatives.

    With the scores $s_i = \beta (r_i - r_0) + m_i$ of the negatives and a link $\phi$, by
    aggregation,

    $$
    \text{softmax: } \phi\Bigl(\log \sum_{i \in S} e^{s_i}\Bigr), \qquad
    \text{pairs: } \frac{1}{|S|} \sum_{i \in S} \phi(s_i), \qquad
    \text{mean: } \phi\Bigl(\frac{1}{|S|} \sum_{i \in S} s_i\Bigr),
    $$

    which are the same with one negative. The lead of the chosen response is $-s_i$. By link,

    - `logistic`: $\phi(s) = (1 - \epsilon) \lambda(s) + \epsilon \lambda(-s)$ with
      $\lambda(s) = \log(1 + e^s)$, as in DPO and, with $\epsilon > 0$, conservative DPO;
    - `robust`: $\phi(s) = \bigl((1 - \epsilon) \lambda(s) - \epsilon \lambda(-s)\bigr) /
      (1 - 2 \epsilon)$, as in robust DPO;
    - `hinge`: $\phi(s) = \max(0, 1 + s)$, as in SLiC and RSO;
    - `squared`: $\phi(s) = (s + \frac{1}{2})^2 / \beta^2$, as in IPO.

    $r$ need not be log-ratios: log-ratios divided by the lengths of the responses give IPO as its
    authors run it, and log-probabilities divided by the lengths, with a constant margin, SimPO.

    Examples:
        >>> log_ratios, valid = jnp.array([[0.0, 1.0, -1.0]]), jnp.ones((1, 3), bool)
        >>> print(preference_loss(log_ratios, valid, 1.0, "pairs", "hinge"))
        [1.]
        >>> print(preference_loss(log_ratios, valid, 1.0, "mean", "squared"))
        [0.25]

    Args:
        log_ratios: nats; the chosen response in column 0.
        valid: True for the responses that count.
        beta: factor of the log-ratios, > 0.
        aggregation: one of `AGGREGATIONS`.
        link: one of `LINKS`.
        label_smoothing: $\epsilon$ of the links logistic and robust, the probability that a
            preference is the wrong way round, in [0, 0.5).
        margins: m, by how much a negative's reward, beta r, should be lower; None: 0.

    Source: for the links, Rafailov et al. 2023 and Mitchell, "A note on DPO with noisy
    preferences", 2023; Chowdhury et al., "Provably Robust DPO", 2024; Zhao et al., "SLiC-HF", 2023;
    Azar et al., "A General Theoretical Paradigm to Understand Learning from Human Preferences",
    2023. For margins, Meng et al., "SimPO", 2024, and those of `odpo`. Forms and names are those
    of TRL's trainers.
    """
    scores, negatives = negative_scores(log_ratios, valid, beta)
    if margins is not None:
        scores += jnp.where(negatives, as_float32(margins), 0.0)
    has_negatives = negatives.any(axis=-1)
    if aggregation == "pairs":
        return masked_mean(_apply_link(scores, beta, link, label_smoothing), negatives)
    if aggregation == "softmax":
        merged = log_sum_exp(scores, negatives)
    elif aggregation == "mean":
        merged = masked_mean(scores, negatives)
    else:
        raise ValueError(f"aggregation={aggregation!r}: expected one of {AGGREGATIONS}")
    return jnp.where(has_negatives, _apply_link(merged, beta, link, label_smoothing), 0.0)


def _apply_link(
    scores: Float[Array, "*n"], beta: float, link: str, label_smoothing: float
) -> Float[Array, "*n"]:
    """Computes the loss of scores that should be low."""
    if link == "hinge":
        return jax.nn.relu(1.0 + scores)
    if link == "squared":
        return jnp.square((scores + 0.5) / beta)
    if link not in ("logistic", "robust"):
        raise ValueError(f"link={link!r}: expected one of {LINKS}")
    loss = jax.nn.softplus(scores)
    if not label_smoothing:
        return loss
    flipped = label_smoothing * jax.nn.softplus(-scores)
    if link == "robust":
        return ((1.0 - label_smoothing) * loss - flipped) / (1.0 - 2.0 * label_smoothing)
    return (1.0 - label_smoothing) * loss + flipped


def plackett_luce(
    log_ratios: Float[Array, "B C"],
    valid: Bool[Array, "B C"],
    beta: float,
    log_weights: Float[Array, "B C"] | None = None,
) -> Float[Array, " B"]:
    r"""Computes the Plackett-Luce loss: the chosen response ranks first among all responses.

    $$
    \ell = -\log \frac{\exp(\beta r_0)}{\exp(\beta r_0) + \sum_{i \in S} \exp(\beta r_i)}
         = -\log \sigma\Bigl(-\log \sum_{i \in S} \exp\bigl(\beta (r_i - r_0)\bigr)\Bigr)
    $$

    with $r$ the log-ratios and $S$ the valid negatives. It is the loss of S-DPO (Softmax DPO; other
    libraries call self-distillation policy optimization "SDPO"), and of MASS-DPO on the set it
    selects. With one negative it is DPO's. At zero log-ratios, where the policy is the reference,
    it is $\log(1 + |S|)$ whatever the data.

    With weights $w_i$ the sum is $\hat{Z} = \sum_{i \in S} w_i \exp(\beta (r_i - r_0))$. If $S$ was
    drawn from more negatives, each with the probability $1 / w_i$, then $\hat{Z}$ has the sum over
    all of these as its mean. The loss $\log(1 + \hat{Z})$ and its gradient
    $\nabla \hat{Z} / (1 + \hat{Z})$ are not linear in it, so their means are not exactly those of
    all negatives: the loss is too low on average, and both errors vanish with the variance of
    $\hat{Z} / (1 + Z)$, with $Z$ that mean.

    Examples:
        >>> log_ratios = jnp.array([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, jnp.nan]])
        >>> valid = jnp.array([[True, True, True, True], [True, True, True, False]])
        >>> print(plackett_luce(log_ratios, valid, beta=0.1))
        [1.3862944 1.0986123]

    Args:
        log_ratios: nats; the chosen response in column 0.
        valid: True for the responses that count.
        beta: strength of the pull towards the reference, > 0.
        log_weights: log w; column 0, of the chosen response, is not read. None: all are 0.

    Source: Chen et al., "On Softmax Direct Preference Optimization for Recommendation", 2024;
    the form by log-sum-exp avoids the overflow of exponentiating log-ratios.
    """
    margins = None if log_weights is None else log_weights[:, 1:]
    return preference_loss(log_ratios, valid, beta, "softmax", margins=margins)


def dpo(
    log_ratios: Float[Array, "B C"], valid: Bool[Array, "B C"], beta: float
) -> Float[Array, " B"]:
    r"""Computes the DPO loss: the chosen response is preferred to one negative.

    $$
    \ell = -\log \sigma\bigl(\beta (r_0 - r_1)\bigr)
    $$

    Examples:
        >>> print(dpo(jnp.array([[1.0, 1.0]]), jnp.array([[True, True]]), beta=0.5))
        [0.6931472]

    Args:
        log_ratios: nats, [B, 2]; the chosen response in column 0.
        valid: True for the responses that count.
        beta: strength of the pull towards the reference, > 0.

    Raises:
        ValueError: there is not exactly one negative.

    Source: Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a
    Reward Model", 2023.
    """
    if log_ratios.shape[-1] != 2:
        raise ValueError(f"dpo takes log_ratios of shape [B, 2], got {log_ratios.shape}")
    return preference_loss(log_ratios, valid, beta, "pairs")


def dpo_k(
    log_ratios: Float[Array, "B C"], valid: Bool[Array, "B C"], beta: float
) -> Float[Array, " B"]:
    r"""Computes the DPO-k loss: the chosen response is preferred to each negative, pair by pair.

    $$
    \ell = -\frac{1}{|S|} \sum_{i \in S} \log \sigma\bigl(\beta (r_0 - r_i)\bigr)
    $$

    The mean of DPO's loss over the pairs of one example. With one negative it is DPO's.

    Examples:
        >>> print(dpo_k(jnp.zeros((1, 4)), jnp.ones((1, 4), bool), beta=0.1))
        [0.6931472]

    Args:
        log_ratios: nats; the chosen response in column 0.
        valid: True for the responses that count.
        beta: strength of the pull towards the reference, > 0.

    Source: MASS-DPO names this baseline without defining it; the mean over pairs is the reading
    that leaves the step's size independent of n.
    """
    return preference_loss(log_ratios, valid, beta, "pairs")


def dmpo(
    log_ratios: Float[Array, "B C"], valid: Bool[Array, "B C"], beta: float
) -> Float[Array, " B"]:
    r"""Computes the DMPO loss: the chosen response is preferred to the average negative.

    $$
    \ell = -\log \sigma\Bigl(\beta r_0 - \frac{1}{|S|} \sum_{i \in S} \beta r_i\Bigr)
    $$

    With one negative it is DPO's.

    Examples:
        >>> print(dmpo(jnp.array([[0.0, 1.0, -1.0]]), jnp.ones((1, 3), bool), beta=1.0))
        [0.6931472]

    Args:
        log_ratios: nats; the chosen response in column 0.
        valid: True for the responses that count.
        beta: strength of the pull towards the reference, > 0.

    Source: Bai et al., "Finetuning Large Language Model for Personalized Ranking", 2024. Checked
    against its abstract and its authors' code (github.com/BZX667/DMPO), without its formulas. That
    code hands the reference's log-probability of the chosen response over twice, so that the
    reference cancels; here it does not.
    """
    return preference_loss(log_ratios, valid, beta, "mean")


def odpo(
    log_ratios: Float[Array, "B C"],
    valid: Bool[Array, "B C"],
    beta: float,
    margins: Float[Array, "B C-1"],
) -> Float[Array, " B"]:
    r"""Computes the ODPO loss: the chosen response is preferred to each negative by a margin.

    $$
    \ell = -\frac{1}{|S|} \sum_{i \in S} \log \sigma\bigl(\beta (r_0 - r_i) - \Delta_i\bigr),
    \qquad \Delta_i = \alpha \log (g_0 - g_i)
    $$

    with $g$ the grades that responses were given. With margins 0 it is `dpo_k`'s.

    Examples:
        >>> valid = jnp.ones((1, 3), bool)
        >>> print(odpo(jnp.zeros((1, 3)), valid, 0.1, jnp.log(jnp.array([[1.0, 4.0]]))))
        [1.1512926]

    Args:
        log_ratios: nats; the chosen response in column 0.
        valid: True for the responses that count.
        beta: strength of the pull towards the reference, > 0.
        margins: the margin Delta of each negative.

    Source: Amini, Vieira and Cotterell, "Direct Preference Optimization with an Offset", 2024, for
    pairs; the mean over an example's pairs is ours. Checked against its authors' code
    (github.com/rycolab/odpo), where alpha is 1 by default. Margins are negative where grades differ
    by less than 1, there too.
    """
    return preference_loss(log_ratios, valid, beta, "pairs", margins=margins)


def mppo(
    logps: Float[Array, "B C"], num_tokens: Int[Array, "B C"], valid: Bool[Array, "B C"]
) -> Float[Array, " B"]:
    r"""Computes the MPPO loss: the chosen response's likelihood per token exceeds the negatives'.

    $$
    \ell = -\log \sigma\Bigl(|S|\, p_0 - \sum_{i \in S} p_i\Bigr), \qquad
    p_i = \prod_{t=1}^{T_i} \pi(y_{i,t} \mid x, y_{i,<t})^{1 / T_i}
    $$

    without reference and without beta: the likelihood $p$ is the authors' Eq. 5. They tried
    pointwise, pairwise and listwise losses and found pairwise best; of the pairwise forms this one,
    "Pair-MNM", which merges the pairs of a prompt in one sigmoid (their Eq. 10).

    Examples:
        >>> logps = jnp.log(jnp.array([[0.25, 0.25]]))
        >>> print(mppo(logps, jnp.array([[2, 1]]), jnp.ones((1, 2), bool)).round(6))
        [0.575939]

    Args:
        logps: nats, summed over each response's tokens, end-of-sequence included; the
            chosen response in column 0.
        num_tokens: T, the tokens of each response.
        valid: True for the responses that count.

    Source: Xie et al., "MPPO: Multi Pair-wise Preference Optimization for LLMs with Arbitrary
    Negative Samples", 2024. Checked against the paper.
    """
    likelihoods = likelihood_per_token(logps, num_tokens, valid)
    negatives = valid[:, 1:] & valid[:, :1]
    merged = jnp.where(negatives, likelihoods[:, 1:] - likelihoods[:, :1], 0.0).sum(axis=-1)
    return jnp.where(negatives.any(axis=-1), jax.nn.softplus(merged), 0.0)


def likelihood_per_token(
    logps: Float[Array, "B C"], num_tokens: Int[Array, "B C"], valid: Bool[Array, "B C"]
) -> Float[Array, "B C"]:
    """Returns the geometric mean of a response's token probabilities; 0 where not valid."""
    logps = jnp.where(valid, as_float32(logps), 0.0)
    return jnp.where(valid, jnp.exp(logps / jnp.maximum(num_tokens, 1)), 0.0)


def sampled_plackett_luce(
    log_ratios: Float[Array, "B C"],
    valid: Bool[Array, "B C"],
    beta: float,
    weights: Float[Array, "B C-1"],
    pool_loss: Float[Array, " B"],
) -> Float[Array, " B"]:
    r"""Computes the Plackett-Luce loss of a whole pool, with its gradient estimated from n draws.

    The gradient of the loss $\ell_N$ on all N negatives is, with p the softmax of their scores
    $\beta (r_i - r_0)$,

    $$
    \nabla \ell_N = \bigl(1 - e^{-\ell_N}\bigr) \sum_{i=1}^{N} p_i \nabla \beta (r_i - r_0).
    $$

    A pass over the pool without gradients gives p and $\ell_N$ exactly. The value returned is
    that $\ell_N$; the gradient replaces the sum over the pool by one over n drawn negatives,
    $\sum_k w_k \nabla \beta (r_k - r_0)$, whose weights (`selection.criteria.sampled`)
    are chosen so that its expectation is the sum over the pool. The estimate is unbiased if weights
    and loss come from the current policy.

    Examples:
        >>> scores = jnp.array([[0.0, -1.0, 1.0]])
        >>> weights = jax.nn.softmax(scores[:, 1:])  # all drawn: the sum itself
        >>> loss = lambda r: sampled_plackett_luce(
        ...     r, jnp.ones((1, 3), bool), 1.0, weights, jnp.array([1.4076059]))[0]
        >>> print(f"{loss(scores):.4f}", jax.grad(loss)(scores)[0].round(4))
        1.4076 [-0.7553  0.09    0.6652]

    Args:
        log_ratios: nats; the chosen response in column 0.
        valid: True for the responses that count.
        beta: strength of the pull towards the reference, > 0.
        weights: w, taken as constants.
        pool_loss: l_N in nats, taken as a constant.
    """
    scores, negatives = negative_scores(log_ratios, valid, beta)
    weights = jnp.where(negatives, jax.lax.stop_gradient(as_float32(weights)), 0.0)
    loss = jax.lax.stop_gradient(as_float32(pool_loss))
    linear = -jnp.expm1(-loss) * jnp.sum(weights * scores, axis=-1)
    has_negatives = negatives.any(axis=-1)
    return jnp.where(has_negatives, loss + linear - jax.lax.stop_gradient(linear), 0.0)


def supervised(
    logps_chosen: Float[Array, " B"], num_tokens: Int[Array, " B"]
) -> Float[Array, " B"]:
    r"""Computes the supervised loss: the negative log-likelihood of the chosen response, per token.

    $$
    \ell = -\frac{1}{T} \sum_{t=1}^{T} \log \pi(y_t \mid x, y_{<t})
    $$

    Args:
        logps_chosen: nats, summed over the response's tokens, end-of-sequence included.
        num_tokens: T of each response; a row with 0 tokens has loss 0 and gradient 0.

    Returns:
        The loss in nats per token.
    """
    nonempty = num_tokens > 0
    logps = jnp.where(nonempty, as_float32(logps_chosen), 0.0)
    return -logps / jnp.maximum(num_tokens, 1)
