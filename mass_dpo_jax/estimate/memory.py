"""Memory of a train step on one device, from formulas; nothing is allocated.

Weights, gradients, optimizer state and batch are exact: the bytes of the sharded arrays. What is
kept for the backward pass is the forward pass's record and what JAX's differentiation saves beside
it. Temporaries are estimates: how many copies of an array live at once is up to the compiler. The
counts below were read off XLA's programs for CPUs in float32, and are up to 20% off. A fused kernel
(models/fused_attention.py) has no scores, and what it holds instead has not been measured.
docs/scaling.md compares this estimate with compiling the step.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mass_dpo_jax.estimate.sizes import BatchLayout, DeviceModel, logits_chunk
from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.models.lora import Lora
from mass_dpo_jax.training.mesh import param_shapes
from mass_dpo_jax.training.optimizer import state_shapes

FLOAT32 = 4  # Bytes.
MASK = FLOAT32 + 1  # Bytes of a score's mask, and of the zero that its masked gradient becomes.
BASE_BYTES = {"float32": FLOAT32, "bfloat16": 2, "int8": 1, "nf4": 1}  # Of a weight, gathered.


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
        pool: what is scored; None where nothing is.
        chunk: groups of the pool that are scored at a time, as for `scoring_bytes`.
        trained: what the loss sees.
        micro_batches: micro-batches of a step.
        reuse: whether training starts from the record of scoring the pool.
    """

    pool: BatchLayout | None
    chunk: int | None
    trained: BatchLayout
    micro_batches: int = 1
    reuse: bool = False


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
        kept: what is kept for the backward pass.
        last_layer_kept: the part of `kept` that the last layer's backward pass uses up.
        pool_record: the part of `kept` that scoring the pool leaves behind.
        scoring: temporaries of scoring the pool.
        logits: temporaries of the loss's vocabulary projection.
        last_layer: temporaries of the loss in the last layer.
        other_layer: temporaries of the loss in any other layer.
        offloaded: whether the optimizer's state is on the device during the update only.
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

    @property
    def phases(self) -> dict[str, int]:
        """Bytes held in each part of a step, by its name.

        The update counts all of an offloaded state, which is the most it can be.
        """
        inputs = self.parameters + self.batch
        held = inputs + (0 if self.offloaded else self.optimizer) + self.gradient_sums
        backward = held + self.gradients + self.weight_copies + self.kept
        return {
            "scoring": held + self.pool_record + self.scoring,
            "vocabulary": held + self.kept + self.logits,
            "last layer": backward + self.last_layer,
            "layers": backward - self.last_layer_kept + self.other_layer,
            "update": inputs + self.optimizer + self.gradients,
        }

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
        step: what is scored and trained on.
        offloaded: whether the optimizer's state lies on the host between updates.
    """
    recorded = step.pool if step.reuse and step.pool is not None else step.trained
    return MemoryEstimate(
        parameters=state.trained + state.frozen,
        gradients=state.trained,
        optimizer=state.optimizer,
        batch=batch,
        gradient_sums=state.trained if step.micro_batches > 1 else 0,
        weight_copies=weight_copy_bytes(model, backward=True),
        kept=kept_bytes(model, recorded, step.trained),
        last_layer_kept=last_layer_record_bytes(model, recorded),
        pool_record=record_bytes(model, recorded) if step.reuse else 0,
        scoring=0 if step.pool is None else scoring_bytes(model, step.pool, step.chunk),
        logits=logits_bytes(model, step.trained, backward=True),
        last_layer=backward_bytes(model, step.trained, last_layer=True),
        other_layer=backward_bytes(model, step.trained),
        offloaded=offloaded,
    )


# Exact bytes.


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
        base_dtype: with adapters, the type that the other weights are stored in.
    """
    trained, frozen = param_shapes(config, mesh, lora, base_dtype), {}
    if lora is not None:
        adapters = {"adapters": trained.pop("adapters")}
        trained, frozen = adapters, trained
    state = state_shapes(optimizer, trained, mesh)
    return StateBytes(tree_bytes(trained), tree_bytes(frozen), tree_bytes(state))


def batch_bytes(rows: int, prompt: int, responses: int, candidates: int, extra: int = 0) -> int:
    """Returns the bytes of the arrays of a `Batch` (data/batches.py).

    Args:
        rows: prompts of a step on one device.
        prompt: tokens of a prompt.
        responses: tokens of all its responses.
        candidates: responses of a prompt, of which a batch has lengths and reference log-probs.
        extra: further values of a row, such as scores.
    """
    row = prompt + responses + 2 * candidates + 2 + extra  # 2: the prompt's length and its index.
    return rows * row * FLOAT32


# What the forward pass keeps for the backward pass.


def kept_bytes(model: DeviceModel, recorded: BatchLayout, trained: BatchLayout) -> int:
    """Returns the bytes of the forward pass's record and of what differentiation saves besides.

    Args:
        model: the model.
        recorded: what the forward pass ran on: the pool, or what is trained on.
        trained: what is trained on.
    """
    # The final norm saves two float32 arrays of hidden states, rotary positions their angles.
    saved = trained.last_layer_tokens * 2 * model.hidden + trained.tokens * model.head_dim
    # The vocabulary projection saves its input, in the compute type, and its mask.
    logits_input = trained.batch * trained.response_tokens * model.hidden * (model.itemsize + 1)
    return record_bytes(model, recorded) + saved * FLOAT32 + logits_input


def record_bytes(model: DeviceModel, layout: BatchLayout) -> int:
    """Returns the bytes of a forward pass's record (models/decoder.py)."""
    # Of every layer its input, and with remat=dots the products of `_recorded_products`.
    token = model.hidden + sum(_recorded_products(model))
    layers = (model.layers - 1) * layout.tokens * token * model.itemsize
    logps = layout.batch * layout.response_tokens * FLOAT32
    return layers + last_layer_record_bytes(model, layout) + logps


def last_layer_record_bytes(model: DeviceModel, layout: BatchLayout) -> int:
    """Returns the last layer's part of a record.

    It is used up when the backward pass of the other layers begins.
    """
    keys_values, others = _recorded_products(model)
    # Input, keys and values of all tokens; of the last layer's tokens the rest and the output.
    values = layout.tokens * (model.hidden + keys_values)
    values += layout.last_layer_tokens * (others + model.hidden)
    return values * model.itemsize


def _recorded_products(model: DeviceModel) -> tuple[int, int]:
    """Counts recorded values per token and layer: keys and values, and other products.

    A layer's last product is not recorded.
    """
    if model.remat == "full":
        return 0, 0
    # Attention's output projection, queries, and the MLP's gate and up.
    return 2 * model.key_width, model.hidden + model.query_width + 2 * model.inner


# Temporaries. Tokens hold values of the compute type, pairs float32 scores for every head.


def forward_bytes(model: DeviceModel, layout: BatchLayout) -> int:
    """Returns the temporaries of a layer in the forward pass: of its MLP or its attention."""
    within_prompt, to_prompt, within_groups = (n * model.heads * FLOAT32 for n in layout.pairs)
    # The scores of the prompt and their softmax live together. Then come those of the responses
    # and their softmax, while the prompt's weights are still there.
    scores = max(2 * within_prompt, within_prompt + 2 * (to_prompt + within_groups))
    if model.fused:
        scores = fused_bytes(model, layout)
    return max(_mlp_bytes(model, layout), _attention_bytes(model, layout) + scores)


def _mlp_bytes(model: DeviceModel, layout: BatchLayout) -> int:
    """Counts a layer's residual, input and output, and the results of gate and up."""
    return layout.tokens * (3 * model.hidden + 2 * model.inner) * model.itemsize


def _attention_bytes(model: DeviceModel, layout: BatchLayout) -> int:
    """Counts a layer's residual, queries, attention's output, keys and values."""
    token = model.hidden + 2 * model.query_width + 2 * model.key_width
    return layout.tokens * token * model.itemsize


def backward_bytes(model: DeviceModel, layout: BatchLayout, last_layer: bool = False) -> int:
    """Returns the temporaries of a layer in the backward pass, what is recomputed included.

    Args:
        model: the model.
        layout: what is trained on.
        last_layer: whether the layer is the last one, which has fewer tokens.
    """
    hidden, inner, query, key = model.hidden, model.inner, model.query_width, model.key_width
    tokens = layout.last_layer_tokens if last_layer else layout.tokens
    pairs = layout.last_layer_pairs if last_layer else layout.pairs
    within_prompt, to_prompt, within_groups = (n * model.heads for n in pairs)
    all_pairs = within_prompt + to_prompt + within_groups
    # A pair's attention weight: in float32 and, where that differs, in the compute type.
    weight = FLOAT32 + (model.itemsize if model.itemsize < FLOAT32 else 0)
    if model.fused:
        masks, weights = 0, fused_bytes(model, layout)
        scores = fused_bytes(model, layout, copies=2)
    else:
        masks, weights = all_pairs * MASK, all_pairs * weight
        # Weights of all pairs and gradients of the responses', or both of the prompt's.
        scores = max(
            weights + (to_prompt + within_groups) * FLOAT32, within_prompt * (weight + FLOAT32)
        )
    # The largest of four places, in values of a token. The MLP has three hidden states, its inner
    # ones with their gradients, and attention's inputs and output. A norm has seven hidden states.
    # Heads are queries, keys and values before and after rotation, with gradients. The scores have
    # attention's inputs and output.
    inner_copies = {"full": 5, "dots": 4}[model.remat]
    mlp = 3 * hidden + inner_copies * inner + 2 * query + 2 * key
    norm = 7 * hidden
    heads = 2 * hidden + 5 * query + 5 * key
    attention = hidden + 2 * query + 2 * key
    return masks + max(
        tokens * mlp * model.itemsize + weights,
        tokens * norm * model.itemsize,
        tokens * heads * model.itemsize,
        tokens * attention * model.itemsize + scores,
    )


def fused_bytes(model: DeviceModel, layout: BatchLayout, copies: int = 1) -> int:
    """Returns what a fused kernel holds beside the layer's queries, keys and values.

    Args:
        model: the model.
        layout: the tokens.
        copies: 2 with gradients of what it holds.
    """
    # Its own queries and outputs, and keys and values that repeat the prompt's for every group.
    rows = layout.tokens * 2 * model.query_width + layout.repeated_keys * 2 * model.key_width
    # The responses' mask, and the same in the compute type as a bias for all heads.
    mask = sum(layout.pairs[1:])
    bias = mask * model.itemsize
    log_sum_exps = layout.tokens * model.heads * FLOAT32
    return copies * (rows * model.itemsize + bias) + log_sum_exps + mask


def weight_copy_bytes(model: DeviceModel, backward: bool) -> int:
    """Returns the copies of weights that a layer computes with.

    One is taken out of the stack of all layers, in the compute type. Where weights are stored in
    parts, a layer is also gathered as it is stored, and its gradient is whole before it is split.
    """
    gathered = model.layer_weights * BASE_BYTES[model.base_dtype] if model.gathers_weights else 0
    if backward and model.lora is None:
        gathered *= 2
    return model.layer_weights * model.itemsize + gathered


def logits_bytes(model: DeviceModel, layout: BatchLayout, backward: bool) -> int:
    """Returns the temporaries of a chunk of the vocabulary projection."""
    chunk = logits_chunk(model, layout)
    logits = layout.batch * chunk * model.vocabulary * FLOAT32
    # The head's weights in the compute type, gathered as they are stored, and their gradient.
    stored = FLOAT32 if model.base_dtype == "float32" else 2
    head = model.itemsize if model.itemsize != stored else 0
    head += stored if model.gathers_weights else 0
    head += FLOAT32 if backward and model.lora is None else 0
    return (3 if backward else 1) * logits + model.vocabulary * model.hidden * head


def scoring_bytes(model: DeviceModel, layout: BatchLayout, chunk: int | None) -> int:
    """Returns the temporaries of scoring a pool, without a record.

    Args:
        model: the model.
        layout: the pool.
        chunk: groups computed at a time after the prompt, from its keys and values; None where
            all are computed together with the prompt.
    """
    weights = weight_copy_bytes(model, backward=False)
    if chunk is None or chunk >= layout.groups:
        hidden = 2 * layout.last_layer_tokens * model.hidden * model.itemsize
        return max(
            forward_bytes(model, layout) + weights,
            hidden + logits_bytes(model, layout, backward=False),
        )
    prompt, groups = layout._replace(groups=0), layout._replace(groups=chunk)
    responses = groups._replace(prompt=0)
    # The prompt's keys and values of all layers, and its last hidden states.
    prompt_values = prompt.tokens * 2 * model.layers * model.key_width
    prompt_values += prompt.last_layer_tokens * model.hidden
    kept = prompt_values * model.itemsize
    if model.fused:
        scores = fused_bytes(model, groups)  # Its keys include the prompt's.
    else:
        scores = 2 * model.heads * FLOAT32 * sum(groups.pairs[1:])
    layer = max(_mlp_bytes(model, responses), _attention_bytes(model, responses) + scores)
    hidden = 2 * responses.tokens * model.hidden * model.itemsize
    return max(
        forward_bytes(model, prompt) + weights,
        layer + weights + kept,
        hidden + logits_bytes(model, responses, backward=False) + kept,
    )
