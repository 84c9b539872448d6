"""Memory of a train step on one device, from formulas; nothing is allocated.

Weights, gradients, optimizer state and batch are exact: the bytes of the sharded arrays. What the
forward pass keeps and the temporaries are counted in activations.py. docs/scaling.md compares this
estimate with compiling the step.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mass_dpo_jax.estimate import activations
from mass_dpo_jax.estimate.activations import FLOAT32
from mass_dpo_jax.estimate.sizes import BatchLayout, Chunks, DeviceModel
from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.models.lora import Lora
from mass_dpo_jax.training.mesh import param_shapes
from mass_dpo_jax.training.optimizer import state_shapes


class StateBytes(NamedTuple):
    """Exact bytes on one device.

    Attributes:
        trained: float32 weights that are trained.
        frozen: the other weights.
        optimizer: the optimizer's state.
    """

    trained: int
    frozen: int
    optimizer: int


class StepLayout(NamedTuple):
    """What a train step computes with on one device.

    Attributes:
        pool: the responses that are scored; None if none are.
        chunks: how the pool is divided for that, see `activations.scoring_bytes`.
        trained: the responses in the loss.
        micro_batches: micro-batches of a step.
        reuse: whether training starts from the record of scoring the pool.
        trained_chunks: how the responses in the loss are divided; None: not.
    """

    pool: BatchLayout | None
    chunks: Chunks | None
    trained: BatchLayout
    micro_batches: int = 1
    reuse: bool = False
    trained_chunks: Chunks | None = None


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device during a train step.

    Attributes:
        parameters: all weights.
        gradients: the gradient of those that are trained.
        optimizer: the optimizer's state.
        batch: all micro-batches of a step.
        gradient_sums: the gradients of earlier micro-batches.
        weight_copies: copies of weights in the backward pass.
        kept: arrays kept for the backward pass.
        last_layer_kept: the part of `kept` that the last layer's backward pass uses up.
        pool_record: the part of `kept` that scoring the pool leaves behind.
        scoring: temporaries of scoring the pool.
        logits: temporaries of the loss's vocabulary projection.
        last_layer: temporaries of the loss in the last layer.
        other_layer: temporaries of the loss in any other layer.
        offloaded: whether the optimizer's state is on the device during the update only.
        earlier_chunks: the gradients of chunks of responses before the one at hand.
        prompt: record and temporaries of the prompt's own backward pass, after all chunks.
    """

    parameters: int
    gradients: int
    optimizer: int
    batch: int
    gradient_sums: int
    weight_copies: int
    kept: int
    last_layer_kept: int
    pool_record: int
    scoring: int
    logits: int
    last_layer: int
    other_layer: int
    offloaded: bool
    earlier_chunks: int = 0
    prompt: int = 0

    @property
    def phases(self) -> dict[str, int]:
        """Bytes held in each part of a step, by its name.

        The update counts all of an offloaded state, which is the most it can be.
        """
        inputs = self.parameters + self.batch
        held = inputs + (0 if self.offloaded else self.optimizer) + self.gradient_sums
        backward = held + self.gradients + self.weight_copies + self.kept
        phases = {
            "scoring": held + self.pool_record + self.scoring,
            "vocabulary": held + self.earlier_chunks + self.kept + self.logits,
            "last layer": backward + self.last_layer,
            "layers": backward - self.last_layer_kept + self.other_layer,
            "update": inputs + self.optimizer + self.gradients,
        }
        if self.prompt:
            phases["prompt"] = held + self.gradients + self.weight_copies + self.prompt
        return phases

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        return max(self.phases.values())

    @property
    def temporaries(self) -> int:
        """The part of the peak beside weights, optimizer state and batch: XLA's `temp_size`."""
        inputs = self.parameters + self.batch
        return max(
            size - inputs - (0 if self.offloaded and name != "update" else self.optimizer)
            for name, size in self.phases.items()
        )


def estimate_step(
    model: DeviceModel, state: StateBytes, batch: int, step: StepLayout, offloaded: bool = False
) -> MemoryEstimate:
    """Estimates the memory of a train step.

    Args:
        model: the model on one device.
        state: bytes of weights and optimizer state.
        batch: bytes of all micro-batches of a step.
        step: the responses that are scored and trained on.
        offloaded: whether the optimizer's state lies on the host between updates.
    """
    chunks = step.trained_chunks
    terms = _count_at_once(model, step) if chunks is None else _count_chunks(model, step, chunks)
    return MemoryEstimate(
        parameters=state.trained + state.frozen,
        gradients=state.trained,
        optimizer=state.optimizer,
        batch=batch,
        gradient_sums=state.trained if step.micro_batches > 1 else 0,
        weight_copies=activations.weight_copy_bytes(model, backward=True),
        offloaded=offloaded,
        earlier_chunks=0 if chunks is None else state.trained,
        **terms,
    )


def _count_at_once(model: DeviceModel, step: StepLayout) -> dict[str, int]:
    """Counts records and temporaries of a step, by the names of `MemoryEstimate`."""
    recorded = step.pool if step.reuse and step.pool is not None else step.trained
    scoring = 0
    if step.pool is not None:
        scoring = activations.scoring_bytes(model, step.pool, step.chunks)
    return {
        "kept": activations.kept_bytes(model, recorded, step.trained),
        "last_layer_kept": activations.last_layer_record_bytes(model, recorded),
        "pool_record": activations.record_bytes(model, recorded) if step.reuse else 0,
        "scoring": scoring,
        "logits": activations.logits_bytes(model, step.trained, backward=True),
        "last_layer": activations.backward_bytes(model, step.trained, last_layer=True),
        "other_layer": activations.backward_bytes(model, step.trained),
    }


def _count_chunks(model: DeviceModel, step: StepLayout, chunks: Chunks) -> dict[str, int]:
    """Counts the same where some responses are differentiated at a time (chunked_replay.py)."""
    prompt, responses = step.trained.prompt_alone, step.trained.take(chunks)
    record = activations.record_bytes(model, prompt)
    read = activations.prompt_bytes(model, prompt)
    # The sum of its gradient is float32.
    kept_of_prompt = record + read + read // model.itemsize * FLOAT32
    scoring = record + read + activations.chunk_scoring_bytes(model, step.trained, chunks)
    if step.pool is not None:
        scoring = activations.scoring_bytes(model, step.pool, step.chunks)
    return {
        "kept": kept_of_prompt + activations.kept_bytes(model, responses, responses),
        "last_layer_kept": activations.last_layer_record_bytes(model, responses),
        "pool_record": 0,
        "scoring": scoring,
        "logits": activations.logits_bytes(model, responses, backward=True),
        "last_layer": activations.backward_bytes(model, responses, last_layer=True),
        "other_layer": activations.backward_bytes(model, responses),
        "prompt": kept_of_prompt + activations.backward_bytes(model, prompt),
    }


def tree_bytes(tree: Any) -> int:
    """Returns the bytes on one device of a tree of `jax.ShapeDtypeStruct` with shardings."""

    def leaf_bytes(x: jax.ShapeDtypeStruct) -> int:
        bits = 4 if x.dtype == jnp.uint4 else 8 * x.dtype.itemsize  # Two uint4 share a byte.
        return math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape) * bits // 8

    return sum(map(leaf_bytes, jax.tree.leaves(tree)))


def state_bytes(
    config: DecoderConfig,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    lora: Lora | None = None,
    base_dtype: str = "float32",
) -> StateBytes:
    """Returns the bytes of weights and optimizer state on one device of `mesh`.

    Args:
        config: the decoder.
        mesh: the devices; only names and sizes of its axes are read.
        optimizer: the optimizer of the trained weights.
        lora: the adapters; None where all weights are trained.
        base_dtype: storage type of the frozen weights beside adapters.
    """
    trained, frozen = param_shapes(config, mesh, lora, base_dtype), {}
    if lora is not None:
        adapters = {"adapters": trained.pop("adapters")}
        trained, frozen = adapters, trained
    state = state_shapes(optimizer, trained, mesh)
    return StateBytes(tree_bytes(trained), tree_bytes(frozen), tree_bytes(state))


def batch_bytes(
    rows: int, prompt: int, responses: int, candidates: int, extra_values: int = 0
) -> int:
    """Returns the bytes of the arrays of a `Batch` (data/batches.py).

    Args:
        rows: prompts of a step on one device.
        prompt: tokens of a prompt.
        responses: tokens of all its responses.
        candidates: responses of a prompt, of which a batch has lengths and reference log-probs.
        extra_values: further values of a row, such as scores.
    """
    # 2: the prompt's length and its index.
    row = prompt + responses + 2 * candidates + 2 + extra_values
    return rows * row * FLOAT32
