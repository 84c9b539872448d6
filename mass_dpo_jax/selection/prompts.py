"""Which k of M prompts to train on, each with its set of negatives: the setting of Theorem 5.2.

The loss of a prompt with the set S is Plackett-Luce's, whose Hessian in the last layer is beta^2
Cov_q(h): q is the softmax of the rewards over S and the chosen response, h their features. That is
Lemma 4.2 with nothing dropped; for one negative it is sigma (1 - sigma) (h_1 - h_0) (h_1 - h_0)',
what active learning for DPO (ADPO, Kveton et al. 2025) adds up for a pair. `design` chooses prompts
greedily, so that the log-determinant of ridge * I + the sum of their Cov_q(h) is large, which is
where the bound of Theorem 5.2 comes from. beta^2 is common to all prompts and left out: it divides
the ridge.

sharded_search.py has the search; nothing is M x M.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mass_dpo_jax.config import CHOICES
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.selection.arrays import as_array, as_integer, as_mask
from mass_dpo_jax.selection.batch import refuse_unknown
from mass_dpo_jax.selection.gram import normalize_features
from mass_dpo_jax.selection.registry import Settings, check_name
from mass_dpo_jax.selection.sharded_search import search_shard
from mass_dpo_jax.selection.shards import (
    Shard,
    Take,
    list_axes,
    make_mesh,
    shard_rows,
)
from mass_dpo_jax.selection.types import Selection

WAYS = CHOICES["selection.prompts"][1:]  # Without "all".
SETTINGS = ("by", "ridge", "feature_norm", "seed")
RANDOM_STREAM = 1  # Beside the seed and the draw; the order of training has the seed and the epoch.


class PromptSelection(NamedTuple):
    """The prompts selected of M, in order of choice: the first of them are the choice of fewer.

    Attributes:
        indices: int [k], 0 <= index < M, all different.
        values: float32 [k]. For `design` the growth of the log-determinant; for `uncertain` the gap
            between rewards; None for `random`.
    """

    indices: np.ndarray
    values: np.ndarray | None


def select_prompts(
    features: Any = None,
    scores: Any = None,
    mask: Any = None,
    *,
    k: int,
    by: str = "design",
    ridge: float = 0.1,
    feature_norm: str = "none",
    seed: int = 0,
    mesh: Mesh | None = None,
    **unknown: Any,
) -> PromptSelection:
    """Selects k of M prompts to train on.

    Memory beside the features: another M x N x D float32 numbers for `design`, over the devices.

    Args:
        features: [M, C, D], pooled hidden states of the responses of each prompt's set, the chosen
            one first and then N = C - 1 negatives. Only `design` reads them.
        scores: [M, N], beta (log-ratio of a negative - that of the chosen response). None: all 0,
            as when the policy is the reference.
        mask: bool [M, N], which negatives exist. None: all.
        k: number of prompts to select, 1 <= k <= M.
        by: "design", the largest information; "uncertain", the smallest gap between the rewards of
            the chosen response and of the hardest negative; or "random".
        ridge: H_0 = ridge * I.
        feature_norm: "none", or "l2" to divide each feature by its norm.
        seed: for "random", and for ties of "uncertain", which go by chance.
        mesh: prompts are split over its axes `data` and `fsdp`. None: over all devices.
        unknown: refused, with the setting that was meant.

    Raises:
        ValueError: shapes do not fit together, or k is out of range.
        UserError: an unknown name or a value out of range; features or scores of existing negatives
            that are not finite, or too large to choose by in float32; or nothing to choose by.
    """
    refuse_unknown("select_prompts", unknown, SETTINGS)
    check_name("by", by, WAYS)
    settings = Settings(ridge=ridge, feature_norm=feature_norm)
    k, seed = as_integer(k, "k"), as_integer(seed, "seed")
    given = {"features": features, "scores": scores, "mask": mask}
    needed = {"design": ("features",), "uncertain": ("scores",), "random": ()}[by]
    for name in needed or (next((n for n in given if given[n] is not None), "features"),):
        if given[name] is None:
            raise UserError(f"by={by!r} needs {name}")
    features = None if features is None else as_array(features, "features")
    if features is not None and (features.ndim != 3 or features.shape[1] < 2):
        raise ValueError(f"expected features [M, C, D] with C >= 2: got shape {features.shape}")
    scores = None if scores is None else as_array(scores, "scores")
    mask = None if mask is None else as_mask(mask)
    shapes = [x.shape for x in (scores, mask) if x is not None]
    if features is not None:
        shapes.append((len(features), features.shape[1] - 1))
    if len({*shapes}) > 1 or len(shapes[0]) != 2:
        raise ValueError(f"expected features [M, C, D], scores and mask [M, C - 1]: got {shapes}")
    shape = shapes[0]
    if not 1 <= k <= shape[0]:
        raise ValueError(f"k={k}: expected 1 to {shape[0]}, the number of prompts")
    scores = jnp.zeros(shape) if scores is None else scores
    mask = jnp.ones(shape, bool) if mask is None else mask
    if by == "random":
        return choose_at_random(shape[0], k, seed)
    if by == "uncertain":
        return choose_uncertain(np.asarray(measure_gaps(scores, mask)), k, seed)
    vectors = jax.jit(information_vectors, static_argnums=3)(
        features, scores, mask, settings.feature_norm
    )
    return choose_by_design(vectors, k, settings.ridge, mesh)


def information_vectors(
    features: Float[Array, "*B C D"],
    scores: Float[Array, "*B N"],
    mask: Bool[Array, "*B N"],
    feature_norm: str = "none",
) -> Float[Array, "*B N D"]:
    r"""Returns vectors v_j of each prompt with sum_j v_j v_j' = Cov_q(h), as few as negatives.

    With the negatives' phi_j = h_j - h_0 and their share of q,

        v_j = sqrt(q_j) (phi_j - sum_i q_i phi_i / (1 + sqrt(q_0))),

    since diag(q) - q q' over the negatives has the root (I - u u' / (1 + sqrt(q_0))) diag(u) with u
    = sqrt(q) and |u|^2 = 1 - q_0. One negative has v = sqrt(q_0 q_1) phi.

    Args:
        features: features of the chosen response and of the N = C - 1 negatives.
        scores: rewards of the negatives minus that of the chosen response.
        mask: which negatives exist; the vectors of others are 0.
        feature_norm: as in `Settings`.
    """
    features = normalize_features(features, feature_norm)
    differences = jnp.where(mask[..., None], features[..., 1:, :] - features[..., :1, :], 0.0)
    rewards = jnp.pad(scores.astype(jnp.float32), [(0, 0)] * (scores.ndim - 1) + [(1, 0)])
    is_member = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(1, 0)], constant_values=True)
    shares = jax.nn.softmax(rewards, axis=-1, where=is_member)
    q, root_q0 = shares[..., 1:, None], jnp.sqrt(shares[..., :1, None])
    mean = jnp.sum(q * differences, axis=-2, keepdims=True)
    vectors = jnp.sqrt(q) * (differences - mean / (1 + root_q0))
    return jnp.where(mask[..., None], vectors, 0.0)


def measure_gaps(scores: Float[Array, "*B N"], mask: Bool[Array, "*B N"]) -> Float[Array, "*B"]:
    """Computes |reward of the chosen response - that of the hardest negative|; inf without any.

    A score that is not finite makes the gap NaN.
    """
    scores = scores.astype(jnp.float32)
    gaps = jnp.abs(jnp.max(scores, axis=-1, where=mask, initial=-jnp.inf))
    return jnp.where((jnp.isfinite(scores) | ~mask).all(-1), gaps, jnp.nan)


def choose_at_random(size: int, k: int, seed: int, draw: int = 0) -> PromptSelection:
    """Draws k of `size` prompts; every `draw` is another."""
    return PromptSelection(_shuffle(size, seed, draw)[:k], None)


def choose_uncertain(
    gaps: Float[np.ndarray, " M"], k: int, seed: int, draw: int = 0
) -> PromptSelection:
    """Selects the prompts of the k smallest gaps; of equal ones those that `random` draws first.

    Raises:
        UserError: a gap is NaN.
    """
    if np.isnan(gaps).any():
        raise UserError(
            f"prompt {int(np.isnan(gaps).argmax())}: scores that are not finite; expected finite "
            "numbers of every negative"
        )
    shuffled = _shuffle(len(gaps), seed, draw)
    indices = shuffled[np.argsort(gaps[shuffled], kind="stable")][:k]
    return PromptSelection(indices, gaps[indices].astype(np.float32))


def _shuffle(size: int, seed: int, draw: int) -> np.ndarray:
    return np.random.default_rng([seed, draw, RANDOM_STREAM]).permutation(size)


def choose_by_design(
    vectors: Any, k: int, ridge: float, mesh: Mesh | None = None
) -> PromptSelection:
    """Selects k prompts greedily by the log-determinant of ridge * I + the sum of v v'.

    Gains within `search.TIE` of the largest, relatively, are ties, and of these the lowest index is
    chosen.

    Args:
        vectors: [M, N, D], of `information_vectors`; NumPy's stay on the host, from which each
            device gets its part.
        k: number of prompts to select.
        ridge: > 0.
        mesh: as in `select_prompts`.

    Raises:
        UserError: vectors are not finite or too large for float32, or all of them are 0.
    """
    mesh = make_mesh() if mesh is None else mesh
    prompts = shard_rows(mesh, vectors)
    is_prompt = shard_rows(mesh, np.ones(len(vectors), bool))
    largest = np.asarray(_squared_norms(prompts))[: len(vectors)] / ridge
    bad = ~np.isfinite(largest)
    if bad.any():
        raise UserError(
            f"prompt {int(bad.argmax())}: features or scores that are not finite, or too large to "
            "choose by in float32; expected finite numbers of every response"
        )
    if not largest.any():
        raise UserError(
            "no prompt has any information to choose by: the features of its responses are equal"
        )
    picks = search(prompts, is_prompt, jnp.float32(1 / ridge), k, mesh)[0]
    growths = vectors.shape[1] * np.log1p(np.asarray(picks.gains, np.float64))
    return PromptSelection(np.asarray(picks.indices), growths.astype(np.float32))


@jax.jit
def _squared_norms(vectors: Float[Array, "M N D"]) -> Float[Array, " M"]:
    return jnp.sum(vectors.astype(jnp.float32) ** 2, axis=(1, 2))


@functools.partial(jax.jit, static_argnums=(3, 4))
def search(
    vectors: Float[Array, "M N D"],
    mask: Bool[Array, " M"],
    scale: Float[Array, ""],
    k: int,
    mesh: Mesh,
) -> tuple[Selection, Int[Array, ""]]:
    """Selects k prompts, as `search_shard`; returns also how many sweeps it took.

    Args:
        vectors: as `shard_rows` gives them.
        mask: likewise; which prompts exist.
        scale: 1 / ridge.
        k: static, like `mesh`.
        mesh: the devices.
    """
    axes = list_axes(mesh)

    def search_prompts(vectors: Array, mask: Array, scale: Array) -> tuple[Selection, Array]:
        def read(take: Take) -> Array:
            return take(vectors).astype(jnp.float32) * jnp.sqrt(scale)

        size, rank, width = vectors.shape
        return search_shard(Shard((size, rank, width), read, axes), mask, k)

    return jax.shard_map(
        search_prompts,
        mesh=mesh,
        in_specs=(P(axes), P(axes), P()),
        out_specs=P(),
        check_vma=False,
    )(vectors, mask, scale)
