"""Candidates that are split over devices: where each is, and how all of them are gone through."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from mass_dpo_jax.selection.search import TIE
from mass_dpo_jax.utils.mesh_axes import BATCH_AXES

CPU_CHUNK_BYTES = 2**21  # Float32 features read at a time: what stays in a CPU core's cache;
CHUNK_BYTES = 2**26  # on accelerators.
NO_INDEX = 2**31 - 1

Take = Callable[[Array], Array]  # From an array [m, ...] to the rows [c, ...] of some candidates.


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh of one axis over devices; None: over all."""
    count = jax.device_count() if devices is None else len(devices)
    kinds = (AxisType.Auto,)
    return jax.make_mesh((count,), BATCH_AXES[:1], axis_types=kinds, devices=devices)


def list_axes(mesh: Mesh) -> tuple[str, ...]:
    """Lists the axes of a mesh that candidates are split over."""
    return tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)


def shard_rows(mesh: Mesh, x: Any) -> Array:
    """Splits an array [N, ...] over the devices, padded by zeros to a multiple of their number."""
    missing = -x.shape[0] % math.prod(mesh.shape[axis] for axis in list_axes(mesh))
    if missing:
        pad = np.pad if isinstance(x, np.ndarray) else jnp.pad
        x = pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
    return jax.device_put(x, NamedSharding(mesh, P(list_axes(mesh))))


@dataclasses.dataclass(frozen=True)
class Shard:
    """The candidates of one device, inside `shard_map` over `axes`.

    Attributes:
        shape: (m, r, D).
        read: a function that returns design vectors over the root of the ridge, float32 [c, r, D],
            of the candidates that a `Take` takes.
        axes: axes of the mesh.
    """

    shape: tuple[int, int, int]
    read: Callable[[Take], Float[Array, "c r D"]]
    axes: tuple[str, ...]

    @property
    def size(self) -> int:
        """M."""
        return self.shape[0]

    @property
    def first(self) -> Array:
        """The index of this device's first candidate among all N."""
        return lax.axis_index(self.axes) * self.size

    def broadcast_from_owner(self, index: Array, make: Callable[[Take], Array]) -> Array:
        """Computes `make` of one candidate on the device that owns it, for all devices."""
        local = index - self.first
        is_owner = (local >= 0) & (local < self.size)
        value = make(lambda x: x[jnp.clip(local, 0, self.size - 1)][None])[0]
        return lax.psum(jnp.where(is_owner, value, 0.0), self.axes)

    def find_largest(self, gains: Array) -> Array:
        """Finds the largest gain on any device."""
        return lax.pmax(jnp.max(gains), self.axes)

    def find_first(self, gains: Array, local_indices: Array, largest: Array) -> Array:
        """Finds the lowest index on any device whose gain is the largest, or ties with it."""
        ties = (gains >= 0) & (gains >= largest * (1 - TIE))
        indices = jnp.where(ties, self.first + local_indices, NO_INDEX)
        return lax.pmin(jnp.min(indices), self.axes)


class Chunk(NamedTuple):
    """Consecutive candidates of a device.

    Attributes:
        start: the first of them.
        is_new: bool [c], False for those that the chunk before had too.
    """

    start: Array
    is_new: Array

    def take(self, x: Array) -> Array:
        """Returns the chunk's rows of x [m, ...]."""
        return lax.dynamic_slice_in_dim(x, self.start, self.is_new.shape[0])

    def put(self, x: Array, values: Array) -> Array:
        """Returns x [m, ...] with the chunk's values replaced."""
        is_new = self.is_new.reshape(-1, *[1] * (x.ndim - 1))
        values = jnp.where(is_new, values, self.take(x))
        return lax.dynamic_update_slice_in_dim(x, values, self.start, 0)


def fold_chunks(shard: Shard, step: Callable[[Any, Chunk], Any], start: Any) -> Any:
    """Folds `step` over all candidates, in chunks that stay small in float32."""
    size, rank, width = shard.shape
    chunk_bytes = CPU_CHUNK_BYTES if jax.default_backend() == "cpu" else CHUNK_BYTES
    chunks = -(-size * 4 * rank * width // chunk_bytes)
    rows = -(-size // min(chunks, size))
    offsets_c = jnp.arange(rows)

    def fold(i: Array, state: Any) -> Any:
        # The last chunk begins earlier, so that all have the same size without a padded copy.
        begin = jnp.minimum(i * rows, size - rows)
        return step(state, Chunk(begin, begin + offsets_c >= i * rows))

    return lax.fori_loop(0, -(-size // rows), fold, start)
