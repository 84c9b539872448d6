"""Adapters added to their weights, and as PEFT's folders keep them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from safetensors import SafetensorError, safe_open

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.files import read_json
from mass_dpo_jax.models.adapters import Lora
from mass_dpo_jax.models.config import PRODUCTS, TARGETS, DecoderConfig
from mass_dpo_jax.models.frozen import dense
from mass_dpo_jax.models.weights import write_tensors

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = "base_model.model.model.layers.{layer}.{module}.lora_{part}.weight"
PARTS = {"a": "A", "b": "B"}

# Settings of PEFT's that change what adapters compute, with the only value that ours know.
ONLY = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "layer_replication": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "exclude_modules": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "lora_bias": False,
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
      UserError: there is none, or it computes something else than these adapters.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise UserError(f"{folder}: no {SETTINGS}; expected adapters in PEFT's format, or a run")
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: found {type(found).__name__}, expected a JSON object")
    for field, value in ONLY.items():
        if found.get(field, value) not in (value, None):
            raise UserError(f"{path}: {field}: found {found[field]!r}, expected {value!r}")
    rank, alpha = found.get("r"), found.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UserError(f"{path}: r: found {rank!r}, expected a positive integer")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not alpha > 0:
        raise UserError(f"{path}: lora_alpha: found {alpha!r}, expected a positive number")
    named = found.get("target_modules")
    if named == "all-linear":
        named = list(TARGETS)
    if not isinstance(named, list) or not named:
        raise UserError(f"{path}: target_modules: found {named!r}, expected a list of names")
    for name in named:
        if name not in TARGETS:
            known = ", ".join(TARGETS)
            raise UserError(f"{path}: target_modules: found {name!r}, expected some of {known}")
    targets = tuple(ours for theirs, ours in TARGETS.items() if theirs in named)
    return Lora(rank, float(alpha), targets)


def load_peft(folder: str | Path, config: DecoderConfig, like: Any) -> Any:
    """Adapters of a folder in PEFT's format, float32.

    Args:
      folder: has `adapter_model.safetensors`.
      config: of the decoder that they adapt.
      like: shapes with shardings, as `params["adapters"]`.

    Raises:
      UserError: names the tensor that is missing, unknown or of a wrong shape.
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise UserError(f"{folder}: no {WEIGHTS}; expected adapters in PEFT's format, or a run")
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from None

    def read(at: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        module, part = PRODUCTS[at[0].key], PARTS[at[1].key]
        stack = np.empty(leaf.shape, np.float32)
        expected = list(leaf.shape[:0:-1])
        for layer in range(config.num_layers):
            name = NAME.format(layer=layer, module=module, part=part)
            if name not in tensors:
                raise UserError(f"{path}: missing tensor {name}, shape {expected}")
            found = tensors.pop(name)
            if list(found.shape) != expected:
                raise UserError(
                    f"{path}: tensor {name}: found shape {list(found.shape)}, expected {expected}"
                )
            stack[layer] = found.T
        return jax.device_put(stack, leaf.sharding)

    adapters = jax.tree.map_with_path(read, like)
    if tensors:
        raise UserError(f"{path}: unexpected tensor {min(tensors)} for its {SETTINGS}")
    return adapters
