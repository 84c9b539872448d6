"""From a configuration to everything a command computes with, checked before it is used.

The configuration enters here, once: `prepare` takes it apart, and what it makes is given the
sections and values that it reads.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mass_dpo_jax import config_checks
from mass_dpo_jax.config_values import parse_cutoffs
from mass_dpo_jax.data.batches import make_buckets
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.data.split_cache import open_splits
from mass_dpo_jax.data.token_cache import tokenize_once
from mass_dpo_jax.data.tokens import Tokens
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models import fused_attention
from mass_dpo_jax.models.logprobs import choose_max_logits
from mass_dpo_jax.runs.run_folder import latest_step
from mass_dpo_jax.training import mesh as mesh_lib
from mass_dpo_jax.training.data_checks import check_training_data, describe_split
from mass_dpo_jax.training.method_config import make_method, uses_reference
from mass_dpo_jax.training.methods import METHODS, Method
from mass_dpo_jax.training.model_paths import check_model, uses_lora
from mass_dpo_jax.training.open_policy import open_policy
from mass_dpo_jax.training.policy import Policy
from mass_dpo_jax.training.prompts import count_prompts, read_settings
from mass_dpo_jax.training.scorer import Scorer
from mass_dpo_jax.training.setup import Setup
from mass_dpo_jax.training.step import Program
from mass_dpo_jax.utils import distributed
from mass_dpo_jax.utils.cache import cache_folder

MIN_CHUNK = 4  # Candidates of a rectangle at a time: fewer leave a device idle.
_log = logging.getLogger(__name__)


def prepare(
    config: ConfigDict,
    workdir: Path | None,
    splits: Sequence[str],
    training: bool = True,
    ties: bool = False,
    replace_negatives: Callable[[Sequence[Example]], Sequence[Example]] | None = None,
) -> Setup:
    """Loads and checks everything but weights; writes at most a tokenizer made from scratch.

    Args:
        config: the configuration.
        workdir: a run that is started or, if it has a checkpoint, resumed or scored.
        splits: the splits to load; the first must have rows.
        training: whether the split "train" is trained on, and must have what the method needs.
        ties: whether responses as good as the chosen one are kept everywhere, see `build_setup`.
        replace_negatives: gives the examples of the training split other negatives.

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
        for name in list_models_read(uses_reference(config), model, has_checkpoint):
            check_model(Path(model[name]), not config.dry_run, f"model.{name}")
        examples = _load_examples(config, splits)
        if replace_negatives is not None:
            examples["train"] = replace_negatives(examples["train"])
        policy = open_with(examples=examples.get("train", ()))
        tokens = _tokenize(config, policy, examples)
    names = distributed.run_on_primary(lambda: list(tokens))
    if not distributed.is_primary():
        policy = open_with(examples=())  # Reads the tokenizer that the primary process has made.
    distributed.check_same_settings({"config.model.path": f"{policy.config} {policy.lora}"})
    # All processes train on the primary's data, so that they are the same.
    tokens = {split: distributed.broadcast_dataclass(Tokens, tokens.get(split)) for split in names}
    return build_setup(config, policy, examples, tokens, training, ties)


def list_models_read(uses_reference: bool, model: ConfigDict, has_checkpoint: bool) -> list[str]:
    """Returns the settings in `config.model` that name models whose weights a run reads.

    Args:
        uses_reference: whether the loss compares the policy with a reference.
        model: the section `config.model`.
        has_checkpoint: the run has saved the weights that it trains.
    """
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
    config: ConfigDict,
    policy: Policy,
    examples: Mapping[str, Sequence[Example]],
    ties: bool = False,
) -> Setup:
    """Prepares a policy and examples in memory, as `prepare`; the split "train" is trained on.

    Raises:
        UserError: the configuration or the examples are not what they should be.
    """
    config_checks.check(config)
    _check_batch_sizes(config, policy.mesh)
    tokens = _tokenize(config, policy, examples)
    return build_setup(config, policy, examples, tokens, True, ties)


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
    ties: bool,
) -> Setup:
    """Builds the setup of tokenized splits; arguments as for `prepare` and `Setup`.

    Responses as good as the chosen one are no negatives. They are left out of what is trained on or
    selected from, unless the method's loss is that of a graded list; and kept where responses are
    only ranked: in the other splits of a training, and with `ties`.

    Raises:
        UserError: the training split does not have what the method needs.
    """
    if not (ties or METHODS[config.method].uses_order):
        tokens = {
            split: rows if training and split != "train" else rows.without_ties()
            for split, rows in tokens.items()
        }
    for split, rows in tokens.items():
        _log.info(f"{split}: {describe_split(rows)}")
        # How negatives were drawn matters to a loss, and not to who ranks where.
        if rows.log_weights is not None and not (training and split == "train"):
            tokens = {**tokens, split: dataclasses.replace(rows, log_weights=None)}
    selected_from = [tokens["train"]] if "train" in tokens else tokens.values()
    largest_pool = max(t.response_lengths.shape[1] for t in selected_from) - 1
    method, prompts = make_method(config, largest_pool), read_settings(config)
    if training and "train" in tokens:
        tokens["train"] = check_training_data(method, tokens["train"])
        count_prompts(prompts, len(tokens["train"]), config.train.batch_size)
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
        prompts=prompts,
        eval_batch_size=config.eval.batch_size,
        cutoffs=parse_cutoffs(config.eval.cutoffs),
        cache=cache_folder(config.cache_dir),
        policy=policy,
        method=method,
        program=Program(
            scorer,
            method,
            trained,
            config.train.reuse_scoring,
            config.train.responses_at_a_time,
            policy.lora is not None and policy.lora.dropout > 0,
        ),
        examples=examples,
        tokens=tokens,
        buckets={s: make_buckets(t, method.num_negatives, max_shapes) for s, t in tokens.items()},
    )


def _build_scorer(config: ConfigDict, policy: Policy, method: Method, longest: int) -> Scorer:
    """Builds the scorer of responses with at most `longest` tokens."""
    model, mesh = config.model, policy.mesh
    chunk = config.train.responses_at_a_time or None
    if chunk is None and model.layout == "rectangle":
        # As many candidates at a time as training has to hold anyway.
        chunk = max(1 + method.num_negatives, MIN_CHUNK)
    return Scorer(
        graphdef=policy.graphdef,
        layout=model.layout,
        max_response=-(-longest // 8) * 8,
        chunk=chunk,
        pooling=config.selection.pooling,
        attention=fused_attention.choose_attention(
            model.attention, policy.config, model.dtype, mesh
        ),
        max_logits=choose_max_logits(mesh.devices.flat[0].platform),
    )
