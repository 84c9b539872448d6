"""Attention by one fused kernel (cuDNN's) that never writes scores to memory.

The functions of attention.py for GPUs and 16-bit types, equal to them up to rounding. There is one
call for the prompt, causal, and one for the responses, whose keys are the prompt's and their own
group's under a mask: one softmax over both. (Two calls merged by their log-sum-exp would train on
wrong gradients: the kernel's backward pass ignores that of the log-sum-exp.) Groups are batch rows,
so that no pairs across groups are computed; the packed layout has one group.

The kernel gets a mask as a bias [B * E, 1, W, P + W] in the compute type, shared by all heads, and,
in jax 0.10, writes a gradient of the same size that nothing reads. For 16 prompts of 160 tokens
with 200 response tokens that is 2.3 MB, where one layer's scores in float32 for 24 heads are
110 MB. Masked pairs are computed, but all of attention is some 2% of a 3B model's operations at
these lengths. One causal row per response would need no bias, but a query for every prompt token of
every response: for short responses many times the tokens.

On several devices each one calls the kernel for its own prompts and heads.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models import attention as plain
from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.models.interfaces import NO_LIMITS, Attend, Attention, Limits
from mass_dpo_jax.utils import distributed
from mass_dpo_jax.utils.mesh_axes import BATCH_AXES

_log = logging.getLogger(__name__)

# jax refuses a backward pass with an odd number of queries or keys. With multiples of 8 each row of
# a 16-bit bias begins at a multiple of 16 bytes, the most a thread loads at once.
ALIGNMENT = 8
# Bounds the error of outputs and gradients: two roundings to bfloat16 differ by some 0.005, a
# single key that one query sees and should not by 0.03.
MAX_RELATIVE_ERROR = 0.02
NO_SOFT_CAP = "the kernel has no soft cap of scores (attn_logit_softcapping)"
SHORT_WINDOW = 9  # Tokens of the window that the small example tries.


@dataclasses.dataclass(frozen=True)
class FusedAttention:
    """An `Attention`. Equal by value: part of a static argument.

    Attributes:
        implementation: `cudnn`; or `xla`, the same calls in plain operations, for tests.
        mesh: the devices, with prompts split over `data` and `fsdp` and heads over `tensor`; None
            for one device.
    """

    implementation: Literal["cudnn", "xla"] = "cudnn"
    mesh: Mesh | None = None

    @classmethod
    def for_mesh(cls, mesh: Mesh) -> FusedAttention:
        """Makes cuDNN attention for a mesh."""
        return cls(mesh=mesh if mesh.size > 1 else None)

    @property
    def batch_shards(self) -> int:
        """The number of parts that prompts are split into."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)

    def attend_causally(
        self,
        query_BTHd: Float[Array, "B T H d"],
        key_BTGd: Float[Array, "B T G d"],
        value_BTGd: Float[Array, "B T G d"],
        layer_input: Any = None,
        limits: Limits = NO_LIMITS,
        /,
    ) -> tuple[Float[Array, "B T H d"], tuple[Array, Array]]:
        """Computes what attention.py does."""
        del layer_input
        batch, length = query_BTHd.shape[:2]
        q, k, v = (_pad(x, -length % ALIGNMENT) for x in (query_BTHd, key_BTGd, value_BTGd))
        visible = None  # No real token comes after padding, so it needs no mask.
        if not limits.reach(length):
            visible = plain.see_causally(q.shape[1], limits)
            visible = jnp.broadcast_to(visible, (batch, 1, *visible.shape))
        return self._attend(q, k, v, visible)[:, :length], (key_BTGd, value_BTGd)

    def make_response_attend(
        self,
        prompt_lengths_B: Int[Array, " B"],
        segments_BEW: Int[Array, "B E W"],
        offsets_BEW: Int[Array, "B E W"],
        /,
    ) -> Attend:
        """Returns what attention.py does."""
        batch, groups, length = segments_BEW.shape

        def attend(
            query_BTHd: Array,
            key_BTGd: Array,
            value_BTGd: Array,
            layer_input: Any,
            limits: Limits,
            /,
        ) -> tuple[Array, None]:
            prompt_key_BPGd, prompt_value_BPGd = layer_input
            prompt_size = prompt_key_BPGd.shape[1]
            missing_queries = -length % ALIGNMENT
            missing_keys = -(prompt_size + length) % ALIGNMENT

            def to_rows(x: Array) -> Array:  # [B, E * W, heads, d] -> [B * E, W, heads, d]
                return x.reshape(batch * groups, length, *x.shape[2:])

            def prepend(prompt_BPGd: Array, own_BTGd: Array) -> Array:
                """Returns [B * E, P + W + padding, G, d]."""
                repeated = jnp.repeat(prompt_BPGd, groups, axis=0)
                return _pad(jnp.concatenate([repeated, to_rows(own_BTGd)], axis=1), missing_keys)

            visible = _compute_mask(
                prompt_size, prompt_lengths_B, segments_BEW, offsets_BEW, limits
            )
            # A query without any key would make the kernel subtract huge numbers from each other,
            # so queries of padding see all keys; their gradient is zero.
            visible = jnp.pad(visible, ((0, 0), (0, missing_queries), (0, 0)), constant_values=True)
            visible = jnp.pad(visible, ((0, 0), (0, 0), (0, missing_keys)), constant_values=False)
            attended = self._attend(
                _pad(to_rows(query_BTHd), missing_queries),
                prepend(prompt_key_BPGd, key_BTGd),
                prepend(prompt_value_BPGd, value_BTGd),
                visible[:, None],
            )
            return attended[:, :length].reshape(query_BTHd.shape), None

        return attend

    def _attend(self, query: Array, key: Array, value: Array, visible: Array | None) -> Array:
        """Attends with [rows, W, H, d] to [rows, keys, G, d].

        Args:
            query: scaled queries.
            key: keys of all heads.
            value: values of all heads.
            visible: bool [rows, 1, W, keys]; None means causal, where the kernel leaves pairs out.
                As a mask and not as a bias: newer versions of jax ask for no gradient of it.
        """

        def attend_on_device(*arrays: Array) -> Array:
            query, key, value, *mask = arrays
            return jax.nn.dot_product_attention(
                query,
                key,
                value,
                mask=mask[0] if mask else None,
                scale=1.0,  # Queries are scaled.
                is_causal=not mask,
                implementation=self.implementation,
            )

        arrays = (query, key, value) if visible is None else (query, key, value, visible)
        if self.mesh is None:
            return attend_on_device(*arrays)
        # Explicit: what XLA would split the kernel's call along differs between versions of jax.
        split = P(BATCH_AXES, None, "tensor", None)
        return jax.shard_map(
            attend_on_device,
            mesh=self.mesh,
            in_specs=(split, split, split, P(BATCH_AXES))[: len(arrays)],
            out_specs=split,
            check_vma=False,  # The kernel's call does not say over what its results vary.
        )(*arrays)


def _pad(x: Array, count: int) -> Array:
    """Appends `count` zeros to the second axis of [rows, W, heads, d]."""
    return jnp.pad(x, ((0, 0), (0, count), (0, 0), (0, 0)))


def _compute_mask(
    prompt_size: int,
    prompt_lengths_B: Array,
    segments_BEW: Array,
    offsets_BEW: Array,
    limits: Limits,
) -> Array:
    """Computes which keys of the prompt and of its own group a response's token sees.

    The result is bool [B * E, W, P + W]. A token sees at least itself.
    """
    own_BEWW = plain.see_own(segments_BEW, limits)
    prompt_BEWP = plain.see_prompt(prompt_size, prompt_lengths_B, offsets_BEW, limits)
    prompt_BEWP = jnp.broadcast_to(prompt_BEWP, (*own_BEWW.shape[:-1], prompt_size))
    mask = jnp.concatenate([prompt_BEWP, own_BEWW], axis=-1)
    return mask.reshape(-1, *mask.shape[2:])


def choose_attention(
    setting: str, config: DecoderConfig, dtype: DTypeLike, mesh: Mesh
) -> Attention:
    """Chooses what `config.model.attention` means on these devices.

    `auto` is the fused kernel on GPUs where it computes what plain attention does, which is tried
    on a small example on all of them. All processes have to call this, and get the same.

    Raises:
        UserError: the setting is `fused`, and the kernel cannot run.
    """
    if setting == "plain":
        return plain
    # One process without the kernel is enough: their programs must be the same.
    obstacles = distributed.gather_values(find_obstacle(config, jnp.dtype(dtype), mesh))
    obstacle = next(filter(None, obstacles), None)
    if obstacle is None:
        return FusedAttention.for_mesh(mesh)
    if setting == "fused":
        raise UserError(f"config.model.attention=fused: {obstacle}; expected auto or plain")
    if mesh.devices.flat[0].platform == "gpu":
        _log.info(f"attention without a fused kernel: {obstacle}")
    return plain


def check_supported(config: DecoderConfig) -> None:
    """Raises UserError for a model that the kernel does not compute on any device."""
    if config.attention_soft_cap is not None:
        raise UserError(f"config.model.attention=fused: {NO_SOFT_CAP}; expected auto or plain")


def find_obstacle(config: DecoderConfig, dtype: jnp.dtype, mesh: Mesh) -> str | None:
    """Returns why the kernel cannot run on these devices, or None if it can."""
    platform, tensor = mesh.devices.flat[0].platform, mesh.shape["tensor"]
    if platform != "gpu":
        return f"the kernel is cuDNN's, and this run is on {platform}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"the kernel needs config.model.dtype=bfloat16, not {dtype.name}"
    if config.attention_soft_cap is not None:
        return NO_SOFT_CAP
    if config.num_kv_heads % tensor:
        return f"config.mesh.tensor={tensor} does not divide {config.num_kv_heads} key-value heads"
    if distributed.is_multiprocess():
        # Each process tries its own devices: where one fails, the others would wait forever.
        local_devices = np.array(mesh.local_devices).reshape(-1, 1, 1)
        mesh = Mesh(local_devices, mesh.axis_names, axis_types=mesh.axis_types)
        heads, keys = config.num_heads // tensor, config.num_kv_heads // tensor
        config = dataclasses.replace(config, num_heads=heads, num_kv_heads=keys)
    try:
        error = measure_error(FusedAttention.for_mesh(mesh), config, dtype)
    except (NotImplementedError, RuntimeError, ValueError) as failure:
        return f"the kernel failed: {str(failure).splitlines()[0]}"
    if not error <= MAX_RELATIVE_ERROR:  # A NaN does not pass either.
        return (
            f"the kernel is off by {error:.2g} on a small example, expected at most "
            f"{MAX_RELATIVE_ERROR}"
        )
    return None


def measure_error(fused: FusedAttention, config: DecoderConfig, dtype: DTypeLike) -> float:
    """Measures the largest relative difference to plain attention, of outputs and of gradients.

    The example has padding, an absent response and lengths that are no multiples of anything, two
    rows for each part that prompts are split into, and the model's heads. With a mesh all processes
    call it.
    """
    heads = config.num_heads, config.num_kv_heads, config.head_dim
    window = None if config.window is None else SHORT_WINDOW
    return float(_measure_error(fused, heads, jnp.dtype(dtype), window))


# Compiled once, if it is asked for again.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _measure_error(
    fused: FusedAttention, heads: tuple[int, int, int], dtype: jnp.dtype, window: int | None
) -> Array:
    prompt, length, parts = 21, 13, fused.batch_shards
    query_heads, kv_heads, size = heads
    prompt_lengths = jnp.tile(jnp.array([prompt, 6]), parts)
    segments = jnp.array([[[0] * 5 + [2] * 7 + [3]], [[1] * 4 + [3] * 9]])
    offsets = jnp.array([[[*range(5), *range(7), 0]], [[*range(4), *range(9)]]])
    segments, offsets = (jnp.tile(x, (parts, 1, 1)) for x in (segments, offsets))
    limits = Limits(window)
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, weights = (
        jax.random.normal(k, (2 * parts, prompt + length, n, size), jnp.float32).astype(dtype)
        for k, n in zip(keys, (query_heads, kv_heads, kv_heads, query_heads), strict=True)
    )
    query *= jnp.asarray(size**-0.5, dtype)

    def differentiate(attention: Attention) -> Any:
        """Outputs of all tokens, and of the prompt's last as in the last layer; gradients."""
        groups = prompt_lengths, segments, offsets
        attend = plain.make_shared_prefix_attend(attention, prompt, *groups)
        last, zeros = prompt_lengths - 1, jnp.zeros((2 * parts, 1, 1), jnp.int32)
        attend_last = attention.make_response_attend(last, zeros, zeros)

        def compute_outputs(query: Array, key: Array, value: Array) -> Any:
            keys_values = key[:, :prompt], value[:, :prompt]
            k, v = (jnp.take_along_axis(x, last[:, None, None, None], 1) for x in keys_values)
            last_token, _ = attend_last(query[:, :1], k, v, keys_values, limits)
            return attend(query, key, value, None, limits)[0], last_token

        outputs, vjp = jax.vjp(compute_outputs, query, key, value)
        return *outputs, *vjp((weights, weights[:, :1]))

    errors = []
    for a, b in zip(differentiate(fused), differentiate(plain), strict=True):
        # Each part by itself: one device's mistake would be a small one among many.
        a, b = (x.astype(jnp.float32).reshape(parts, -1) for x in (a, b))
        errors.append(jnp.linalg.norm(a - b, axis=1) / jnp.linalg.norm(b, axis=1))
    largest = jnp.max(jnp.stack(errors))
    if fused.mesh is None:
        return largest
    return jax.lax.with_sharding_constraint(largest, NamedSharding(fused.mesh, P()))
