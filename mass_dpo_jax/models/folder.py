"""Recognizes what lies in a model's folder, by names, sizes and first bytes, without JAX.

Readers of config.json, tokenizers and weights say with it what they found instead.
"""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.utils.files import check_links, read_json
from mass_dpo_jax.utils.run_paths import CHECKPOINTS, find_enclosing_run

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_WEIGHTS, ADAPTER_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
GENERATION = "generation_config.json"
SMALL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
    GENERATION,
)

HOW_TO_CONVERT = (
    "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW) of transformers writes "
    "safetensors"
)
# Weights of formats that are not read, by patterns of their names, and what to do.
OTHER_WEIGHTS = {
    "pytorch_model*.bin": f"pickles are not read; convert them to safetensors: {HOW_TO_CONVERT}",
    "*.gguf": "GGUF is not read; take the model's safetensors, from which it was made",
    "consolidated*": "Meta's or Mistral's own format; take the model in that of transformers",
    "*model*.pt*": "pickles are not read; take the model as safetensors",
    "zero_to_fp32.py": "DeepSpeed's checkpoint; convert it with that program",
    "*.distcp": "a sharded checkpoint of PyTorch; save the model with save_pretrained",
    "tf_model*.h5": "TensorFlow's weights are not read; take the model's safetensors",
    "flax_model*": "Flax's weights are not read; take the model's safetensors",
    "*.onnx": "ONNX is not read; take the model's safetensors, from which it was exported",
    "adapters*.safetensors": "MLX's adapters; merge them into their base, or train new ones",
    "weights*.npz": "MLX's weights; take the model in the format of transformers",
    "*.incomplete": "a download that has not ended; start it again",
}
DATASETS = (
    *("dataset_dict.json", "dataset_info.json", "state.json"),
    *("*.parquet", "*.arrow", "*.jsonl"),
)
MAX_NAMES = 5  # In a message.
CUT_SHORT = "was the download cut short? Start it again"

_log = logging.getLogger(__name__)


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning the first time only: files are read several times."""
    _log.warning(message)


def check_folder(folder: Path, setting: str = "model.path") -> None:
    """Checks that a folder's small files are what their names say; only weights may be links.

    Args:
        folder: a model's folder.
        setting: the setting that names it, for messages.

    Raises:
        UserError: one of them is not, or there is no folder.
    """
    if folder.is_file():
        hint = "GGUF is not read; " if folder.suffix == ".gguf" else ""
        raise UserError(f"model folder {folder}: a file; {hint}expected the folder of a model")
    if not folder.is_dir():
        raise UserError(
            f"model folder {folder}: no such folder; expected a run, or what `hf download NAME "
            "--local-dir FOLDER` leaves of a model on the Hugging Face hub; if it has moved, "
            f"--config.{setting}=FOLDER says so"
        )
    check_links(folder)
    for name in SMALL_FILES:
        if (folder / name).is_file() and (damage := describe_damage(folder / name)):
            raise UserError(f"{folder / name}: {damage}")
    generation = folder / GENERATION  # Read when a run is exported: too late.
    if generation.is_file() and not isinstance(read_json(generation), dict):
        raise UserError(f"{generation}: expected a JSON object")


def describe_damage(path: Path) -> str:
    """Describes a file that is not what its name says, like a web page; "" if nothing is wrong."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError:  # The reader reports it.
        return ""
    if not start:
        return f"is empty; {CUT_SHORT}"
    if start.startswith(b"version https://git-lfs"):
        return (
            "a Git LFS pointer, not the file itself: `git lfs pull` in the folder fetches it, or "
            "take `hf download`"
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not the file: the download failed (does the model need a login?)"
    if not start.strip(b"\0"):
        return f"begins with zeros only; {CUT_SHORT}"
    if path.suffix == ".safetensors":
        return _describe_damaged_tensors(path, start)
    return ""


def _describe_damaged_tensors(path: Path, start: bytes) -> str:
    if start.startswith(b"GGUF"):
        return "GGUF under another name; take the model's safetensors"
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return f"PyTorch's pickle under another name, which is not read: {HOW_TO_CONVERT}"
    size, length = path.stat().st_size, int.from_bytes(start[:8], "little")
    if size < 8 or start[8:9] not in (b"", b"{") or length > 10**9:
        return ""
    if size < 8 + length:
        promised = 8 + length
    else:
        try:
            with path.open("rb") as file:
                file.seek(8)
                header = json.loads(file.read(length))
            ends = [x["data_offsets"][1] for k, x in header.items() if k != "__metadata__"]
            promised = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError):
            return ""
    if isinstance(promised, int) and size < promised:
        return f"has {size:,} bytes of the {promised:,} that its header tells of; {CUT_SHORT}"
    return ""


def explain_missing_config(folder: Path) -> str:
    """Says what a folder without config.json seems to be, for a message after its name."""
    if description := _describe_run_part(folder):
        return description
    if description := _describe_inner_folders(folder, "config.json"):
        return description
    if (folder / ADAPTER_SETTINGS).is_file():
        return (
            f"adapters (adapter_config.json): give them as --config.model.lora.path={folder}, and "
            f"the model that they adapt{_name_base_model(folder)} as --config.model.path"
        )
    if description := _find_other_weights(folder):
        return description
    patterns = [path for name in DATASETS for path in (name, f"*/{name}")]
    data = [p.name for pattern in patterns for p in folder.glob(pattern)]
    if data:
        return f"a data set (found {_join_names(data)}): --config.data.path is for data"
    names = sorted(p.name for p in folder.iterdir())
    has = f"found {_join_names(names)}" if names else "the folder is empty"
    return f"no config.json: expected the folder of a Hugging Face model; {has}"


def explain_missing_weights(folder: Path) -> str:
    """Says what a folder has instead of weights, for a message after its name."""
    if description := _describe_run_part(folder):
        return description
    problem = f"no weights: expected {WEIGHTS} or {INDEX}"
    for name in (WEIGHTS, INDEX):
        if (folder / name).is_symlink():
            return f"{name} is a link to {(folder / name).readlink()}, which is not there"
    if shards := sorted(p.name for p in folder.glob("model-*-of-[0-9]*.safetensors")):
        total = int(shards[0].rpartition("-of-")[2].partition(".")[0])
        if len(shards) < total:
            names = _join_names(shards)
            return f"{problem}; found {len(shards)} of {total} files ({names}), {CUT_SHORT}"
        return f"{problem}; found {_join_names(shards)}, so only the index is missing: fetch it"
    if (folder / ADAPTER_WEIGHTS).is_file():
        return (
            f"{problem}; found adapters (adapter_model.safetensors): give them as "
            f"--config.model.lora.path={folder}, and the model that they adapt"
            f"{_name_base_model(folder)} as --config.model.path"
        )
    if description := _find_other_weights(folder):
        return f"{problem}; {description}"
    if tensors := sorted(p.name for p in folder.glob("*.safetensors")):
        return f"{problem}; found {_join_names(tensors)}: is it the model under another name?"
    return problem


def explain_missing_adapters(folder: Path) -> str:
    """Says what a folder has instead of PEFT's two files, for a message after its name."""
    missing = ADAPTER_WEIGHTS if (folder / ADAPTER_SETTINGS).is_file() else ADAPTER_SETTINGS
    problem = f"no {missing}; expected adapters in PEFT's format, or a run"
    if not folder.is_dir():
        return f"no such folder ({problem})"
    if (link := folder / ADAPTER_WEIGHTS).is_symlink():
        return f"{ADAPTER_WEIGHTS} is a link to {link.readlink()}, which is not there"
    if (folder / "adapter_model.bin").is_file():
        return (
            f"{problem}; found adapter_model.bin: pickles are not read; load it with PEFT, whose "
            "save_pretrained writes safetensors"
        )
    if description := _describe_inner_folders(folder, ADAPTER_SETTINGS):
        return description
    if (folder / "config.json").is_file():
        return f"{problem}; found a whole model (config.json): that is for --config.model.path"
    names = sorted(p.name for p in folder.iterdir() if p.name != ADAPTER_SETTINGS)
    return f"{problem}; found {_join_names(names)}" if names else problem


def _describe_inner_folders(folder: Path, name: str) -> str:
    """Names inner folders that hold the file, as those of the hub's cache and of trainers."""
    if snapshots := sorted(folder.glob("snapshots/*/")):
        newest = max(snapshots, key=lambda path: path.stat().st_mtime)
        return f"the hub's cache of a model, whose files lie in {newest}: give that folder"
    if cached := sorted(p.name for p in folder.glob("models--*")):
        return (
            f"the hub's cache ({_join_names(cached)}): give one model's folder, "
            f"{folder / cached[0] / 'snapshots'}/HASH"
        )
    if inside := sorted(path.parent.name for path in folder.glob(f"*/{name}")):
        return f"no {name}; {_join_names(inside)} in it has one: give that folder"
    return ""


def _describe_run_part(folder: Path) -> str:
    """Names the run that a folder is a part of, and what names its weights; "" if none."""
    run = find_enclosing_run(folder)
    return f"a part of the run {run}: give that, or {run / CHECKPOINTS}/STEP" if run else ""


def _find_other_weights(folder: Path) -> str:
    """Names weights of another format in a folder, and what to do; "" if there are none."""
    for pattern, advice in OTHER_WEIGHTS.items():
        if names := sorted(p.name for p in folder.glob(pattern)):
            return f"found {_join_names(names)}: {advice}"
    return ""


def _name_base_model(folder: Path) -> str:
    """Returns the name of the model that adapters were made for, in brackets; "" if unknown."""
    try:
        settings = json.loads((folder / ADAPTER_SETTINGS).read_text(encoding="utf-8"))
        name = settings["base_model_name_or_path"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ""
    return f" ({name})" if name and isinstance(name, str) else ""


def _join_names(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
