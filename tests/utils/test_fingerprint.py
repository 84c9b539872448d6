"""Fingerprints of weights: the same on devices and read in parts, another where a value moves."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from mass_dpo_jax.utils.fingerprint import (
    checksum_array,
    checksum_part,
    combine_checksums,
    fingerprint,
)

ARRAYS = {
    ("blocks", "gate"): np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32),
    ("blocks", "a"): np.arange(7, dtype=np.int32),
    ("embed",): np.ones((2, 3), jnp.bfloat16),
}
TREE = {
    "embed": ARRAYS["embed",],
    "blocks": {"gate": ARRAYS["blocks", "gate"], "a": ARRAYS["blocks", "a"]},
}


@pytest.mark.parametrize("keys", ARRAYS)
def test_checksums_of_parts_add_up(keys: tuple[str, ...]) -> None:
    array = ARRAYS[keys]
    flat = array.reshape(-1)
    parts = (checksum_part(flat[i : i + 4], i) for i in range(0, flat.size, 4))
    total = np.sum(list(parts), axis=0, dtype=np.uint32)
    np.testing.assert_array_equal(total, checksum_array(jnp.asarray(array)))


def test_a_fingerprint_is_that_of_its_checksums() -> None:
    checksums = {keys: (x.shape, checksum_part(x, 0)) for keys, x in ARRAYS.items()}
    assert combine_checksums(checksums) == fingerprint(TREE)
    assert combine_checksums(dict(reversed(checksums.items()))) == fingerprint(TREE)


def test_values_places_names_and_shapes_count() -> None:
    x = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    others = [{"w": x.T}, {"v": x}, {"w": x.reshape(4)}, {"w": x + np.float32(1e-6)}]
    prints = {fingerprint(tree) for tree in ({"w": x}, *others)}
    assert len(prints) == 1 + len(others)
