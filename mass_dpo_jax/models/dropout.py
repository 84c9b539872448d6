"""LoRA's dropout: which inputs of adapters are zero while a model trains.

Every token of a training example has a key of its own, made of the step, the example's row in its
split, the response and the token's place in it, and a mask is drawn from that key, the layer and
the projection. So the masks are the same in any layout, any chunk of responses, any micro-batch and
on any devices, when a layer runs again backwards, and when a run goes on from a checkpoint.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, UInt32

MAX_LENGTH = 2**16  # Tokens of a response, for numbers of places that no two responses share.


class DropoutKeys(NamedTuple):
    """What the masks of B examples are drawn from.

    Attributes:
        examples: key data of each example.
        candidate_ids: the numbers of its responses in its pool.
    """

    examples: UInt32[Array, "B words"]
    candidate_ids: Int[Array, "B n"]

    def make_prompt_keys(self, size: int) -> UInt32[Array, "B P words"]:
        """Makes the keys of P prompt tokens."""
        places = jnp.arange(size, dtype=jnp.uint32)
        return _fold_in(self.examples, jnp.broadcast_to(places, (len(self.examples), size)))

    def make_response_keys(
        self, segments: Int[Array, "B E W"], offsets: Int[Array, "B E W"]
    ) -> UInt32[Array, "B E*W words"]:
        """Makes the keys of tokens of responses, which `segments` numbers as `candidate_ids`."""
        batch = len(segments)
        segments, offsets = segments.reshape(batch, -1), offsets.reshape(batch, -1)
        numbers = jnp.take_along_axis(self.candidate_ids, segments, axis=1, mode="clip")
        return _fold_in(self.examples, (1 + numbers) * MAX_LENGTH + offsets)


def make_example_keys(key: Array, rows: Int[Array, " B"]) -> UInt32[Array, "B words"]:
    """Makes key data for examples, by the key of a step and their rows in the split."""
    return jax.vmap(lambda row: jax.random.key_data(jax.random.fold_in(key, row)))(rows)


def _fold_in(
    examples: UInt32[Array, "B words"], places: Int[Array, "B T"]
) -> UInt32[Array, "B T words"]:
    def fold(data: Array, place: Array) -> Array:
        return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(data), place))

    return jax.vmap(jax.vmap(fold, (None, 0)))(examples, places)


def draw_factors(
    keys: UInt32[Array, "tokens words"], number: Array | int, size: int, rate: float
) -> Float[Array, "tokens size"]:
    """Draws what the inputs of a projection are multiplied by: 0, or 1 / (1 - rate).

    Args:
        keys: the tokens' keys.
        number: the projection's, of all projections of all layers.
        size: the width of the projection's input.
        rate: the share that is zero, on average.
    """

    def draw(data: Array) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(data), number)
        return jax.random.bernoulli(key, 1.0 - rate, (size,))

    return jax.vmap(draw)(keys).astype(jnp.float32) / (1.0 - rate)
