"""Greedy selection from one very large pool, outside training: a whole catalogue as negatives.

The same picks as `batch.select_negatives` for the additive designs, where N x N products would not
fit. sharded_search.py has the algorithm.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.selection import criteria
from mass_dpo_jax.selection.arrays import as_array, as_integer, as_mask
from mass_dpo_jax.selection.batch import refuse_unknown
from mass_dpo_jax.selection.gram import multiply, normalize_features
from mass_dpo_jax.selection.registry import Settings, check_name
from mass_dpo_jax.selection.sharded_search import search_shard
from mass_dpo_jax.selection.shards import (
    Chunk,
    Shard,
    Take,
    fold_chunks,
    list_axes,
    make_mesh,
    shard_rows,
)
from mass_dpo_jax.selection.types import Selection

CRITERIA = ("pool_fisher", "contrast")
SETTINGS = ("criterion", "ridge", "feature_norm", "fisher_scale", "beta")


def select_from_catalogue(
    features: Any,
    scores: Any = None,
    mask: Any = None,
    *,
    n: int,
    chosen: Any = None,
    mesh: Mesh | None = None,
    criterion: str = "pool_fisher",
    ridge: float = 0.1,
    feature_norm: str = "none",
    fisher_scale: bool = False,
    beta: float = 0.1,
    **unknown: Any,
) -> Selection:
    """Selects up to n of N candidates, as `select_negatives` would from one example's.

    Memory beside the features: O(N) and, for the shortlist, N / 32 x D. Features stay in the type
    they come in (bfloat16, say) and are read chunk by chunk, in float32.

    Gains within `search.TIE` of the largest, relatively, are ties, and of these the lowest index is
    chosen. Sums in another order (more devices, another chunk size, `select_negatives`) round
    differently: a candidate that close to the edge of a tie may be chosen instead.

    A candidate whose features are not finite has no gain. If the weights or the mean are not finite
    because of it, or of a score, no candidate has one, and there is no choice to make: an error.

    Args:
        features: [N, D], pooled hidden states of the candidates, N >= 2.
        scores: [N], beta (log-ratio of the candidate - that of the chosen response). None: all 0.
        mask: bool [N], which candidates may be chosen, and count in the weights. None: all.
        n: number of candidates to select.
        chosen: [D], feature of the chosen response; needed for `contrast`, which measures from it.
        mesh: candidates are split over its axes `data` and `fsdp`. None: over all devices.
        criterion: `pool_fisher` or `contrast`.
        ridge: the same as in `select_negatives`. Weights are about 1 / N, so a ridge that suits 20
            candidates makes a design of the largest norms of 100,000.
        feature_norm: the same as in `select_negatives`, like `fisher_scale` and `beta`.
        unknown: refused, with the setting that was meant.

    Returns:
        A `Selection` of JAX arrays [n].

    Raises:
        ValueError: shapes do not fit together, or n < 1.
        UserError: an unknown name or a value out of range, no `chosen` for `contrast`, or features
            or scores by which no candidate can be chosen.
    """
    refuse_unknown("select_from_catalogue", unknown, SETTINGS)
    settings = Settings(criterion, ridge, feature_norm, fisher_scale, beta)
    check_name("criterion", criterion, CRITERIA)
    n = as_integer(n, "n")
    features = _read_rows(features, "features")
    if features.ndim != 2 or features.shape[0] < 2 or n < 1:
        raise ValueError(
            f"expected features [N, D] with N >= 2, and n >= 1: got shape {features.shape}, n = {n}"
        )
    size, width = features.shape
    scores = jnp.zeros(size) if scores is None else _read_rows(scores, "scores")
    mask = jnp.ones(size, bool) if mask is None else as_mask(mask)
    if chosen is None and criterion == "contrast":
        raise UserError("criterion='contrast' measures from the chosen response: give chosen=[D]")
    chosen = jnp.zeros(width) if chosen is None else as_array(chosen, "chosen")
    if scores.shape != (size,) or mask.shape != (size,) or chosen.shape != (width,):
        raise ValueError(
            f"features {features.shape} need scores and mask of shape ({size},) and chosen of "
            f"shape ({width},): got {scores.shape}, {mask.shape}, {chosen.shape}"
        )
    mesh = make_mesh() if mesh is None else mesh
    features, scores, mask = (shard_rows(mesh, x) for x in (features, scores, mask))
    scale = jnp.float32(1.0 / settings.ridge)
    if settings.fisher_scale:
        scale = scale * criteria.fisher_factor(scores, mask, settings.beta)
    static = n, criterion, feature_norm, mesh
    picks, _ = search_greedily(features, scores, mask, chosen, scale, *static)
    largest = float(picks.gains[0])
    origin = chosen if criterion == "contrast" else jnp.zeros_like(chosen)
    if not math.isfinite(largest) or (
        largest == 0 and not _is_finite(features, scores, mask, origin)
    ):
        raise UserError(
            "features, scores or chosen: not finite, or too large to choose by in float32; "
            "expected finite numbers of every candidate that may be chosen"
        )
    return picks


@jax.jit
def _is_finite(features: Array, scores: Array, mask: Array, origin: Array) -> Bool[Array, ""]:
    """Whether scores and squared norms of all that may be chosen are finite in float32."""
    squares = jnp.sum((features.astype(jnp.float32) - origin[None]) ** 2, axis=1)
    return ((jnp.isfinite(squares) & jnp.isfinite(scores)) | ~mask).all()


def _read_rows(x: Any, name: str) -> Any:
    """Reads an array [N, ...]; NumPy's stays on the host, from which each device gets its part."""
    return x if isinstance(x, np.ndarray) else as_array(x, name)


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8))
def search_greedily(
    features: Float[Array, "N D"],
    scores: Float[Array, " N"],
    mask: Bool[Array, " N"],
    chosen: Float[Array, " D"],
    scale: Float[Array, ""],
    n: int,
    criterion: str,
    feature_norm: str,
    mesh: Mesh,
) -> tuple[Selection, Int[Array, ""]]:
    """Selects n candidates; returns also how many sweeps it took (the first finds squared norms).

    Arrays [N, ...] are as `shard_rows` gives them; `chosen` is not read for `pool_fisher`. `scale`,
    1 / ridge, multiplies products of design vectors. All that follows it is static.
    """
    weights = criteria.pool_weights(scores, mask)
    axes = list_axes(mesh)

    def search(
        features: Array, weights: Array, mask: Array, chosen: Array, scale: Array
    ) -> tuple[Selection, Array]:
        roots = jnp.sqrt(weights * scale)
        candidates = _Candidates(features, roots, chosen, 0 * chosen, feature_norm)
        if criterion == "contrast":
            candidates = dataclasses.replace(candidates, origin=candidates.read(chosen))
        else:
            candidates = _subtract_mean(candidates, weights, axes)
        return search_shard(candidates.as_shard(axes), mask, n)

    return jax.shard_map(
        search,
        mesh=mesh,
        in_specs=(P(axes), P(axes), P(axes), P(), P()),
        out_specs=P(),
        check_vma=False,
    )(features, weights, mask, chosen.astype(jnp.float32), scale)


@dataclasses.dataclass(frozen=True)
class _Candidates:
    """The candidates of one device, each with one design vector.

    Attributes:
        features: [m, D], of any type.
        roots: float32 [m], square roots of what multiplies v v': the weight over the ridge.
        origin: float32 [D], subtracted from every feature first.
        mean: float32 [D], subtracted from the remainder.
        feature_norm: the same as in `Settings`.
    """

    features: Float[Array, "m D"]
    roots: Float[Array, " m"]
    origin: Float[Array, " D"]
    mean: Float[Array, " D"]
    feature_norm: str

    def as_shard(self, axes: tuple[str, ...]) -> Shard:
        """Returns what is searched, over the axes of a mesh."""
        size, width = self.features.shape

        def read(take: Take) -> Array:
            return self.design_vectors(take(self.features), take(self.roots))[:, None]

        return Shard((size, 1, width), read, axes)

    def read(self, features: Array) -> Array:
        """Returns features [..., D] as `gram.normalize_features` does."""
        return normalize_features(features, self.feature_norm)

    def design_vectors(self, features_cD: Array, roots_c: Array) -> Array:
        """Computes design vectors over the root of the ridge, [c, D]; 0 without weight."""
        roots_c1 = roots_c[:, None]
        centred_cD = self.read(features_cD) - self.origin[None] - self.mean[None]
        return jnp.where(roots_c1 > 0, roots_c1 * centred_cD, 0.0)


def _subtract_mean(
    candidates: _Candidates, weights_m: Float[Array, " m"], axes: tuple[str, ...]
) -> _Candidates:
    """Returns the candidates with the weighted mean over all devices as what is subtracted."""
    # The mean lies close to the heaviest candidate, so with that as origin little cancels.
    weights_m = jnp.where(weights_m > 0, weights_m, 0.0)
    shard = candidates.as_shard(axes)
    largest = shard.find_largest(weights_m)
    heaviest = shard.find_first(weights_m, jnp.arange(shard.size), largest)
    origin_D = shard.broadcast_from_owner(
        heaviest, lambda take: candidates.read(take(candidates.features))
    )
    shifted = dataclasses.replace(candidates, origin=origin_D)

    def add(total_D: Array, chunk: Chunk) -> Array:
        weights_c = jnp.where(chunk.is_new, chunk.take(weights_m), 0.0)
        features_cD = chunk.take(candidates.features)
        differences_cD = shifted.design_vectors(features_cD, jnp.sign(weights_c))
        return total_D + multiply(weights_c, differences_cD)

    mean_D = lax.psum(fold_chunks(shard, add, candidates.mean), axes)
    return dataclasses.replace(shifted, mean=mean_D)
