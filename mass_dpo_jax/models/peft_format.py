"""Adapters in PEFT's folders, read and written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.config import TARGETS, DecoderConfig
from mass_dpo_jax.models.families import FUSED, PROJECTIONS
from mass_dpo_jax.models.fields import MAX_AXIS_SIZE
from mass_dpo_jax.models.folder import ADAPTER_SETTINGS as SETTINGS
from mass_dpo_jax.models.folder import ADAPTER_WEIGHTS as WEIGHTS
from mass_dpo_jax.models.folder import describe_damage, explain_missing_adapters, warn_once
from mass_dpo_jax.models.lora import Lora
from mass_dpo_jax.models.tensors import (
    check_finite,
    check_type,
    open_tensors,
    suggest_tensor,
    write_tensors,
)
from mass_dpo_jax.utils.files import check_links, read_json

NAME = "base_model.model.model.layers.{layer}.{module}.lora_{part}.weight"
# How names begin in a text model, and in one that is part of a multimodal model.
TEXT_MODEL = "base_model.model.model."
PARTS_OF = ("base_model.model.model.language_model.", "base_model.model.language_model.model.")
PARTS = {"a": "A", "b": "B"}
MAX_ALPHA = float(np.finfo(np.float32).max)

# PEFT's settings that do not change what adapters compute, that are read below or that choose
# projections, of which there must be tensors ...
IGNORED_SETTINGS = frozenset(
    (
        "r lora_alpha use_rslora target_modules lora_dropout base_model_name_or_path revision "
        "peft_version auto_mapping inference_mode runtime_config eva_config megatron_core "
        "qalora_group_size ensure_weight_tying exclude_modules"
    ).split()
)
# ... and values of others with which PEFT's adapters compute what ours do. Any other setting, those
# of future versions included, has to be null, false or empty.
SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    # Others subtract the adapters they draw from the base's weights, when PEFT loads them too.
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
    "fan_in_fan_out": (True,),  # PEFT takes it as false in linear layers, as all are here.
}


def save_peft(folder: Path, adapters: Any, lora: Lora, base: str, part_of: str = "") -> None:
    """Writes adapters as PEFT reads them, float32: `PeftModel.from_pretrained(model, folder)`.

    Args:
        folder: the folder to write into, created if it is missing.
        adapters: `params["adapters"]`, on any devices.
        lora: the adapters' settings.
        base: the name or folder of the model that they adapt.
        part_of: `DecoderConfig.part_of`.

    Raises:
        UserError: the file of tensors cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, parts in adapters.items():
        for part, array in parts.items():
            for layer, matrix in enumerate(np.asarray(array)):
                key = NAME.format(layer=layer, module=PROJECTIONS[name], part=PARTS[part])
                if part_of:
                    key = key.replace(TEXT_MODEL, PARTS_OF[0])
                tensors[key] = np.ascontiguousarray(matrix.T)
    write_tensors(tensors, folder / WEIGHTS)
    peft_names = {ours: theirs for theirs, ours in TARGETS.items()}
    targets: Any = [peft_names[name] for name in lora.targets]
    if part_of:  # The other parts have modules of these names, too.
        targets = rf".*\blanguage_model\b.*\.({'|'.join(targets)})"
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": targets,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def check_exportable(config: DecoderConfig) -> None:
    """Raises UserError if PEFT cannot adapt a model's projections one by one, as we do."""
    theirs = list(config.family.projections.values())
    if fused := sorted({name.rpartition(".")[2] for name in theirs if theirs.count(name) > 1}):
        raise UserError(
            f"--adapters: a {config.model_type} model keeps several projections as one matrix "
            f"({', '.join(fused)}), to which PEFT adds one adapter; leave --adapters out, and the "
            "exported folder is the model with its adapters merged"
        )


def load_peft_settings(folder: Path) -> Lora:
    """Reads rank, alpha and targets of a folder in PEFT's format.

    Raises:
        UserError: there is none, or its adapters may compute something else than ours.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise UserError(f"{folder}: {explain_missing_adapters(folder)}")
    check_links(folder)
    if problem := describe_damage(path):
        raise UserError(f"{path}: {problem}")
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise UserError(f"{path}: found {type(settings).__name__}, expected a JSON object")
    if "peft_type" not in settings:
        fields = ", ".join(sorted(settings)[:8]) or "nothing"
        raise UserError(
            f"{path}: not PEFT's format, which has peft_type, r and lora_alpha (found {fields}); "
            "adapters of MLX and other programs have to be converted, or merged into their base"
        )
    for field, value in settings.items():
        if field not in IGNORED_SETTINGS:
            _check_setting(path, field, value)
    rank, alpha = _read_rank_and_alpha(path, settings)
    targets = _read_targets(path, settings)
    if settings.get("lora_dropout"):
        warn_once(
            f"{path}: lora_dropout={settings['lora_dropout']} was theirs in training; ours is "
            "config.model.lora.dropout"
        )
    return Lora(rank, alpha, targets)


def _read_rank_and_alpha(path: Path, settings: Mapping[str, Any]) -> tuple[int, float]:
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank <= MAX_AXIS_SIZE:
        raise UserError(f"{path}: r: found {rank!r}, expected a positive integer")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha <= MAX_ALPHA:
        raise UserError(f"{path}: lora_alpha: found {alpha!r}, expected a positive number")
    if (rank_stabilized := settings.get("use_rslora")) not in (None, False, True):
        raise UserError(f"{path}: use_rslora: found {rank_stabilized!r}, expected true or false")
    if rank_stabilized:  # Their alpha / sqrt(r) is our alpha / r.
        alpha *= math.sqrt(rank)
    return rank, float(alpha)


def _read_targets(path: Path, settings: Mapping[str, Any]) -> tuple[str, ...]:
    modules = value = settings.get("target_modules")
    adapted = _list_adapted_modules(_find_weights(path.parent))
    if value == "all-linear":
        modules = list(TARGETS)
    elif isinstance(value, str):  # A pattern; the file has what it matched.
        modules = adapted
    if not isinstance(modules, list) or not modules:
        raise UserError(f"{path}: target_modules: found {value!r}, expected a list of names")
    for name in modules:
        if fused := next((x for x in FUSED if f".{x}".endswith(f".{name}")), None):
            parts = ", ".join(x for x, ours in TARGETS.items() if ours in FUSED[fused])
            raise UserError(
                f"{path}: target_modules: {name} gets one adapter there and one each of {parts} "
                "here, which train differently; merge it into its base (merge_and_unload of PEFT) "
                "and give that as config.model.path"
            )
        if not isinstance(name, str) or _find_projection(name) is None:
            expected = ", ".join(TARGETS)
            raise UserError(f"{path}: target_modules: found {name!r}, expected some of {expected}")
    return tuple(ours for ours in PROJECTIONS if ours in map(_find_projection, modules))


def _check_setting(path: Path, field: str, value: Any) -> None:
    """Raises UserError unless adapters with this setting compute what ours do."""
    if value is None or value is False or value in ("", [], {}):
        return
    supported = SUPPORTED_VALUES.get(field, ())
    if any(type(value) is type(x) and value == x for x in supported):
        return
    expected = " or ".join(map(repr, supported)) or "null, false or nothing"
    raise UserError(
        f"{path}: {field}: found {value!r}, expected {expected}: only adapters that add "
        "(alpha / r) (x A) B are read; merge others into their base (merge_and_unload of PEFT, "
        "where it can) and give that as config.model.path"
    )


def _find_projection(name: str) -> str | None:
    """Returns our name of the projection that PEFT calls `q_proj` or `self_attn.q_proj`."""
    return next((x for x, theirs in PROJECTIONS.items() if f".{theirs}".endswith(f".{name}")), None)


def _list_adapted_modules(path: Path) -> list[str]:
    """Lists the projections that a file has adapters of, by PEFT's names."""
    names = list(open_tensors(path).keys())
    return [x for x in TARGETS if any(f".{x}.lora_A." in name for name in names)]


def _find_weights(folder: Path) -> Path:
    """Returns the file of adapters in a folder; UserError if there is none."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{folder}: {explain_missing_adapters(folder)}")
    return path


def load_peft(folder: str | Path, config: DecoderConfig, abstract: Any) -> Any:
    """Reads the adapters of a folder in PEFT's format, float32.

    Args:
        folder: the folder.
        config: configuration of the decoder that they adapt.
        abstract: shapes with shardings, as `params["adapters"]`.

    Raises:
        UserError: the same as for `check_peft`; or a tensor holds NaN or infinity.
    """
    path, file, names = check_peft(folder, config, abstract)

    def read(path_in_tree: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        layers = []
        for name in _list_tensors(path_in_tree, config):
            layers.append(file.get_tensor(names[name]).T.astype(np.float32))
            check_finite(layers[-1], path, name)
        return jax.device_put(np.stack(layers), leaf.sharding)

    return jax.tree.map_with_path(read, abstract)


def check_peft(
    folder: str | Path, config: DecoderConfig, abstract: Any
) -> tuple[Path, Any, dict[str, str]]:
    """Opens a folder's adapters and checks them against `abstract`, reading headers only.

    Returns:
        The path, the open file, and its own names of tensors by PEFT's.

    Raises:
        UserError: a tensor is missing, unknown or of a wrong shape or type.
    """
    path = _find_weights(Path(folder))
    file = open_tensors(path)
    present = sorted(file.keys())
    names = _map_names(path, present)
    unknown = set(names)
    for path_in_tree, leaf in jax.tree.leaves_with_path(abstract):
        expected = list(leaf.shape[:0:-1])
        for name in _list_tensors(path_in_tree, config):
            if name not in names:
                hint = suggest_tensor(name, present)
                raise UserError(f"{path}: missing tensor {name}, shape {expected}{hint}")
            if (shape := file.get_slice(names[name]).get_shape()) != expected:
                raise UserError(
                    f"{path}: tensor {name}: found shape {shape}, expected {expected} (are these "
                    "adapters of another model?)"
                )
            check_type(file, path, names[name])
            unknown.discard(name)
    if unknown:
        raise UserError(f"{path}: unexpected tensor {min(unknown)} for its {SETTINGS}")
    return path, file, names


def _list_tensors(at: Any, config: DecoderConfig) -> list[str]:
    """Lists PEFT's names of each layer's part of `params["adapters"]` at a path."""
    module, part = PROJECTIONS[at[0].key], PARTS[at[1].key]
    layers = range(config.num_layers)
    return [NAME.format(layer=layer, module=module, part=part) for layer in layers]


def _map_names(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Maps names without the adapters' own in `lora_A.NAME.weight` to those of a file.

    The state of a model with adapters has that name, a saved folder has not. Names of a multimodal
    model's text model become those of a text model.
    """
    plain = {}
    for name in names:
        short = re.sub(r"(\.lora_[AB])\.[^.]+\.weight$", r"\1.weight", name)
        for start in PARTS_OF:
            short = short.replace(start, TEXT_MODEL)
        plain[short] = name
    if len(plain) < len(names):
        several = {name.rsplit(".", 2)[1] for name in names if name.endswith(".weight")}
        raise UserError(f"{path}: several adapters in one file: {', '.join(sorted(several))}")
    return plain
