"""Selects negatives for the examples of a batch.

`select` maps a criterion over pools, `select_negatives` does so for arrays from any library.
registry.py defines what a criterion is; criteria.py has the built-in ones. Everything but
`select_negatives` is `jit`-able with static `n` and `settings`.

Examples:
    >>> features = jnp.array([[0.0, 0.0], [0.8, 0.8], [1.0, 0.0], [0.0, 1.0], [0.1, 0.0]])
    >>> picks = select_negatives(features, n=2, criterion="contrast")
    >>> print(picks.indices, [f"{gain:.4f}" for gain in picks.gains])
    [0 1] ['3.2000', '1.5476']
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.selection import baselines as baselines  # Registers its criteria.
from mass_dpo_jax.selection import criteria
from mass_dpo_jax.selection.arrays import as_array, as_integer, as_mask
from mass_dpo_jax.selection.draws import effective_pool, share_certain
from mass_dpo_jax.selection.gram import compute_gram, norm_excess
from mass_dpo_jax.selection.registry import Settings, check_name
from mass_dpo_jax.selection.search import search_exhaustively
from mass_dpo_jax.selection.types import Pool, Selection

MAX_SETS = 20_000  # `diagnose` looks for the best of no more sets than this.
OVERLAP = 2**31 - 1  # Folded into the key that diagnostics draw with: no candidate has this index.


def select(pools: Pool, n: int, settings: Settings) -> Selection:
    """Selects up to n negatives of every example.

    Args:
        pools: a `Pool` whose fields have a leading batch dimension B; `Settings` says whether gram
            and scores may be None.
        n: number of negatives to select, >= 1; static.
        settings: static.

    Returns:
        A `Selection` with leading dimension B.
    """
    choose = settings.definition.choose
    return jax.vmap(lambda pool: choose(pool, n, settings))(pools)


def float32_excess(pools: Pool, settings: Settings) -> Float[Array, " B"]:
    """Returns the ratio of each pool's magnitude to what float32 can resolve.

    Above 1, or NaN, the selection is meaningless, which `check_selection` refuses.
    """
    make = settings.definition.design

    def excess(pool: Pool) -> Array:
        if pool.scores is None:
            return jnp.float32(0)
        ratio = norm_excess(make(pool, settings)) if make else jnp.float32(0)
        return jnp.where(jnp.isfinite(pool.scores) | ~pool.mask, ratio, jnp.nan).max()

    return jax.vmap(excess)(pools)


def check_selection(
    picks: Selection, excess: Any, settings: Settings, locations: Sequence[str]
) -> None:
    """Raises UserError for the first example whose selection is meaningless.

    Args:
        picks: selections with a leading batch dimension B.
        excess: [B], from `float32_excess`.
        settings: settings of the selection.
        locations: name of each example in messages.
    """
    excess = np.asarray(excess)
    bad = ~(excess <= 1)
    for figures in (picks.gains, picks.weights):
        bad |= ~np.isfinite(figures).all(-1)
    if not bad.any():
        return
    row = int(bad.argmax())
    if excess[row] > 1:
        raise UserError(
            f"{locations[row]}: features too far apart to choose by {settings.criterion} in "
            f"float32: squared distances over the ridge {excess[row]:.1e} times what it has the "
            "digits for; expected less, as with selection.feature_norm=l2 or a larger "
            "selection.ridge"
        )
    raise UserError(
        f"{locations[row]}: features or scores that are not finite or overflow float32; expected "
        "finite numbers"
    )


def select_negatives(
    features: Any,
    scores: Any = None,
    mask: Any = None,
    *,
    n: int,
    criterion: str = "pool_fisher",
    ridge: float = 0.1,
    feature_norm: str = "none",
    fisher_scale: bool = False,
    beta: float = 0.1,
    draw: str = "pivotal",
    top: int = 10,
    seed: int = 0,
    **unknown: Any,
) -> Selection:
    """Selects up to n negatives of one example or of many: the selector as a library call.

    Arrays may be NumPy's, JAX's, or any that speak DLPack, such as PyTorch's, including slices and
    tensors with a gradient; `torch.from_dlpack` takes back what is returned.

    Args:
        features: [C, D] or [B, C, D], pooled hidden states of each response, the chosen one first.
        scores: [N] or [B, N], N = C - 1: beta (log-ratio of the negative - that of the chosen).
            None: all 0, as where the policy is the reference. `topk` and `boundary`, which rank as
            the policy does in training, rank by them.
        mask: bool, like scores: which negatives exist. None: all.
        n: number of negatives to select.
        criterion: a built-in name or one that was registered, see `selection.names()`.
        ridge: the paper's gamma, H_0 = ridge * I.
        feature_norm: "none", or "l2" to divide each feature by its norm.
        fisher_scale: True to multiply by Eq. 11's factor beta^2 (1 - sigma(Z)).
        beta: that of the scores, for `fisher_scale`.
        draw: how `sampled` draws: pivotal, local, partition or independent.
        top: for `topk`, how many of the largest scores negatives are drawn from.
        seed: for criteria that draw.
        unknown: refused, with the setting that was meant.

    Returns:
        A `Selection` of JAX arrays, with leading dimension B if features have it. Negatives are
        counted from 0: index i is row i + 1 of the features.

    Raises:
        ValueError: shapes do not fit together, or n < 1.
        UserError: an unknown name or a value out of range; features or scores of existing negatives
            that are not finite, or too large to choose by in float32; or something that is no array
            of real numbers, no mask or no whole number.
    """
    refuse_unknown("select_negatives", unknown, SETTINGS)
    n, seed = as_integer(n, "n"), as_integer(seed, "seed")
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
    if is_single := features.ndim == 2:
        features, scores, mask = features[None], scores[None], mask[None]
    settings = Settings(criterion, ridge, feature_norm, fisher_scale, beta, draw, top)
    picks, excess = select_features(features, scores, mask, jax.random.key(seed), n, settings)
    locations = ["features"] if is_single else [f"features[{row}]" for row in range(len(mask))]
    check_selection(picks, excess, settings, locations)
    return jax.tree.map(lambda x: x[0], picks) if is_single else picks


SETTINGS = tuple(field.name for field in dataclasses.fields(Settings) if field.init)


def refuse_unknown(function: str, unknown: dict[str, Any], settings: tuple[str, ...]) -> None:
    """Raises UserError for keywords that a function does not take."""
    for name in unknown:
        check_name(f"a setting of {function}", name, settings)


@functools.partial(jax.jit, static_argnums=(4, 5))
def select_features(
    features: Array, scores: Array, mask: Array, key: Key[Array, ""], n: int, settings: Settings
) -> tuple[Selection, Float[Array, " B"]]:
    """Selects as `select_negatives` from arrays [B, ...]; returns `float32_excess` beside."""
    keys = jax.random.split(key, features.shape[0])
    pools = Pool(compute_grams(features, mask, settings), scores, mask, keys)
    return select(pools, n, settings), float32_excess(pools, settings)


def compute_grams(features: Array, mask: Array, settings: Settings) -> Float[Array, "B C C"]:
    """Computes what criteria see of features [B, C, D], with mask [B, N] as in `Pool`."""

    def gram(example: tuple[Array, Array]) -> Array:
        return compute_gram(*example, settings.feature_norm)

    def vmap_grams(features: Array, mask: Array) -> Array:
        return jax.vmap(gram)((features, mask))

    def map_grams(features: Array, mask: Array) -> Array:
        return lax.map(gram, (features, mask))

    if jax.device_count() > 1:
        return vmap_grams(features, mask)
    # On a CPU, an example at a time stays in the cache from its centring to its product.
    return lax.platform_dependent(features, mask, cpu=map_grams, default=vmap_grams)


def diagnose(pools: Pool, picks: Selection, settings: Settings) -> dict[str, Array]:
    """Computes figures of a selection from scored pools: means over the batch, float32 scalars.

    - `selection/random_overlap`: the share of picks that `random` would have made; n / N is what
      chance gives.
    - `selection/effective_pool`: exp(entropy of p), how many candidates the pool weights p are
      spread over. With n or more of them drawing is nearly exact.
    - `selection/certain`: the share of the n drawn candidates that `pl_sampled` is certain to draw,
      because their weights are so large; 1 where the estimate is exact.

    And for designs:

    - `selection/logdet`: the value of the picks.
    - `selection/max_norm_ridge`: max ||v||^2 / ridge over the pool. Far below 1, a design is close
      to "largest norms first".
    - `selection/effective_rank`: (sum of G's eigenvalues)^2 / sum of their squares, how many
      directions the pool's design vectors have.
    - `selection/optimality`: for the first example, the value over that of the best set; left out
      where there are more than `MAX_SETS` sets.
    """
    n, size = picks.indices.shape[1], pools.mask.shape[1]

    def overlap(pool: Pool, picks: Selection) -> Array:
        # Uses a separate key, or a random criterion would be compared with its own draw.
        pool = pool._replace(key=jax.random.fold_in(pool.key, OVERLAP))
        random = criteria.random(pool, n, settings)
        is_random = jnp.zeros(size, bool).at[random.indices].max(random.valid)
        hits = jnp.sum(picks.valid & is_random[picks.indices])
        return hits / jnp.maximum(jnp.sum(picks.valid), 1)

    assert pools.scores is not None
    figures = {
        "selection/random_overlap": jax.vmap(overlap)(pools, picks).mean(),
        "selection/effective_pool": jax.vmap(effective_pool)(pools.scores, pools.mask).mean(),
        "selection/certain": jax.vmap(share_certain, (0, 0, None))(
            pools.scores, pools.mask, n
        ).mean(),
    }
    make = settings.definition.design
    if make is None:
        return figures

    def norm_and_rank(pool: Pool) -> tuple[Array, Array]:
        gram = make(pool, settings).gram
        trace = jnp.trace(gram)
        rank = trace**2 / jnp.maximum(jnp.sum(gram**2), jnp.finfo(gram.dtype).tiny)
        return jnp.diagonal(gram).max(), rank

    norm, rank = jax.vmap(norm_and_rank)(pools)
    figures["selection/logdet"] = jnp.log1p(picks.gains).sum(1).mean()
    figures["selection/max_norm_ridge"] = norm.mean()
    figures["selection/effective_rank"] = rank.mean()
    if math.comb(size, min(n, size)) <= MAX_SETS:
        first = jax.tree.map(lambda x: x[0], pools)
        best = search_exhaustively(make(first, settings), first.mask, n)
        value, optimum = (jnp.log1p(gains).sum() for gains in (picks.gains[0], best.gains))
        figures["selection/optimality"] = jnp.where(optimum > 0, value / optimum, 1.0)
    return figures
