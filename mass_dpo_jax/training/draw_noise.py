"""How much of a gradient's noise comes from the draw of negatives, and not from the prompts.

Two gradients of b prompts differ by the noise of both. If only the draws of the negatives differ,
the expected squared distance is 2 D / b, with D the variance of the draw for one prompt. If the
prompts differ as well, it is 2 (D + P) / b, with P the variance between prompts. So D / (D + P) is
the ratio of two distances between true gradients, whatever the model, the method and the draw.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mass_dpo_jax.data.batches import Batch
from mass_dpo_jax.training.step import Params, Program

SECOND_DRAW = 2**31 - 2  # Folded into the key: no row of a split has this index.


def measure(*args: Any) -> Array:
    """Computes the draw's share of the variance of a gradient, a float32 scalar.

    A ratio of two distances, each of which is right on average: single values scatter. Arguments as
    for `measure_distances`.
    """
    drawn, total = measure_distances(*args)
    return drawn / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)


def measure_distances(
    program: Program,
    trained: Params,
    frozen: Params,
    first: tuple[Batch, int],
    second: tuple[Batch, int],
    key: Array,
) -> tuple[Array, Array]:
    """Computes squared distances of gradients: by another draw, and by other prompts as well.

    Takes three gradients of a micro-batch, of which two are held at a time.

    Args:
        program: the run's computations.
        trained: the weights that are trained.
        frozen: the others.
        first: the batch of a step, [A, B, ...] of which the first micro-batch is used, and its
            packed length.
        second: that of another step, with other prompts.
        key: the key of the first step's draws.
    """
    gradient = functools.partial(_gradient, program, trained, frozen)
    other_key = jax.random.fold_in(key, SECOND_DRAW)
    reference = gradient(*first, key)
    drawn = _squared_distance(reference, gradient(*first, other_key))
    return drawn, _squared_distance(reference, gradient(*second, key))


@functools.partial(jax.jit, static_argnames=("program", "packed_length"))
def _gradient(
    program: Program, trained: Params, frozen: Params, batch: Batch, packed_length: int, key: Array
) -> Params:
    first: Any = jax.tree.map(lambda x: x[0], batch)
    return program.gradient(trained, frozen, first, None, key, packed_length)[0]


@jax.jit
def _squared_distance(a: Params, b: Params) -> Array:
    return optax.tree.norm(optax.tree.sub(a, b), squared=True)
