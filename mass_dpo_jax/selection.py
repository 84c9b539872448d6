"""Which n of a prompt's N negatives to train on.

A criterion is one function from a `Pool` to a `Selection`, registered in `CRITERIA`; `select` maps
it over the prompts of a batch. Everything is `jit`-able with static `n` and `settings`.

`pool_fisher` is Algorithm 1 of MASS-DPO. It grows a design matrix, H = ridge I + sum v v', by the
candidate with the largest v' H^-1 v, n times. The paper's form inverts d x d matrices; this one
works with the N x N matrix G = V V' / ridge, since v_i' H^-1 v_i is the diagonal of

    G - G_S' (I + G_SS)^-1 G_S        (S: the candidates chosen so far)

and one more chosen candidate s changes it by the rank-1 term g g' / (1 + g_s), g = G[:, s], which
is the Sherman-Morrison update seen from the candidates.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mass_dpo_jax.errors import UserError


class Pool(NamedTuple):
    """The negatives of one prompt (`select` takes a leading batch dimension on every field)."""

    features: jax.Array | None
    """float32 [C, D]: pooled hidden states, the chosen response first; None without scoring."""
    scores: jax.Array | None
    """float32 [N]: beta (log-ratio of the negative - that of the chosen); None likewise."""
    mask: jax.Array
    """bool [N]: which negatives exist; the others' features and scores may hold anything."""
    key: jax.Array
    """A PRNG key of this prompt and this draw."""


class Selection(NamedTuple):
    """The chosen negatives of one prompt, in the order of choice."""

    indices: jax.Array
    """int32 [n], 0 <= index < N; 0 where not valid."""
    valid: jax.Array
    """bool [n]: False where the pool had fewer than n negatives, always at the end."""
    gains: jax.Array
    """float32 [n]: v' H^-1 v at the moment of choice, so log(1 + gain) is the increase of
    log det H; the first is max ||v||^2 / ridge. 0 where not valid or not defined."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to select. Hashable: a static argument of `jit`.

    Raises:
        UserError: an unknown name, or a ridge or beta that is not positive.
    """

    criterion: str = "pool_fisher"
    ridge: float = 0.1
    feature_norm: str = "none"
    fisher_scale: bool = False
    beta: float = 0.1

    def __post_init__(self) -> None:
        _check_name("selection.criterion", self.criterion, tuple(CRITERIA))
        _check_name("selection.feature_norm", self.feature_norm, FEATURE_NORMS)
        _check_positive("selection.ridge", self.ridge)
        _check_positive("beta", self.beta)


@dataclasses.dataclass(frozen=True)
class Criterion:
    """A way to select n negatives of one prompt. Asked for n > N, it fills up with invalid ones."""

    choose: Choose
    needs_scoring: bool

    def __call__(self, pool: Pool, n: int, settings: Settings) -> Selection:
        return self.choose(pool, n, settings)


Choose = Callable[[Pool, int, Settings], Selection]
FEATURE_NORMS = ("none", "l2")
TIE = 4e-6  # Relative: what a float32 sum over some thousand features loses.
CRITERIA: dict[str, Criterion] = {}


def criterion(name: str, *, needs_scoring: bool) -> Callable[[Choose], Choose]:
    """Decorator that registers a function in `CRITERIA`."""

    def register(choose: Choose) -> Choose:
        CRITERIA[name] = Criterion(choose, needs_scoring)
        return choose

    return register


def needs_scoring(criterion: str) -> bool:
    """Whether a criterion reads features and scores, which cost a pass over the whole pool."""
    return CRITERIA[criterion].needs_scoring


def select(pools: Pool, n: int, settings: Settings) -> Selection:
    """Selects up to n negatives of every prompt.

    Args:
        pools: a `Pool` whose fields have a leading batch dimension B. Features and scores may be
            None when `settings.needs_scoring` is False.
        n: how many to select, >= 1; static.
        settings: static.

    Returns:
        A `Selection` with leading dimension B.
    """
    choose = CRITERIA[settings.criterion]
    return jax.vmap(lambda pool: choose(pool, n, settings))(pools)


@criterion("pool_fisher", needs_scoring=True)
def pool_fisher(pool: Pool, n: int, settings: Settings) -> Selection:
    """Algorithm 1 of MASS-DPO: greedy D-optimal design on the pool's Fisher information.

    v_i = sqrt(p_i) (h_i - sum_j p_j h_j) with p the softmax of the scores over the valid pool. In
    the paper's terms h_i is phi_i: the chosen response's feature is in every phi and in their mean,
    and cancels. With `fisher_scale` the factor beta^2 (1 - sigma(Z)) of Eq. 11 multiplies v v',
    where Z = -log sum_i exp(score_i) over the pool.
    """
    assert pool.features is not None and pool.scores is not None
    vectors = design_vectors(pool.features[1:], pool.scores, pool.mask, settings.feature_norm)
    gram = gram_matrix(vectors) / settings.ridge
    if settings.fisher_scale:
        gram *= fisher_factor(pool.scores, pool.mask, settings.beta)
    return greedy(gram, pool.mask, n)


@criterion("random", needs_scoring=False)
def random(pool: Pool, n: int, settings: Settings) -> Selection:
    """n distinct negatives, uniformly. The same key and negatives give the same picks, however far
    the pool is padded: the number a candidate draws depends on the key and its index only."""
    del settings
    size = pool.mask.shape[0]
    draws = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(pool.key, i)))(
        jnp.arange(size)
    )
    _, order = lax.top_k(jnp.where(pool.mask, draws, -1.0), min(n, size))
    return _in_order(order, pool.mask, n)


@criterion("all", needs_scoring=False)
def every(pool: Pool, n: int, settings: Settings) -> Selection:
    """Every negative, in order; n must be at least N."""
    del settings
    if n < pool.mask.shape[0]:
        raise ValueError(f"criterion all needs n >= N = {pool.mask.shape[0]}, got n = {n}")
    return _in_order(jnp.argsort(~pool.mask, stable=True), pool.mask, n)


def design_vectors(
    features: jax.Array, scores: jax.Array, mask: jax.Array, feature_norm: str
) -> jax.Array:
    """The vectors v_i = sqrt(p_i) (h_i - sum_j p_j h_j) of one pool; 0 where masked.

    Args:
        features: [N, D], h of the negatives.
        scores: [N].
        mask: bool [N].
        feature_norm: "none", or "l2" to divide every h (never a difference of them) by its norm.

    Returns:
        float32 [N, D].
    """
    present = mask[:, None]
    features = features.astype(jnp.float32)
    if feature_norm == "l2":
        norms = jnp.sqrt(jnp.sum(features**2, axis=-1, keepdims=True))
        features = features / jnp.where(norms > 0, norms, 1.0)
    # Hidden states share a component much larger than their differences, so it is taken out
    # before anything is multiplied: one of them (equal candidates become exactly 0), the mean of
    # what is left, and then the weighted mean, by now a small correction.
    count = jnp.maximum(jnp.sum(mask), 1)
    features = jnp.where(present, features - features[jnp.argmax(mask)], 0.0)
    features = jnp.where(present, features - jnp.sum(features, axis=0) / count, 0.0)
    weights = pool_weights(scores, mask)[:, None]
    centred = features - jnp.sum(weights * features, axis=0)
    return jnp.where(present, jnp.sqrt(weights) * centred, 0.0)


def pool_weights(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax of the scores over the valid negatives: [N], 0 where masked, all 0 if none is."""
    scores = jnp.where(mask, scores.astype(jnp.float32), 0.0)
    weights = jnp.where(mask, jnp.exp(scores - jnp.max(scores, where=mask, initial=-jnp.inf)), 0.0)
    return weights / jnp.maximum(jnp.sum(weights), 1.0)  # the sum is >= 1 unless all are masked


def fisher_factor(scores: jax.Array, mask: jax.Array, beta: float) -> jax.Array:
    """beta^2 (1 - sigma(Z)) with Z = -log sum_i exp(score_i) over the valid pool: a scalar.

    1 - sigma(Z) is the probability that the model does not rank the chosen response first. At the
    reference it is N / (N + 1): with beta = 0.1 and N = 19 the factor is 0.0095.
    """
    scores = jnp.where(mask, scores.astype(jnp.float32), -jnp.inf)
    return beta**2 * jax.nn.sigmoid(jax.nn.logsumexp(scores))


def gram_matrix(vectors: jax.Array) -> jax.Array:
    """V V': [N, N] from [N, D], in full float32: by default a GPU or TPU rounds the factors."""
    return jnp.einsum("id,jd->ij", vectors, vectors, precision=lax.Precision.HIGHEST)


def greedy(gram: jax.Array, mask: jax.Array, n: int) -> Selection:
    """Greedily maximises log det(I + G_SS): n times the candidate with the largest gain.

    Args:
        gram: [N, N], symmetric and positive semi-definite: design vectors' products over the ridge.
        mask: bool [N], candidates that may be chosen; each is chosen at most once.
        n: how many; static.

    Returns:
        A `Selection`; ties go to the lowest index, and gains that differ by rounding are ties.
    """

    def step(k: jax.Array, state: tuple) -> tuple:
        gram, free, chosen = state
        # Rounding can leave a small negative number where nothing is left to gain. A NaN, of a
        # model that has diverged, is no gain either: the set must not shrink and hide it.
        diagonal = jnp.diagonal(gram)
        diagonal = jnp.where(diagonal > 0, diagonal, 0.0)
        most = jnp.max(diagonal, where=free, initial=0.0)
        best = jnp.argmax(free & (diagonal >= most * (1 - TIE)))
        valid = free[best]
        gain = diagonal[best]
        column = gram[:, best]
        gram = gram - jnp.outer(column, column) / (1.0 + gain)
        chosen = Selection(
            chosen.indices.at[k].set(jnp.where(valid, best, 0).astype(jnp.int32)),
            chosen.valid.at[k].set(valid),
            chosen.gains.at[k].set(jnp.where(valid, gain, 0.0)),
        )
        return gram, free.at[best].set(False), chosen

    nothing = Selection(jnp.zeros(n, jnp.int32), jnp.zeros(n, jnp.bool_), jnp.zeros(n, gram.dtype))
    return lax.fori_loop(0, n, step, (gram, mask, nothing))[-1]


def _in_order(order: jax.Array, mask: jax.Array, n: int) -> Selection:
    """The first n of `order` (valid candidates first), padded to n; gains are not defined."""
    order = jnp.pad(order[:n], (0, max(0, n - order.shape[0])))
    valid = jnp.arange(n) < jnp.sum(mask)
    return Selection(jnp.where(valid, order, 0).astype(jnp.int32), valid, jnp.zeros(n, jnp.float32))


def _check_name(field: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise UserError(f"{field}={name!r} is none of {', '.join(names)}; nearest: {near!r}")


def _check_positive(field: str, value: float) -> None:
    if not value > 0:
        raise UserError(f"{field} must be > 0, got {value}")
