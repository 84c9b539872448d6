"""What a run began from, kept in its folder: where the files lay, and what they were.

A run has what it needs of its start: `model/` describes the architecture and holds the tokenizer
with its chat template, `adapters/` holds the adapters that it began from. Only the weights of its
base and of its reference stay outside. `origin.json` says where they and the data lay, and has
digests by which all of these are known again: of the weights as they are read, whatever type they
are kept in, and of the files.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.config import load_config
from mass_dpo_jax.models.folder import GENERATION, warn_once
from mass_dpo_jax.utils.files import read_json, write_whole

FILE = "origin.json"
MODEL = "model"  # config.json and the tokenizer.
ADAPTERS = "adapters"  # Where model.lora.path was set: PEFT's format.
TEMPLATE = f"{MODEL}/chat_template.jinja"
PEFT = ("adapter_config.json", "adapter_model.safetensors")
# Of config.json: they change no computation.
NOT_COMPUTED = "initializer_range max_position_embeddings bos_token_id eos_token_id".split()
# Settings that name files of a user's.
PATHS = ("data.path", "data.chat_template", "model.path", "model.reference_path", "model.lora.path")
_log = logging.getLogger(__name__)


def read(workdir: Path) -> dict[str, Any]:
    """Returns `paths`, `files` and `weights` of a run; empty ones of a run that was begun by a
    version without them.

    Raises:
      UserError: the file is not what `write` wrote.
    """
    path = workdir / FILE
    found = read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object")
    parts = {name: found.get(name, {}) for name in ("paths", "files", "weights")}
    for name, part in parts.items():
        if not isinstance(part, dict) or not all(isinstance(x, str) for x in part.values()):
            raise UserError(f"{path}: {name}: expected an object of strings")
    return parts


def write(workdir: Path, config: ConfigDict, weights: Mapping[str, str] | None) -> None:
    """Writes `origin.json` of a run whose `model/` and `adapters/` are complete.

    Args:
      config: its settings, with paths that count from here.
      weights: digests of the weights that stay outside, by the setting that names them; None: only
        the places are new.
    """
    content = read(workdir)
    if weights is not None:
        content = {"paths": {}, "files": _digests(workdir), "weights": dict(weights)}
    elif not content["files"]:
        return  # Begun by a version that kept none.
    content["paths"] |= _absolute_paths(config, workdir)
    write_whole(workdir / FILE, [json.dumps(content, indent=2) + "\n"])


def _absolute_paths(config: ConfigDict, workdir: Path) -> dict[str, str]:
    """The absolute path of each setting in `PATHS` that names something that is there, but for the
    run's own copies."""
    fields = dict(config_lib.flatten(config))
    paths = {name: Path(fields[name]).absolute() for name in PATHS if _is_path(config, name)}
    own = workdir / ADAPTERS
    return {n: str(path) for n, path in paths.items() if path.exists() and not is_same(path, own)}


def _is_path(config: ConfigDict, name: str) -> bool:
    if name == "data.path":
        return bool(config.data.path) and config.data.name != "synthetic"
    if name == "data.chat_template":
        return config.data.chat_template not in ("tokenizer", "none")
    return bool(dict(config_lib.flatten(config))[name])


def find_files(config: ConfigDict, workdir: Path) -> ConfigDict:
    """Returns a run's own settings with its files as they are found from any folder.

    Absolute paths replace the typed ones, which count from where the run was started. Where one is
    gone, but the typed one leads somewhere from here, that is taken, and said. The template is the
    one in `model/`, the adapters to start from are those in `adapters/`.

    Args:
      config: what `config.load` gives; it is not changed.
    """
    found = config.copy_and_resolve_references()
    known = read(workdir)["paths"]
    fields = dict(config_lib.flatten(config))
    for name, path in known.items():
        typed = fields.get(name)
        if not typed or name not in PATHS:
            continue
        if not Path(path).exists() and Path(typed).exists() and name != "data.chat_template":
            warn_once(f"config.{name}: {path} is gone; taking {Path(typed).absolute()}")
            path = typed
        found.update_from_flattened_dict({name: path})
    if config.model.lora.path and (workdir / ADAPTERS).is_dir():
        found.model.lora.path = str(workdir / ADAPTERS)
    return found


def typed(config: ConfigDict, workdir: Path) -> ConfigDict:
    """Returns settings as a run keeps them: paths that it knows already, as they were first typed.

    Whoever goes on from another folder, or by absolute paths, names the same files in other words.
    """
    kept = config.copy_and_resolve_references()
    known = read(workdir)["paths"]
    if known:
        fields, own = (dict(config_lib.flatten(c)) for c in (config, config_lib.load(workdir)))
        for name in PATHS:
            there = [known[name]] if name in known else []
            if name == "model.lora.path":
                there.append(str(workdir / ADAPTERS))
            if fields[name] and any(is_same(Path(fields[name]), Path(path)) for path in there):
                kept.update_from_flattened_dict({name: own[name]})
    return kept


def with_own_files(config: ConfigDict, workdir: Path) -> ConfigDict:
    """Returns settings that take template and adapters from the run, which has saved something.

    The files that they were copied from may be gone. Where they have changed, that changes nothing
    here, and is said.
    """
    found = config.copy_and_resolve_references()
    if _is_path(config, "data.chat_template"):
        found.data.chat_template = "tokenizer"
    if config.model.lora.path and (workdir / ADAPTERS).is_dir():
        found.model.lora.path = str(workdir / ADAPTERS)
    for name, own in _copies(config, workdir).items():
        if (there := _content(Path(own[0]))) and there != _content(own[1]):
            _log.warning(
                f"config.{name}: {own[0]} is not what the run began with; it goes on with its own, "
                f"{own[1]}"
            )
    return found


def has_own(config: ConfigDict, workdir: Path, name: str) -> bool:
    """Is this setting the file or folder that a run was started with, or one with the content of
    the run's copy?"""
    if not _is_path(config, name):
        return False
    here = Path(dict(config_lib.flatten(config))[name])
    if (known := read(workdir)["paths"].get(name)) and is_same(here, Path(known)):
        return True
    copy = {"model.lora.path": workdir / ADAPTERS, "data.chat_template": workdir / TEMPLATE}
    if name not in copy:
        return False
    return here.exists() and bool(_content(here)) and _content(here) == _content(copy[name])


def is_same(path: Path, other: Path) -> bool:
    """Do two paths name one file or folder, by whatever links?"""
    return path.resolve() == other.resolve()


def _copies(config: ConfigDict, workdir: Path) -> dict[str, tuple[str, Path]]:
    """The files that a run has copies of: where they lay and where the copy is, by setting."""
    found = {}
    if _is_path(config, "data.chat_template"):
        found["data.chat_template"] = config.data.chat_template, workdir / TEMPLATE
    if config.model.lora.path and not is_same(Path(config.model.lora.path), workdir / ADAPTERS):
        found["model.lora.path"] = config.model.lora.path, workdir / ADAPTERS
    return {name: own for name, own in found.items() if own[1].exists()}


def _content(path: Path) -> dict[str, str]:
    """Digests of a template's text, or of the files of PEFT's in a folder; nothing where there are
    none."""
    if path.is_file():  # The copy has the line ends of this system.
        text = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return {"": hashlib.sha256(text).hexdigest()}
    return {name: _digest(path / name) for name in PEFT if (path / name).is_file()}


def check_files(workdir: Path) -> None:
    """Raises UserError where files in a run's `model/` or `adapters/` are not those that it began
    with, or others that change how it is read have come in."""
    known = read(workdir)["files"]
    if not known:
        return
    there = _digests(workdir)
    names = {*known, *(name for name in there if _is_read(name))}
    if differ := sorted(n for n in names if there.get(n) != known.get(n)):
        raise UserError(
            f"{workdir / differ[0]}: not what the run began with (changed, added or removed since "
            "then); restore it, or begin another run"
        )


def _is_read(name: str) -> bool:
    """May a file of this name be one that a tokenizer is made of? File managers, editors and git
    leave others beside them."""
    path = Path(name)
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.suffix in (".json", ".jinja", ".model", ".txt", ".safetensors")


def check_weights(workdir: Path, found: Mapping[str, str], advice: str = "") -> None:
    """Raises UserError where weights that a run reads and does not save are not those that it began
    with, and names the setting.

    Args:
      found: digests as for `write`, of those that were read.
      advice: how to name those of before; empty: by the setting.
    """
    known = read(workdir)["weights"]
    for name, digest in found.items():
        if known.get(name, digest) != digest:
            raise UserError(
                f"{workdir}: config.{name}: its weights are not those that the run began with. "
                "Nothing is lost: "
                + (
                    advice
                    or f"name those of before by --config.{name}=PATH (of a run that has gone on, "
                    "RUN/checkpoints/STEP), or choose another --workdir"
                )
            )


def _digests(workdir: Path) -> dict[str, str]:
    return {path.relative_to(workdir).as_posix(): _digest(path) for path in _files(workdir)}


def _files(workdir: Path) -> Iterator[Path]:
    for folder in (MODEL, ADAPTERS):
        for path in sorted((workdir / folder).rglob("*")):
            if path.is_file() and path.name != GENERATION:  # It changes no computation.
                yield path


def _digest(path: Path) -> str:
    if path.parent.name == MODEL and path.name == "config.json":  # However it is written.
        load_config(path.parent)  # Says what is wrong with it.
        fields = {**read_json(path), **dict.fromkeys(NOT_COMPUTED)}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
