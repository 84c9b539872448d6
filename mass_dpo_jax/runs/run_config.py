"""The configuration of a run: read from its folder, with paths that lead somewhere from here.

A run keeps its settings as they were typed, in `config.json`, and the absolute paths of the files
they name in `origin.json`. This file is also what `--config` is for a command with `--workdir`.
"""

from __future__ import annotations

import logging
from pathlib import Path

from ml_collections import ConfigDict

from mass_dpo_jax import config as config_lib
from mass_dpo_jax import config_checks
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.folder import warn_once
from mass_dpo_jax.runs import origin
from mass_dpo_jax.utils import hub
from mass_dpo_jax.utils.files import read_json
from mass_dpo_jax.utils.run_paths import check_run

_log = logging.getLogger(__name__)


def get_config(workdir: str) -> ConfigDict:
    """Returns the settings of the run in `workdir`, for `--config=.../run_config.py:WORKDIR`."""
    return locate_files(load_config(Path(workdir)), Path(workdir))


def load_config(workdir: Path) -> ConfigDict:
    """Reads the configuration that the run in `workdir` was started with.

    Raises:
        UserError: it is no run, or its config.json does not hold the settings of one.
    """
    check_run(workdir)
    path = workdir / "config.json"
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise UserError(f"{path}: expected a JSON object with a run's settings")
    if "model_type" in stored:
        raise UserError(
            f"{path}: found a model's description, expected a run's settings; a model's folder is "
            "what --config.model.path takes"
        )
    config = config_lib.default()
    fields = dict(config_lib.flatten(config))
    for name, value in config_lib.flatten(stored):
        if name not in fields:
            raise UserError(f"{path}: unknown setting {name!r}, written by another version?")
        fields[name] = value
    try:
        config_checks.check_types(fields)
        for name, value in fields.items():
            config_lib.set_field(config, name, value)
        config_checks.check(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def locate_files(config: ConfigDict, workdir: Path) -> ConfigDict:
    """Returns a run's own settings with paths that lead to its files from any folder.

    Absolute paths replace the typed ones, which are relative to where the run was started. Where an
    absolute path is gone but the typed one exists from here, the typed one is taken, with a
    warning. The chat template is the run's copy in `model/`, the initial adapters are those in
    `adapters/`.

    Args:
        config: result of `load_config`, which is not changed.
        workdir: the run folder.
    """
    resolved_config = config.copy_and_resolve_references()
    fields = dict(config_lib.flatten(config))
    for name, path in origin.read(workdir)["paths"].items():
        typed = fields.get(name)
        if not typed or name not in origin.PATHS:
            continue
        if not Path(path).exists() and Path(typed).exists() and name != "data.chat_template":
            warn_once(f"config.{name}: {path} is gone; taking {Path(typed).absolute()}")
            path = typed
        config_lib.set_field(resolved_config, name, path)
    _use_own_adapters(resolved_config, workdir)
    return resolved_config


def restore_typed_paths(config: ConfigDict, workdir: Path) -> ConfigDict:
    """Returns settings in which paths that the run knows are as they were first typed.

    A command that resumes a run from another folder, or by absolute paths, names the same files
    differently; config.json keeps the first names.
    """
    typed = config.copy_and_resolve_references()
    paths = origin.read(workdir)["paths"]
    if paths:
        fields, stored = (dict(config_lib.flatten(c)) for c in (config, load_config(workdir)))
        for name in origin.PATHS:
            locations = [paths[name]] if name in paths else []
            if name == "model.lora.path":
                locations.append(str(workdir / origin.ADAPTERS))
            path = fields[name]
            if path and any(origin.is_same(Path(path), Path(other)) for other in locations):
                config_lib.set_field(typed, name, stored[name])
    return typed


def use_own_files(config: ConfigDict, workdir: Path) -> ConfigDict:
    """Returns settings that take the chat template and initial adapters from the run's own copies.

    For a run that has saved a checkpoint: the files that were copied may be gone by now. Where they
    have changed, the copies still count, and a warning says so. A model that was named on the hub
    is the revision that the run began with, where it still lies.
    """
    settings = config.copy_and_resolve_references()
    paths = origin.read(workdir)["paths"]
    fields = dict(config_lib.flatten(config))
    for name in config_lib.MODEL_PATHS:
        if name in paths and hub.is_name(fields[name]) and Path(paths[name]).is_dir():
            config_lib.set_field(settings, name, paths[name])
    if origin.is_path(config, "data.chat_template"):
        settings.data.chat_template = "tokenizer"
    _use_own_adapters(settings, workdir)
    for name, (source, copy) in origin.find_copies(config, workdir).items():
        digests = origin.digest_content(Path(source))
        if digests and digests != origin.digest_content(copy):
            _log.warning(
                f"config.{name}: {source} is not what the run began with; it goes on with its own, "
                f"{copy}"
            )
    return settings


def is_own_file(value: str, workdir: Path, name: str) -> bool:
    """Whether a value of a setting names what the run was started with.

    That is the same file or folder, or one with the same content as the run's copy.

    Args:
        value: the setting's value.
        workdir: the run folder.
        name: the setting's name, one of `origin.COPIES` or a model.
    """
    if not value or (name == "data.chat_template" and value in ("tokenizer", "none")):
        return False
    path = Path(value)
    start = origin.read(workdir)["paths"].get(name)
    if start and origin.is_same(path, Path(start)):
        return True
    if name not in origin.COPIES:
        return False
    digests = origin.digest_content(path) if path.exists() else {}
    return bool(digests) and digests == origin.digest_content(workdir / origin.COPIES[name])


def _use_own_adapters(config: ConfigDict, workdir: Path) -> None:
    """Points `model.lora.path`, where it is set, to the run's copy of those adapters."""
    adapters = workdir / origin.ADAPTERS
    if config.model.lora.path and adapters.is_dir():
        config.model.lora.path = str(adapters)
