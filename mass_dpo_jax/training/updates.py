"""The updates of a run: their batches, the state they change, and the step from one to the next."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from mass_dpo_jax.data.batches import Batch, Order, make_batch
from mass_dpo_jax.errors import UserError, check_type
from mass_dpo_jax.training import draw_noise
from mass_dpo_jax.training import mesh as mesh_lib
from mass_dpo_jax.training.negatives import NegativeSets
from mass_dpo_jax.training.optimizer import moments_memory, state_shapes
from mass_dpo_jax.training.prompts import PromptChoice
from mass_dpo_jax.training.scorer import Params
from mass_dpo_jax.training.setup import Reference, Setup
from mass_dpo_jax.training.step import Metrics, TrainedBatch, TrainState


class StepBatch(NamedTuple):
    """What one update trains on: B prompts in A micro-batches, each with its whole pool.

    Attributes:
        step: the update's index, from 0.
        rows: int32 [B], the examples' rows of the training split.
        arrays: [A, B / A, ...] on the devices.
        packed_length: tokens that hold the chosen response and any n negatives of a prompt.
    """

    step: int
    rows: np.ndarray
    arrays: Batch
    packed_length: int


class Batches:
    """The batches of a run, in order: a sequence without a state.

    `batches[step]` is a function of (seed, step, lengths of the examples) and of the prompts that
    the policy has chosen for its epoch, so a loop that resumes at a saved step sees what it would
    have seen. Every epoch is a new permutation, cut into batches of similar lengths. Made by
    `mass_dpo_jax.batches`.

    Attributes:
        setup: method, decoder and tokens.
        reference: the reference's log-probabilities of every response.
        prompts: which rows an epoch has.
        order: a function from a step to its rows.
    """

    def __init__(self, setup: Setup, reference: Reference):
        train = setup.train
        self.setup = setup
        self.reference = reference
        self.prompts = PromptChoice(setup, reference)
        self.order = Order(
            setup.buckets["train"],
            train.batch_size,
            setup.seed,
            self.prompts.rows,
            self.prompts.size,
        )
        self._total = train.steps or train.epochs * self.order.steps_per_epoch

    def __len__(self) -> int:
        """Returns the updates of the run: `train.steps`, or as many as `train.epochs` need."""
        return self._total

    def __iter__(self) -> Iterator[StepBatch]:
        return (self[step] for step in range(self._total))

    def __getitem__(self, step: int) -> StepBatch:
        """Returns the batch of an update, on the devices.

        Raises:
            IndexError: there is no such update.
        """
        step = range(self._total)[operator.index(step)]  # No slices.
        rows, shape = self.order(step)
        tokens, ref_logps = self.setup.tokens["train"], self.reference.logps.get("train")

        def make(rows: np.ndarray) -> Batch:
            batch = make_batch(tokens, rows.reshape(-1), shape, ref_logps, self.reference.grams)
            return jax.tree.map(lambda x: x.reshape(*rows.shape, *x.shape[1:]), batch)

        return StepBatch(step, rows, self._shard(rows, make), shape.selected)

    def find_other(self, step: int) -> int | None:
        """Returns a step whose batch has other prompts and is known already; None: there is none.

        It is the next one, or the one before where that is not known yet.
        """
        for other in (step + 1, step - 1):
            epoch = self.order.locate(other)["epoch"]
            if other in range(self._total) and self.prompts.is_known(epoch):
                return other
        return None

    def shard_negatives(self, rows: np.ndarray, candidate_ids: np.ndarray) -> jax.Array:
        """Puts the negatives of a step's rows on the devices, int32 [A, B / A, n].

        Args:
            rows: int32 [B].
            candidate_ids: int32 [M, n], of every example.
        """
        sharded: jax.Array = self._shard(rows, lambda rows: candidate_ids[rows])
        return sharded

    def _shard(self, rows: np.ndarray, make: Callable[[np.ndarray], Any]) -> Any:
        rows = rows.reshape(-1, self.setup.train.micro_batch_size)
        return mesh_lib.shard_rows(self.setup.mesh, rows, make)


class TrainStep:
    """`state, metrics = step(state, batch)`: one update. Made by `mass_dpo_jax.make_train_step`.

    Negatives are chosen anew as `selection.refresh` says. Where they outlive a step, those of a
    window are chosen at its first step and handed on in the state, so that another function, or
    another process with a saved state, can continue with them. A step whose negatives are missing
    (a state without `sets`, a window entered in its middle) chooses them itself, with a warning.

    Attributes:
        optimizer: the gradient transformation.
        sets: chooses the negatives of a window, where they outlive a step.
    """

    def __init__(
        self,
        batches: Batches,
        optimizer: optax.GradientTransformationExtraArgs,
        frozen: Params,
        negatives: np.ndarray | None = None,
    ):
        self.optimizer = optimizer
        self.sets = NegativeSets(
            batches.setup, batches.order, len(batches), batches.reference, negatives
        )
        self._batches = batches
        self._frozen = frozen

    def init(self, params: Params) -> TrainState:
        """Returns the state before the first update, with a copy of the trained weights.

        Args:
            params: the model's weights, as `Model.params`.

        Raises:
            UserError: they are something else.
        """
        setup = self._batches.setup
        if len({jax.tree.structure(x) for x in (params, setup.policy.abstract)}) > 1:
            raise UserError(
                f"params: a {type(params).__name__} with other entries than this model's weights; "
                "expected Model.params"
            )
        trained, _ = setup.policy.split(params)
        abstract = abstract_state(setup, self.optimizer)
        return first_state(abstract, self.optimizer, jax.tree.map(jnp.copy, trained))

    def __call__(self, state: TrainState, batch: StepBatch) -> tuple[TrainState, Metrics]:
        """Scores the pools, chooses negatives, and descends the loss on them.

        Args:
            state: donated: its arrays are gone afterwards.
            batch: the batch of the step that the state is at.

        Raises:
            UserError: an argument is something else, the criterion was registered again since the
                batches were made, or the state's `sets` are those of other examples.

        Returns:
            The next state, and metrics by name, float32 scalars on the devices: `loss` (nats),
            `grad_norm`, `update_ratio`, `skipped` (1 where the loss or the gradient was not finite,
            and nothing was changed), `rewards/*`, `logps/*` and `selection/*`.
        """
        state, _, metrics = self.update(state, batch)
        return state, metrics

    def update(
        self, state: TrainState, batch: StepBatch
    ) -> tuple[TrainState, TrainedBatch, Metrics]:
        """Updates the state as a call does, and returns what it was trained on, too."""
        check_type(state, TrainState, "state", "that of init(model.params), or the last step's")
        check_type(batch, StepBatch, "batch", "one of those that the step was made for")
        if isinstance(state.step, jax.Array) and state.step.is_deleted():
            raise UserError(
                "state: its arrays went into another step; expected what that one returned, as in "
                "state, metrics = step(state, batch), or init(model.params) to begin again"
            )
        setup = self._batches.setup
        setup.method.selection.check_current()
        sets = self.sets.for_step(batch.step, {**self._frozen, **state.params}, state.sets)
        if sets is not None and not np.array_equal(batch.rows, self._batches.order(batch.step)[0]):
            raise UserError(
                "batch: of other batches than the step was made for, whose sets of negatives it "
                "keeps; make_train_step(model, batches) makes one for these"
            )
        negatives = None
        if sets is not None:
            negatives = self._batches.shard_negatives(batch.rows, sets.candidate_ids)
        state, trained, metrics = setup.program.train_step(
            self.optimizer,
            state._replace(sets=None),
            batch.arrays,
            negatives,
            self._draw_key(batch),
            batch.packed_length,
            self._frozen,
        )
        return state._replace(sets=sets), trained, metrics

    def measure_draw_noise(self, state: TrainState, batch: StepBatch, other: StepBatch) -> Array:
        """Measures which share of a gradient's noise the draw of negatives makes.

        Args:
            state: the state before the batch's step; it is left as it is.
            batch: the batch of a step.
            other: that of another step, with other prompts.

        Returns:
            A float32 scalar on the devices, see draw_noise.py; 0 where nothing is drawn at a step.
        """
        setup = self._batches.setup
        return draw_noise.measure(
            setup.program,
            state.params,
            self._frozen,
            (batch.arrays, batch.packed_length),
            (other.arrays, other.packed_length),
            self._draw_key(batch),
        )

    def _draw_key(self, batch: StepBatch) -> Array:
        """Returns the key that negatives are drawn with, the same throughout a refresh window."""
        return self._batches.setup.key(batch.step // self.sets.window)


def first_state(
    abstract: Any, optimizer: optax.GradientTransformation, trained: Params
) -> TrainState:
    """Returns the state before the first update; it takes the weights over without a copy.

    Args:
        abstract: the state's `abstract_state`.
        optimizer: the run's optimizer.
        trained: the weights.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract.opt_state)
    return TrainState(
        jax.device_put(np.int32(0), abstract.step.sharding),
        trained,
        jax.jit(optimizer.init, out_shardings=shardings)(trained),
    )


def abstract_state(setup: Setup, optimizer: optax.GradientTransformation) -> Any:
    """Returns a `TrainState` of shapes and shardings; Adam's moments lie where their weights do."""
    params, _ = setup.policy.split(setup.policy.abstract)
    memory = moments_memory(setup.train, setup.mesh)
    step = jax.ShapeDtypeStruct((), np.int32, sharding=mesh_lib.replicated_sharding(setup.mesh))
    return TrainState(step, params, state_shapes(optimizer, params, setup.mesh, memory))
