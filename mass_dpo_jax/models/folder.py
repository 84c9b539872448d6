"""What lies in a folder that is given as a model, told by names, sizes and first bytes.

Readers of config.json, tokenizers and weights say with it what they found instead. No JAX.
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
ADAPTERS, ADAPTERS_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
GENERATION = "generation_config.json"
SMALL = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
    GENERATION,
)

CONVERT = (
    "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW) of transformers writes "
    "safetensors"
)
# Weights that are not read, by the patterns of their names, and what to do.
OTHER_WEIGHTS = {
    "pytorch_model*.bin": f"pickles are not read; convert them to safetensors: {CONVERT}",
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
DATA = ("dataset_dict.json", "dataset_info.json", "state.json", "*.parquet", "*.arrow", "*.jsonl")
SHOWN = 5  # Names in a message.
CUT = "was the download cut short? Start it again"

_log = logging.getLogger(__name__)


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning, which the reader of a file would give at each of several readings, once."""
    _log.warning(message)


def check_folder(folder: Path, setting: str = "model.path") -> None:
    """Raises UserError unless this is a folder whose small files are what their names say, and of
    which only weights are links to elsewhere.

    Args:
      setting: what names it, for messages.
    """
    if folder.is_file():
        kind = "GGUF is not read; " if folder.suffix == ".gguf" else ""
        raise UserError(f"model folder {folder}: a file; {kind}expected the folder of a model")
    if not folder.is_dir():
        raise UserError(
            f"model folder {folder}: no such folder; expected a run, or what `hf download NAME "
            "--local-dir FOLDER` leaves of a model on the Hugging Face hub; if it has moved, "
            f"--config.{setting}=FOLDER says so"
        )
    check_links(folder)
    for name in SMALL:
        if (folder / name).is_file() and (what := damage(folder / name)):
            raise UserError(f"{folder / name}: {what}")
    generation = folder / GENERATION  # Read when a run is exported: too late.
    if generation.is_file() and not isinstance(read_json(generation), dict):
        raise UserError(f"{generation}: expected a JSON object")


def damage(path: Path) -> str:
    """What a file is that its name does not say: cut short, a page of the web; "" for the rest."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError:  # Who reads it says so.
        return ""
    if not start:
        return f"is empty; {CUT}"
    if start.startswith(b"version https://git-lfs"):
        return (
            "a Git LFS pointer, not the file itself: `git lfs pull` in the folder fetches it, or "
            "take `hf download`"
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not the file: the download failed (does the model need a login?)"
    if not start.strip(b"\0"):
        return f"begins with zeros only; {CUT}"
    if path.suffix == ".safetensors":
        return _damaged_tensors(path, start)
    return ""


def _damaged_tensors(path: Path, start: bytes) -> str:
    if start.startswith(b"GGUF"):
        return "GGUF under another name; take the model's safetensors"
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return f"PyTorch's pickle under another name, which is not read: {CONVERT}"
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
        return f"has {size:,} bytes of the {promised:,} that its header tells of; {CUT}"
    return ""


def no_config(folder: Path) -> str:
    """What a folder without config.json seems to be, for a message that begins with its name."""
    if what := _part_of_run(folder):
        return what
    if what := _files_inside(folder, "config.json"):
        return what
    if (folder / ADAPTERS_SETTINGS).is_file():
        return (
            f"adapters (adapter_config.json): give them as --config.model.lora.path={folder}, and "
            f"the model that they adapt{_base(folder)} as --config.model.path"
        )
    if what := other_weights(folder):
        return what
    data = [
        p.name for pattern in DATA for p in (*folder.glob(pattern), *folder.glob(f"*/{pattern}"))
    ]
    if data:
        return f"a data set (found {_names(data)}): --config.data.path is for data"
    found = sorted(p.name for p in folder.iterdir())
    has = f"found {_names(found)}" if found else "the folder is empty"
    return f"no config.json: expected the folder of a Hugging Face model; {has}"


def no_weights(folder: Path) -> str:
    """What a folder has instead of weights, for a message that begins with its name."""
    if what := _part_of_run(folder):
        return what
    expected = f"no weights: expected {WEIGHTS} or {INDEX}"
    for name in (WEIGHTS, INDEX):
        if (folder / name).is_symlink():
            return f"{name} is a link to {(folder / name).readlink()}, which is not there"
    if shards := sorted(p.name for p in folder.glob("model-*-of-[0-9]*.safetensors")):
        total = int(shards[0].rpartition("-of-")[2].partition(".")[0])
        if len(shards) < total:
            return f"{expected}; found {len(shards)} of {total} files ({_names(shards)}), {CUT}"
        return f"{expected}; found {_names(shards)}, so only the index is missing: fetch it"
    if (folder / ADAPTERS).is_file():
        return (
            f"{expected}; found adapters (adapter_model.safetensors): give them as "
            f"--config.model.lora.path={folder}, and the model that they adapt{_base(folder)} as "
            "--config.model.path"
        )
    if what := other_weights(folder):
        return f"{expected}; {what}"
    if tensors := sorted(p.name for p in folder.glob("*.safetensors")):
        return f"{expected}; found {_names(tensors)}: is it the model under another name?"
    return expected


def no_adapters(folder: Path) -> str:
    """What a folder without PEFT's two files has instead, for a message as `no_config`'s."""
    expected = (
        f"no {ADAPTERS}" if (folder / ADAPTERS_SETTINGS).is_file() else f"no {ADAPTERS_SETTINGS}"
    )
    expected += "; expected adapters in PEFT's format, or a run"
    if not folder.is_dir():
        return f"no such folder ({expected})"
    if (folder / ADAPTERS).is_symlink():
        return f"{ADAPTERS} is a link to {(folder / ADAPTERS).readlink()}, which is not there"
    if (folder / "adapter_model.bin").is_file():
        return (
            f"{expected}; found adapter_model.bin: pickles are not read; load it with PEFT, whose "
            "save_pretrained writes safetensors"
        )
    if what := _files_inside(folder, ADAPTERS_SETTINGS):
        return what
    if (folder / "config.json").is_file():
        return f"{expected}; found a whole model (config.json): that is for --config.model.path"
    found = sorted(p.name for p in folder.iterdir() if p.name != ADAPTERS_SETTINGS)
    return f"{expected}; found {_names(found)}" if found else expected


def _files_inside(folder: Path, name: str) -> str:
    """Which folders in this one hold a file, if any: the hub's cache has them, and trainers."""
    if snapshots := sorted(folder.glob("snapshots/*/")):
        newest = max(snapshots, key=lambda path: path.stat().st_mtime)
        return f"the hub's cache of a model, whose files lie in {newest}: give that folder"
    if cached := sorted(p.name for p in folder.glob("models--*")):
        return (
            f"the hub's cache ({_names(cached)}): give one model's folder, "
            f"{folder / cached[0] / 'snapshots'}/HASH"
        )
    if inside := sorted(path.parent.name for path in folder.glob(f"*/{name}")):
        return f"no {name}; {_names(inside)} in it has one: give that folder"
    return ""


def _part_of_run(folder: Path) -> str:
    """Which run a folder is a part of, if any, and what names its weights."""
    run = find_enclosing_run(folder)
    return f"a part of the run {run}: give that, or {run / CHECKPOINTS}/STEP" if run else ""


def other_weights(folder: Path) -> str:
    """Which weights of another format a folder has, and what to do; "" for none."""
    for pattern, what in OTHER_WEIGHTS.items():
        if found := sorted(p.name for p in folder.glob(pattern)):
            return f"found {_names(found)}: {what}"
    return ""


def _base(folder: Path) -> str:
    """The name of the model that adapters were made for, in brackets, as far as they tell."""
    try:
        found = json.loads((folder / ADAPTERS_SETTINGS).read_text(encoding="utf-8"))
        name = found["base_model_name_or_path"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ""
    return f" ({name})" if name and isinstance(name, str) else ""


def _names(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
