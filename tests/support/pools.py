"""Pools for the tests of selection, and what is chosen from them as NumPy."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mass_dpo_jax import selection
from mass_dpo_jax.selection import Settings
from mass_dpo_jax.selection.search import search_exhaustively

SIZE, DIMENSION = 11, 6  # one shape for most tests, so that little is compiled


class Pool(NamedTuple):
    """A batch of pools before their features become Gram matrices."""

    features: Any
    scores: Any
    mask: Any
    key: Any


def to_select(pools, how):
    pools = jax.tree.map(jnp.asarray, pools)
    gram = None
    if pools.features is not None:
        gram = selection.compute_grams(pools.features, pools.mask, how)
    return selection.Pool(gram, pools.scores, pools.mask, pools.key)


@functools.partial(jax.jit, static_argnums=(1, 2))
def run(pools, n, how):
    return selection.select(to_select(pools, how), n, how)


@functools.partial(jax.jit, static_argnums=(1, 2))
def run_exhaustively(pools, n, how):
    """Selects as `run` for a design, but the best set of all."""
    make = how.definition.design
    return jax.vmap(lambda pool: search_exhaustively(make(pool, how), pool.mask, n))(
        to_select(pools, how)
    )


def make_pool(seed, *, size=SIZE, dimension=DIMENSION, valid=None, offset=0.0, spread=1.0):
    """Makes a batch of one pool with `valid` negatives at random positions (None: all)."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(size + 1, dimension)) + offset * rng.normal(size=dimension)
    mask = np.zeros(size, bool)
    mask[rng.permutation(size)[:valid]] = True
    return Pool(
        features.astype(np.float32)[None],
        rng.normal(0, spread, (1, size)).astype(np.float32),
        mask[None],
        jax.random.split(jax.random.key(seed), 1),
    )


def picks(pool, n, how=None, search=run):
    """Returns the valid picks of the one pool in a batch, and their gains, as NumPy."""
    got = jax.tree.map(lambda x: np.asarray(x[0]), search(pool, n, how or Settings()))
    assert got.indices.shape == got.valid.shape == got.gains.shape == (n,)
    assert (got.indices[~got.valid] == 0).all() and (got.gains[~got.valid] == 0).all()
    return got.indices[got.valid].tolist(), got.gains[got.valid]
