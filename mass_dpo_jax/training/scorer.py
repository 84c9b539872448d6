"""A decoder as a function of weights and batches: log-probabilities, features, and their record."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import Array

from mass_dpo_jax import selection
from mass_dpo_jax.data.batches import Batch
from mass_dpo_jax.models import attention, chunked_replay, replay, shared_prefix
from mass_dpo_jax.models.dropout import DropoutKeys
from mass_dpo_jax.models.interfaces import Attention, ScoringRecord
from mass_dpo_jax.models.logprobs import MAX_LOGITS
from mass_dpo_jax.models.response_layout import Picks

Params = Any


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A decoder as a function of weights and batches. A static argument of its own methods.

    Attributes:
        graphdef: the decoder without its weights (`nnx.split`).
        layout: `packed` or `rectangle`.
        max_response: R, the longest response of any batch, the width of a rectangle.
        chunk: the most candidates that are scored at a time; None for all.
        pooling: `response` or `all`, the tokens whose hidden states make a feature.
        attention: plain, or a fused kernel.
        max_logits: logits that a device holds at a time.
    """

    graphdef: nnx.GraphDef
    layout: str
    max_response: int
    chunk: int | None
    pooling: str
    attention: Attention = attention
    max_logits: int = MAX_LOGITS

    def __call__(
        self,
        params: Params,
        batch: Batch,
        features: bool = False,
        record: bool = False,
        dropout: DropoutKeys | None = None,
    ) -> Any:
        """Scores every candidate.

        Args:
            params: weights of the decoder.
            batch: [B, ...].
            features: return the candidates' features [B, C, D], too.
            record: return the record of the pass, too.
            dropout: keys of the adapters' dropout; None: none.

        Returns:
            A `shared_prefix.CandidateScores`.
        """
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
            dropout=dropout,
        )

    def replay(
        self,
        params: Params,
        record: ScoringRecord,
        batch: Batch,
        picks: Picks | None = None,
        dropout: DropoutKeys | None = None,
    ) -> Array:
        """Returns log-probabilities of a recorded batch, for training: of the picks, or of all."""
        return replay.replay(
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
            dropout=dropout,
        )

    def differentiate(
        self,
        loss: Callable[[Array], tuple[Array, Any]],
        trained: Params,
        frozen: Params,
        batch: Batch,
        picks: Picks,
        at_a_time: int,
        logps: Array | None = None,
        dropout: Array | None = None,
    ) -> tuple[tuple[Array, Any], Params]:
        """Computes a loss of log-probabilities and its gradient, a few responses at a time.

        Args:
            loss: see `chunked_replay.value_and_grad`.
            trained: the weights to differentiate with respect to.
            frozen: the others.
            batch: [B, ...], with the whole pools.
            picks: the candidates in the loss.
            at_a_time: the most responses of a prompt that are differentiated together.
            logps: the picks' log-probabilities [B, n] by these weights, where they are known.
            dropout: see `chunked_replay.value_and_grad`.

        Returns:
            What `loss` returns, and the gradient.
        """
        return chunked_replay.value_and_grad(
            loss,
            lambda trained: nnx.merge(self.graphdef, {**frozen, **trained}),
            trained,
            batch.prompts,
            batch.prompt_lengths,
            batch.responses,
            batch.response_lengths,
            picks,
            at_a_time,
            logps,
            layout=self.layout,
            max_response=self.max_response,
            attention=self.attention,
            max_logits=self.max_logits,
            dropout=dropout,
        )

    @functools.partial(jax.jit, static_argnums=0)
    def logps(self, params: Params, batch: Batch) -> Array:
        """Returns log-probabilities [B, C], for the reference pass and evaluation."""
        return self(params, batch).logps

    @functools.partial(jax.jit, static_argnums=0)
    def logps_and_features(self, params: Params, batch: Batch) -> tuple[Array, Array]:
        """Returns log-probabilities [B, C] and features [B, C, D]."""
        scored = self(params, batch, features=True)
        return scored.logps, scored.features

    @functools.partial(jax.jit, static_argnums=(0, 3))
    def grams(self, params: Params, batch: Batch, settings: selection.Settings) -> Array:
        """Returns what criteria see of these weights' features, [B, C, C], to be frozen."""
        mask = batch.response_lengths[:, 1:] > 0
        return selection.compute_grams(self(params, batch, features=True).features, mask, settings)
