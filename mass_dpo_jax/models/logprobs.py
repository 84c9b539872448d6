"""Log-probabilities of given tokens, without ever holding all logits."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from mass_dpo_jax.models.attention import cap_softly, einsum_f32

# Logits held at once on a device: 2^24 float32 are 64 MiB, enough for a CPU's matrix products to
# run at full speed. Accelerators multiply so fast that reading and casting the weights of the head
# and adding to their gradient, once a chunk, would take longer: 2^27 are 1,000 tokens of a
# vocabulary of 128,256.
MAX_LOGITS = 2**24
ACCELERATOR_MAX_LOGITS = 2**27


def choose_max_logits(platform: str) -> int:
    """Chooses `max_logits` for devices of a platform: cpu, gpu, tpu."""
    return MAX_LOGITS if platform == "cpu" else ACCELERATOR_MAX_LOGITS


@jax.named_scope("logprobs")
def compute_token_logps(
    hidden: Float[Array, "B T D"],
    weights: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    max_logits: int = MAX_LOGITS,
    sharding: NamedSharding | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "B T"]:
    """Computes log softmax(hidden @ weights.T)[target] in float32.

    Runs over the T axis in chunks of at most `max_logits` logits, and the backward pass recomputes
    each chunk's logits.

    Args:
        hidden: hidden states, in the compute type.
        weights: float32 weights, cast inside each chunk, so that their gradient adds up in float32.
        targets: token ids.
        max_logits: maximum number of logits held at once on each device.
        sharding: split of B over devices. Each then runs its own chunks: weights are gathered
            before the first and their gradient is summed over devices after the last, not in
            every one.
        soft_cap: logits l become soft_cap * tanh(l / soft_cap); None: they stay.
    """
    axes = () if sharding is None else sharding.spec[0]
    # Where only the vocabulary is split, XLA (of jax 0.10) fails on a map over axes of size 1.
    if sharding is None or math.prod(sharding.mesh.shape[axis] for axis in axes) == 1:
        return _compute_in_chunks(hidden, weights, targets, max_logits, soft_cap)

    def compute_on_device(hidden: Array, weights: Array, targets: Array) -> Array:
        # Without this, the gradient would be summed over devices inside the loop.
        weights = jax.lax.pcast(weights, axes, to="varying")
        return _compute_in_chunks(hidden, weights, targets, max_logits, soft_cap)

    split = PartitionSpec(axes)
    return jax.shard_map(
        compute_on_device,
        mesh=sharding.mesh,
        in_specs=(split, PartitionSpec(), split),
        out_specs=split,
        axis_names=set(axes),
    )(hidden, weights, targets)


def _compute_in_chunks(
    hidden: Array, weights: Array, targets: Array, max_logits: int, soft_cap: float | None
) -> Array:
    batch, length, size = hidden.shape
    longest = max(1, max_logits // (batch * weights.shape[0]))
    chunks = max(1, -(-length // longest))
    chunk = -(-length // chunks)
    padding = chunks * chunk - length
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)))

    @jax.checkpoint
    def compute_chunk(hidden: Array, targets: Array, weights: Array) -> Array:
        logits = einsum_f32("btd,vd->btv", hidden, weights.astype(hidden.dtype))
        if soft_cap is not None:
            logits = cap_softly(logits, soft_cap)
        highest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
        shifted = logits - highest
        # A comparison and a sum, not a gather: it stays local where V is sharded, and its
        # gradient is no scatter.
        is_target = jnp.arange(weights.shape[0])[None, None] == targets[..., None]
        target = jnp.where(is_target, shifted, 0.0).sum(axis=-1)
        return target - jnp.log(jnp.exp(shifted).sum(axis=-1))

    if chunks == 1:
        return compute_chunk(hidden, targets, weights)
    stacked = (
        jnp.moveaxis(hidden.reshape(batch, chunks, chunk, size), 1, 0),
        jnp.moveaxis(targets.reshape(batch, chunks, chunk), 1, 0),
    )
    logps = jax.lax.map(lambda x: compute_chunk(*x, weights), stacked)  # [chunks, B, chunk]
    return jnp.moveaxis(logps, 0, 1).reshape(batch, -1)[:, :length]
