"""`origin.json`: where the files a run started from were, and digests of what they held.

A run copies what it needs of its start: `model/` has the architecture and the tokenizer with its
chat template, `adapters/` has the adapters it started from. The weights of its base and of its
reference stay outside. `origin.json` has the absolute paths of these and of the data, and digests
that recognize them: of weights as they are read, whatever type they are stored in, and of the
copied files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from ml_collections import ConfigDict

from mass_dpo_jax import config as config_lib
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.config import load_config
from mass_dpo_jax.models.folder import ADAPTER_SETTINGS as PEFT_SETTINGS
from mass_dpo_jax.models.folder import ADAPTER_WEIGHTS as PEFT_WEIGHTS
from mass_dpo_jax.models.folder import GENERATION
from mass_dpo_jax.utils.files import list_paths, make_absolute, read_json, write_whole

FILE = "origin.json"
MODEL = "model"  # Folder with config.json and the tokenizer.
ADAPTERS = "adapters"  # Folder in PEFT's format, where model.lora.path was set.
# The run's copy of the file or folder that a setting names.
COPIES = {"data.chat_template": f"{MODEL}/chat_template.jinja", "model.lora.path": ADAPTERS}
# Settings that name a user's files.
PATHS = (
    "data.path", "data.chat_template", "model.path", "model.reference_path", "model.lora.path",
    "mine.catalogue",
)  # fmt: skip
# Fields of a model's config.json that change no computation.
NOT_COMPUTED = "initializer_range max_position_embeddings bos_token_id eos_token_id".split()
# Kinds of files that a tokenizer or adapters may be read from.
READ_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".safetensors")


def read(workdir: Path) -> dict[str, dict[str, str]]:
    """Returns `paths`, `files` and `weights` of a run's origin.json; empty where it has none.

    Raises:
        UserError: the file is not what `write` wrote.
    """
    path = workdir / FILE
    content = read_json(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    parts = {name: content.get(name, {}) for name in ("paths", "files", "weights")}
    for name, part in parts.items():
        if not isinstance(part, dict) or not all(isinstance(x, str) for x in part.values()):
            raise UserError(f"{path}: {name}: expected an object of strings")
    return parts


def write(workdir: Path, config: ConfigDict, weights: Mapping[str, str] | None) -> None:
    """Writes origin.json of a run whose `model/` and `adapters/` are complete.

    Args:
        workdir: the run folder.
        config: the run's settings, with paths relative to the current folder.
        weights: digests of the weights that stay outside, by the setting that names them; None for
            a run that is resumed, where only the paths are new.
    """
    content = read(workdir)
    if weights is not None:
        content = {"paths": {}, "files": _digest_files(workdir), "weights": dict(weights)}
    elif not content["files"]:
        return  # It is gone, and with it what the files were.
    fields = dict(config_lib.flatten(config))
    paths = {name: make_absolute(fields[name]) for name in PATHS if is_path(config, name)}
    content["paths"] |= {
        name: path
        for name, path in paths.items()
        if any(other.exists() for other in list_paths(path))
        and not is_same(Path(path), workdir / ADAPTERS)
    }
    write_whole(workdir / FILE, [json.dumps(content, indent=2) + "\n"])


def is_path(config: ConfigDict, name: str) -> bool:
    """Whether the value of a setting in `PATHS` names a file or folder."""
    if name == "data.path":
        return bool(config.data.path) and config.data.name != "synthetic"
    if name == "data.chat_template":
        return config.data.chat_template not in ("tokenizer", "none")
    return bool(dict(config_lib.flatten(config))[name])


def is_same(path: Path, other: Path) -> bool:
    """Whether two paths name one file or folder, through any links."""
    return path.resolve() == other.resolve()


def find_copies(config: ConfigDict, workdir: Path) -> dict[str, tuple[str, Path]]:
    """Returns, by setting, the path of each file that the run has a copy of, and the copy's."""
    fields = dict(config_lib.flatten(config))
    copies = {}
    for name, copy in COPIES.items():
        path = workdir / copy
        if is_path(config, name) and path.exists() and not is_same(Path(fields[name]), path):
            copies[name] = fields[name], path
    return copies


def digest_content(path: Path) -> dict[str, str]:
    """Returns digests of a template's text, or of the PEFT files in a folder, by their names."""
    if path.is_file():  # The copy has this system's line ends.
        text = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return {"": hashlib.sha256(text).hexdigest()}
    names = (PEFT_SETTINGS, PEFT_WEIGHTS)
    return {name: _digest_file(path / name) for name in names if (path / name).is_file()}


def check_files(workdir: Path) -> None:
    """Raises UserError if files in a run's `model/` or `adapters/` are not those it began with.

    They may have changed, be missing, or be new ones that would be read.
    """
    originals = read(workdir)["files"]
    if not originals:
        return
    digests = _digest_files(workdir)
    names = {*originals, *(name for name in digests if _is_read(name))}
    if differ := sorted(n for n in names if digests.get(n) != originals.get(n)):
        raise UserError(
            f"{workdir / differ[0]}: not what the run began with (changed, added or removed since "
            "then); restore it, or begin another run"
        )


def _is_read(name: str) -> bool:
    """Whether a tokenizer may be read from a file of this name.

    File managers, editors and git leave other files beside them.
    """
    path = Path(name)
    return path.suffix in READ_SUFFIXES and not any(part.startswith(".") for part in path.parts)


def check_weights(workdir: Path, digests: Mapping[str, str], advice: str = "") -> None:
    """Raises UserError if weights that a run reads and does not save have changed since its start.

    Args:
        workdir: the run folder.
        digests: digests of the weights that were read, by setting, see `write`.
        advice: advice on naming the original weights; empty: to use the setting.
    """
    originals = read(workdir)["weights"]
    for name, digest in digests.items():
        if originals.get(name, digest) != digest:
            raise UserError(
                f"{workdir}: config.{name}: its weights are not those that the run began with. "
                "Nothing is lost: "
                + (
                    advice
                    or f"name those of before by --config.{name}=PATH (of a run that has gone on, "
                    "RUN/checkpoints/STEP), or choose another --workdir"
                )
            )


def _digest_files(workdir: Path) -> dict[str, str]:
    return {path.relative_to(workdir).as_posix(): _digest_file(path) for path in _files(workdir)}


def _files(workdir: Path) -> Iterator[Path]:
    for folder in (MODEL, ADAPTERS):
        for path in sorted((workdir / folder).rglob("*")):
            if path.is_file() and path.name != GENERATION:  # It changes no computation.
                yield path


def _digest_file(path: Path) -> str:
    if path.parent.name == MODEL and path.name == "config.json":  # However it is formatted.
        load_config(path.parent)  # Says what is wrong with it.
        fields = {**read_json(path), **dict.fromkeys(NOT_COMPUTED)}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
