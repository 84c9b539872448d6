"""The train step: score the pools, choose negatives, and descend the loss on them.

`Program` has everything that stays the same from step to step. Its methods are pure functions of
arrays, traced once for each shape of batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mass_dpo_jax import selection
from mass_dpo_jax.data.batches import Batch
from mass_dpo_jax.models.candidate_scores import CandidateScores
from mass_dpo_jax.models.dropout import DropoutKeys, make_example_keys
from mass_dpo_jax.models.interfaces import ScoringRecord
from mass_dpo_jax.models.response_layout import Picks, gather_candidates, gather_lengths
from mass_dpo_jax.training.methods import Method, Responses
from mass_dpo_jax.training.scorer import Params, Scorer

Metrics = dict[str, Array]
DROPOUT_STREAM = 2**31  # Folded into a key, beside the rows that draw negatives.


class WindowNegatives(NamedTuple):
    """The negatives of one refresh window, as NumPy arrays on the host.

    Attributes:
        window: int, index of the window in the run, from 0.
        candidate_ids: int32 [M, n] of every training example, as in `Choice`; -1 throughout where
            nothing has been chosen for an example yet.
    """

    window: Any
    candidate_ids: Any


class TrainState(NamedTuple):
    """The training state, as arrays or as shapes with shardings.

    Attributes:
        step: int32, updates made.
        params: the trained weights: all, or LoRA's adapters.
        opt_state: the optimizer's state.
        sets: negatives that outlive a step, where `selection.refresh` keeps them.
    """

    step: Any
    params: Params
    opt_state: optax.OptState
    sets: WindowNegatives | None = None


class Choice(NamedTuple):
    """The negatives of B prompts to train on.

    Attributes:
        candidate_ids: int32 [B, n], candidates 1..N in order of choice; 0 where the pool has no
            more.
        weights: float32 [B, n], for the loss on drawn negatives; else None.
        pool_loss: float32 [B], with `weights`.
    """

    candidate_ids: Array
    weights: Array | None = None
    pool_loss: Array | None = None


class TrainedBatch(NamedTuple):
    """What a step has trained on, in A micro-batches of B examples.

    Attributes:
        candidate_ids: int32 [A, B, n], the negatives.
        not_finite: bool [A, B], examples whose own loss is not finite.
    """

    candidate_ids: Array
    not_finite: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The computations of a training run.

    A static argument of its own methods: equal programs share what was compiled for one of them,
    also those of different runs in one process.

    Attributes:
        scorer: the decoder.
        method: the loss, and the choice of negatives.
        shardings: shardings of the trained weights, a tree like them; gradients are held to it.
        reuse: whether the pass that scores a pool is the forward pass of training, too.
        at_a_time: responses of a prompt that are differentiated together; 0: all.
        drops: whether training has dropout: pools are scored without, by a pass of their own.
    """

    scorer: Scorer
    method: Method
    shardings: Any
    reuse: bool = True
    at_a_time: int = 0
    drops: bool = False

    @functools.cached_property
    def _key(self) -> tuple[Any, ...]:
        leaves, tree = jax.tree.flatten(self.shardings)
        settings = self.reuse, self.at_a_time, self.drops
        return (self.scorer, self.method, tuple(leaves), tree, *settings)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def reuses_scoring(self) -> bool:
        """Whether a pass that scores pools in a step is recorded, which takes memory for all."""
        return self.reuse and not self.at_a_time and not self.drops

    def score_pools(
        self,
        params: Params,
        batch: Batch,
        key: Array,
        record: bool = False,
        always: bool = False,
        at_reference: bool = False,
    ) -> tuple[selection.Pool, CandidateScores | None]:
        """Computes what the method's criterion chooses from.

        Args:
            params: the current policy.
            batch: [B, ...], with the whole pool of each prompt.
            key: the key of this draw; every prompt folds its row of the split into it.
            record: whether to keep what `loss` can use of the scoring pass.
            always: whether to compute scores, with features, even if the criterion needs none.
            at_reference: whether these weights are the reference, so that all log-ratios are 0 but
                for those that are not finite, which stay so that they are found.

        Returns:
            The pools, and their scores; None where nothing needs them.
        """
        settings = self.method.selection
        mask = batch.response_lengths[:, 1:] > 0
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(batch.index)
        if not (settings.needs_scoring or always):
            return selection.Pool(gram=None, scores=None, mask=mask, key=keys), None
        features = settings.needs_features and not self.method.frozen_features
        scored = self.scorer(params, batch, features=features or always, record=record)
        gram = batch.ref_gram
        if features:
            gram = selection.compute_grams(scored.features, mask, settings)
        logps = scored.logps
        responses = Responses(
            logps=logps,
            log_ratios=jnp.where(jnp.isfinite(logps), 0.0, logps)
            if at_reference
            else logps - batch.ref_logps,
            lengths=batch.response_lengths,
            valid=batch.response_lengths > 0,
            grades=batch.grades,
            weights=None,
            pool_loss=None,
            log_weights=batch.log_weights,
        )
        policy_scores = logps[:, 1:] - logps[:, :1]
        scores = self.method.scores(responses)
        return selection.Pool(gram, scores, mask, keys, policy_scores=policy_scores), scored

    def choose(self, pools: selection.Pool) -> tuple[Choice, Metrics]:
        """Chooses negatives by the method's criterion, and describes the choice."""
        settings = self.method.selection
        selected = selection.select(pools, self.method.num_negatives, settings)
        candidate_ids = jnp.where(selected.valid, selected.indices + 1, 0)
        metrics = selection.diagnose(pools, selected, settings) if settings.needs_scoring else {}
        if not self.method.uses_draws:
            return Choice(candidate_ids), metrics
        assert pools.scores is not None
        pool_loss = jax.vmap(selection.pool_loss)(pools.scores, pools.mask)
        return Choice(candidate_ids, selected.weights, pool_loss), metrics

    @functools.partial(jax.jit, static_argnames="self")
    def choose_batch(self, params: Params, batch: Batch, key: Array) -> tuple[Choice, Metrics]:
        """Scores pools and chooses, for negatives that outlive a step."""
        return self.choose(self.score_pools(params, batch, key)[0])

    def loss(
        self,
        params: Params,
        batch: Batch,
        choice: Choice,
        packed_length: int,
        record: ScoringRecord | None = None,
        dropout: Array | None = None,
    ) -> tuple[Array, tuple[Array, Metrics]]:
        """Computes the mean loss of a micro-batch on the chosen response and the picks.

        Args:
            params: the policy.
            batch: [B, ...], with the whole pools.
            choice: the picks.
            packed_length: see `train_step`.
            record: record of these weights on the pools, which is the forward pass then; without
                it, the picks alone are computed.
            dropout: key data of each example for the adapters' dropout, without a record; None:
                none.

        Returns:
            The loss; which examples' own losses are not finite, bool [B]; and metrics.
        """
        picks = _make_picks(choice, packed_length)
        if record is None:
            responses, lengths = gather_candidates(batch.responses, batch.response_lengths, picks)
            picked = batch._replace(responses=responses, response_lengths=lengths)
            keys = None if dropout is None else DropoutKeys(dropout, picks.candidate_ids)
            constant = jax.lax.stop_gradient(params)
            record = self.scorer(constant, picked, record=True, dropout=keys).record
            logps = self.scorer.replay(params, record, picked, dropout=keys)
        else:
            logps = self.scorer.replay(params, record, batch, picks)
        return self.loss_of_logps(logps, batch, choice)

    def loss_of_logps(
        self, logps: Array, batch: Batch, choice: Choice
    ) -> tuple[Array, tuple[Array, Metrics]]:
        """Computes what `loss` returns, from log-probabilities [B, 1 + n]."""
        picks = _make_picks(choice, 0)
        valid = picks.valid

        def gather_picks(table: Array) -> Array:
            return jnp.take_along_axis(table, picks.candidate_ids, axis=1)

        scored = Responses(
            logps=logps,
            log_ratios=jnp.where(valid, logps - gather_picks(batch.ref_logps), 0.0),
            lengths=gather_lengths(batch.response_lengths, picks),
            valid=valid,
            grades=None if batch.grades is None else gather_picks(batch.grades),
            weights=choice.weights,
            pool_loss=choice.pool_loss,
            log_weights=None if batch.log_weights is None else gather_picks(batch.log_weights),
        )
        losses = self.method.loss(scored)
        if self.method.is_supervised:
            metrics = {"logps/chosen": logps[:, 0].mean()}
        else:
            rewards = self.method.rewards(scored)
            metrics = _describe_responses(logps, rewards, valid)
            if self.method.uses_whole_pool:
                margins = self.method.margins(scored)
                scores = rewards[:, 1:] if margins is None else rewards[:, 1:] + margins
                spread = jax.vmap(selection.effective_pool)(scores, valid[:, 1:])
                metrics["selection/effective_pool"] = spread.mean()
        return losses.mean(), (~jnp.isfinite(losses), metrics)

    def value_and_grad(
        self,
        trained: Params,
        frozen: Params,
        batch: Batch,
        choice: Choice,
        packed_length: int,
        scores: CandidateScores | None,
        dropout: Array | None = None,
    ) -> tuple[tuple[Array, tuple[Array, Metrics]], Params]:
        """Computes what `loss` returns, and its gradient with respect to the trained weights.

        Args:
            trained: see `gradient`.
            frozen: see `gradient`.
            batch: see `loss`.
            choice: see `loss`.
            packed_length: see `loss`.
            scores: scores of the pools by these weights, with or without a record; None if there
                are none.
            dropout: see `loss`.
        """
        picks = _make_picks(choice, packed_length)
        if 0 < self.at_a_time < picks.valid.shape[1]:
            logps = None
            if scores is not None and dropout is None:
                logps = jnp.take_along_axis(scores.logps, picks.candidate_ids, axis=1)
                logps = jnp.where(picks.valid, logps, 0.0)
            loss = functools.partial(self.loss_of_logps, batch=batch, choice=choice)
            return self.scorer.differentiate(
                loss, trained, frozen, batch, picks, self.at_a_time, logps, dropout
            )

        def loss_of_weights(trained: Params) -> tuple[Array, Any]:
            record = None if scores is None else scores.record
            return self.loss({**frozen, **trained}, batch, choice, packed_length, record, dropout)

        return jax.value_and_grad(loss_of_weights, has_aux=True)(trained)

    def gradient(
        self,
        trained: Params,
        frozen: Params,
        batch: Batch,
        candidate_ids: Array | None,
        key: Array,
        packed_length: int,
        dropout_key: Array | None = None,
    ) -> tuple[Params, Metrics, TrainedBatch]:
        """Computes the gradient of a micro-batch's mean loss; `train_step` has the first steps.

        Args:
            trained: the weights to differentiate with respect to.
            frozen: the others.
            batch: [B, ...], one micro-batch.
            candidate_ids: int32 [B, n], negatives as in `Choice`; None to choose them here.
            key: see `score_pools`.
            packed_length: see `train_step`.
            dropout_key: key of the adapters' dropout in this step; None: none.
        """
        scores: CandidateScores | None = None
        selection_metrics: Metrics = {}
        if self.method.is_supervised:
            choice = Choice(jnp.zeros((len(batch.index), 0), jnp.int32))
        elif candidate_ids is not None:
            choice = Choice(candidate_ids)
        else:
            # 1. Score the pools, with the policy before the update.
            with jax.named_scope("score"):
                policy = {**frozen, **trained}
                pools, scores = self.score_pools(policy, batch, key, self.reuses_scoring)
            # 2. Choose n negatives of each pool.
            with jax.named_scope("choose"):
                choice, selection_metrics = self.choose(pools)
        # 3. Loss and gradient on the picks. Where there is a record, it is the forward pass.
        dropout = None
        if dropout_key is not None:
            dropout = make_example_keys(dropout_key, batch.index)
        with jax.named_scope("loss"):
            (loss, (not_finite, loss_metrics)), grads = self.value_and_grad(
                trained, frozen, batch, choice, packed_length, scores, dropout
            )
        metrics = {"loss": loss, **loss_metrics, **selection_metrics}
        return grads, metrics, TrainedBatch(choice.candidate_ids, not_finite)

    @functools.partial(
        jax.jit,
        static_argnames=("self", "optimizer", "packed_length"),
        donate_argnames="state",
    )
    def train_step(
        self,
        optimizer: optax.GradientTransformationExtraArgs,
        state: TrainState,
        batch: Batch,
        negatives: Array | None,
        key: Array,
        packed_length: int,
        frozen: Params | None = None,
    ) -> tuple[TrainState, TrainedBatch, Metrics]:
        """Makes one update, or none where the loss or the gradient is not finite.

        Without an update, weights and Adam's moments stay as they were, and the metric `skipped` is
        1.

        Args:
            optimizer: the gradient transformation.
            state: donated; do not use it again.
            batch: [A, B, ...], micro-batches whose gradients are averaged.
            negatives: int32 [A, B, n], candidate ids as in `Choice`; None to choose them here.
            key: see `score_pools`.
            packed_length: S after selection, room for the chosen response and any n negatives.
            frozen: the weights that are not in the state, with LoRA.

        Returns:
            The next state, what it was trained on, and the step's metrics, float32 scalars.
        """
        # A key of its own for every step: the key of negatives may last for several.
        dropout_key = None
        if self.drops:
            dropout_key = jax.random.fold_in(jax.random.fold_in(key, DROPOUT_STREAM), state.step)

        def micro_step(micro_batch: Batch, candidate_ids: Array | None) -> tuple[Any, TrainedBatch]:
            # 1 to 3. Score the pools, choose negatives, and differentiate the loss on them.
            grads, metrics, trained = self.gradient(
                state.params,
                frozen or {},
                micro_batch,
                candidate_ids,
                key,
                packed_length,
                dropout_key,
            )
            return (grads, metrics), trained

        # 4. Average gradients and metrics over the micro-batches.
        (grads, metrics), trained = average_micro_batches(micro_step, batch, negatives)
        # 5. Update the weights, or leave everything as it was.
        with jax.named_scope("update"):
            state, update_metrics = self._update(optimizer, state, grads, metrics["loss"])
        return state, trained, {**metrics, **update_metrics}

    def _update(
        self,
        optimizer: optax.GradientTransformationExtraArgs,
        state: TrainState,
        grads: Params,
        loss: Array,
    ) -> tuple[TrainState, Metrics]:
        grads = jax.lax.with_sharding_constraint(grads, self.shardings)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, finite=finite, shardings=self.shardings
        )
        ratio = optax.tree.norm(updates) / optax.tree.norm(state.params)
        updated = optax.apply_updates(state.params, updates)
        params = jax.tree.map(lambda a, b: jnp.where(finite, a, b), updated, state.params)
        params = jax.lax.with_sharding_constraint(params, self.shardings)
        metrics = {
            "grad_norm": grad_norm,
            "update_ratio": jnp.where(finite, ratio, 0.0),
            "skipped": 1.0 - finite,
        }
        state = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, metrics


def average_micro_batches(micro_step: Callable[..., tuple[Any, Any]], *args: Any) -> Any:
    """Calls a function on one micro-batch after another and averages what it returns.

    Args:
        micro_step: a function that returns two pytrees; the first is averaged, the second stacked.
        *args: its arguments, pytrees of arrays [A, ...].

    Returns:
        The mean over A, and the stacked arrays [A, ...].
    """
    count = jax.tree.leaves(args)[0].shape[0]
    first = jax.tree.map(lambda x: x[0], args)
    if count == 1:
        total, stacked = micro_step(*first)
        stacked = jax.tree.map(lambda x: x[None], stacked)
    else:

        def add(total: Any, micro_batch: Any) -> tuple[Any, Any]:
            terms, stacked = micro_step(*micro_batch)
            with jax.named_scope("average"):
                return jax.tree.map(jnp.add, total, terms), stacked

        shapes, _ = jax.eval_shape(micro_step, *first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, stacked = jax.lax.scan(add, zeros, args)
    with jax.named_scope("average"):
        return jax.tree.map(lambda x: x / count, total), stacked


def _make_picks(choice: Choice, packed_length: int) -> Picks:
    """Returns the chosen response and the picks, [B, 1 + n]."""
    ids = choice.candidate_ids
    valid = jnp.pad(ids > 0, ((0, 0), (1, 0)), constant_values=True)
    return Picks(jnp.pad(ids, ((0, 0), (1, 0))), valid, packed_length)


def _describe_responses(logps: Array, rewards: Array, valid: Array) -> Metrics:
    """Computes TRL's metrics of the responses trained on, [B, 1 + n], under TRL's names.

    A row without negatives counts as 0 in every comparison with them.
    """
    negatives = valid[:, 1:]
    count = jnp.maximum(negatives.sum(1), 1)

    def mean(x: Array) -> Array:
        return (jnp.where(negatives, x[:, 1:], 0).sum(1) / count).mean()

    hardest = jnp.where(negatives, rewards[:, 1:], -jnp.inf).max(1)
    hard_margins = jnp.where(negatives.any(1), rewards[:, 0] - hardest, 0.0)
    return {
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": mean(rewards),
        "rewards/accuracies": mean((rewards[:, :1] > rewards).astype(jnp.float32)),
        "rewards/margins": mean(rewards[:, :1] - rewards),
        "rewards/margins_hard": hard_margins.mean(),
        "logps/chosen": logps[:, 0].mean(),
        "logps/rejected": mean(logps),
    }
