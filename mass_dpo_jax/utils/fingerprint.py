"""Fingerprints: hashes of weights that do not depend on how these lie on devices.

The checksum of an array is two sums modulo 2^32 over its values. Sums are the same in any order, so
no array has to leave its devices, and a file can be read a part at a time: `checksum_part` computes
the checksum of a part on the host, and adding up those of all parts gives `checksum_array`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt32

from mass_dpo_jax.utils import distributed

# Odd numbers whose bits look random mix a value with its index: the golden ratio's 2^32 / phi, and
# a multiplier of MurmurHash3.
INDEX_MULTIPLIER = 0x9E3779B1
VALUE_MULTIPLIER = 0x85EBCA6B
SHIFT = 15


def fingerprint(params: Any) -> str:
    """Hashes a tree of arrays."""
    checksums = jax.tree.leaves(_checksum_tree(params))
    leaves = zip(jax.tree.leaves_with_path(params), checksums, strict=True)
    return _hash((jax.tree_util.keystr(path), leaf.shape, sums) for (path, leaf), sums in leaves)


def combine_checksums(checksums: Mapping[tuple[str, ...], tuple[tuple[int, ...], Any]]) -> str:
    """Returns the `fingerprint` of nested dicts from the shape and checksum of every array.

    Args:
        checksums: by the array's keys, outermost first.
    """
    # `jax.tree` visits the keys of a dict in sorted order, too.
    return _hash((format_keys(keys), *entry) for keys, entry in sorted(checksums.items()))


def format_keys(keys: Sequence[str]) -> str:
    """Formats the keys of nested dicts as `jax.tree_util.keystr` does: `['blocks']['gate']`."""
    return "".join(f"[{key!r}]" for key in keys)


def checksum_part(part: np.ndarray, start: int) -> UInt32[np.ndarray, " 2"]:
    """Computes the checksum of a part of an array, in NumPy.

    Args:
        part: values that follow each other in the array.
        start: number of values that precede them in the array.
    """
    bits = part.astype(np.float32).reshape(-1).view(np.uint32)
    index = np.arange(start, start + bits.size, dtype=np.uint64).astype(np.uint32)
    mixed = (bits ^ (index * np.uint32(INDEX_MULTIPLIER))) * np.uint32(VALUE_MULTIPLIER)
    mixed = mixed ^ (mixed >> np.uint32(SHIFT))
    return np.stack([mixed.sum(dtype=np.uint32), (mixed * bits).sum(dtype=np.uint32)])


def checksum_array(array: jax.Array) -> UInt32[jax.Array, " 2"]:
    """Computes the checksum of an array; the result stays on the array's devices."""
    checksum: jax.Array = _checksum_tree(array)
    return checksum


@jax.jit
def _checksum_tree(params: Any) -> Any:
    def checksum(x: jax.Array) -> jax.Array:
        x = jax.device_put(x, jax.memory.Space.Device)  # Moments may lie in the host's memory.
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
        index = jnp.zeros((), jnp.uint32)
        for axis, size in enumerate(x.shape):
            index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        mixed = (bits ^ (index * jnp.uint32(INDEX_MULTIPLIER))) * jnp.uint32(VALUE_MULTIPLIER)
        mixed = mixed ^ (mixed >> SHIFT)
        return jnp.stack([mixed.sum(dtype=jnp.uint32), (mixed * bits).sum(dtype=jnp.uint32)])

    return jax.tree.map(checksum, params)


def _hash(checksums: Iterable[tuple[str, tuple[int, ...], Any]]) -> str:
    digest = hashlib.sha256()
    for name, shape, sums in checksums:
        digest.update(f"{name}{shape}".encode())
        digest.update(distributed.gather(sums).tobytes())
    return digest.hexdigest()
