"""AdamW with linear warm-up, cosine decay and a clipped gradient, as the paper trains.

Adam's moments take twice the memory of the weights. They can be stored in bfloat16, and lie in
the host's memory between updates.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.training.mesh import replicated

HOST = "pinned_host"  # JAX's name of the host memory that a device can copy from and to.


def learning_rate(train: ConfigDict, total_steps: int) -> Callable[[int], float]:
    """The rate of each update, counted from 0, for the log: no device computes it."""
    peak, warmup = train.learning_rate, round(train.warmup_ratio * total_steps)
    decay = max(total_steps, warmup + 1) - warmup

    def rate(step: int) -> float:
        if step < warmup:
            return float(peak * step / warmup)
        done = min((step - warmup) / decay, 1.0)
        return float(peak * (1 + math.cos(math.pi * done)) / 2)

    return rate


def make_optimizer(train: ConfigDict, total_steps: int) -> optax.GradientTransformationExtraArgs:
    """The same object for the same settings, so that what was compiled for it serves again."""
    return _optimizer(
        train.learning_rate,
        round(train.warmup_ratio * total_steps),
        total_steps,
        train.clip,
        train.weight_decay,
        train.moments_dtype,
        train.offload_moments,
    )


def state_shapes(
    optimizer: optax.GradientTransformation, params: Any, mesh: Mesh, memory: str | None = None
) -> Any:
    """An optimizer's state as shapes with shardings: moments lie where their weights do, what has
    other shapes (a count, the rows and columns of Adafactor) on every device.

    Args:
      params: the weights, as shapes with shardings.
      memory: the kind of memory of the moments; None: that of their weights.
    """
    everywhere = replicated(mesh)

    def put(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    def beside(leaf: Any, weight: Any) -> jax.ShapeDtypeStruct:
        place = weight.sharding if leaf.shape == weight.shape else everywhere
        return put(leaf, place if memory is None else place.with_memory_kind(memory))

    return optax.tree_utils.tree_map_params(
        optimizer,
        beside,
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda leaf: put(leaf, everywhere),
    )


def memory_of_moments(train: ConfigDict, mesh: Mesh) -> str | None:
    """The memory kind of Adam's moments in shardings; None: the devices' own.

    Raises:
      UserError: they are to lie in the host's memory, and the devices cannot address it.
    """
    if not train.offload_moments:
        return None
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise UserError(
            f"config.train.offload_moments=True: {device.platform} devices know the memories "
            f"{', '.join(kinds)}; expected {HOST} among them, or the setting False"
        )
    return HOST


def _schedule(peak: float, warmup: int, total_steps: int) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else peak,
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=max(total_steps, warmup + 1),
    )


@functools.cache
def _optimizer(
    peak: float,
    warmup: int,
    total_steps: int,
    clip: float,
    weight_decay: float,
    moments_dtype: str,
    offload: bool,
) -> optax.GradientTransformationExtraArgs:
    adam = optax.scale_by_adam()
    if moments_dtype == "bfloat16":
        adam = stored_in_bfloat16(adam)
    adam = unless_bad(adam, clip)
    if offload:
        adam = kept_on_host(adam)
    # optax.clip_by_global_norm and optax.adamw, taken apart; the first keeps nothing, and its place
    # stays since checkpoints have it.
    return optax.chain(
        optax.identity(),
        optax.chain(
            adam,
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(_schedule(peak, warmup, total_steps)),
        ),
    )


def unless_bad(
    adam: optax.GradientTransformation, clip: float = math.inf
) -> optax.GradientTransformationExtraArgs:
    """`adam` that stays as it is where its argument `finite`, a bool scalar, says no.

    Its gradient g is clipped first, g * clip / max(||g||, clip), as optax.clip_by_global_norm does.
    Before the branch below, that would be written to memory and read again; in it, a product with
    one number is computed where it is used.

    A gradient that is not finite would never leave the moments again. What it gives then is the
    gradient itself, of no use; the step holds the weights.

    A branch, and not a choice between new and old moments, which would have to be in memory
    together: a twentieth of a small model's step on a CPU.

    `places`, if given, are shardings of the weights, and what comes out lies so. XLA for GPUs would
    otherwise give every device all moments, whatever came in.
    """

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        finite: Any = True,
        places: Any = None,
        **_: Any,
    ) -> tuple[Any, Any]:
        factor: Any = 1.0
        if clip < math.inf:
            factor = clip / jnp.maximum(optax.tree.norm(updates), clip)
        updates, state = jax.lax.cond(
            finite,
            lambda g, state: adam.update(jax.tree.map(lambda x: x * factor, g), state, params),
            lambda g, state: (g, state),
            updates,
            state,
        )
        if places is None:
            return updates, state
        put = jax.lax.with_sharding_constraint

        def beside(leaf: Any, weight: Any, place: Any) -> Any:
            return put(leaf, place if leaf.shape == weight.shape else replicated(place.mesh))

        state = optax.tree_utils.tree_map_params(adam, beside, state, updates, places)
        return put(updates, places), state

    return optax.GradientTransformationExtraArgs(adam.init, update)


def stored_in_bfloat16(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optax.scale_by_adam` whose moments are bfloat16 between updates; its arithmetic is float32.

    Rounding is stochastic. One update changes the second moment by at most 1/1000 of itself where
    the gradient shrinks, less than half of bfloat16's spacing of 1/128 to 1/256: rounded to the
    nearest value it would never move. So each value goes up or down with the probabilities that
    keep its expectation. The bits depend on the count of updates alone, so a resumed run draws the
    same.
    """

    def init(params: optax.Params) -> Any:
        return _with_moments(adam.init(params), lambda x: x.astype(jnp.bfloat16))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        wide = _with_moments(state, lambda x: x.astype(jnp.float32))
        updates, new = adam.update(updates, wide, params)
        leaves, tree = jax.tree.flatten(new.mu)
        key = jax.random.fold_in(jax.random.key(0), new.count)
        bits = [
            jax.random.bits(jax.random.fold_in(key, i), leaf.shape, jnp.uint32)
            for i, leaf in enumerate(leaves)
        ]
        bits = jax.tree.unflatten(tree, bits)
        mu = jax.tree.map(lambda x, b: _round(x, b & 0xFFFF), new.mu, bits)
        nu = jax.tree.map(lambda x, b: _round(x, b >> 16), new.nu, bits)
        return updates, new._replace(mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def kept_on_host(adam: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`adam` whose moments come to the device for the update and go back to the host after it.

    Their first place is that of the state which comes in: see `memory_of_moments`.
    """

    adam = optax.with_extra_args_support(adam)

    def update(updates: Any, state: Any, params: Any = None, **more: Any) -> tuple[Any, Any]:
        near = _with_moments(state, lambda x: jax.device_put(x, jax.memory.Space.Device))
        updates, new = adam.update(updates, near, params, **more)
        return updates, _with_moments(new, lambda x: jax.device_put(x, jax.memory.Space.Host))

    return optax.GradientTransformationExtraArgs(adam.init, update)


def _with_moments(state: Any, change: Any) -> Any:
    """`optax.ScaleByAdamState` with both moments changed, leaf by leaf."""
    return state._replace(mu=jax.tree.map(change, state.mu), nu=jax.tree.map(change, state.nu))


def _round(x: jax.Array, bits: jax.Array) -> jax.Array:
    """float32 to one of the two bfloat16 around it, by 16 random bits (uint32).

    A bfloat16 is a float32 without its lower 16 bits. They carry over into the upper ones with the
    probability (lower bits) / 2^16, so the expectation is x.
    """
    carried = jax.lax.bitcast_convert_type(x, jnp.uint32) + bits
    upper = (carried >> 16).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
