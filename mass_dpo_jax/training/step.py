"""The train step: score the pool, choose negatives, descend the loss on them. Pure functions.

`Program` holds what stays the same from step to step; its methods are traced once for each shape
of batch. Arrays enter with a leading axis of micro-batches, `[A, B, ...]`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from mass_dpo_jax import selection
from mass_dpo_jax.data.batches import Batch
from mass_dpo_jax.models import attention, shared_prefix
from mass_dpo_jax.models.attention import Attention
from mass_dpo_jax.models.logprobs import MAX_LOGITS
from mass_dpo_jax.training.methods import Method, Responses

Params = Any
Metrics = dict[str, Array]


class KeptSets(NamedTuple):
    """The negatives of the steps of one refresh window. NumPy, on the host."""

    window: Any
    """int: which window of the run, counted from 0."""
    numbers: Any
    """int32 [M, n] of every training example, numbers as in `Choice`; -1 throughout where an
    example has had no set yet."""


class TrainState(NamedTuple):
    """All that a step changes; or the shapes and shardings of all that."""

    step: Any  # int32: updates made
    params: Params  # The weights that are trained: all, or LoRA's adapters.
    opt_state: optax.OptState
    sets: KeptSets | None = None  # Where `selection.refresh` keeps sets for more than a step.


class Choice(NamedTuple):
    """Negatives to train on, of B prompts.

    numbers: int32 [B, n], candidates 1..N in order of choice, 0 where the pool has no more.
    weights: float32 [B, n] and pool_loss: float32 [B], for the loss on drawn negatives; else None.
    """

    numbers: Any
    weights: Any = None
    pool_loss: Any = None


class Trained(NamedTuple):
    """What a step trained on, of A micro-batches of B examples.

    numbers: int32 [A, B, n], the negatives.
    bad: bool [A, B], examples whose own loss is not finite.
    """

    numbers: Any
    bad: Any


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A decoder as a function of weights and batches. A static argument of its own methods.

    Attributes:
      graphdef: the decoder without its weights (`nnx.split`).
      layout: `packed` or `rectangle`.
      max_response: R, the longest response of any batch (the rectangle's width).
      chunk: how many candidates of a rectangle are computed at a time; None: all.
      pooling: `response` or `all`, the tokens whose hidden states make a feature.
      attention: plain, or by a fused kernel.
      max_logits: held at once on a device.
    """

    graphdef: nnx.GraphDef
    layout: str
    max_response: int
    chunk: int | None
    pooling: str
    attention: Attention = attention
    max_logits: int = MAX_LOGITS

    def __call__(
        self, params: Params, batch: Batch, features: bool = False, record: bool = False
    ) -> Any:
        """Log-probs `[B, C]` and, if asked for, features `[B, C, D]` of every candidate, and the
        record of the pass."""
        return shared_prefix.score(
            nnx.merge(self.graphdef, params),
            batch.prompts,
            batch.prompt_lengths,
            batch.responses,
            batch.response_lengths,
            pooling=self.pooling if features else None,
            layout=self.layout,
            max_response=self.max_response,
            candidate_chunk=self.chunk,
            attention=self.attention,
            max_logits=self.max_logits,
            record=record,
        )

    def replay(
        self,
        params: Params,
        record: shared_prefix.Record,
        batch: Batch,
        picks: shared_prefix.Picks | None = None,
    ) -> Array:
        """Log-probs `[B, K]` of some candidates, or of all, of a batch that was recorded."""
        return shared_prefix.replay(
            nnx.merge(self.graphdef, params),
            record,
            batch.prompts,
            batch.prompt_lengths,
            batch.responses,
            batch.response_lengths,
            picks,
            layout=self.layout,
            max_response=self.max_response,
            attention=self.attention,
            max_logits=self.max_logits,
        )

    @functools.partial(jax.jit, static_argnums=0)
    def logps(self, params: Params, batch: Batch) -> Array:
        """`[B, C]`: the reference pass and evaluation."""
        return self(params, batch).logps

    @functools.partial(jax.jit, static_argnums=0)
    def logps_and_features(self, params: Params, batch: Batch) -> tuple[Array, Array]:
        """`[B, C]` and `[B, C, D]`."""
        found = self(params, batch, features=True)
        return found.logps, found.features

    @functools.partial(jax.jit, static_argnums=(0, 3))
    def grams(self, params: Params, batch: Batch, settings: selection.Settings) -> Array:
        """`[B, C, C]`, what criteria see of these weights' features: for frozen features."""
        mask = batch.response_lengths[:, 1:] > 0
        return selection.grams(self(params, batch, features=True).features, mask, settings)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The computations of a training run.

    A static argument of its own methods: equal programs share what was compiled for one of them,
    also those of different runs in one process.

    Attributes:
      scorer: the decoder.
      method: loss and choice of negatives.
      shardings: of the trained weights, a tree like them; gradients are held to it.
      reuse: the pass that scores a pool is the forward pass of training too.
    """

    scorer: Scorer
    method: Method
    shardings: Any
    reuse: bool = True

    @functools.cached_property
    def _key(self) -> tuple[Any, ...]:
        leaves, tree = jax.tree.flatten(self.shardings)
        return (self.scorer, self.method, tuple(leaves), tree, self.reuse)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def choose(
        self, params: Params, batch: Batch, key: Array, record: bool = False
    ) -> tuple[Choice, Metrics, shared_prefix.Record | None]:
        """The negatives to train on.

        Args:
          params: the current policy.
          batch: `[B, ...]`, the whole pool of each prompt.
          key: of this drawing; every prompt gets one of its own from it, by its row of the split.
          record: keep what `loss` can use of a scoring pass.

        Returns:
          The choice, figures on it, and the record; None where nothing was scored.
        """
        pools, found = self.pools(params, batch, key, record)
        settings = self.method.selection
        chosen = selection.select(pools, self.method.num_negatives, settings)
        numbers = jnp.where(chosen.valid, chosen.indices + 1, 0)
        figures = selection.diagnostics(pools, chosen, settings) if settings.needs_scoring else {}
        if not self.method.uses_draws:
            return Choice(numbers), figures, found
        assert pools.scores is not None
        pool_loss = jax.vmap(selection.pool_loss)(pools.scores, pools.mask)
        return Choice(numbers, chosen.weights, pool_loss), figures, found

    def pools(
        self, params: Params, batch: Batch, key: Array, record: bool = False
    ) -> tuple[selection.Pool, shared_prefix.Record | None]:
        """What the method's criterion chooses from; scored only if the criterion looks at that."""
        settings = self.method.selection
        mask = batch.response_lengths[:, 1:] > 0
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(batch.index)
        if not settings.needs_scoring:
            return selection.Pool(gram=None, scores=None, mask=mask, key=keys), None
        live = settings.needs_features and not self.method.frozen_features
        scored = self.scorer(params, batch, features=live, record=record)
        rewards = self.method.beta * (scored.logps - batch.ref_logps)
        gram = batch.ref_gram
        if live:
            gram = selection.grams(scored.features, mask, settings)
        pools = selection.Pool(gram, rewards[:, 1:] - rewards[:, :1], mask, keys)
        return pools, scored.record

    def loss(
        self,
        params: Params,
        batch: Batch,
        choice: Choice,
        size: int,
        record: shared_prefix.Record | None = None,
    ) -> tuple[Array, tuple[Array, Metrics]]:
        """Mean loss of a micro-batch on the chosen response and the chosen negatives.

        The forward pass is that of the record, of these weights on the pools; without one, it is on
        the sets alone. Returns also which of its examples' losses are not finite, bool [B], and
        figures.
        """
        negatives = choice.numbers
        candidates = jnp.pad(negatives, ((0, 0), (1, 0)))
        valid = jnp.pad(negatives > 0, ((0, 0), (1, 0)), constant_values=True)
        picks = shared_prefix.Picks(candidates, valid, size)
        responses, lengths = shared_prefix.gather_candidates(
            batch.responses, batch.response_lengths, picks
        )

        def of_chosen(table: Array) -> Array:
            return jnp.take_along_axis(table, candidates, axis=1)

        if record is None:
            some = batch._replace(responses=responses, response_lengths=lengths)
            record = self.scorer(jax.lax.stop_gradient(params), some, record=True).record
            logps = self.scorer.replay(params, record, some)
        else:
            logps = self.scorer.replay(params, record, batch, picks)
        found = Responses(
            logps=logps,
            log_ratios=jnp.where(valid, logps - of_chosen(batch.ref_logps), 0.0),
            lengths=lengths,
            valid=valid,
            grades=None if batch.grades is None else of_chosen(batch.grades),
            weights=choice.weights,
            pool_loss=choice.pool_loss,
        )
        losses = self.method.loss(found)
        bad = ~jnp.isfinite(losses)
        if self.method.is_supervised:
            return losses.mean(), (bad, {"logps/chosen": logps[:, 0].mean()})
        return losses.mean(), (bad, _figures(logps, self.method.rewards(found), valid))

    @functools.partial(jax.jit, static_argnums=0)
    def choose_batch(self, params: Params, batch: Batch, key: Array) -> tuple[Choice, Metrics]:
        """`choose`, on its own: for sets that outlive a step."""
        return self.choose(params, batch, key)[:2]

    @functools.partial(jax.jit, static_argnums=(0, 1, 6), donate_argnums=2)
    def train_step(
        self,
        optimizer: optax.GradientTransformationExtraArgs,
        state: TrainState,
        batch: Batch,
        negatives: Array | None,
        key: Array,
        size: int,
        frozen: Params | None = None,
    ) -> tuple[TrainState, Trained, Metrics]:
        """One update, or none where loss or gradient are not finite: weights and Adam's moments
        stay what they were, the figure `skipped` is 1.

        Args:
          optimizer: the gradient transformation.
          state: donated; do not use it again.
          batch: `[A, B, ...]`, micro-batches whose gradients are averaged.
          negatives: `[A, B, n]`, numbers as in `Choice`, or None to choose them here, with the
            policy as it is before the update.
          key: see `choose`.
          size: S after selection, room for the chosen response and any n negatives.
          frozen: with LoRA, the weights that are not in the state.

        Returns:
          The next state, what it trained on, and the step's figures, float32 scalars.
        """
        frozen = frozen or {}
        params = {**frozen, **state.params}

        @functools.partial(jax.value_and_grad, has_aux=True)
        def gradient(weights: Params, *args: Any) -> tuple[Array, tuple[Array, Metrics]]:
            return self.loss({**frozen, **weights}, *args)

        def micro(sums: Any, args: Any) -> tuple[Any, Trained]:
            micro_batch, numbers = args
            figures: Metrics = {}
            record = None
            if self.method.is_supervised:
                choice = Choice(jnp.zeros((micro_batch.prompts.shape[0], 0), jnp.int32))
            elif numbers is None:
                choice, figures, record = self.choose(params, micro_batch, key, self.reuse)
            else:
                choice = Choice(numbers)
            (loss, (bad, more)), grads = gradient(state.params, micro_batch, choice, size, record)
            found = grads, {"loss": loss, **more, **figures}
            total = found if sums is None else jax.tree.map(jnp.add, sums, found)
            return total, Trained(choice.numbers, bad)

        count = batch.prompts.shape[0]
        first = jax.tree.map(lambda x: x[0], (batch, negatives))
        if count == 1:
            total, trained = micro(None, first)
            trained = jax.tree.map(lambda x: x[None], trained)
        else:
            like, _ = jax.eval_shape(lambda args: micro(None, args), first)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
            total, trained = jax.lax.scan(micro, zeros, (batch, negatives))
        grads, figures = jax.tree.map(lambda x: x / count, total)
        grads = jax.lax.with_sharding_constraint(grads, self.shardings)
        figures["grad_norm"] = optax.tree.norm(grads)
        finite = jnp.isfinite(figures["loss"]) & jnp.isfinite(figures["grad_norm"])
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, finite=finite, places=self.shardings
        )
        ratio = optax.tree.norm(updates) / optax.tree.norm(state.params)
        figures["update_ratio"] = jnp.where(finite, ratio, 0.0)
        figures["skipped"] = 1.0 - finite
        updated = optax.apply_updates(state.params, updates)
        weights = jax.tree.map(lambda a, b: jnp.where(finite, a, b), updated, state.params)
        weights = jax.lax.with_sharding_constraint(weights, self.shardings)
        return TrainState(state.step + 1, weights, opt_state), trained, figures


def _figures(logps: Array, rewards: Array, valid: Array) -> Metrics:
    """TRL's names, over the responses trained on; the first column is the chosen one. A row without
    negatives counts as 0 in what compares with them."""
    negatives = valid[:, 1:]
    count = jnp.maximum(negatives.sum(1), 1)

    def mean(x: Array) -> Array:
        return (jnp.where(negatives, x[:, 1:], 0).sum(1) / count).mean()

    hardest = jnp.where(negatives, rewards[:, 1:], -jnp.inf).max(1)
    hard = jnp.where(negatives.any(1), rewards[:, 0] - hardest, 0.0)
    return {
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": mean(rewards),
        "rewards/accuracies": mean((rewards[:, :1] > rewards).astype(jnp.float32)),
        "rewards/margins": mean(rewards[:, :1] - rewards),
        "rewards/margins_hard": hard.mean(),
        "logps/chosen": logps[:, 0].mean(),
        "logps/rejected": mean(logps),
    }
