"""What selection passes around: a pool, the design made from it, the negatives selected from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int, Key


class Pool(NamedTuple):
    """The negatives of one example; `select` takes a leading dimension B on every field.

    Attributes:
        gram: float32 [C, C], inner products of the pooled hidden states, the chosen response first,
            as `gram.compute_gram` makes them; None for criteria that need no scoring.
        scores: float32 [N], beta (log-ratio of the negative - that of the chosen); None likewise.
        mask: bool [N], which negatives exist; features and scores of the others may hold anything.
        key: a PRNG key of this example and this draw.
        policy_scores: float32 [N], the policy's log-probability of the negative - that of the
            chosen, nats, for criteria that rank as the policy does. None: `scores` stand for them.
    """

    gram: Float[Array, "*B C C"] | None
    scores: Float[Array, "*B N"] | None
    mask: Bool[Array, "*B N"]
    key: Key[Array, "*B"]
    policy_scores: Float[Array, "*B N"] | None = None


class Selection(NamedTuple):
    """The negatives selected for one example, in the order of choice.

    Attributes:
        indices: int32 [n], 0 <= index < N; 0 where not valid.
        valid: bool [n], False where there were fewer than n to choose from, always at the end.
        gains: float32 [n]; log(1 + gain) is the growth of the value of the picks before it. For an
            additive design the gain is v' H^-1 v at the moment of choice, and the first is
            max ||v||^2 / ridge. 0 where not valid, and for criteria without a value.
        weights: float32 [n]; sum_k weights_k f(indices_k) is an unbiased estimate of the pool's
            sum_i p_i f(i) for criterion `sampled`. 0 for the others.
    """

    indices: Int[Array, "*B n"]
    valid: Bool[Array, "*B n"]
    gains: Float[Array, "*B n"]
    weights: Float[Array, "*B n"]


Value = Callable[[Array, Array], Array]


class Design(NamedTuple):
    """What a criterion maximizes.

    Attributes:
        gram: G, products of the whole pool's design vectors over the ridge: [N, N], or [C, C] where
            the chosen response has one, too.
        value: value of a set, from indices int32 [n] and valid bool [n]; None for an additive
            design over the negatives, whose value is log det(I + G_SS).
    """

    gram: Float[Array, "K K"]
    value: Value | None = None
