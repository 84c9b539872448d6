"""What attends to what, by one fused kernel (cuDNN's) that never writes scores to memory.

The functions of models/attention.py for GPUs and 16-bit types, equal to them up to rounding. There
is one call for the prompt, causal, and one for the responses, whose keys are the prompt's and their
own group's under a mask: one softmax over both. (Two calls merged by their log-sum-exp would train
on wrong gradients: the kernel's backward pass ignores that of the log-sum-exp.) Groups are batch
rows, so that none computes pairs with another's; the packed layout has one group.

The kernel gets a mask as a bias [B * G, 1, L, P + L] in the compute type, all heads sharing it,
and, in jax 0.10, writes a gradient of the same size that nothing reads. For 16 prompts of 160
tokens with 200 response places that is 2.3 MB, where one layer's scores in float32 for 24 heads
are 110 MB. Masked pairs are computed, but all of attention is some 2% of a 3B model's operations
at such lengths. Every response in a row behind its prompt, causal, would need no bias, but a query
for every prompt token of every response: for short responses many times the tokens.

On several devices each one calls the kernel for its own prompts and heads.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models import attention as plain
from mass_dpo_jax.models.attention import Attention
from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.utils import distributed
from mass_dpo_jax.utils.mesh_axes import BATCH_AXES

if TYPE_CHECKING:
    from mass_dpo_jax.models.decoder import Attend

_log = logging.getLogger(__name__)

# jax refuses a backward pass with an odd number of queries or keys. With multiples of 8 each row of
# a 16-bit bias begins at a multiple of 16 bytes, the most a thread loads at once.
ALIGNMENT = 8
CHOICES = ("auto", "plain", "fused")
# Relative, of outputs and gradients: two roundings to bfloat16 differ by some 0.005, a single key
# that one query sees and should not by 0.03.
MOST = 0.02


@dataclasses.dataclass(frozen=True)
class Fused:
    """The two functions of an `Attention`. Equal by value: part of a static argument.

    Attributes:
      implementation: `cudnn`; or `xla`, the same calls in plain operations, for tests.
      mesh: the devices, prompts lying on `data` and `fsdp` and heads on `tensor`; None: one device.
    """

    implementation: Literal["cudnn", "xla"] = "cudnn"
    mesh: Mesh | None = None

    @classmethod
    def on(cls, mesh: Mesh) -> Fused:
        """cuDNN's on these devices."""
        return cls(mesh=mesh if mesh.size > 1 else None)

    @property
    def ways(self) -> int:
        """Into how many parts prompts are split."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)

    def causal(
        self, query: jax.Array, key: jax.Array, value: jax.Array, extra: Any = None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """See models/attention.py."""
        del extra
        length = query.shape[1]
        # No real token comes after those of padding, so they need no mask.
        q, k, v = (_pad(x, -length % ALIGNMENT) for x in (query, key, value))
        return self._attend(q, k, v, None)[:, :length], (key, value)

    def behind_prompt(self, prompt_lengths: jax.Array, segments: jax.Array) -> Attend:
        """See models/attention.py."""
        batch, groups, length = segments.shape

        def attend(
            query: jax.Array, key: jax.Array, value: jax.Array, extra: Any
        ) -> tuple[jax.Array, None]:
            prompt_size = extra[0].shape[1]
            more_queries = -length % ALIGNMENT
            more_keys = -(prompt_size + length) % ALIGNMENT

            def rows(x: jax.Array) -> jax.Array:  # [B, G * L, heads, K] -> [B * G, L, heads, K]
                return x.reshape(batch * groups, length, *x.shape[2:])

            def with_prompt(of_prompt: jax.Array, own: jax.Array) -> jax.Array:
                """[B, P, KV, K] and [B, G * L, KV, K] -> [B * G, P + L + padding, KV, K]."""
                repeated = jnp.repeat(of_prompt, groups, axis=0)
                return _pad(jnp.concatenate([repeated, rows(own)], axis=1), more_keys)

            visible = _visible(prompt_size, prompt_lengths, segments)
            # No row may see nothing: the kernel would subtract huge numbers from each other. So
            # queries of padding see all; their gradient is zero.
            visible = jnp.pad(visible, ((0, 0), (0, more_queries), (0, 0)), constant_values=True)
            visible = jnp.pad(visible, ((0, 0), (0, 0), (0, more_keys)), constant_values=False)
            seen = self._attend(
                _pad(rows(query), more_queries),
                with_prompt(extra[0], key),
                with_prompt(extra[1], value),
                visible[:, None],
            )
            return seen[:, :length].reshape(query.shape), None

        return attend

    def _attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array | None
    ) -> jax.Array:
        """[rows, L, H, K] and [rows, keys, KV, K] -> [rows, L, H, K].

        Args:
          visible: bool [rows, 1, L, keys]; None: causal, where the kernel leaves pairs out. As a
            mask and not as a bias: newer versions of jax then ask for no gradient of it.
        """

        def of_device(*arrays: jax.Array) -> jax.Array:
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
            return of_device(*arrays)
        # Said here: what XLA would split the kernel's call along differs between versions of jax.
        split = P(BATCH_AXES, None, "tensor", None)
        return jax.shard_map(
            of_device,
            mesh=self.mesh,
            in_specs=(split, split, split, P(BATCH_AXES))[: len(arrays)],
            out_specs=split,
            check_vma=False,  # The kernel's call does not say over what its results vary.
        )(*arrays)


def _pad(x: jax.Array, more: int) -> jax.Array:
    """[rows, L, heads, K] -> [rows, L + more, heads, K], zeros behind."""
    return jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0)))


def _visible(prompt_size: int, prompt_lengths: jax.Array, segments: jax.Array) -> jax.Array:
    """Which of the prompt's and its own group's keys a response's token sees: bool
    [B * G, L, P + L], never none, since a token sees itself."""
    batch, groups, length = segments.shape
    real = jnp.arange(prompt_size)[None] < prompt_lengths[:, None]  # [B, P]
    real = jnp.broadcast_to(real[:, None, None], (batch, groups, length, prompt_size))
    own = segments[..., :, None] == segments[..., None, :]  # [B, G, L, L]
    own &= jnp.tri(length, dtype=bool)[None, None]
    return jnp.concatenate([real, own], axis=-1).reshape(batch * groups, length, -1)


def choose(setting: str, config: DecoderConfig, dtype: DTypeLike, mesh: Mesh) -> Attention:
    """What `config.model.attention` means on these devices.

    `auto` is the fused kernel on GPUs where it computes what plain attention does: that is tried,
    on a small example on all of them. All processes have to ask, and get the same.

    Raises:
      UserError: `fused`, and it cannot be.
    """
    if setting == "plain":
        return plain
    # One process without the kernel is enough: their programs must be the same.
    found = next(
        filter(None, distributed.gather_values(obstacle(config, jnp.dtype(dtype), mesh))), None
    )
    if found is None:
        return Fused.on(mesh)
    if setting == "fused":
        raise UserError(f"config.model.attention=fused: {found}; expected auto or plain")
    if mesh.devices.flat[0].platform == "gpu":
        _log.info(f"attention without a fused kernel: {found}")
    return plain


def obstacle(config: DecoderConfig, dtype: jnp.dtype, mesh: Mesh) -> str | None:
    """Why the kernel cannot run there, or None."""
    platform, tensor = mesh.devices.flat[0].platform, mesh.shape["tensor"]
    if platform != "gpu":
        return f"the kernel is cuDNN's, and this run is on {platform}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"the kernel needs config.model.dtype=bfloat16, not {dtype.name}"
    if config.num_kv_heads % tensor:
        return f"config.mesh.tensor={tensor} does not divide {config.num_kv_heads} key-value heads"
    if distributed.is_multiprocess():
        # Each tries its own devices: where one fails, the others would wait for it for ever.
        own = np.array(mesh.local_devices).reshape(-1, 1, 1)
        mesh = Mesh(own, mesh.axis_names, axis_types=mesh.axis_types)
        heads, keys = config.num_heads // tensor, config.num_kv_heads // tensor
        config = dataclasses.replace(config, num_heads=heads, num_kv_heads=keys)
    try:
        error = difference(Fused.on(mesh), config, dtype)
    except (NotImplementedError, RuntimeError, ValueError) as failure:
        return f"the kernel failed: {str(failure).splitlines()[0]}"
    if not error <= MOST:  # Nor is a NaN.
        return f"the kernel is off by {error:.2g} on a small example, expected at most {MOST}"
    return None


def difference(fused: Fused, config: DecoderConfig, dtype: DTypeLike) -> float:
    """The largest relative difference to plain attention, of outputs and of gradients.

    On rows with padding, an absent response and lengths that are no multiples of anything, two for
    each part that prompts are split into; heads as the model's. With a mesh all processes call it.
    """
    heads = config.num_heads, config.num_kv_heads, config.head_dim
    return float(_difference(fused, heads, jnp.dtype(dtype)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # Compiled once, if it is asked for again.
def _difference(fused: Fused, heads: tuple[int, int, int], dtype: jnp.dtype) -> jax.Array:
    prompt, length, parts = 21, 13, fused.ways
    of_queries, of_keys, size = heads
    prompt_lengths = jnp.tile(jnp.array([prompt, 6]), parts)
    segments = jnp.array([[[0] * 5 + [2] * 7 + [3]], [[1] * 4 + [3] * 9]])
    segments = jnp.tile(segments, (parts, 1, 1))
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, weights = (
        jax.random.normal(k, (2 * parts, prompt + length, n, size), jnp.float32).astype(dtype)
        for k, n in zip(keys, (of_queries, of_keys, of_keys, of_queries), strict=True)
    )
    query *= jnp.asarray(size**-0.5, dtype)

    def values(attention: Attention) -> Any:
        """Outputs of all, and of the prompt's last token alone as in the last layer; gradients."""
        every = plain.shared_prefix(attention, prompt, prompt_lengths, segments)
        last = prompt_lengths - 1
        one = attention.behind_prompt(last, jnp.zeros((2 * parts, 1, 1), jnp.int32))

        def seen(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
            of_prompt = key[:, :prompt], value[:, :prompt]
            k, v = (jnp.take_along_axis(x, last[:, None, None, None], 1) for x in of_prompt)
            return every(query, key, value, None)[0], one(query[:, :1], k, v, of_prompt)[0]

        found, vjp = jax.vjp(seen, query, key, value)
        return *found, *vjp((weights, weights[:, :1]))

    errors = []
    for a, b in zip(values(fused), values(plain), strict=True):
        # Of each part by itself: one device's mistake would be a small one among many.
        a, b = (x.astype(jnp.float32).reshape(parts, -1) for x in (a, b))
        errors.append(jnp.linalg.norm(a - b, axis=1) / jnp.linalg.norm(b, axis=1))
    largest = jnp.max(jnp.stack(errors))
    if fused.mesh is None:
        return largest
    return jax.lax.with_sharding_constraint(largest, NamedSharding(fused.mesh, P()))
