"""AdamW with linear warm-up, cosine decay and gradient clipping, as in the paper.

Adam's moments take twice the memory of the weights. They can be stored in bfloat16, and can stay in
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
from mass_dpo_jax.training.mesh import replicated_sharding

HOST = "pinned_host"  # JAX's name for host memory that a device can copy from and to.


def learning_rate(train: ConfigDict, total_steps: int) -> Callable[[int], float]:
    """Returns the rate of each update, counted from 0, for the log, computed on the host."""
    peak, warmup = train.learning_rate, round(train.warmup_ratio * total_steps)
    decay = max(total_steps, warmup + 1) - warmup

    def rate(step: int) -> float:
        if step < warmup:
            return float(peak * step / warmup)
        progress = min((step - warmup) / decay, 1.0)
        return float(peak * (1 + math.cos(math.pi * progress)) / 2)

    return rate


def make_optimizer(train: ConfigDict, total_steps: int) -> optax.GradientTransformationExtraArgs:
    """Makes the optimizer of the section `config.train`.

    Equal settings give the same object, so that a program compiled for it is used again.
    """
    return _make_optimizer(
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
    """Returns an optimizer's state as shapes with shardings.

    Moments lie where their weights do. What has another shape (a count, the rows and columns of
    Adafactor) lies on every device.

    Args:
        optimizer: the run's optimizer.
        params: the weights, as shapes with shardings.
        mesh: the devices.
        memory: the kind of memory of the moments; None for that of their weights.
    """
    everywhere = replicated_sharding(mesh)

    def shape(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def shape_like_weight(leaf: Any, weight: Any) -> jax.ShapeDtypeStruct:
        sharding = weight.sharding if leaf.shape == weight.shape else everywhere
        return shape(leaf, sharding if memory is None else sharding.with_memory_kind(memory))

    return optax.tree_utils.tree_map_params(
        optimizer,
        shape_like_weight,
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda leaf: shape(leaf, everywhere),
    )


def moments_memory(train: ConfigDict, mesh: Mesh) -> str | None:
    """Returns the memory kind of Adam's moments, for shardings; None for the devices' own memory.

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


def _make_schedule(peak: float, warmup: int, total_steps: int) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else peak,
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=max(total_steps, warmup + 1),
    )


@functools.cache
def _make_optimizer(
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
        adam = store_in_bfloat16(adam)
    adam = skip_if_not_finite(adam, clip)
    if offload:
        adam = offload_to_host(adam)
    # optax.adamw, taken apart.
    return optax.chain(
        adam,
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(_make_schedule(peak, warmup, total_steps)),
    )


def skip_if_not_finite(
    inner: optax.GradientTransformation, clip: float = math.inf
) -> optax.GradientTransformationExtraArgs:
    """Skips the update where its argument `finite`, a bool scalar, is False.

    A gradient that is not finite would never leave Adam's moments again. The update returned in its
    place is meaningless, and the caller keeps the old weights. This differs from
    `optax.apply_if_finite` in three ways. The caller decides what is finite, so the loss counts,
    too. The gradient g is clipped inside of the branch, g * clip / max(||g||, clip) as in
    `optax.clip_by_global_norm`: in front of it, the clipped gradient would be written to memory and
    read again. And it branches instead of selecting between new and old moments, which would have
    to be in memory together: that costs a twentieth of a small model's step on a CPU.

    Args:
        inner: the transformation.
        clip: upper bound on the norm of the gradient.

    Returns:
        A transformation whose `update` also takes `shardings`, a tree like the weights. If given,
        updates and state are held to them: XLA for GPUs would otherwise give every device all
        moments, whatever came in.
    """

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        finite: Any = True,
        shardings: Any = None,
        **_: Any,
    ) -> tuple[Any, Any]:
        factor: Any = 1.0
        if clip < math.inf:
            factor = clip / jnp.maximum(optax.tree.norm(updates), clip)
        updates, state = jax.lax.cond(
            finite,
            lambda g, state: inner.update(jax.tree.map(lambda x: x * factor, g), state, params),
            lambda g, state: (g, state),
            updates,
            state,
        )
        if shardings is None:
            return updates, state
        constrain = jax.lax.with_sharding_constraint

        def constrain_like_weight(leaf: Any, weight: Any, sharding: Any) -> Any:
            if leaf.shape == weight.shape:
                return constrain(leaf, sharding)
            return constrain(leaf, replicated_sharding(sharding.mesh))

        state = optax.tree_utils.tree_map_params(
            inner, constrain_like_weight, state, updates, shardings
        )
        return constrain(updates, shardings), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def store_in_bfloat16(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Stores the moments of `optax.scale_by_adam` in bfloat16; its arithmetic stays float32.

    Rounding is stochastic. Where the gradient shrinks, one update changes the second moment by at
    most 1/1000 of itself, less than half of bfloat16's spacing of 1/128 to 1/256: rounded to the
    nearest value it would never move. So each value goes up or down with the probabilities that
    preserve its expectation. The random bits depend on the count of updates alone, so a resumed run
    draws the same ones.
    """

    def init(params: optax.Params) -> Any:
        return _map_moments(adam.init(params), lambda x: x.astype(jnp.bfloat16))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        float32_state = _map_moments(state, lambda x: x.astype(jnp.float32))
        updates, new_state = adam.update(updates, float32_state, params)
        leaves, tree = jax.tree.flatten(new_state.mu)
        key = jax.random.fold_in(jax.random.key(0), new_state.count)
        bits = [
            jax.random.bits(jax.random.fold_in(key, i), leaf.shape, jnp.uint32)
            for i, leaf in enumerate(leaves)
        ]
        bits = jax.tree.unflatten(tree, bits)
        mu = jax.tree.map(lambda x, b: _round(x, b & 0xFFFF), new_state.mu, bits)
        nu = jax.tree.map(lambda x, b: _round(x, b >> 16), new_state.nu, bits)
        return updates, new_state._replace(mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def offload_to_host(adam: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Keeps Adam's moments in the host's memory, except during the update.

    The state has to lie there at first: see `moments_memory`.
    """
    adam = optax.with_extra_args_support(adam)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        device_state = _map_moments(state, lambda x: jax.device_put(x, jax.memory.Space.Device))
        updates, new_state = adam.update(updates, device_state, params, **extra_args)
        return updates, _map_moments(new_state, lambda x: jax.device_put(x, jax.memory.Space.Host))

    return optax.GradientTransformationExtraArgs(adam.init, update)


def _map_moments(state: Any, change: Callable[[jax.Array], Any]) -> Any:
    """Applies a function to both moments of an `optax.ScaleByAdamState`, leaf by leaf."""
    return state._replace(mu=jax.tree.map(change, state.mu), nu=jax.tree.map(change, state.nu))


def _round(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Rounds float32 to one of the two bfloat16 around it, by 16 random bits (uint32).

    A bfloat16 is a float32 without its lower 16 bits. Random bits added to these carry over into
    the upper ones with the probability (lower bits) / 2^16, so the expectation is x.
    """
    carried = jax.lax.bitcast_convert_type(x, jnp.uint32) + bits
    upper = (carried >> 16).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
