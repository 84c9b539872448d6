"""The meaning of a configuration: data in tokens, a policy without weights, and a method."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mass_dpo_jax.data.batches import Batch, Buckets
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.tokens import Tokens
from mass_dpo_jax.models import fused_attention
from mass_dpo_jax.models.lora import zero_idle_adapters
from mass_dpo_jax.training import scoring
from mass_dpo_jax.training.methods import Method
from mass_dpo_jax.training.policy import Policy
from mass_dpo_jax.training.prompts import PromptSettings
from mass_dpo_jax.training.step import Program
from mass_dpo_jax.utils.cache import load_or_compute
from mass_dpo_jax.utils.fingerprint import fingerprint

DRAW_STREAM = 2**31 - 1  # Folded into the seed's key; random weights use the numbers from 0.


class Reference(NamedTuple):
    """What is kept of the reference. Made by `Setup.score_reference`.

    Attributes:
        logps: float32 [M, C] of each split; empty where there is no reference.
        grams: float32 [M, C, C] of the split to select from, where criteria see its features.
    """

    logps: dict[str, np.ndarray]
    grams: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Setup:
    """The meaning of a configuration, without weights. Made by `prepare` and `prepare_examples`.

    Attributes:
        model: the section `config.model`.
        train: the section `config.train`.
        seed: seed of all random choices.
        beta: factor from log-ratios to rewards.
        refresh: `selection.refresh`, the time that picks last.
        prompts: how the prompts of an epoch are chosen.
        eval_batch_size: prompts per scoring batch.
        cutoffs: the k of recall and NDCG.
        cache: folder of what is computed once.
        policy: decoder and tokenizer.
        method: the choice of negatives to train on, and the loss.
        program: the jitted steps: its scorer scores responses, the rest selects and trains.
        examples: examples by split, as text; empty on processes that are not primary.
        tokens: tokens by split.
        buckets: shapes of batches and the rows that fit them, by split.
    """

    model: ConfigDict
    train: ConfigDict
    seed: int
    beta: float
    refresh: str
    prompts: PromptSettings
    eval_batch_size: int
    cutoffs: tuple[int, ...]
    cache: Path
    policy: Policy
    method: Method
    program: Program
    examples: Mapping[str, Sequence[Example]]
    tokens: dict[str, Tokens]
    buckets: dict[str, Buckets]

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.policy.mesh

    def key(self, draw: int) -> jax.Array:
        """Returns the PRNG key of a draw of random negatives."""
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), DRAW_STREAM), draw)

    def digests(self) -> dict[str, str]:
        """Returns, by split, a digest of the data as it is trained and evaluated on."""
        digests = {split: tokens.digest() for split, tokens in self.tokens.items()}
        if self.method.uses_scores or self.method.uses_order:
            scores = np.ascontiguousarray(self.tokens["train"].scores, "<f4").tobytes()
            digests["train"] = hashlib.sha256(digests["train"].encode() + scores).hexdigest()
        if "train" in self.tokens and self.tokens["train"].log_weights is not None:
            weights = np.ascontiguousarray(self.tokens["train"].log_weights, "<f4").tobytes()
            digests["train"] = hashlib.sha256(digests["train"].encode() + weights).hexdigest()
        return digests

    def score(self, params: Any, split: str, label: str) -> np.ndarray:
        """Computes the log-probabilities, float32 [M, C], of a split.

        Args:
            params: the weights.
            split: its name.
            label: label of the progress bar.
        """
        compute = functools.partial(self.program.scorer.logps, params)
        logps: np.ndarray = self.map_split(compute, split, label)
        return logps

    def score_reference(self, params: Any, select_from: str | None = "train") -> Reference:
        """Computes what is kept of the reference, or reads it from the cache.

        Args:
            params: the reference's weights.
            select_from: the split that negatives are selected from, if any.
        """
        scorer, selection = self.program.scorer, self.method.selection
        key = self._reference_key(params)
        logps = {
            split: load_or_compute(
                self.cache,
                "ref_logps",
                f"{key} {tokens.digest()}",
                functools.partial(self.score, params, split, "reference"),
            )
            for split, tokens in self.tokens.items()
        }
        if not self.method.frozen_features or select_from not in self.tokens:
            return Reference(logps)
        grams = load_or_compute(
            self.cache,
            "ref_grams",
            f"{key} {self.tokens[select_from].digest()} {scorer.pooling} {selection.feature_norm}",
            lambda: self.map_split(
                lambda batch: scorer.grams(params, batch, selection), select_from, "features"
            ),
        )
        return Reference(logps, grams)

    def _reference_key(self, params: Any) -> str:
        """Returns what identifies a reference's scores in the cache, but for the data."""
        lora = self.policy.lora
        if lora is None:
            digest = fingerprint(params)
        else:  # Fingerprint scaled adapters, since alpha changes their effect.
            added = {**params, "adapters": lora.scale_adapters(params["adapters"])}
            digest = fingerprint(zero_idle_adapters(added))
        key = f"{self.policy.config} {self.model.dtype} {digest}"
        if isinstance(self.program.scorer.attention, fused_attention.FusedAttention):
            key += " fused"  # In 16 bits it rounds differently from plain attention.
        return key

    def map_split(self, compute: Callable[[Batch], Any], split: str, label: str) -> Any:
        """Applies `compute` to every example of a split, see `scoring.compute_table`."""
        batches = self.scoring_batches(split, f"{label}, {split}")
        return scoring.compute_table(compute, batches, len(self.tokens[split]))

    def scoring_batches(
        self,
        split: str,
        label: str,
        rows: np.ndarray | None = None,
        ref_logps: np.ndarray | None = None,
        ref_grams: np.ndarray | None = None,
    ) -> Iterator[tuple[np.ndarray, Batch]]:
        """Yields batches of a split for a pass without gradients, see `scoring.device_batches`."""
        return scoring.device_batches(
            self.tokens[split],
            self.buckets[split],
            self.eval_batch_size,
            self.mesh,
            label,
            rows,
            ref_logps,
            ref_grams,
        )
