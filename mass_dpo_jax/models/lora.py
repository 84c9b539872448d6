"""Adapters added to their weights, and as PEFT's folders keep them."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.files import read_json
from mass_dpo_jax.models.adapters import Lora
from mass_dpo_jax.models.config import MOST_OF_AN_AXIS, PRODUCTS, TARGETS, DecoderConfig
from mass_dpo_jax.models.folder import warn_once
from mass_dpo_jax.models.frozen import dense
from mass_dpo_jax.models.tensors import (
    check_finite,
    check_type,
    instead,
    open_tensors,
    write_tensors,
)

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = "base_model.model.model.layers.{layer}.{module}.lora_{part}.weight"
PARTS = {"a": "A", "b": "B"}
LARGEST = float(np.finfo(np.float32).max)

# Of PEFT's settings, those that say nothing of what adapters compute or that are read below ...
NOT_COMPUTED = frozenset(
    (
        "r lora_alpha use_rslora target_modules lora_dropout base_model_name_or_path revision "
        "peft_version auto_mapping inference_mode runtime_config eva_config megatron_core "
        "qalora_group_size ensure_weight_tying"
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
}


def without_idle(params: Any) -> Any:
    """The same function of text with zeros in the place of adapters that add nothing (B = 0): two
    models that differ only in what was drawn for A get the same weights."""
    adapters = {
        name: {"a": jnp.where(jnp.any(x["b"] != 0), x["a"], 0.0), "b": x["b"]}
        for name, x in params["adapters"].items()
    }
    return {**params, "adapters": adapters}


def merge(params: Any, lora: Lora, shardings: Any = None) -> Any:
    """Frozen weights and adapters as one decoder's float32 weights, without adapters.

    Args:
      params: as `training.policy.Policy.weights` gives them with LoRA.
      lora: the adapters' settings.
      shardings: of the result, a tree like it; None: as the compiler likes.
    """
    base = {name: tree for name, tree in params.items() if name != "adapters"}
    adapters = lora.scaled(params["adapters"])

    def leaf(path: Any, weights: Any, place: Any = None) -> jax.Array:
        name = path[-2].key if path[-1].key == "kernel" else ""
        return jax.jit(_merged, out_shardings=place)(weights, adapters.get(name))

    places = () if shardings is None else (shardings,)
    is_leaf = functools.partial(_isinstance, kind=qwix.QArray)
    return jax.tree.map_with_path(leaf, base, *places, is_leaf=is_leaf)


def _isinstance(x: Any, kind: type) -> bool:
    return isinstance(x, kind)


def _merged(weights: Any, adapter: Mapping[str, jax.Array] | None) -> jax.Array:
    found = dense(weights, jnp.float32)
    if adapter is None:
        return found
    exact = jax.lax.Precision.HIGHEST
    return found + jnp.einsum("lir,lro->lio", adapter["a"], adapter["b"], precision=exact)


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
                key = NAME.format(layer=layer, module=PRODUCTS[name], part=PARTS[part])
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
        raise UserError(f"{folder}: no {SETTINGS}; expected adapters in PEFT's format, or a run")
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
    if named == "all-linear":
        named = list(TARGETS)
    if not isinstance(named, list) or not named:
        raise UserError(f"{path}: target_modules: found {named!r}, expected a list of names")
    for name in named:
        if not isinstance(name, str) or name not in TARGETS:
            known = ", ".join(TARGETS)
            raise UserError(f"{path}: target_modules: found {name!r}, expected some of {known}")
    targets = tuple(ours for theirs, ours in TARGETS.items() if theirs in named)
    _weights_file(folder)
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


def _weights_file(folder: Path) -> Path:
    """The file of adapters in a folder.

    Raises:
      UserError: there is none; names what there is instead.
    """
    path = folder / WEIGHTS
    if path.is_file():
        return path
    if path.is_symlink():
        raise UserError(f"{path}: a link to {path.resolve()}, which is not there")
    other = folder / "adapter_model.bin"
    has = ""
    if other.is_file():
        has = (
            f" (found {other.name}, which is a pickle and not read: load it with PEFT, and "
            "save_pretrained writes safetensors)"
        )
    elif names := sorted(p.name for p in folder.iterdir() if p.name != SETTINGS):
        has = f" (found {', '.join(names[:5])})"
    raise UserError(f"{folder}: no {WEIGHTS}{has}; expected adapters in PEFT's format, or a run")


def load_peft(folder: str | Path, config: DecoderConfig, like: Any) -> Any:
    """Adapters of a folder in PEFT's format, float32.

    Args:
      folder: has `adapter_model.safetensors`.
      config: of the decoder that they adapt.
      like: shapes with shardings, as `params["adapters"]`.

    Raises:
      UserError: names the tensor that is missing, unknown or of a wrong shape.
    """
    path = _weights_file(Path(folder))
    with open_tensors(path) as file:
        listed = sorted(file.keys())
        for name in listed:
            check_type(file, path, name)
        tensors = _plain_names(path, {name: file.get_tensor(name) for name in listed})

    def read(at: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        module, part = PRODUCTS[at[0].key], PARTS[at[1].key]
        expected = list(leaf.shape[:0:-1])
        layers = []
        for layer in range(config.num_layers):
            name = NAME.format(layer=layer, module=module, part=part)
            if name not in tensors:
                hint = instead(name, listed)
                raise UserError(f"{path}: missing tensor {name}, shape {expected}{hint}")
            found = tensors.pop(name)
            if list(found.shape) != expected:
                raise UserError(
                    f"{path}: tensor {name}: found shape {list(found.shape)}, expected {expected}"
                )
            layers.append(found.T.astype(np.float32))
            check_finite(layers[-1], path, name)
        return jax.device_put(np.stack(layers), leaf.sharding)

    adapters = jax.tree.map_with_path(read, like)
    if tensors:
        raise UserError(f"{path}: unexpected tensor {min(tensors)} for its {SETTINGS}")
    return adapters


def _plain_names(path: Path, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the name of the adapters in `lora_A.NAME.weight`, which a model's own state has."""
    plain = {
        re.sub(r"(\.lora_[AB])\.[^.]+\.weight$", r"\1.weight", k): x for k, x in tensors.items()
    }
    if len(plain) < len(tensors):
        names = {k.rsplit(".", 2)[1] for k in tensors if k.endswith(".weight")}
        raise UserError(f"{path}: several adapters in one file: {', '.join(sorted(names))}")
    return plain
