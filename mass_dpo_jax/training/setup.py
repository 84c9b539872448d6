"""From a configuration to everything a command computes with, checked before it is used.

The configuration enters here, once: `prepare` takes it apart, and what it makes is given the
sections and values that it reads.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mass_dpo_jax import config_checks
from mass_dpo_jax.data.batches import Batch, Buckets, make_buckets
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.split_cache import open_splits
from mass_dpo_jax.data.token_cache import tokenize_once
from mass_dpo_jax.data.tokens import Tokens
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models import fused_attention
from mass_dpo_jax.models.logprobs import choose_max_logits
from mass_dpo_jax.models.lora import zero_idle_adapters
from mass_dpo_jax.runs.run_folder import latest_step
from mass_dpo_jax.training import mesh as mesh_lib
from mass_dpo_jax.training import scoring
from mass_dpo_jax.training.data_checks import check_training_data, describe_split
from mass_dpo_jax.training.methods import METHODS, Method, make_method
from mass_dpo_jax.training.model_paths import check_model, uses_lora
from mass_dpo_jax.training.open_policy import open_policy
from mass_dpo_jax.training.policy import Policy
from mass_dpo_jax.training.scorer import Scorer
from mass_dpo_jax.training.step import Program
from mass_dpo_jax.utils import distributed
from mass_dpo_jax.utils.cache import cache_folder, load_or_compute
from mass_dpo_jax.utils.fingerprint import fingerprint

MIN_CHUNK = 4  # Candidates of a rectangle at a time: fewer leave a device idle.
DRAW_STREAM = 2**31 - 1  # Folded into the seed's key; random weights use the numbers from 0.
_log = logging.getLogger(__name__)


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
        seed: of all random choices.
        beta: factor from log-ratios to rewards.
        refresh: `selection.refresh`, how long picks last.
        eval_batch_size: prompts per scoring batch.
        cache: folder of what is computed once.
        policy: decoder and tokenizer.
        method: which negatives are trained on, and the loss.
        program: the jitted steps: its scorer scores responses, the rest selects and trains.
        examples: by split, as text; empty on processes that are not primary.
        tokens: by split.
        buckets: by split, the shapes of batches and the rows that fit them.
    """

    model: ConfigDict
    train: ConfigDict
    seed: int
    beta: float
    refresh: str
    eval_batch_size: int
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
        if self.method.uses_scores:
            scores = np.ascontiguousarray(self.tokens["train"].scores, "<f4").tobytes()
            digests["train"] = hashlib.sha256(digests["train"].encode() + scores).hexdigest()
        return digests

    def score(self, params: Any, split: str, label: str) -> np.ndarray:
        """Computes the log-probabilities, float32 [M, C], of a split.

        Args:
            params: the weights.
            split: its name.
            label: of the progress bar.
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
        else:  # Of what is added to the base: with another alpha the same A and B add more or less.
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


def prepare(
    config: ConfigDict, workdir: Path | None, splits: Sequence[str], training: bool = True
) -> Setup:
    """Loads and checks everything but weights; writes at most a tokenizer made from scratch.

    Args:
        config: the configuration.
        workdir: a run that is started or, if it has a checkpoint, resumed or scored.
        splits: those to load; the first must have rows.
        training: the split "train" is trained on, and must have what the method needs.

    Raises:
        UserError: the configuration, the data or the model folder is not what it should be.
    """
    mesh = open_mesh(config)
    data, model = config.data, config.model
    max_length = data.max_prompt_length + data.max_response_length
    open_with = functools.partial(
        open_policy, model, mesh, workdir, max_length=max_length, weights=not config.dry_run
    )
    examples: dict[str, Sequence[Example]] = {}
    tokens: dict[str, Tokens] = {}
    if distributed.is_primary():
        has_checkpoint = workdir is not None and latest_step(workdir) is not None
        # Models first: reading data can take minutes, looking at a folder takes no time.
        for name in list_models_read(config.method, model, has_checkpoint):
            check_model(Path(model[name]), not config.dry_run, f"model.{name}")
        examples = _load_examples(config, splits)
        policy = open_with(examples=examples.get("train", ()))
        tokens = _tokenize(config, policy, examples)
    names = distributed.run_on_primary(lambda: list(tokens))
    if not distributed.is_primary():
        policy = open_with(examples=())  # Reads the tokenizer that the primary process has made.
    distributed.check_same_settings({"config.model.path": f"{policy.config} {policy.lora}"})
    # All processes train on the primary's data, so that they are the same.
    tokens = {split: distributed.broadcast_dataclass(Tokens, tokens.get(split)) for split in names}
    return build_setup(config, policy, examples, tokens, training)


def list_models_read(method: str, model: ConfigDict, has_checkpoint: bool) -> list[str]:
    """Returns the settings in `config.model` that name models whose weights a run reads.

    Args:
        method: `config.method`.
        model: the section `config.model`.
        has_checkpoint: the run has saved the weights that it trains.
    """
    uses_reference = METHODS[method].uses_reference
    uses_other = uses_reference and bool(model.reference_path)
    starts_from = not has_checkpoint or uses_lora(model.lora) or (uses_reference and not uses_other)
    return ["path"] * (starts_from and bool(model.path)) + ["reference_path"] * uses_other


def _load_examples(config: ConfigDict, splits: Sequence[str]) -> dict[str, Sequence[Example]]:
    """Loads the splits that have rows."""
    loaded = open_splits(cache_folder(config.cache_dir), config.data, splits, config.seed)
    examples = {split: rows for split, rows in loaded.items() if rows}
    if splits[0] not in examples:
        raise UserError(
            f"{config.data.path or config.data.name}: split {splits[0]!r} has no rows of its "
            f"own, and with config.data.validation_share={config.data.validation_share} none "
            "are held out for it; expected another --split"
        )
    return examples


def prepare_examples(
    config: ConfigDict, policy: Policy, examples: Mapping[str, Sequence[Example]]
) -> Setup:
    """Prepares a policy and examples in memory, as `prepare`; the split "train" is trained on.

    Raises:
        UserError: the configuration or the examples are not what they should be.
    """
    config_checks.check(config)
    _check_batch_sizes(config, policy.mesh)
    return build_setup(config, policy, examples, _tokenize(config, policy, examples), True)


def open_mesh(config: ConfigDict) -> Mesh:
    """Checks a configuration, and returns the mesh of its devices.

    Raises:
        UserError: a setting that no run could use, or that does not fit the devices.
    """
    config_checks.check(config)
    if config.model.dtype == "float32":
        # GPUs and TPUs otherwise multiply float32 matrices in fewer bits.
        jax.config.update("jax_default_matmul_precision", "highest")
    if jax.process_count() > 1 and not distributed.is_multiprocess():
        raise UserError(
            f"this is one of {jax.process_count()} processes: start each with --distributed"
        )
    mesh = mesh_lib.make_mesh(config.mesh)
    _check_batch_sizes(config, mesh)
    return mesh


def _check_batch_sizes(config: ConfigDict, mesh: Mesh) -> None:
    mesh_lib.check_batch(mesh, "train.micro_batch_size", config.train.micro_batch_size)
    mesh_lib.check_batch(mesh, "eval.batch_size", config.eval.batch_size)


def _tokenize(
    config: ConfigDict, policy: Policy, examples: Mapping[str, Sequence[Example]]
) -> dict[str, Tokens]:
    cache, max_positions = cache_folder(config.cache_dir), policy.config.max_positions
    return {
        split: tokenize_once(
            cache, rows, policy.tokenizer, config.data, progress=True, max_positions=max_positions
        )
        for split, rows in examples.items()
    }


def build_setup(
    config: ConfigDict,
    policy: Policy,
    examples: Mapping[str, Sequence[Example]],
    tokens: dict[str, Tokens],
    training: bool,
) -> Setup:
    """Builds the setup of tokenized splits; arguments as for `prepare` and `Setup`.

    Raises:
        UserError: the training split does not have what the method needs.
    """
    for split, rows in tokens.items():
        _log.info(f"{split}: {describe_split(rows)}")
    selected_from = [tokens["train"]] if "train" in tokens else tokens.values()
    largest_pool = max(t.response_lengths.shape[1] for t in selected_from) - 1
    method = make_method(config, largest_pool)
    if training and "train" in tokens:
        tokens["train"] = check_training_data(method, tokens["train"])
    longest = max(int(t.response_lengths.max()) for t in tokens.values())
    scorer = _build_scorer(config, policy, method, longest)
    trained, _ = policy.split(policy.shardings)
    max_shapes = config.data.max_shapes
    return Setup(
        model=config.model,
        train=config.train,
        seed=config.seed,
        beta=config.beta,
        refresh=config.selection.refresh,
        eval_batch_size=config.eval.batch_size,
        cache=cache_folder(config.cache_dir),
        policy=policy,
        method=method,
        program=Program(scorer, method, trained, config.train.reuse_scoring),
        examples=examples,
        tokens=tokens,
        buckets={s: make_buckets(t, method.num_negatives, max_shapes) for s, t in tokens.items()},
    )


def _build_scorer(config: ConfigDict, policy: Policy, method: Method, longest: int) -> Scorer:
    """Builds the scorer of responses with at most `longest` tokens."""
    model, mesh = config.model, policy.mesh
    is_rectangle = model.layout == "rectangle"
    return Scorer(
        graphdef=policy.graphdef,
        layout=model.layout,
        max_response=-(-longest // 8) * 8,
        # As many candidates at a time as training has to hold anyway.
        chunk=max(1 + method.num_negatives, MIN_CHUNK) if is_rectangle else None,
        pooling=config.selection.pooling,
        attention=fused_attention.choose_attention(
            model.attention, policy.config, model.dtype, mesh
        ),
        max_logits=choose_max_logits(mesh.devices.flat[0].platform),
    )
