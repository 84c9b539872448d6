"""From a configuration to everything a command computes with, checked before it is used."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.data.batches import Batch, Buckets, make_buckets
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.split_cache import open_splits
from mass_dpo_jax.data.token_cache import tokenize_once
from mass_dpo_jax.data.tokens import Tokens
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models import fused_attention
from mass_dpo_jax.models.logprobs import choose_max_logits
from mass_dpo_jax.models.lora import zero_idle_adapters
from mass_dpo_jax.runs import run_folder
from mass_dpo_jax.training import mesh as mesh_lib
from mass_dpo_jax.training import scoring
from mass_dpo_jax.training.methods import METHODS, Method, make_method
from mass_dpo_jax.training.policy import Policy, check_model, open_policy, uses_lora
from mass_dpo_jax.training.step import Program, Scorer
from mass_dpo_jax.utils import distributed
from mass_dpo_jax.utils.cache import cache_folder, load_or_compute
from mass_dpo_jax.utils.fingerprint import fingerprint

LEAST_CHUNK = 4  # Candidates of a rectangle at a time: fewer leave a device idle.
DRAWS = 2**31 - 1  # Of the seed's key: numbers from 0 are those of random weights.
_log = logging.getLogger(__name__)


class Reference(NamedTuple):
    """What is kept of the reference's weights.

    logps: float32 `[M, C]` of each split; empty where there is no reference.
    grams: float32 `[M, C, C]` of the split to choose from, where criteria see its features.
    """

    logps: dict[str, np.ndarray]
    grams: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a configuration means: data in tokens, a decoder without weights, a method.

    Attributes:
      examples: by split, as text; of several processes, the first one's alone.
      tokens: by split.
      buckets: by split.
    """

    config: ConfigDict
    mesh: Mesh
    policy: Policy
    method: Method
    program: Program
    examples: Mapping[str, Sequence[Example]]
    tokens: dict[str, Tokens]
    buckets: dict[str, Buckets]

    def key(self, draw: int) -> jax.Array:
        """Of random choices, which differ between draws and not within one."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), DRAWS)
        return jax.random.fold_in(key, draw)

    def digests(self) -> dict[str, str]:
        """By split, a digest of the data as it is trained and evaluated on."""
        found = {split: tokens.digest() for split, tokens in self.tokens.items()}
        if self.method.uses_scores:
            scores = np.ascontiguousarray(self.tokens["train"].scores, "<f4").tobytes()
            found["train"] = hashlib.sha256(found["train"].encode() + scores).hexdigest()
        return found

    def score(self, params: Any, split: str, label: str) -> np.ndarray:
        """`logps` `[M, C]` of a split."""
        compute = functools.partial(self.program.scorer.logps, params)
        found: np.ndarray = self.over_split(compute, split, label)
        return found

    def reference(self, params: Any, choosing: str | None = "train") -> Reference:
        """What is needed of the reference's weights, computed once and kept in the cache.

        Args:
          params: the weights.
          choosing: the split that negatives are chosen from, if any.
        """
        folder = cache_folder(self.config.cache_dir)
        lora = self.policy.lora
        if lora is None:
            digest = fingerprint(params)
        else:  # What is added: the same A and B add something else under another alpha.
            added = {**params, "adapters": lora.scale_adapters(params["adapters"])}
            digest = fingerprint(zero_idle_adapters(added))
        key = f"{self.policy.config} {self.config.model.dtype} {digest}"
        if isinstance(self.program.scorer.attention, fused_attention.FusedAttention):
            key += " fused"  # In 16 bits its roundings are not the other's.
        logps = {}
        for split, tokens in self.tokens.items():
            logps[split] = load_or_compute(
                folder,
                "ref_logps",
                f"{key} {tokens.digest()}",
                functools.partial(self.score, params, split, "reference"),
            )
        if not self.method.frozen_features or choosing not in self.tokens:
            return Reference(logps)
        how, tokens, scorer = self.config.selection, self.tokens[choosing], self.program.scorer
        grams = load_or_compute(
            folder,
            "ref_grams",
            f"{key} {tokens.digest()} {how.pooling} {how.feature_norm}",
            lambda: self.over_split(
                lambda batch: scorer.grams(params, batch, self.method.selection),
                choosing,
                "features",
            ),
        )
        return Reference(logps, grams)

    def over_split(self, compute: Callable[[Batch], Any], split: str, label: str) -> Any:
        """What `compute` gives for every example of a split, see `scoring.compute_split`."""
        return scoring.compute_split(
            compute,
            self.tokens[split],
            self.buckets[split],
            self.config.eval.batch_size,
            self.mesh,
            f"{label}, {split}",
        )


def prepare(
    config: ConfigDict, workdir: Path | None, splits: Sequence[str], training: bool = True
) -> Setup:
    """Loads and checks everything but weights; writes at most a tokenizer made from scratch.

    Args:
      workdir: a run that begins or, once it has saved something, goes on or is scored.
      splits: those to load; the first must have rows.
      training: the split "train" is trained on, and must have what the method needs.

    Raises:
      UserError: the configuration, the data or the model folder is not what it should be.
    """
    mesh = open_mesh(config)
    examples: dict[str, Sequence[Example]] = {}
    tokens: dict[str, Tokens] = {}
    if distributed.is_primary():
        # Reading data can take minutes, looking at a folder none.
        begun = workdir is not None and run_folder.latest_step(workdir) is not None
        for name in models_read(config, begun):
            check_model(Path(config.model[name]), not config.dry_run, f"model.{name}")
        examples = _load(config, splits)
        policy = open_policy(config, mesh, workdir, examples.get("train", ()))
        tokens = _tokenize(config, policy, examples)
    there = distributed.run_on_primary(lambda: list(tokens))
    if (
        not distributed.is_primary()
    ):  # What is trained on comes from the first one, so that it is the same.
        policy = open_policy(config, mesh, workdir, ())
    distributed.check_same_settings({"config.model.path": f"{policy.config} {policy.lora}"})
    tokens = {split: distributed.broadcast_dataclass(Tokens, tokens.get(split)) for split in there}
    return _of_tokens(config, policy, examples, tokens, training)


def models_read(config: ConfigDict, begun: bool) -> list[str]:
    """Returns the settings of `config.model` that name models whose weights a run reads.

    Args:
      begun: it has a checkpoint, with the weights that it trains.
    """
    needed = METHODS[config.method].uses_reference
    other = needed and bool(config.model.reference_path)
    is_reference = needed and not other
    start = not begun or uses_lora(config.model.lora) or is_reference
    return ["path"] * (start and bool(config.model.path)) + ["reference_path"] * other


def _load(config: ConfigDict, splits: Sequence[str]) -> dict[str, Sequence[Example]]:
    """By split, those that have rows."""
    found = open_splits(cache_folder(config.cache_dir), config.data, splits, config.seed)
    examples = {split: rows for split, rows in found.items() if rows}
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
    """As `prepare`, for a policy and examples that are there already; trains on those of "train".

    Raises:
      UserError: the configuration or the examples are not what they should be.
    """
    config_lib.check(config)
    _check_sizes(config, policy.mesh)
    return _of_tokens(config, policy, examples, _tokenize(config, policy, examples), True)


def open_mesh(config: ConfigDict) -> Mesh:
    """The devices of a configuration, which is checked first.

    Raises:
      UserError: a setting that no run could use, or that does not fit the devices.
    """
    config_lib.check(config)
    if config.model.dtype == "float32":
        # GPUs and TPUs otherwise multiply float32 matrices in fewer bits.
        jax.config.update("jax_default_matmul_precision", "highest")
    if jax.process_count() > 1 and not distributed.is_multiprocess():
        raise UserError(
            f"this is one of {jax.process_count()} processes: start each with --distributed"
        )
    mesh = mesh_lib.make_mesh(config.mesh)
    _check_sizes(config, mesh)
    return mesh


def _check_sizes(config: ConfigDict, mesh: Mesh) -> None:
    mesh_lib.check_batch(mesh, "train.micro_batch_size", config.train.micro_batch_size)
    mesh_lib.check_batch(mesh, "eval.batch_size", config.eval.batch_size)


def _tokenize(
    config: ConfigDict, policy: Policy, examples: Mapping[str, Sequence[Example]]
) -> dict[str, Tokens]:
    cache = cache_folder(config.cache_dir)
    return {
        split: tokenize_once(
            cache,
            rows,
            policy.tokenizer,
            config.data,
            progress=True,
            max_positions=policy.config.max_positions,
        )
        for split, rows in examples.items()
    }


def _of_tokens(
    config: ConfigDict,
    policy: Policy,
    examples: Mapping[str, Sequence[Example]],
    tokens: dict[str, Tokens],
    training: bool,
) -> Setup:
    mesh = policy.mesh
    for split, rows in tokens.items():
        _log.info(f"{split}: {_describe(rows)}")
    chosen_from = [tokens["train"]] if "train" in tokens else tokens.values()
    width = max(t.response_lengths.shape[1] for t in chosen_from)
    method = make_method(config, largest_pool=width - 1)
    if training and "train" in tokens:
        check_pools(method, tokens["train"])
        if method.uses_scores:
            _check_grades(tokens["train"])
        elif method.name == "odpo":
            tokens["train"] = _graded_by_rank(tokens["train"])
    longest = max(int(t.response_lengths.max()) for t in tokens.values())
    rectangle = config.model.layout == "rectangle"
    scorer = Scorer(
        graphdef=policy.graphdef,
        layout=config.model.layout,
        max_response=-(-longest // 8) * 8,
        # As large as what training has to hold anyway, and not one by one.
        chunk=max(1 + method.num_negatives, LEAST_CHUNK) if rectangle else None,
        pooling=config.selection.pooling,
        attention=fused_attention.choose_attention(
            config.model.attention, policy.config, config.model.dtype, mesh
        ),
        max_logits=choose_max_logits(mesh.devices.flat[0].platform),
    )
    trained, _ = policy.split(policy.shardings)
    program = Program(scorer, method, trained, config.train.reuse_scoring)
    most = config.data.max_shapes
    buckets = {s: make_buckets(t, method.num_negatives, most) for s, t in tokens.items()}
    return Setup(config, mesh, policy, method, program, examples, tokens, buckets)


def check_pools(method: Method, tokens: Tokens) -> None:
    """Says how many pools have fewer negatives than the method takes.

    Raises:
      UserError: all of them.
    """
    sizes, n = (tokens.response_lengths[:, 1:] > 0).sum(1), method.num_negatives
    largest = int(sizes.max())
    if n > largest:
        other = ", or config.method=dpo" if largest == 1 else " or fewer"
        raise UserError(
            f"config.num_negatives={n}: larger than every pool of the data (the largest has "
            f"{largest} rejected response{'s' * (largest > 1)}); set config.num_negatives={largest}"
            f"{other}"
        )
    if not method.uses_whole_pool:
        say_small_pools(n, sizes)


def say_small_pools(n: int, sizes: np.ndarray) -> None:
    """Says, where it is so, that some pools, of `sizes` [M], have fewer negatives than n."""
    if few := int((sizes < n).sum()):
        _log.info(
            f"config.num_negatives={n}: {few} of {len(sizes)} pools have fewer (the smallest "
            f"{sizes.min()}); of those all are taken"
        )


def _graded_by_rank(tokens: Tokens) -> Tokens:
    """Rejected responses are listed from the best to the worst: those left out keep their rank."""
    return dataclasses.replace(tokens, scores=-tokens.candidate_ids.astype(np.float32))


def _check_grades(tokens: Tokens) -> None:
    if tokens.scores is None:
        raise UserError(
            "config.method=odpo: the training data has no scores; expected score_chosen and "
            "score_rejected in every row, or config.odpo.offset=rank where rejected responses are "
            "listed from the best to the worst"
        )
    above = tokens.scores[:, :1] > tokens.scores[:, 1:]
    bad = np.flatnonzero((~above & (tokens.response_lengths[:, 1:] > 0)).any(1))
    if len(bad):
        chosen, *rejected = tokens.scores[bad[0], tokens.response_lengths[bad[0]] > 0].tolist()
        raise UserError(
            f"config.method=odpo: example {tokens.ids[bad[0]]!r}: score_chosen {chosen} is not "
            f"above every score_rejected (the largest is {max(rejected)})"
        )


def _describe(tokens: Tokens) -> str:
    pools = (tokens.response_lengths[:, 1:] > 0).sum(1)
    sizes = f"{pools.min()}" if pools.min() == pools.max() else f"{pools.min()} to {pools.max()}"
    prompts = tokens.prompt_lengths
    cut = ", ".join(
        f"{count} {name.replace('_', ' ')}" for name, count in tokens.cut.items() if count
    )
    return (
        f"{len(tokens)} examples with {sizes} negatives, prompts of {prompts.mean():.0f} tokens "
        f"(at most {prompts.max()}), responses of at most {tokens.response_lengths.max()}"
        + (f"; {cut}" if cut else "")
    )
