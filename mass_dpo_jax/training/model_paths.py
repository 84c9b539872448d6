"""What `config.model` names: models and adapters, in Hugging Face folders or in runs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mass_dpo_jax.config import MODEL_PATHS, flatten, set_field
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models import peft_format
from mass_dpo_jax.models.config import load_config, parse_targets
from mass_dpo_jax.models.folder import check_folder
from mass_dpo_jax.models.lora import Lora
from mass_dpo_jax.models.weights import check_hf
from mass_dpo_jax.runs import origin, run_config
from mass_dpo_jax.runs.run_folder import check_step, find_run
from mass_dpo_jax.training.checkpoint_reading import Reader
from mass_dpo_jax.utils import hub


def fetch_models(config: ConfigDict, weights: bool = True) -> ConfigDict:
    """Returns a configuration in which models named on the hub are folders, downloaded if need be.

    Args:
        config: the configuration, which is not changed.
        weights: False to leave the weights out: for a dry run, or where a tokenizer is enough.

    Raises:
        UserError: a model cannot be downloaded; names the setting.
    """
    fields = dict(flatten(config))
    found = config.copy_and_resolve_references()
    for name in MODEL_PATHS:
        if hub.is_name(fields[name]):
            set_field(found, name, hub.fetch_model(fields[name], name, weights))
    return found


def find_description(path: Path, setting: str = "model.path") -> Path:
    """Returns the folder with the config.json and the tokenizer that a path leads to.

    Args:
        path: the path of a run, a checkpoint or a Hugging Face folder.
        setting: the setting that names it, for messages.

    Raises:
        UserError: it is none of them, or a run's description has changed.
    """
    if run := find_run(path):
        check_step(run)
        origin.check_files(run.folder)
        path = run.folder / origin.MODEL
    check_folder(path, setting)
    return path


def check_model(path: Path, weights: bool = True, setting: str = "model.path") -> Path:
    """Checks a model, and returns its `find_description(path, setting)`.

    Args:
        path: a path as for `find_description`.
        weights: whether to check the headers of the weights' files too; a dry run needs none.
        setting: the setting that names it, for messages.

    Raises:
        UserError: it is no model, or its weights do not fit its config.json.
    """
    folder = find_description(path, setting)
    architecture = load_config(folder)
    if weights and find_run(path) is None:
        check_hf(folder, architecture)
    return folder


def uses_lora(settings: ConfigDict) -> bool:
    """Whether the section `config.model.lora` asks for adapters."""
    return bool(settings.rank or settings.path)


def read_lora(settings: ConfigDict) -> Lora | None:
    """Returns the form of the adapters that `config.model.lora` asks for; None: no LoRA.

    Adapters to start from decide it themselves, but for the dropout.

    Raises:
        UserError: there are no adapters at its `path`.
    """
    if not uses_lora(settings):
        return None
    if not settings.path:
        alpha = settings.alpha
        if settings.rank_stabilized:  # Their alpha / sqrt(rank) is our alpha / rank.
            alpha *= math.sqrt(settings.rank)
        return Lora(settings.rank, alpha, parse_targets(settings.targets), settings.dropout)
    path = Path(settings.path)
    run = find_run(path)
    if run is None:
        lora: Lora | None = peft_format.load_peft_settings(path)
    else:
        check_step(run)
        lora = read_lora(load_model_settings(run.folder).lora)
    if lora is None:
        raise UserError(f"config.model.lora.path={path}: a run without LoRA")
    return dataclasses.replace(lora, dropout=settings.dropout)


def load_model_settings(workdir: Path) -> ConfigDict:
    """Reads the section `model` of a run's configuration, with paths that lead to its files."""
    return run_config.get_config(str(workdir)).model


def read_adapters(read: Reader, lora: Lora) -> Any:
    """Reads A and B of each product from a checkpoint."""
    return {
        name: {part: read(("adapters", name, part), None) for part in ("a", "b")}
        for name in lora.targets
    }
