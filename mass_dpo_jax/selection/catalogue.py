"""Greedy selection from one very large pool, outside of training: a whole catalogue as negatives.

The same picks as `batch.select_negatives` for the additive designs, where N x N products would
not fit. With the chosen vectors v_s, H = I + sum_s v_s v_s' (everything over the ridge) has

    H^-1 = I - sum_k w_k w_k',    w_k = H_{k-1}^-1 v_s / sqrt(1 + gain_s),

w_k for the k-th choice, so a candidate's gain v' H^-1 v falls by (w_k' v)^2 at each choice: one
product of the features with a vector, an incremental Cholesky factorisation of I + G_SS whose
columns need not be kept.

Gains only fall. So those of the last *sweep* over all candidates bound all later ones, and between
sweeps only a *shortlist* of the most promising is kept up to date. As long as the best of it is
above every bound outside, nothing else can be chosen; else the next sweep makes up for the choices
that were missed, and makes a new shortlist. Where gains fall so fast that every choice needs a
sweep, that is the dense method.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.selection import Settings, batch, criteria, designs, registry
from mass_dpo_jax.selection.designs import TIE, Selection
from mass_dpo_jax.utils.mesh_axes import BATCH_AXES

CRITERIA = ("pool_fisher", "contrast")
SHORTLIST = 32  # One candidate of so many is kept exact between sweeps, but at least
SHORTEST = 1024  # so many.
CHUNK_BYTES = 2**21  # Of float32 features at a time on a CPU: what stays in a core's cache.
OTHER_CHUNK_BYTES = 2**26  # On accelerators.
TAKEN = -1.0  # The gain of who must not be chosen (again); others' are >= 0.
NOBODY = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class _Part:
    """The M = N / devices candidates of one device, inside `shard_map` over `axes`.

    Attributes:
        features: [M, D], of any type.
        roots: float32 [M], square roots of what multiplies v v': the weight over the ridge.
        origin: float32 [D], subtracted from every feature first.
        mean: float32 [D], subtracted from what is left.
        norm: `Settings.feature_norm`.
        axes: of the mesh.
    """

    features: jax.Array
    roots: jax.Array
    origin: jax.Array
    mean: jax.Array
    norm: str
    axes: tuple[str, ...]

    @property
    def size(self) -> int:
        return self.features.shape[0]

    @property
    def first(self) -> jax.Array:
        """The place of the first of ours among all N."""
        return lax.axis_index(self.axes) * self.size

    def read(self, features: jax.Array) -> jax.Array:
        """Features [..., D] in float32, divided by their norms where those are asked for."""
        features = features.astype(jnp.float32)
        if self.norm == "l2":
            norms = jnp.sqrt(jnp.sum(features**2, axis=-1, keepdims=True))
            norms = jnp.where(jnp.isinf(norms), jnp.nan, norms)  # Not a direction that is 0.
            features = features / jnp.where(norms == 0, 1.0, norms)
        return features

    def vectors(self, features: jax.Array, roots: jax.Array) -> jax.Array:
        """Design vectors over the ridge's root, of features [m, D]; 0 without weight."""
        roots = roots[:, None]
        centred = self.read(features) - self.origin[None] - self.mean[None]
        return jnp.where(roots > 0, roots * centred, 0.0)

    def anyone(self, place: jax.Array, make: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """`make` of a place on the device that has it, on every device: [D]."""
        here = place - self.first
        ours = (here >= 0) & (here < self.size)
        return lax.psum(jnp.where(ours, make(jnp.clip(here, 0, self.size - 1)), 0.0), self.axes)

    def best(self, gains: jax.Array, places: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The largest gain on any device, and the lowest place that has it or ties.

        Args:
            gains: [m] of ours at `places` [m].
        """
        most = lax.pmax(jnp.max(gains), self.axes)
        ties = (gains >= 0) & (gains >= most * (1 - TIE))
        return most, lax.pmin(jnp.min(jnp.where(ties, self.first + places, NOBODY)), self.axes)


class _Choices(NamedTuple):
    """Those that were made, on every device."""

    made: jax.Array
    """int32: how many."""
    chosen: Selection
    inverse: jax.Array
    """float32 [n, D]: the w_k of H^-1; 0 for choices to come."""


class _Shortlist(NamedTuple):
    """The m candidates whose gains are kept exact."""

    places: jax.Array
    """int32 [m], counted from the first of this device."""
    vectors: jax.Array
    """float32 [m, D]."""
    gains: jax.Array
    """float32 [m]; or `TAKEN`."""
    outside: jax.Array
    """float32: no other gain of this device is above it."""


def select_from_catalogue(
    features: Any,
    scores: Any = None,
    mask: Any = None,
    *,
    n: int,
    chosen: Any = None,
    mesh: Mesh | None = None,
    **settings: Any,
) -> Selection:
    """Selects up to n of N candidates, as `batch.select_negatives` would of one prompt's.

    Memory beside the features: O(N) and, for the shortlist, N / 32 x D. Features stay in the type
    they come in (bfloat16, say) and are read chunk by chunk, in float32.

    Gains within `designs.TIE` of the largest, relatively, are ties, and of these the lowest index
    is chosen. Sums in another order (more devices, another chunk size, `select_negatives`) round
    otherwise: who is that close to the edge of a tie may be chosen instead.

    A candidate whose features are not finite has no gain. If the weights or the mean are not finite
    because of it, or of a score, nobody has, and there is no choice to make: an error.

    Args:
        features: [N, D], pooled hidden states of the candidates, N >= 2.
        scores: [N]: beta (log-ratio of the candidate - that of the chosen response). None: all 0.
        mask: bool [N]: who may be chosen, and counts in the weights. None: all.
        n: how many to select.
        chosen: [D], feature of the chosen response; needed for `contrast`, which measures from it.
        mesh: candidates are split over its axes `data` and `fsdp`. None: over all devices.
        settings: `criterion` (`pool_fisher` or `contrast`), `ridge`, `feature_norm`,
            `fisher_scale`, `beta`; see `Settings`. Weights are about 1 / N, so a ridge that suits
            20 candidates makes a design of the largest norms of 100,000.

    Returns:
        A `Selection` of JAX arrays [n].

    Raises:
        ValueError: shapes do not fit together, or n < 1.
        UserError: an unknown name or a value out of range in `settings`, no `chosen` for
            `contrast`, or features or scores by which nobody can be chosen.
    """
    how, n = _settings(settings), batch.whole(n, "n")
    features = _array(features, "features")
    if features.ndim != 2 or features.shape[0] < 2 or n < 1:
        raise ValueError(
            f"expected features [N, D] with N >= 2, and n >= 1: got shape {features.shape}, n = {n}"
        )
    size, width = features.shape
    scores = jnp.zeros(size) if scores is None else _array(scores, "scores")
    mask = jnp.ones(size, bool) if mask is None else batch.as_mask(mask)
    if chosen is None and how.criterion == "contrast":
        raise UserError("criterion='contrast' measures from the chosen response: give chosen=[D]")
    chosen = jnp.zeros(width) if chosen is None else batch.as_array(chosen, "chosen")
    if scores.shape != (size,) or mask.shape != (size,) or chosen.shape != (width,):
        raise ValueError(
            f"features {features.shape} need scores and mask of shape ({size},) and chosen of "
            f"shape ({width},): got {scores.shape}, {mask.shape}, {chosen.shape}"
        )
    mesh = all_devices() if mesh is None else mesh
    features, scores, mask = (split(mesh, x) for x in (features, scores, mask))
    scale = jnp.float32(1.0 / how.ridge)
    if how.fisher_scale:
        scale = scale * criteria.fisher_factor(scores, mask, how.beta)
    static = n, how.criterion, how.feature_norm, mesh
    found = greedy(features, scores, mask, chosen, scale, *static)[0]
    first = float(found.gains[0])  # The largest of them.
    origin = chosen if how.criterion == "contrast" else jnp.zeros_like(chosen)
    if not math.isfinite(first) or (first == 0 and not _finite(features, scores, mask, origin)):
        raise UserError(
            "features, scores or chosen: not finite, or too large to choose by in float32; "
            "expected finite numbers of every candidate that may be chosen"
        )
    return found


@jax.jit
def _finite(
    features: jax.Array, scores: jax.Array, mask: jax.Array, origin: jax.Array
) -> jax.Array:
    """Whether scores and squared norms are numbers in float32, of all that may be chosen."""
    squares = jnp.sum((features.astype(jnp.float32) - origin[None]) ** 2, axis=1)
    return ((jnp.isfinite(squares) & jnp.isfinite(scores)) | ~mask).all()


def _settings(settings: dict[str, Any]) -> Settings:
    known = ("criterion", "ridge", "feature_norm", "fisher_scale", "beta")
    for name in settings:
        registry.check_name("a setting of select_from_catalogue", name, known)
    how = Settings(**settings)
    registry.check_name("criterion", how.criterion, CRITERIA)
    return how


def _array(x: Any, name: str) -> Any:
    """NumPy's stay on the host, from where each device gets its own part."""
    return x if isinstance(x, np.ndarray) else batch.as_array(x, name)


def all_devices() -> Mesh:
    """A mesh of one axis over all devices."""
    return jax.make_mesh((jax.device_count(),), BATCH_AXES[:1], axis_types=(AxisType.Auto,))


def _axes(mesh: Mesh) -> tuple[str, ...]:
    return tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)


def split(mesh: Mesh, x: Any) -> jax.Array:
    """An array [N, ...] over the devices, filled up with zeros to a multiple of their number."""
    missing = -x.shape[0] % math.prod(mesh.shape[axis] for axis in _axes(mesh))
    if missing:
        pad = np.pad if isinstance(x, np.ndarray) else jnp.pad
        x = pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
    return jax.device_put(x, NamedSharding(mesh, P(_axes(mesh))))


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8))
def greedy(
    features: jax.Array,
    scores: jax.Array,
    mask: jax.Array,
    chosen: jax.Array,
    scale: jax.Array,
    n: int,
    criterion: str,
    feature_norm: str,
    mesh: Mesh,
) -> tuple[Selection, jax.Array]:
    """The choice and how many sweeps it took (the first is for the squared norms).

    Args:
        features: [N, D], N a multiple of the number of devices.
        scores, mask: [N].
        chosen: [D], of any values for `pool_fisher`.
        scale: a scalar, what multiplies the weights' products: 1 / ridge.
        n, criterion, feature_norm, mesh: static.
    """
    weights = criteria.pool_weights(scores, mask)
    axes = _axes(mesh)

    def local(
        features: jax.Array,
        weights: jax.Array,
        mask: jax.Array,
        chosen: jax.Array,
        scale: jax.Array,
    ) -> tuple[Selection, jax.Array]:
        raw = _Part(features, jnp.sqrt(weights * scale), chosen, 0 * chosen, feature_norm, axes)
        if criterion == "contrast":
            part = dataclasses.replace(raw, origin=raw.read(chosen))
        else:
            part = _centred(raw, weights)
        return _greedy(part, mask, n)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(axes), P(axes), P(axes), P(), P()),
        out_specs=P(),
        check_vma=False,
    )(features, weights, mask, chosen.astype(jnp.float32), scale)


def _greedy(part: _Part, mask: jax.Array, n: int) -> tuple[Selection, jax.Array]:
    """`greedy` on one device of the mesh: its M = N / devices candidates."""
    everyone = jnp.arange(part.size)

    def from_list(state: tuple) -> tuple:
        choices, listed, _ = state
        return _take(part, choices, listed, *part.best(listed.gains, listed.places))

    def sweep(state: tuple) -> tuple:
        choices, gains, swept, sweeps = state
        gains = _sweep(part, gains, swept, choices)
        swept = choices.made
        # Of all: there may be more ties than the shortlist has room for.
        found = part.best(gains, everyone)
        # Loops, since a conditional would copy what it hands on at every choice.
        start = _take(part, choices, _shorten(part, gains), *found)
        choices, _, _ = lax.while_loop(lambda x: (x[0].made < n) & x[2], from_list, start)
        return choices, gains, swept, sweeps + 1

    zero = jnp.int32(0)
    choices = _Choices(zero, designs.nothing(n), jnp.zeros((n, part.features.shape[1])))
    start = choices, jnp.where(mask, 0.0, TAKEN), zero, zero
    choices, _, _, sweeps = lax.while_loop(lambda x: x[0].made < n, sweep, start)
    return choices.chosen, sweeps


def _centred(raw: _Part, weights: jax.Array) -> _Part:
    """With the weighted mean as what is subtracted."""
    # From the heaviest candidate it is not far, so little cancels.
    weights = jnp.where(weights > 0, weights, 0.0)
    heaviest = raw.best(weights, jnp.arange(raw.size))[1]
    shifted = dataclasses.replace(
        raw, origin=raw.anyone(heaviest, lambda i: raw.read(raw.features[i]))
    )

    def add(total: jax.Array, chunk: _Chunk) -> jax.Array:
        heavy = jnp.where(chunk.new, chunk.of(weights), 0.0)
        differences = shifted.vectors(chunk.of(raw.features), jnp.sign(heavy))
        return total + _product(heavy, differences)

    mean = lax.psum(_over_chunks(raw, add, raw.mean), raw.axes)
    return dataclasses.replace(shifted, mean=mean)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    # In full float32: by default a GPU or TPU rounds the factors.
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


class _Chunk(NamedTuple):
    """Some rows in a row of a device's candidates."""

    start: jax.Array
    new: jax.Array
    """bool [rows]: False for those that the chunk before had too."""

    def of(self, x: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, self.start, self.new.shape[0])

    def into(self, x: jax.Array, part: jax.Array) -> jax.Array:
        """x [M] with new values [rows]."""
        values = jnp.where(self.new, part, self.of(x))
        return lax.dynamic_update_slice_in_dim(x, values, self.start, 0)


def _over_chunks(
    part: _Part, step: Callable[[jax.Array, _Chunk], jax.Array], start: jax.Array
) -> jax.Array:
    """Folds `step` over all rows, so many at a time that they stay small in float32."""
    most = CHUNK_BYTES if jax.default_backend() == "cpu" else OTHER_CHUNK_BYTES
    chunks = -(-part.size * 4 * part.features.shape[1] // most)
    rows = -(-part.size // min(chunks, part.size))
    places = jnp.arange(rows)

    def one(i: jax.Array, state: jax.Array) -> jax.Array:
        # The last chunk begins earlier, so that all have the same size without a copy that is
        # filled up.
        begin = jnp.minimum(i * rows, part.size - rows)
        return step(state, _Chunk(begin, begin + places >= i * rows))

    return lax.fori_loop(0, -(-part.size // rows), one, start)


def _sweep(part: _Part, gains: jax.Array, swept: jax.Array, choices: _Choices) -> jax.Array:
    """Everyone's gains [M] after the choices that were made, from those after the first `swept`."""
    own = choices.chosen.indices - part.first
    own = jnp.where(choices.chosen.valid & (own >= 0), own, part.size)
    left = gains.at[own].set(TAKEN, mode="drop")

    def step(gains: jax.Array, chunk: _Chunk) -> jax.Array:
        vectors = part.vectors(chunk.of(part.features), chunk.of(part.roots))
        own = chunk.of(gains)
        # With H = I, before the first choice, gains are squared norms.
        norms = lax.cond(choices.made == 0, _norms, lambda v: jnp.zeros(len(v)), vectors)
        own = jnp.where(own >= 0, own + norms, TAKEN)

        def fall(j: jax.Array, gains: jax.Array) -> jax.Array:
            return _fall(gains, vectors, choices.inverse[j])

        return chunk.into(gains, lax.fori_loop(swept, choices.made, fall, own))

    return _over_chunks(part, step, left)


def _norms(vectors: jax.Array) -> jax.Array:
    norms = jnp.sum(vectors**2, axis=1)
    return jnp.where(norms > 0, norms, 0.0)


def _fall(gains: jax.Array, vectors: jax.Array, w: jax.Array) -> jax.Array:
    """Gains [m] after one more choice, which added w w' to I - H^-1."""
    after = gains - _product(vectors, w) ** 2
    # Rounding can leave a small negative number where nothing is left to gain. A NaN, of a model
    # that has diverged, is no gain either.
    return jnp.where(gains >= 0, jnp.where(after > 0, after, 0.0), TAKEN)


def shortlist_room(size: int) -> int:
    """How many of `size` candidates of a device are on its shortlist."""
    return min(size, max(SHORTEST, size // SHORTLIST))


def _shorten(part: _Part, gains: jax.Array) -> _Shortlist:
    room = shortlist_room(part.size)
    values, places = lax.top_k(gains, min(room + 1, part.size))
    outside = values[room] if room < part.size else jnp.float32(TAKEN)
    places = places[:room]
    vectors = part.vectors(part.features[places], part.roots[places])
    return _Shortlist(places, vectors, values[:room], outside)


def _take(
    part: _Part, choices: _Choices, listed: _Shortlist, gain: jax.Array, place: jax.Array
) -> tuple[_Choices, _Shortlist, jax.Array]:
    """With `place` chosen too; whether the next can be chosen from the shortlist.

    Args:
        gain: its gain; `TAKEN` says that there is nobody left.
    """
    k, chosen, inverse = choices
    valid = gain >= 0
    gain = jnp.where(valid, gain, 0.0)
    v = part.anyone(place, lambda i: part.vectors(part.features[i, None], part.roots[i, None])[0])
    w = (v - _product(_product(inverse, v), inverse)) / jnp.sqrt(1 + gain)
    w = jnp.where(gain > 0, w, 0.0)
    chosen = designs._add(chosen, k, place, valid, gain)
    left = jnp.where(part.first + listed.places == place, TAKEN, listed.gains)
    listed = listed._replace(gains=_fall(left, listed.vectors, w))
    most = lax.pmax(jnp.max(listed.gains), part.axes)
    safe = lax.pmax(listed.outside, part.axes) < most * (1 - TIE)
    return _Choices(k + 1, chosen, inverse.at[k].set(w)), listed, safe
