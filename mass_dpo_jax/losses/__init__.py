"""Preference losses on arrays of log-ratios, one value per example.

Every loss takes `log_ratios` [B, C]: the log-probability of each of the C = 1 + n responses under
the policy minus that under the reference, the chosen response in column 0 and its n negatives after
it (`mppo` and `supervised`, which have no reference, take log-probabilities). In their place may
stand log-probabilities, or either divided by the lengths of the responses. `valid` has the same
shape and says which entries count; the others may hold anything, NaN and infinities included, and
reach neither the values nor the gradients. A row whose chosen response is not valid, or that has no
valid negative, has loss 0 and gradient 0. Losses are computed in float32 unless the input is more
precise.

Losses of graded lists, `lipo_lambda`, `pl_rank` and `tree_po`, compare all responses of a row by
their grades, and no column is special.

Examples:
    One example, a chosen response and two negatives:

    >>> import jax.numpy as jnp
    >>> log_ratios = jnp.array([[0.5, 0.0, -0.5]])
    >>> valid = jnp.ones_like(log_ratios, bool)
    >>> print(plackett_luce(log_ratios, valid, beta=1.0))
    [0.68026966]
"""

from mass_dpo_jax.losses.graded import (
    lambda_weights,
    lipo_lambda,
    pl_rank,
    tree_po,
    weighted_pairs,
)
from mass_dpo_jax.losses.one_chosen import (
    dmpo,
    dpo,
    dpo_k,
    likelihood_per_token,
    mppo,
    odpo,
    plackett_luce,
    preference_loss,
    sampled_plackett_luce,
    supervised,
)

__all__ = [
    "dmpo",
    "dpo",
    "dpo_k",
    "lambda_weights",
    "likelihood_per_token",
    "lipo_lambda",
    "mppo",
    "odpo",
    "pl_rank",
    "plackett_luce",
    "preference_loss",
    "sampled_plackett_luce",
    "supervised",
    "tree_po",
    "weighted_pairs",
]
