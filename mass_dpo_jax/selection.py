"""Which n of a prompt's N negatives to train on.

A criterion is one function, registered under its name: from a `Pool` to a `Selection`
(`@criterion`), or to a `Design` whose value is then searched (`@design`, see designs.py). `select`
maps it over the prompts of a batch. Everything is `jit`-able with static `n` and `settings`.

Criteria see features through one Gram matrix per prompt, so that is all that has to be kept of
features that are frozen. They are compared on language models in docs/results.md.

Examples:
    >>> features = jnp.array([[0.0, 0.0], [0.8, 0.8], [1.0, 0.0], [0.0, 1.0], [0.1, 0.0]])
    >>> chosen = select_negatives(features, n=2, criterion="contrast")
    >>> print(chosen.indices, [f"{gain:.4f}" for gain in chosen.gains])
    [0 1] ['3.2000', '1.5476']
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mass_dpo_jax import designs
from mass_dpo_jax.designs import Design, Selection
from mass_dpo_jax.errors import UserError

__all__ = [
    "Design",
    "Pool",
    "Selection",
    "Settings",
    "criterion",
    "design",
    "in_order",
    "names",
    "pool_loss",
    "pool_weights",
    "select",
    "select_negatives",
]

FEATURE_NORMS = ("none", "l2")


class Pool(NamedTuple):
    """The negatives of one prompt (`select` takes a leading batch dimension on every field)."""

    gram: jax.Array | None
    """float32 [C, C]: `designs.gram_matrix` of the pooled hidden states, the chosen response first;
    None for criteria that need no scoring."""
    scores: jax.Array | None
    """float32 [N]: beta (log-ratio of the negative - that of the chosen); None likewise."""
    mask: jax.Array
    """bool [N]: which negatives exist; the others' features and scores may hold anything."""
    key: jax.Array
    """A PRNG key of this prompt and this draw."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to select. Hashable: a static argument of `jit`. Fields as in the configuration.

    Raises:
        UserError: an unknown name, or a ridge or beta that is not positive.
    """

    criterion: str = "pool_fisher"
    search: str = "greedy"
    ridge: float = 0.1
    feature_norm: str = "none"
    fisher_scale: bool = False
    beta: float = 0.1
    replacement: bool = False

    def __post_init__(self) -> None:
        _check_name("selection.criterion", self.criterion, tuple(CRITERIA))
        _check_name("selection.search", self.search, designs.SEARCHES)
        _check_name("selection.feature_norm", self.feature_norm, FEATURE_NORMS)
        _check_positive("selection.ridge", self.ridge)
        _check_positive("beta", self.beta)

    @property
    def needs_scoring(self) -> bool:
        """Whether the criterion reads scores, which cost a pass over the whole pool."""
        return CRITERIA[self.criterion].needs_scoring

    @property
    def needs_features(self) -> bool:
        """Whether the criterion reads features too."""
        return CRITERIA[self.criterion].design is not None


Choose = Callable[[Pool, int, Settings], Selection]
MakeDesign = Callable[[Pool, Settings], Design]


@dataclasses.dataclass(frozen=True)
class Criterion:
    """A way to select n negatives of one prompt. Asked for n > N, it fills up with invalid ones."""

    choose: Choose
    needs_scoring: bool
    design: MakeDesign | None = None
    weighted: bool = False  # Its choice has weights, which only `pl_sampled`'s loss reads.


CRITERIA: dict[str, Criterion] = {}


def names() -> tuple[str, ...]:
    """The criteria that `config.selection.criterion` can name, registered ones included."""
    return tuple(name for name, found in CRITERIA.items() if not found.weighted)


def criterion(
    name: str, *, needs_scoring: bool, weighted: bool = False
) -> Callable[[Choose], Choose]:
    """Decorator that registers a choice: from (pool, n, settings) to a `Selection`.

    Whatever takes a criterion's name then knows it: `select_negatives`, `config.selection`, the
    commands. The function is `vmap`ped over prompts inside of `jit`; n and settings are static.

    Examples:
        >>> @criterion("first", needs_scoring=False)
        ... def first(pool, n, settings):
        ...     return in_order(jnp.argsort(~pool.mask, stable=True), pool.mask, n)
        >>> print(select_negatives(jnp.eye(4), n=2, criterion="first").indices)
        [0 1]
        >>> del CRITERIA["first"]

    Args:
        name: of the criterion.
        needs_scoring: does it read the pool's scores? A pass over the whole pool is what that
            costs. Features are only there for designs, see `design`.
        weighted: its choice has weights, for the loss of `pl_sampled`.
    """

    def register(choose: Choose) -> Choose:
        CRITERIA[name] = Criterion(choose, needs_scoring, weighted=weighted)
        return choose

    return register


def design(name: str) -> Callable[[MakeDesign], MakeDesign]:
    """Decorator that registers a design: from (pool, settings) to a `Design`, of
    which `settings.search` then looks for a set of large value. As `criterion` otherwise.

    Args:
        name: of the criterion.
    """

    def register(make: MakeDesign) -> MakeDesign:
        def choose(pool: Pool, n: int, settings: Settings) -> Selection:
            return designs.search(make(pool, settings), pool.mask, n, settings.search)

        CRITERIA[name] = Criterion(choose, needs_scoring=True, design=make)
        return make

    return register


def select(pools: Pool, n: int, settings: Settings) -> Selection:
    """Selects up to n negatives of every prompt.

    Args:
        pools: a `Pool` whose fields have a leading batch dimension B; see `Settings` for which of
            gram and scores may be None.
        n: how many to select, >= 1; static.
        settings: static.

    Returns:
        A `Selection` with leading dimension B.
    """
    choose = CRITERIA[settings.criterion].choose
    return jax.vmap(lambda pool: choose(pool, n, settings))(pools)


def excess(pools: Pool, settings: Settings) -> jax.Array:
    """How far the numbers of each prompt are beyond what its choice can be computed of: [B], above
    1 or NaN where it means nothing. For `check`, where a wrong choice would not be noticed."""
    make = CRITERIA[settings.criterion].design

    def of(pool: Pool) -> jax.Array:
        if pool.scores is None:
            return jnp.float32(0)
        found = designs.excess(make(pool, settings)) if make else jnp.float32(0)
        return jnp.where(jnp.isfinite(pool.scores) | ~pool.mask, found, jnp.nan).max()

    return jax.vmap(of)(pools)


def check(chosen: Selection, beyond: Any, settings: Settings, names: Sequence[str]) -> None:
    """Raises UserError for the first prompt whose choice means nothing.

    Args:
        chosen: with a leading batch dimension B.
        beyond: [B], see `excess`.
        settings: that it was chosen by.
        names: what to call each prompt.
    """
    beyond = np.asarray(beyond)
    bad = ~(beyond <= 1)
    for figures in (chosen.gains, chosen.weights):
        bad |= ~np.isfinite(figures).all(-1)
    if not bad.any():
        return
    row = int(bad.argmax())
    if beyond[row] > 1:
        raise UserError(
            f"{names[row]}: features too far apart to choose by {settings.criterion} in float32: "
            f"squared distances over the ridge {beyond[row]:.1e} times what it has the digits for; "
            "expected less, as with selection.feature_norm=l2 or a larger selection.ridge"
        )
    raise UserError(
        f"{names[row]}: features or scores that are not finite or overflow float32; expected "
        "finite numbers"
    )


def select_negatives(
    features: Any, scores: Any = None, mask: Any = None, *, n: int, seed: int = 0, **settings: Any
) -> Selection:
    """Selects up to n negatives of one prompt or of many: the selector as a library call.

    Arrays are NumPy's, JAX's, or any that speak DLPack, such as PyTorch's (on the CPU or on a GPU
    that JAX sees too, detached from their graph); `torch.from_dlpack` takes back what is returned.

    Args:
        features: [C, D] or [B, C, D], pooled hidden states of each response, the chosen one first.
        scores: [N] or [B, N], N = C - 1: beta (log-ratio of the negative - that of the chosen).
            None: all 0, as where the policy is the reference.
        mask: bool, like scores: which negatives exist. None: all.
        n: how many to select.
        seed: of criteria that draw.
        settings: `criterion`, `search`, `ridge`, `feature_norm`, `fisher_scale`, `beta`,
            `replacement`; see `Settings` and mass_dpo_jax/config.py.

    Returns:
        A `Selection` of JAX arrays, with leading dimension B if features have it. Negatives are
        counted from 0: index i is row i + 1 of the features.

    Raises:
        ValueError: shapes do not fit together, or n < 1.
        UserError: an unknown name or a value out of range in `settings`; or of the negatives there
            are, features or scores that are not finite, or too large to choose by in float32.
    """
    known = [field.name for field in dataclasses.fields(Settings)]
    for name in settings:
        _check_name("select_negatives", name, tuple(known))
    features = _array(features)
    if features.ndim not in (2, 3) or features.shape[-2] < 2 or n < 1:
        raise ValueError(
            f"expected features [C, D] or [B, C, D] with C >= 2, and n >= 1: got shape "
            f"{features.shape}, n = {n}"
        )
    shape = (*features.shape[:-2], features.shape[-2] - 1)
    scores = jnp.zeros(shape) if scores is None else _array(scores)
    mask = jnp.ones(shape, bool) if mask is None else _array(mask).astype(bool)
    if scores.shape != shape or mask.shape != shape:
        raise ValueError(
            f"features {features.shape} need scores and mask of shape {shape}: got "
            f"{scores.shape}, {mask.shape}"
        )
    if single := features.ndim == 2:
        features, scores, mask = features[None], scores[None], mask[None]
    how = Settings(**settings)
    chosen, beyond = select_features(features, scores, mask, jax.random.key(seed), n, how)
    names = ["features"] if single else [f"features[{row}]" for row in range(len(mask))]
    check(chosen, beyond, how, names)
    return jax.tree.map(lambda x: x[0], chosen) if single else chosen


@functools.partial(jax.jit, static_argnums=(4, 5))
def select_features(
    features: jax.Array,
    scores: jax.Array,
    mask: jax.Array,
    key: jax.Array,
    n: int,
    settings: Settings,
) -> tuple[Selection, jax.Array]:
    """`select_negatives` of arrays [B, ...], with what `check` needs."""
    keys = jax.random.split(key, features.shape[0])
    pools = Pool(grams(features, mask, settings), scores, mask, keys)
    return select(pools, n, settings), excess(pools, settings)


def grams(features: jax.Array, mask: jax.Array, settings: Settings) -> jax.Array:
    """What criteria see of features [B, C, D]: float32 [B, C, C]; mask [B, N] as in `Pool`."""

    def gram(one: tuple[jax.Array, jax.Array]) -> jax.Array:
        return designs.gram_matrix(*one, settings.feature_norm)

    if jax.default_backend() == "cpu" and jax.device_count() == 1:
        # One prompt after another stays in the cache from its centring to its product.
        return lax.map(gram, (features, mask))
    return jax.vmap(gram)((features, mask))


@design("pool_fisher")
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


@design("contrast")
def contrast(pool: Pool, settings: Settings) -> Design:
    """As `pool_fisher`, with v_i = sqrt(p_i) (h_i - h_chosen): not centred, so the chosen response
    counts. sum_i v_i v_i' is the pool's Cov_p(phi) + phi_bar phi_bar', which is Lemma 4.2's Hessian
    with the dropped term put back whole."""
    assert pool.gram is not None and pool.scores is not None
    roots = jnp.sqrt(pool_weights(pool.scores, pool.mask))
    products = designs.from_origin(pool.gram, 0)[1:, 1:]
    return Design(_scaled(roots[:, None] * roots[None, :] * products, pool, settings))


@design("set_fisher")
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


@criterion("hardest", needs_scoring=True)
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


@criterion("random", needs_scoring=False)
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


@criterion("all", needs_scoring=False)
def every(pool: Pool, n: int, settings: Settings) -> Selection:
    """Every negative, in order; n must be at least N."""
    del settings
    if n < pool.mask.shape[0]:
        raise ValueError(f"criterion all needs n >= N = {pool.mask.shape[0]}, got n = {n}")
    return in_order(jnp.argsort(~pool.mask, stable=True), pool.mask, n)


def diagnostics(pools: Pool, chosen: Selection, settings: Settings) -> dict[str, jax.Array]:
    """Figures on a choice from scored pools: means over the batch, float32 scalars.

    - `selection/random_overlap`: the share of picks that `random` would have made with the same
      key; n / N is what chance gives.

    And for designs:

    - `selection/logdet`: the value of the chosen sets.
    - `selection/max_norm_ridge`: max ||v||^2 / ridge over the pool. Far below 1, a design is close
      to "largest norms first".
    - `selection/effective_rank`: (sum of G's eigenvalues)^2 / sum of their squares, how many
      directions the pool's design vectors have.
    - `selection/optimality`: of the first prompt, the value over that of the best set there is;
      left out where more than `designs.MOST_SETS` sets would have to be looked at.
    """
    n = chosen.indices.shape[1]
    size = pools.mask.shape[1]

    def overlap(pool: Pool, mine: Selection) -> jax.Array:
        other = random(pool, n, settings)
        theirs = jnp.zeros(size, bool).at[other.indices].max(other.valid)
        hits = jnp.sum(mine.valid & theirs[mine.indices])
        return hits / jnp.maximum(jnp.sum(mine.valid), 1)

    figures = {"selection/random_overlap": jax.vmap(overlap)(pools, chosen).mean()}
    make = CRITERIA[settings.criterion].design
    if make is None:
        return figures

    def shape(pool: Pool) -> tuple[jax.Array, jax.Array]:
        gram = make(pool, settings).gram
        trace = jnp.trace(gram)
        rank = trace**2 / jnp.maximum(jnp.sum(gram**2), jnp.finfo(gram.dtype).tiny)
        return jnp.diagonal(gram).max(), rank

    norm, rank = jax.vmap(shape)(pools)
    figures["selection/logdet"] = jnp.log1p(chosen.gains).sum(1).mean()
    figures["selection/max_norm_ridge"] = norm.mean()
    figures["selection/effective_rank"] = rank.mean()
    if math.comb(size, min(n, size)) <= designs.MOST_SETS:
        first = jax.tree.map(lambda x: x[0], pools)
        best = designs.search(make(first, settings), first.mask, n, "exhaustive")
        values = [jnp.log1p(gains).sum() for gains in (chosen.gains[0], best.gains)]
        figures["selection/optimality"] = jnp.where(values[1] > 0, values[0] / values[1], 1.0)
    return figures


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
    gram = jnp.where(pool.mask[:, None] & pool.mask, products / settings.ridge, 0.0)
    if settings.fisher_scale:
        gram *= fisher_factor(pool.scores, pool.mask, settings.beta)
    return gram


def in_order(order: jax.Array, mask: jax.Array, n: int) -> Selection:
    """The first n of an order, as a `Selection` without gains: for criteria that sort.

    Args:
        order: int [N], negatives, all valid ones before the others.
        mask: bool [N], which are valid.
        n: how many; static.
    """
    order = jnp.pad(order[:n], (0, max(0, n - order.shape[0])))
    valid = jnp.arange(n) < jnp.sum(mask)
    indices = jnp.where(valid, order, 0).astype(jnp.int32)
    return designs.nothing(n)._replace(indices=indices, valid=valid)


def _array(x: Any) -> jax.Array:
    """A JAX array of the same values; without a copy where the other library allows it."""
    if hasattr(x, "__dlpack__") and not hasattr(x, "__array_interface__"):
        return jnp.from_dlpack(x)
    return jnp.asarray(x)


def _check_name(field: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise UserError(f"{field}={name!r} is none of {', '.join(names)}; nearest: {near!r}")


def _check_positive(field: str, value: float) -> None:
    if not value > 0:
        raise UserError(f"{field} must be > 0, got {value}")
