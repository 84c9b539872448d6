"""Prepares a model or a run's checkpoint for the commands that score, evaluate and select."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.data import sources
from mass_dpo_jax.data.examples import Example
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.runs import origin, run_config, run_folder
from mass_dpo_jax.training.method_config import uses_reference
from mass_dpo_jax.training.model_paths import fetch_models, uses_lora
from mass_dpo_jax.training.policy import Policy
from mass_dpo_jax.training.prepare import prepare, prepare_examples
from mass_dpo_jax.training.setup import Reference, Setup
from mass_dpo_jax.utils import distributed

_log = logging.getLogger(__name__)


class ResponseScores(NamedTuple):
    """Scores of examples that were given in memory, as in `api.Scores`. Made by `score_examples`.

    Attributes:
        ids: the examples' ids.
        logps: float32 [M, C], 0 where there is no response.
        lengths: int32 [M, C], tokens of a response, 0 where there is none.
        features: float32 [M, C, D], or None.
    """

    ids: list[str]
    logps: np.ndarray
    lengths: np.ndarray
    features: np.ndarray | None


def score_examples(
    config: ConfigDict,
    policy: Policy,
    params: Any,
    examples: Sequence[Example],
    features: bool = False,
) -> ResponseScores:
    """Scores all responses of examples, with the chat template and limits of a configuration.

    Column 0 is the chosen response's, column i that of an example's i-th other response; responses
    that `data.long_response` leaves out keep a column, with 0 tokens.

    Args:
        config: the configuration; what it says of data, precision and batches is read.
        policy: the policy.
        params: its weights.
        examples: the examples, whose ids differ.
        features: whether the responses' mean hidden states are returned too.

    Raises:
        UserError: a row is too long, unless the configuration cuts or drops such rows.
    """
    setup = prepare_examples(config, policy, {"all": examples}, ties=True)
    tokens, scorer = setup.tokens["all"], setup.program.scorer
    compute = scorer.logps_and_features if features else scorer.logps
    scores = setup.map_split(lambda batch: compute(params, batch), "all", "scoring")
    logps, hidden = scores if features else (scores, None)
    sizes = {example.id: len(example.responses) for example in examples}
    width = max(sizes[name] for name in tokens.ids)
    logps, lengths = (tokens.restore_columns(x, width) for x in (logps, tokens.response_lengths))
    hidden = None if hidden is None else tokens.restore_columns(hidden, width)
    return ResponseScores(tokens.ids, logps, lengths, hidden)


class ScoredModel(NamedTuple):
    """A model with the split that it scores. Made by `prepare_scoring`.

    Attributes:
        setup: the setup, with one split.
        split: its name.
        params: the model's weights.
        reference: the scores kept from its reference; empty where it has none.
    """

    setup: Setup
    split: str
    params: Any
    reference: Reference


def prepare_scoring(
    config: ConfigDict,
    workdir: Path | None,
    split: str | None,
    selecting: bool = False,
    ties: bool = False,
) -> ScoredModel:
    """Prepares a run's newest checkpoint or the model at `config.model.path` for scoring.

    The reference of a run is the one it was trained against; that of another model is the one at
    `config.model.reference_path`, if given.

    Args:
        config: the configuration; it is not changed.
        workdir: the run; None: there is none.
        split: its name; None: the test split or, of a single file without splits, all of it.
        selecting: whether negatives are selected from the split.
        ties: whether responses as good as the chosen one are scored too.

    Raises:
        UserError: as for `prepare`; both a run and another model are given; or what a run reads
            again has changed since its start.
    """
    config = config.copy_and_resolve_references()
    if split is None:
        split = choose_split(config.data, "test")
    select_from = split if selecting else None
    if workdir is not None:
        return _prepare_run(config, workdir, split, select_from, ties)
    config = fetch_models(config)
    model = config.model
    if not model.path:
        raise UserError("no model: give --workdir=RUN, or --config.model.path=FOLDER")
    setup = prepare(config, None, (split,), training=False, ties=ties)
    reference = Reference({})
    if model.reference_path:
        params = setup.policy.weights(model.reference_path, config.seed)
        reference = setup.score_reference(params, select_from)
        del params  # Before as many weights are read.
    params = setup.policy.weights(model.path, config.seed, model.lora.path)
    return ScoredModel(setup, split, params, reference)


def choose_split(data: ConfigDict, default: str) -> str:
    """Returns "all" for data without splits, and `default` for other data."""
    if data.name == "synthetic" or not data.path:
        return default
    return default if Path(data.path).is_dir() or sources.has_splits(data) else "all"


def _prepare_run(
    config: ConfigDict, workdir: Path, split: str, select_from: str | None, ties: bool
) -> ScoredModel:
    """Prepares a run's newest checkpoint.

    `config.model.path` may say where the model that the run started from is now.
    """
    if distributed.run_on_primary(lambda: run_folder.latest_step(workdir)) is None:
        raise UserError(f"{workdir}: {run_folder.NO_CHECKPOINT}")
    run_settings = run_config.get_config(str(workdir))
    run_uses_lora = uses_lora(run_settings.model.lora)
    has_reference = uses_reference(run_settings)
    other_reference = config.model.reference_path or run_settings.model.reference_path

    # The base that the run started from: read again for LoRA, and as the reference.
    base = run_settings.model.path
    reads_base = run_uses_lora or (has_reference and not other_reference)
    if reads_base and "model.path" in origin.read(workdir)["weights"]:
        if config.model.path and not origin.is_same(Path(config.model.path), workdir):
            base = config.model.path
    else:
        _check_own("model.path", config, run_settings, workdir)
    _check_own("model.lora.path", config, run_settings, workdir)

    # The reference is another model, or the base with the adapters that the run started from.
    reference_path, adapters = other_reference, ""
    if not other_reference:
        reference_path, adapters = base, run_settings.model.lora.path
    if run_config.is_own_file(config.data.chat_template, workdir, "data.chat_template"):
        config.data.chat_template = "tokenizer"
    config.model.path = base
    config.model.lora.update(run_settings.model.lora)
    if run_uses_lora:  # Adapters stay beside their base, as they were trained.
        config.model.lora.path = str(workdir)
    setup = prepare(config, workdir, (split,), training=False, ties=ties)
    reference = Reference({})
    if has_reference or config.model.reference_path:
        params, digest = setup.policy.read(reference_path, run_settings.seed, adapters)
        _check_reference(config, run_settings, workdir, reference_path, digest)
        reference = setup.score_reference(params, select_from)
        del params  # Before as many weights are read.
    path = base if run_uses_lora else str(workdir)
    params, digest = setup.policy.read(path, run_settings.seed, config.model.lora.path)
    if run_uses_lora:
        origin.check_weights(workdir, {"model.path": digest})
    return ScoredModel(setup, split, params, reference)


def _check_reference(
    config: ConfigDict, run_settings: ConfigDict, workdir: Path, reference: str, digest: str
) -> None:
    """Raises UserError if a run's reference has changed; logs if another one was asked for."""
    name = "model.reference_path" if run_settings.model.reference_path else "model.path"
    try:
        origin.check_weights(workdir, {name: digest})
    except UserError:
        if config.model.reference_path == run_settings.model.reference_path:
            raise
        _log.warning(f"rewards are against {reference}, which the run was not trained against")


def _check_own(name: str, config: ConfigDict, run_settings: ConfigDict, workdir: Path) -> None:
    """Raises UserError if a setting names weights other than the run's, which would be ignored."""
    value, run_value = (dict(config_lib.flatten(c))[name] for c in (config, run_settings))
    is_same = any(origin.is_same(Path(value), Path(path)) for path in (run_value, workdir) if path)
    if value and not is_same and not run_config.is_own_file(value, workdir, name):
        raise UserError(
            f"config.{name}={value}: the model is that of the run in --workdir={workdir}; "
            "expected one of them, not both"
        )
