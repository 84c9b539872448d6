"""Which n of a prompt's N negatives to train on.

`select` maps a criterion over the prompts of a batch, `select_negatives` does so for arrays of
whoever calls. What a criterion is says registry.py, those there are criteria.py. Everything is
`jit`-able with static `n` and `settings`.

Examples:
    >>> features = jnp.array([[0.0, 0.0], [0.8, 0.8], [1.0, 0.0], [0.0, 1.0], [0.1, 0.0]])
    >>> chosen = select_negatives(features, n=2, criterion="contrast")
    >>> print(chosen.indices, [f"{gain:.4f}" for gain in chosen.gains])
    [0 1] ['3.2000', '1.5476']
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.selection import criteria, designs
from mass_dpo_jax.selection.designs import Selection
from mass_dpo_jax.selection.registry import (
    Pool,
    Settings,
    check_name,
)

OVERLAP = 2**31 - 1  # Of the key by which `diagnostics` draws: no candidate has this number.


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
    choose = settings.definition.choose
    return jax.vmap(lambda pool: choose(pool, n, settings))(pools)


def excess(pools: Pool, settings: Settings) -> jax.Array:
    """How far the numbers of each prompt are beyond what its choice can be computed of: [B], above
    1 or NaN where it means nothing. For `check`, where a wrong choice would not be noticed."""
    make = settings.definition.design

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

    Arrays are NumPy's, JAX's, or any that speak DLPack, such as PyTorch's, slices and those that
    have a gradient too; `torch.from_dlpack` takes back what is returned.

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
            are, features or scores that are not finite, or too large to choose by in float32; or
            something that is no array of real numbers, no mask or no whole number.
    """
    known = [field.name for field in dataclasses.fields(Settings) if field.init]
    for name in settings:
        check_name("a setting of select_negatives", name, tuple(known))
    n, seed = whole(n, "n"), whole(seed, "seed")
    features = as_array(features, "features")
    if features.ndim not in (2, 3) or features.shape[-2] < 2 or n < 1:
        raise ValueError(
            f"expected features [C, D] or [B, C, D] with C >= 2, and n >= 1: got shape "
            f"{features.shape}, n = {n}"
        )
    shape = (*features.shape[:-2], features.shape[-2] - 1)
    scores = jnp.zeros(shape) if scores is None else as_array(scores, "scores")
    mask = jnp.ones(shape, bool) if mask is None else as_mask(mask)
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

    def at_once(features: jax.Array, mask: jax.Array) -> jax.Array:
        return jax.vmap(gram)((features, mask))

    def in_turn(features: jax.Array, mask: jax.Array) -> jax.Array:
        return lax.map(gram, (features, mask))

    if jax.device_count() > 1:
        return at_once(features, mask)
    # On a CPU, one prompt after another stays in the cache from its centring to its product.
    return lax.platform_dependent(features, mask, cpu=in_turn, default=at_once)


def diagnostics(pools: Pool, chosen: Selection, settings: Settings) -> dict[str, jax.Array]:
    """Figures on a choice from scored pools: means over the batch, float32 scalars.

    - `selection/random_overlap`: the share of picks that `random` would have made; n / N is what
      chance gives.

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
        # With noise of its own: a criterion that draws would meet itself.
        apart = pool._replace(key=jax.random.fold_in(pool.key, OVERLAP))
        other = criteria.random(apart, n, settings)
        theirs = jnp.zeros(size, bool).at[other.indices].max(other.valid)
        hits = jnp.sum(mine.valid & theirs[mine.indices])
        return hits / jnp.maximum(jnp.sum(mine.valid), 1)

    figures = {"selection/random_overlap": jax.vmap(overlap)(pools, chosen).mean()}
    make = settings.definition.design
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


def whole(x: Any, name: str) -> int:
    """An integer of any library as Python's own; raises UserError of anything else."""
    try:
        return operator.index(x)
    except TypeError:
        raise UserError(f"{name}={x!r}: expected a whole number") from None


def as_mask(x: Any) -> jax.Array:
    """A bool array; raises UserError of one that has more to say than who is there, such as indices
    or what is added to scores."""
    found = as_array(x, "mask")
    if not ((found == 0) | (found == 1)).all():
        raise UserError("mask: expected bool, or 1 where there is a negative and 0 elsewhere")
    return found.astype(bool)


def as_array(x: Any, name: str) -> jax.Array:
    """A JAX array of the same values; without a copy where the other library allows it.

    Raises:
        UserError: it is no array of real numbers; called by `name`.
    """
    foreign = hasattr(x, "__dlpack__") and not hasattr(x, "__array_interface__")
    read = jnp.from_dlpack if foreign else jnp.asarray
    given = x
    try:
        if foreign and hasattr(x, "detach"):
            # PyTorch hands over neither what has a gradient nor slices.
            given = x.detach().contiguous()
        try:
            found = read(given)
        except (BufferError, RuntimeError, TypeError, ValueError):
            if not hasattr(given, "cpu"):
                raise
            found = read(given.cpu())  # On a device that JAX does not see.
        if jnp.issubdtype(found.dtype, jnp.complexfloating):
            raise TypeError("complex numbers")
    except (BufferError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise UserError(
            f"{name}: {type(x).__name__}: not read as an array of real numbers ({reason}); "
            "expected one of NumPy or JAX, or a dense tensor of PyTorch"
        ) from None
    return found
