"""The train step: score the pool, choose negatives, descend the loss on them. Pure functions.

`Program` holds what stays the same from step to step; its methods are traced once for each shape
of batch. Arrays enter with a leading axis of micro-batches, `[A, B, ...]`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from mass_dpo_jax import losses, selection
from mass_dpo_jax.data.batches import Batch
from mass_dpo_jax.models import shared_prefix
from mass_dpo_jax.models.logprobs import MAX_LOGITS
from mass_dpo_jax.training.mesh import BATCH
from mass_dpo_jax.training.methods import Method

Params = Any
Metrics = dict[str, Array]


class TrainState(NamedTuple):
    """All that a step changes; or the shapes and shardings of all that."""

    step: Any  # int32: updates made
    params: Params
    opt_state: optax.OptState


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The computations of a run.

    Attributes:
      graphdef: the decoder without its weights (`nnx.split`).
      method: loss and choice of negatives.
      beta: the factor from log-ratios to rewards.
      pooling: `response` or `all`, the tokens whose hidden states make a feature.
      layout: `packed` or `rectangle`.
      max_response: R, the longest response of any batch (the rectangle's width).
      seed: of random negatives.
      mesh: the devices.
      shardings: of the weights, a tree like them; gradients are held to it.
    """

    graphdef: nnx.GraphDef
    method: Method
    beta: float
    pooling: str
    layout: str
    max_response: int
    seed: int
    mesh: Mesh
    shardings: Any

    def score(self, params: Params, batch: Batch, pooling: str | None = None) -> Any:
        """Log-probs `[B, C]` and, if pooled, features `[B, C, D]` of every candidate."""
        # A rectangle is scored in chunks as large as what training has to hold anyway.
        chunk = self.method.num_negatives + 1 if self.layout == "rectangle" else None
        shards = math.prod(self.mesh.shape[axis] for axis in BATCH)
        return shared_prefix.score(
            nnx.merge(self.graphdef, params),
            batch.prompts,
            batch.prompt_lengths,
            batch.responses,
            batch.response_lengths,
            pooling=pooling,
            layout=self.layout,
            max_response=self.max_response,
            candidate_chunk=chunk,
            max_logits=MAX_LOGITS * shards,
        )

    def choose(self, params: Params, batch: Batch, draw: Array) -> tuple[Array, Metrics]:
        """The negatives to train on.

        Args:
          params: the current policy.
          batch: `[B, ...]`, the whole pool of each prompt.
          draw: which drawing this is; random choices differ between draws, not within one.

        Returns:
          Candidate numbers `[B, n]` in 1..N, in order of choice, 0 where the pool has no more;
          and figures on the choice.
        """
        mask = batch.response_lengths[:, 1:] > 0
        key = jax.random.fold_in(jax.random.key(self.seed), draw)
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(batch.index)
        settings = self.method.selection
        if selection.needs_scoring(settings.criterion):
            scored = self.score(params, batch, self.pooling)
            rewards = self.beta * (scored.logps - batch.ref_logps)
            features, scores = scored.features, rewards[:, 1:] - rewards[:, :1]
        else:
            features = scores = None
        pools = selection.Pool(features=features, scores=scores, mask=mask, key=keys)
        chosen = selection.select(pools, self.method.num_negatives, settings)
        figures = {}
        if selection.needs_scoring(settings.criterion):
            # The first gain is max ||v||^2 / ridge: far below 1, Algorithm 1 is "largest norms".
            figures = {
                "selection/logdet": jnp.log1p(chosen.gains).sum(1).mean(),
                "selection/max_norm_ridge": chosen.gains[:, 0].mean(),
            }
        return jnp.where(chosen.valid, chosen.indices + 1, 0), figures

    def loss(
        self, params: Params, batch: Batch, negatives: Array, size: int
    ) -> tuple[Array, Metrics]:
        """Mean loss of a micro-batch on the chosen response and `negatives` `[B, n]`."""
        rows = batch.prompts.shape[0]
        candidates = jnp.concatenate([jnp.zeros((rows, 1), jnp.int32), negatives], axis=1)
        valid = jnp.concatenate([jnp.ones((rows, 1), bool), negatives > 0], axis=1)
        responses, lengths = shared_prefix.gather_candidates(
            batch.responses, batch.response_lengths, candidates, valid, size
        )
        ref_logps = jnp.take_along_axis(batch.ref_logps, candidates, axis=1)
        batch = batch._replace(responses=responses, response_lengths=lengths)
        logps = self.score(params, batch).logps
        if self.method.supervised:
            loss = losses.supervised(logps[:, 0], lengths[:, 0]).mean()
            return loss, {"logps/chosen": logps[:, 0].mean()}
        log_ratios = jnp.where(valid, logps - ref_logps, 0.0)
        loss = losses.plackett_luce(log_ratios, valid, self.beta).mean()
        return loss, _figures(logps, self.beta * log_ratios, valid)

    @functools.partial(jax.jit, static_argnums=0)
    def score_batch(self, params: Params, batch: Batch) -> Array:
        """`logps` `[B, C]`: the reference pass and evaluation."""
        return self.score(params, batch).logps

    @functools.partial(jax.jit, static_argnums=0)
    def choose_batch(self, params: Params, batch: Batch, draw: Array) -> tuple[Array, Metrics]:
        """`choose`, on its own: for sets that outlive a step."""
        return self.choose(params, batch, draw)

    @functools.partial(jax.jit, static_argnums=(0, 1, 6), donate_argnums=2)
    def train_step(
        self,
        optimizer: optax.GradientTransformation,
        state: TrainState,
        batch: Batch,
        negatives: Array | None,
        draw: Array,
        size: int,
    ) -> tuple[TrainState, Metrics]:
        """One update.

        Args:
          optimizer: the gradient transformation.
          state: donated; do not use it again.
          batch: `[A, B, ...]`, micro-batches whose gradients are averaged.
          negatives: `[A, B, n]` as `choose` returns them, or None to choose them here, with the
            policy as it is before the update.
          draw: see `choose`.
          size: S after selection, room for the chosen response and any n negatives.

        Returns:
          The next state and the step's figures, float32 scalars.
        """
        gradient = jax.value_and_grad(self.loss, has_aux=True)

        def micro(micro_batch: Batch, chosen: Array | None) -> tuple[Params, Metrics]:
            figures: Metrics = {}
            if self.method.supervised:
                chosen = jnp.zeros((micro_batch.prompts.shape[0], 0), jnp.int32)
            elif chosen is None:
                chosen, figures = self.choose(state.params, micro_batch, draw)
            (loss, more), grads = gradient(state.params, micro_batch, chosen, size)
            return grads, {"loss": loss, **more, **figures}

        count = batch.prompts.shape[0]
        if count == 1:
            total = micro(*jax.tree.map(lambda x: x[0], (batch, negatives)))
        else:
            like = jax.eval_shape(micro, *jax.tree.map(lambda x: x[0], (batch, negatives)))
            total, _ = jax.lax.scan(
                lambda sums, args: (jax.tree.map(jnp.add, sums, micro(*args)), None),
                jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like),
                (batch, negatives),
            )
        grads, figures = jax.tree.map(lambda x: x / count, total)
        grads = jax.lax.with_sharding_constraint(grads, self.shardings)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        figures["grad_norm"] = optax.tree.norm(grads)
        return TrainState(state.step + 1, params, opt_state), figures


def _figures(logps: Array, rewards: Array, valid: Array) -> Metrics:
    """TRL's names, over the responses trained on; the first column is the chosen one."""
    negatives = valid[:, 1:]
    count = jnp.maximum(negatives.sum(1), 1)

    def mean(x: Array) -> Array:
        return (jnp.where(negatives, x[:, 1:], 0).sum(1) / count).mean()

    hardest = jnp.where(negatives, rewards[:, 1:], -jnp.inf).max(1)
    return {
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": mean(rewards),
        "rewards/accuracies": mean((rewards[:, :1] > rewards).astype(jnp.float32)),
        "rewards/margins": mean(rewards[:, :1] - rewards),
        "rewards/margins_hard": (rewards[:, 0] - hardest).mean(),
        "logps/chosen": logps[:, 0].mean(),
        "logps/rejected": mean(logps),
    }
