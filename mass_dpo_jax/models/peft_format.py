"""Adapters in PEFT's folders, read and written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.config import PROJECTIONS, TARGETS, DecoderConfig
from mass_dpo_jax.models.fields import MOST_OF_AN_AXIS
from mass_dpo_jax.models.folder import ADAPTERS as WEIGHTS
from mass_dpo_jax.models.folder import ADAPTERS_SETTINGS as SETTINGS
from mass_dpo_jax.models.folder import damage, no_adapters, warn_once
from mass_dpo_jax.models.lora import Lora
from mass_dpo_jax.models.tensors import (
    check_finite,
    check_type,
    instead,
    open_tensors,
    write_tensors,
)
from mass_dpo_jax.utils.files import check_links, read_json

NAME = "base_model.model.model.layers.{layer}.{module}.lora_{part}.weight"
PARTS = {"a": "A", "b": "B"}
LARGEST = float(np.finfo(np.float32).max)

# Of PEFT's settings, those that say nothing of what adapters compute, that are read below or that
# choose products, of which there must be tensors ...
NOT_COMPUTED = frozenset(
    (
        "r lora_alpha use_rslora target_modules lora_dropout base_model_name_or_path revision "
        "peft_version auto_mapping inference_mode runtime_config eva_config megatron_core "
        "qalora_group_size ensure_weight_tying exclude_modules"
    ).split()
)
# ... and the values of others with which they compute what ours do. All that is in neither, also
# what PEFT will have one day, has to be null, false or empty.
COMPUTED_ALIKE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    # Others subtract the adapters that they draw from the base's weights, when PEFT loads them too.
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
    "fan_in_fan_out": (True,),  # PEFT takes it as false where a layer is linear, as all of ours.
}


def save_peft(folder: Path, adapters: Any, lora: Lora, base: str) -> None:
    """Writes adapters as PEFT reads them, float32: `PeftModel.from_pretrained(model, folder)`.

    Args:
      folder: is made if it is missing.
      adapters: `params["adapters"]`, on any devices.
      lora: their settings.
      base: the name or folder of the model that they adapt.

    Raises:
      UserError: the file of tensors cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, parts in adapters.items():
        for part, array in parts.items():
            for layer, matrix in enumerate(np.asarray(array)):
                key = NAME.format(layer=layer, module=PROJECTIONS[name], part=PARTS[part])
                tensors[key] = np.ascontiguousarray(matrix.T)
    write_tensors(tensors, folder / WEIGHTS)
    theirs = {ours: theirs for theirs, ours in TARGETS.items()}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": [theirs[name] for name in lora.targets],
        "bias": "none",
        "inference_mode": True,
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def load_peft_settings(folder: Path) -> Lora:
    """Rank, alpha and targets of a folder in PEFT's format.

    Raises:
      UserError: there is none, it computes something else than these adapters, or it is not
        known whether it does.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise UserError(f"{folder}: {no_adapters(folder)}")
    check_links(folder)
    if what := damage(path):
        raise UserError(f"{path}: {what}")
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: found {type(found).__name__}, expected a JSON object")
    if "peft_type" not in found:
        shown = ", ".join(sorted(found)[:8]) or "nothing"
        raise UserError(
            f"{path}: not PEFT's format, which has peft_type, r and lora_alpha (found {shown}); "
            "adapters of MLX and other programs have to be converted, or merged into their base"
        )
    for field, value in found.items():
        if field not in NOT_COMPUTED:
            _check_setting(path, field, value)
    rank, alpha = found.get("r"), found.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank <= MOST_OF_AN_AXIS:
        raise UserError(f"{path}: r: found {rank!r}, expected a positive integer")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha <= LARGEST:
        raise UserError(f"{path}: lora_alpha: found {alpha!r}, expected a positive number")
    if (root := found.get("use_rslora")) not in (None, False, True):
        raise UserError(f"{path}: use_rslora: found {root!r}, expected true or false")
    if root:  # Their alpha / sqrt(r) is our alpha / r.
        alpha *= math.sqrt(rank)
    named = found.get("target_modules")
    there = _modules(_weights_file(folder))
    if named == "all-linear":
        named = list(TARGETS)
    elif isinstance(named, str):  # A pattern, of which the file has what it matched.
        named = there
    if not isinstance(named, list) or not named:
        raise UserError(
            f"{path}: target_modules: found {found.get('target_modules')!r}, expected a list of "
            "names"
        )
    for name in named:
        if not isinstance(name, str) or _product(name) is None:
            known = ", ".join(TARGETS)
            raise UserError(f"{path}: target_modules: found {name!r}, expected some of {known}")
    targets = tuple(ours for ours in PROJECTIONS if ours in map(_product, named))
    if found.get("lora_dropout"):
        warn_once(
            f"{path}: lora_dropout={found['lora_dropout']}: not used, training goes on without"
        )
    return Lora(rank, float(alpha), targets)


def _check_setting(path: Path, field: str, value: Any) -> None:
    """Raises UserError unless adapters with this setting compute what ours do."""
    if value is None or value is False or value in ("", [], {}):
        return
    known = COMPUTED_ALIKE.get(field, ())
    if any(type(value) is type(k) and value == k for k in known):
        return
    expected = " or ".join(map(repr, known)) if known else "null, false or nothing"
    raise UserError(
        f"{path}: {field}: found {value!r}, expected {expected}: only adapters that add "
        "(alpha / r) (x A) B are read; merge others into their base (merge_and_unload of PEFT, "
        "where it can) and give that as config.model.path"
    )


def _product(name: str) -> str | None:
    """Our name of the product that PEFT calls so: `q_proj` or `self_attn.q_proj`."""
    return next((x for x, theirs in PROJECTIONS.items() if f".{theirs}".endswith(f".{name}")), None)


def _modules(path: Path) -> list[str]:
    """The names of the products that a file has adapters of."""
    names = list(open_tensors(path).keys())
    return [x for x in TARGETS if any(f".{x}.lora_A." in name for name in names)]


def _weights_file(folder: Path) -> Path:
    """The file of adapters in a folder; UserError where there is none."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{folder}: {no_adapters(folder)}")
    return path


def load_peft(folder: str | Path, config: DecoderConfig, like: Any) -> Any:
    """Adapters of a folder in PEFT's format, float32.

    Args:
      folder: has `adapter_model.safetensors`.
      config: of the decoder that they adapt.
      like: shapes with shardings, as `params["adapters"]`.

    Raises:
      UserError: as `check_peft`; or a tensor holds NaN or infinity.
    """
    path, file, names = check_peft(folder, config, like)

    def read(at: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        layers = []
        for name in _names(at, config):
            layers.append(file.get_tensor(names[name]).T.astype(np.float32))
            check_finite(layers[-1], path, name)
        return jax.device_put(np.stack(layers), leaf.sharding)

    return jax.tree.map_with_path(read, like)


def check_peft(
    folder: str | Path, config: DecoderConfig, like: Any
) -> tuple[Path, Any, dict[str, str]]:
    """The open file of a folder in PEFT's format and, under PEFT's names, its own; reads headers.

    Raises:
      UserError: names the tensor that is missing, unknown or of a wrong shape or type.
    """
    path = _weights_file(Path(folder))
    file = open_tensors(path)
    there = sorted(file.keys())
    names = _plain_names(path, there)
    unknown = set(names)
    for at, leaf in jax.tree.leaves_with_path(like):
        expected = list(leaf.shape[:0:-1])
        for name in _names(at, config):
            if name not in names:
                hint = instead(name, there)
                raise UserError(f"{path}: missing tensor {name}, shape {expected}{hint}")
            if (found := file.get_slice(names[name]).get_shape()) != expected:
                raise UserError(
                    f"{path}: tensor {name}: found shape {found}, expected {expected} (are these "
                    "adapters of another model?)"
                )
            check_type(file, path, names[name])
            unknown.discard(name)
    if unknown:
        raise UserError(f"{path}: unexpected tensor {min(unknown)} for its {SETTINGS}")
    return path, file, names


def _names(at: Any, config: DecoderConfig) -> list[str]:
    """PEFT's names of a part of a product's adapters, by its path in `params["adapters"]`."""
    module, part = PROJECTIONS[at[0].key], PARTS[at[1].key]
    layers = range(config.num_layers)
    return [NAME.format(layer=layer, module=module, part=part) for layer in layers]


def _plain_names(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Those of a file under what they are without the name of the adapters in
    `lora_A.NAME.weight`, which a model's own state has."""
    plain = {re.sub(r"(\.lora_[AB])\.[^.]+\.weight$", r"\1.weight", name): name for name in names}
    if len(plain) < len(names):
        several = {name.rsplit(".", 2)[1] for name in names if name.endswith(".weight")}
        raise UserError(f"{path}: several adapters in one file: {', '.join(sorted(several))}")
    return plain
