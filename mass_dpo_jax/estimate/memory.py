"""What a train step needs of a device's memory, from formulas: nothing is allocated.

Weights, gradients, optimizer state and batch are exact: they are the sharded arrays themselves.
What is kept for the backward pass is the forward pass's record and what JAX's differentiation
saves beside it. Temporaries are estimates: how many copies of an array live at once is the
compiler's choice, and the counts below were read off XLA's programs for CPUs in float32, where they
are off by up to 20%. A fused kernel (models/fused_attention.py) has no scores; what it holds
instead nobody has measured. Letters as in sizes.py.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mass_dpo_jax.estimate.sizes import Layout, Model, logits_chunk
from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.models.lora import Lora
from mass_dpo_jax.training.mesh import param_shapes
from mass_dpo_jax.training.optimizer import state_shapes

FLOAT = 4  # Bytes.
MASKS = FLOAT + 1  # Of a score: its mask, and the zeros that masked gradients become.


def bytes_of(tree: Any) -> int:
    """Bytes on one device of a tree of `jax.ShapeDtypeStruct`, split as their shardings say."""

    def size(x: jax.ShapeDtypeStruct) -> int:
        bits = 4 if x.dtype == jnp.uint4 else 8 * x.dtype.itemsize  # Two of these are a byte.
        return math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape) * bits // 8

    return sum(map(size, jax.tree.leaves(tree)))


def state_bytes(
    config: DecoderConfig,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    lora: Lora | None = None,
) -> tuple[int, int]:
    """Exact bytes of the float32 weights that are trained and of the optimizer's state, on one
    device of `mesh`, of which only names and sizes are read."""
    shapes = param_shapes(config, mesh, lora)
    if lora is not None:
        shapes = {"adapters": shapes["adapters"]}
    return bytes_of(shapes), bytes_of(state_shapes(optimizer, shapes, mesh))


def frozen_bytes(config: DecoderConfig, mesh: Mesh, lora: Lora | None, stored: str) -> int:
    """Exact bytes of the weights that are not trained, see `state_bytes`."""
    if lora is None:
        return 0
    shapes = param_shapes(config, mesh, lora, stored)
    return bytes_of({name: tree for name, tree in shapes.items() if name != "adapters"})


def batch_bytes(rows: int, prompt: int, responses: int, candidates: int, more: int = 0) -> int:
    """The arrays of data/batches.py's Batch, a row: tokens, lengths, log-probs, number, `more`."""
    return rows * (prompt + responses + 2 * candidates + 2 + more) * FLOAT


def kept_bytes(m: Model, recorded: Layout, trained: Layout) -> int:
    """What the forward pass keeps for the backward pass: its record, and beside the layers the
    final norm's two float32 [ends, D], what the logits came from and its mask, and rotary angles.

    Args:
      recorded: what the forward pass ran on: the pool, or what is trained on.
      trained: what is trained on.
    """
    beside = (trained.ends * 2 * m.hidden + trained.tokens * m.size) * FLOAT
    beside += trained.batch * trained.responses * m.hidden * (m.itemsize + 1)
    return record_bytes(m, recorded) + beside


def record_bytes(m: Model, at: Layout) -> int:
    """A forward pass's record (models/decoder.py), c bytes a value of the compute type.

    full  a layer's input: D c a token
    dots  also the results of products with weights (but the last): (2 D + H K + 2 KV K + 2 F) c

    and what the last layer gives, D c; a log-prob a response token. The last layer has its input
    and keys and values of all tokens, and the rest of `Layout.ends`.
    """
    below = (m.layers - 1) * at.tokens * (m.hidden + sum(_products(m)))
    return below * m.itemsize + last_bytes(m, at) + at.batch * at.responses * FLOAT


def last_bytes(m: Model, at: Layout) -> int:
    """Of a record what the last layer left; it is used up when the others' backward pass begins."""
    keys, rest = _products(m)
    return (at.tokens * (m.hidden + keys) + at.ends * (rest + m.hidden)) * m.itemsize


def _products(m: Model) -> tuple[int, int]:
    """Recorded values a token and layer: of keys and values, and of the other products."""
    if m.remat == "full":
        return 0, 0
    return 2 * m.keys, m.hidden + m.queries + 2 * m.inner


def bias_bytes(m: Model, at: Layout) -> int:
    """A fused kernel's mask of the responses, in the compute type and for all heads: c a pair."""
    return sum(at.scores[1:]) * m.itemsize


def fused_bytes(m: Model, at: Layout, copies: int = 1) -> int:
    """What a fused kernel has beside queries, keys and values of the layer: its own copies of
    those, keys repeated for every group, log-sum-exps, the mask (1 a pair) and its bias.

    Args:
      copies: 2 with gradients of all these.
    """
    rows = (at.tokens * 2 * m.queries + at.repeated * 2 * m.keys) * m.itemsize
    mask = sum(at.scores[1:])
    return copies * (rows + bias_bytes(m, at)) + at.tokens * m.heads * FLOAT + mask


def forward_bytes(m: Model, at: Layout) -> int:
    """Temporaries of a layer in the forward pass: its MLP's, or its attention's.

    mlp        (3 D + 2 F) c a token
    attention  (D + 2 H K + 2 KV K) c a token and 4 H a pair: those of the prompt twice, or once
               and those of the responses twice; `fused_bytes` instead
    """
    c, t = m.itemsize, at.tokens
    prompt, to_prompt, own = (n * m.heads * FLOAT for n in at.scores)
    mlp = t * (3 * m.hidden + 2 * m.inner) * c
    scores = max(2 * prompt, prompt + 2 * (to_prompt + own))
    if m.fused:
        scores = fused_bytes(m, at)
    attention = t * (m.hidden + 2 * m.queries + 2 * m.keys) * c + scores
    return max(mlp, attention)


def backward_bytes(m: Model, at: Layout, last: bool = False) -> int:
    """Temporaries of a layer, or of the last one, in the backward pass, recomputed values among
    them.

    mlp      (3 D + k F + 2 H K + 2 KV K) c a token, k = 5, 4 for full, dots; all pairs' weights
             (4 + c)
    norms    7 D c a token
    heads    (2 D + 5 H K + 5 KV K) c a token
    scores   (D + 2 H K + 2 KV K) c a token, and a pair's weight (4 + c) and gradient (4): of all
             pairs and the responses', or of the prompt's

    and, in every layer, `MASKS` a pair and head. Fused: `fused_bytes` for pairs, no `MASKS`.
    """
    c, t = m.itemsize, at.ends if last else at.tokens
    wide = FLOAT + (c if c < FLOAT else 0)
    prompt, to_prompt, own = (n * m.heads for n in (at.end_scores if last else at.scores))
    inner = {"full": 5, "dots": 4}[m.remat]
    every = prompt + to_prompt + own
    again = every * wide
    scores = max(every * wide + (to_prompt + own) * FLOAT, prompt * (wide + FLOAT))
    masks = every * MASKS
    if m.fused:
        masks, again = 0, fused_bytes(m, at)
        scores = fused_bytes(m, at, copies=2)
    return masks + max(
        t * (3 * m.hidden + inner * m.inner + 2 * m.queries + 2 * m.keys) * c + again,
        t * 7 * m.hidden * c,
        t * (2 * m.hidden + 5 * m.queries + 5 * m.keys) * c,
        t * (m.hidden + 2 * m.queries + 2 * m.keys) * c + scores,
    )


def weight_copies(m: Model, backward: bool) -> int:
    """Copies of weights to compute with: a layer's, taken out of the stack in the compute type.

    Where weights are split, a layer is gathered as it is stored and its gradient is whole before it
    is split again.
    """
    size = {"float32": FLOAT, "bfloat16": 2, "int8": 1, "nf4": 1}[m.stored]
    gathered = m.block * size if m.gathered else 0
    if backward and m.lora is None:
        gathered *= 2
    return m.block * m.itemsize + gathered


def logits_bytes(m: Model, at: Layout, backward: bool) -> int:
    """A chunk of the vocabulary projection: one array of logits, or three in the backward pass,
    the head's weights in the compute type, and then their gradient."""
    chunk = logits_chunk(m, at)
    logits = at.batch * chunk * m.vocabulary * FLOAT
    head = m.vocabulary * m.hidden
    size = FLOAT if m.stored == "float32" else 2
    copies = (m.itemsize if m.itemsize != size else 0) + (size if m.gathered else 0)
    gradient = FLOAT if backward and m.lora is None else 0
    return (3 if backward else 1) * logits + head * (copies + gradient)


def scoring_bytes(m: Model, at: Layout, chunk: int | None) -> int:
    """Temporaries of scoring a pool, nothing kept for a backward pass.

    Args:
      chunk: groups computed at a time behind the prompt's keys and values; None: all with it.
    """
    if chunk is None or chunk >= at.groups:
        hidden = 2 * at.ends * m.hidden * m.itemsize
        layers = forward_bytes(m, at) + weight_copies(m, backward=False)
        return max(layers, hidden + logits_bytes(m, at, backward=False))
    prompt, some = at._replace(groups=0), at._replace(groups=chunk)
    kept = (prompt.tokens * 2 * m.layers * m.keys + prompt.ends * m.hidden) * m.itemsize
    behind = some._replace(prompt=0)
    scores = m.heads * FLOAT * 2 * sum(some.scores[1:])
    if m.fused:  # Of `some`, since the keys include the prompt's.
        scores = fused_bytes(m, some)
    attention = behind.tokens * (m.hidden + 2 * m.queries + 2 * m.keys) * m.itemsize + scores
    mlp = behind.tokens * (3 * m.hidden + 2 * m.inner) * m.itemsize
    logits = 2 * behind.tokens * m.hidden * m.itemsize + logits_bytes(m, behind, backward=False)
    weights = weight_copies(m, backward=False)
    return max(
        forward_bytes(m, prompt) + weights, max(mlp, attention) + weights + kept, logits + kept
    )


@dataclasses.dataclass(frozen=True)
class Account:
    """Bytes on one device.

    Attributes:
      parameters, gradients, optimizer, batch: all weights, the gradient of those that are trained,
        Adam's state, and all micro-batches of a step.
      sums: the gradients of earlier micro-batches.
      copies: of weights, in the backward pass.
      kept: for the backward pass.
      of_last: of that, what the last layer's backward pass has used up.
      scored: of that, what scoring the pool leaves behind.
      scoring, vocabulary, last, layers: temporaries of scoring the pool and, of the loss, of the
        vocabulary projection, of the last layer and of any other.
      offloaded: the optimizer's state is on the device only during the update.
    """

    parameters: int
    gradients: int
    optimizer: int
    batch: int
    sums: int
    copies: int
    kept: int
    of_last: int
    scored: int
    scoring: int
    vocabulary: int
    last: int
    layers: int
    offloaded: bool

    @property
    def phases(self) -> dict[str, int]:
        """What is held in each part of a step; during the update all of an offloaded state, which
        is the most it can be."""
        always = self.parameters + self.batch
        state = always + (0 if self.offloaded else self.optimizer) + self.sums
        backward = state + self.gradients + self.copies + self.kept
        return {
            "scoring": state + self.scored + self.scoring,
            "vocabulary": state + self.kept + self.vocabulary,
            "last layer": backward + self.last,
            "layers": backward - self.of_last + self.layers,
            "update": always + self.optimizer + self.gradients,
        }

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def temporaries(self) -> int:
        """Of the peak, what is neither weights nor optimizer nor batch: XLA's `temp_size`."""
        held = self.parameters + self.batch
        rest = {name: size - held for name, size in self.phases.items()}
        return max(
            size - (0 if self.offloaded and name != "update" else self.optimizer)
            for name, size in rest.items()
        )


def account(
    m: Model,
    parameters: int,
    optimizer: int,
    batch: int,
    pool: Layout | None,
    chunk: int | None,
    trained: Layout,
    micro_batches: int,
    offloaded: bool = False,
    reuse: bool = False,
    frozen: int = 0,
) -> Account:
    """The account of a step.

    Args:
      m: the model on one device.
      parameters, optimizer, batch: exact bytes; parameters are those that are trained.
      pool: what is scored; None: nothing.
      chunk: see `scoring_bytes`.
      trained: what the loss sees.
      micro_batches: of a step.
      offloaded: see `Account`.
      reuse: does training start from what scoring the pool has left?
      frozen: exact bytes of the other weights.
    """
    scoring = 0 if pool is None else scoring_bytes(m, pool, chunk)
    recorded = pool if reuse and pool is not None else trained
    return Account(
        parameters=parameters + frozen,
        gradients=parameters,
        optimizer=optimizer,
        batch=batch,
        sums=parameters if micro_batches > 1 else 0,
        copies=weight_copies(m, backward=True),
        kept=kept_bytes(m, recorded, trained),
        of_last=last_bytes(m, recorded),
        scored=record_bytes(m, recorded) if reuse else 0,
        scoring=scoring,
        vocabulary=logits_bytes(m, trained, backward=True),
        last=backward_bytes(m, trained, last=True),
        layers=backward_bytes(m, trained),
        offloaded=offloaded,
    )
