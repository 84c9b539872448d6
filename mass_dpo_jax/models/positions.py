"""What a `config.json` says of positions: rotary angles, and windows of attention, without JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from mass_dpo_jax.models.families import Family
from mass_dpo_jax.models.fields import FieldReader

LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's scaling of the rotary frequencies; it changes short contexts too."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def to_hf(self) -> dict[str, Any]:
        """Returns the fields of `rope_scaling`."""
        return {
            "rope_type": "llama3",
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_max_positions,
        }


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """All rotary frequencies divided by a factor."""

    factor: float

    def to_hf(self) -> dict[str, Any]:
        """Returns the fields of `rope_scaling`."""
        return {"rope_type": "linear", "factor": self.factor}


Scaling = Llama3Scaling | LinearScaling


class Rope(NamedTuple):
    """Rotary settings: the base, its scaling, and the base of local layers where it is another."""

    theta: float
    scaling: Scaling | None = None
    local_theta: float | None = None


def read_rope(reader: FieldReader, family: Family, max_positions: int) -> Rope:
    """Reads rotary settings.

    As in transformers 5, a scaling outside wins over one in `rope_parameters`, and a base inside
    wins over one outside.
    """
    config = reader.config
    if "rope_local_base_freq" in family.defaults:
        return _read_ropes_by_layer_type(reader, family, max_positions)
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(field) or {}
    if not isinstance(rope, Mapping):
        raise reader.error(field, rope, "an object")
    for layer_type in LAYER_TYPES:
        if layer_type in rope:
            raise reader.error(f"{field}.{layer_type}", rope[layer_type], "settings of all layers")
    theta = reader.check_positive("rope_theta", rope.get("rope_theta", config["rope_theta"]))
    return Rope(theta, _read_scaling(reader, family, field, rope, max_positions))


def _read_ropes_by_layer_type(reader: FieldReader, family: Family, max_positions: int) -> Rope:
    """Reads the settings of Gemma 3, whose local layers have a base of their own.

    `rope_parameters` has an object for each type of layer; `rope_scaling` is of global layers.
    """
    config = reader.config
    by_type = reader.read_object("rope_parameters")
    if unknown := by_type.keys() - set(LAYER_TYPES):
        raise reader.error("rope_parameters", min(unknown), f"only {' and '.join(LAYER_TYPES)}")
    whole, local = (FieldReader(by_type, "").read_object(name) for name in LAYER_TYPES)
    whole = {"rope_type": "default", **whole, **reader.read_object("rope_scaling")}
    field = "rope_scaling" if config.get("rope_scaling") else f"rope_parameters.{LAYER_TYPES[0]}"
    scaling = _read_scaling(reader, family, field, whole, max_positions)
    field = f"rope_parameters.{LAYER_TYPES[1]}"
    if _read_scaling(reader, family, field, local, max_positions) is not None:
        raise reader.error(f"{field}.rope_type", local["rope_type"], "'default'")
    theta, local_theta = (
        reader.check_positive(name, rope.get("rope_theta", config[name]))
        for name, rope in (("rope_theta", whole), ("rope_local_base_freq", local))
    )
    return Rope(theta, scaling, local_theta)


def write_rope(rope: Rope) -> dict[str, Any]:
    """Returns the fields from which `read_rope` reads this, in both schemas."""
    scaling = None if rope.scaling is None else rope.scaling.to_hf()
    parameters: dict[str, Any] = {"rope_theta": rope.theta} | (scaling or {"rope_type": "default"})
    config = {"rope_theta": rope.theta, "rope_scaling": scaling}
    if rope.local_theta is None:
        return config | {"rope_parameters": parameters}
    local = {"rope_type": "default", "rope_theta": rope.local_theta}
    return config | {
        "rope_local_base_freq": rope.local_theta,
        "rope_parameters": dict(zip(LAYER_TYPES, (parameters, local))),
    }


def _read_scaling(
    reader: FieldReader,
    family: Family,
    field: str,
    rope: Mapping[str, Any],
    max_positions: int,
) -> Scaling | None:
    """Reads how rotary frequencies are scaled; `field` names the object `rope`."""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("type", rope_type) != rope_type:
        raise reader.error(f"{field}.type", rope["type"], f"the rope_type, {rope_type!r}, or none")
    if rope_type not in family.rope_types:
        expected = " or ".join(map(repr, family.rope_types))
        raise reader.error(f"{field}.rope_type", rope_type, expected)
    if rope.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        raise reader.error(f"{field}.partial_rotary_factor", rope["partial_rotary_factor"], "1.0")

    def read_number(name: str, default: Any = None) -> float:
        return reader.check_positive(f"{field}.{name}", rope.get(name, default))

    if rope_type == "default":
        return None
    if rope_type == "linear":
        return LinearScaling(read_number("factor"))
    low, high = read_number("low_freq_factor"), read_number("high_freq_factor")
    if high <= low:
        raise reader.error(f"{field}.high_freq_factor", high, f"more than low_freq_factor, {low}")
    name = "original_max_position_embeddings"
    original = read_number(name, max_positions)
    if reader.config.get(name, original) != original:  # Which one counts depends on the reader.
        raise reader.error(name, reader.config[name], f"{original:g}, as in {field}, or none")
    return Llama3Scaling(read_number("factor"), low, high, int(original))


def read_rope_layers(reader: FieldReader, family: Family, num_layers: int) -> tuple[bool, ...]:
    """Reads which layers have rotary positions."""
    if "no_rope_layer_interval" not in family.defaults:
        return (True,) * num_layers
    layers = reader.config.get("no_rope_layers")  # 1 means "has positions" in transformers, too.
    if layers is None:
        interval = reader.read_integer("no_rope_layer_interval")
        return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    if not isinstance(layers, list) or len(layers) < num_layers:
        raise reader.error("no_rope_layers", layers, f"a list of at least {num_layers} 0s and 1s")
    return tuple(bool(used) for used in layers[:num_layers])


def read_windows(
    reader: FieldReader, family: Family, rope_layers: tuple[bool, ...]
) -> tuple[int | None, tuple[bool, ...]]:
    """Reads how many tokens a token sees, itself included, and in which layers.

    Returns:
        The number, None where all see everything; and for each layer whether it is local.
    """
    layers = range(len(rope_layers))
    if family.window == "none":  # A file that sets one means another model than ours.
        for field in ("sliding_window", "use_sliding_window"):
            if reader.config.get(field):
                raise reader.error(field, reader.config[field], "null (it has no windows)")
    # The others do not read it.
    used = "use_sliding_window" not in family.defaults or reader.read_flag("use_sliding_window")
    window = None
    if used and (reader.config.get("sliding_window") is not None or family.window == "interval"):
        window = reader.read_integer("sliding_window")
    if window is None:
        local = tuple(False for _ in layers)
    elif family.window == "all":
        local = tuple(True for _ in layers)
    elif family.window == "interval":
        interval = reader.read_integer("sliding_window_pattern", 2)
        if interval != 2 and "sliding_window_pattern" not in family.defaults:
            raise reader.error("sliding_window_pattern", interval, "2, or layer_types instead")
        local = tuple((layer + 1) % interval != 0 for layer in layers)
    elif family.window == "last":
        first = reader.read_integer("max_window_layers", minimum=0)
        local = tuple(layer >= first for layer in layers)
    else:
        local = tuple(not has_positions for has_positions in rope_layers)
    types = _read_layer_types(reader, len(rope_layers))
    if types is not None and types != local:
        # There transformers masks by `sliding_window` alone, or not at all.
        if window is None or family.window == "all":
            expected = f"{LAYER_TYPES[window is not None]!r} (sliding_window is {window})"
            raise reader.error("layer_types", reader.config["layer_types"], expected)
        local = types
    if not any(local) and family.window != "interval":
        window = None
    return window, local


def _read_layer_types(reader: FieldReader, num_layers: int) -> tuple[bool, ...] | None:
    """Reads which layers `layer_types` calls sliding; None if there is no such field."""
    types = reader.read_list("layer_types")
    if not types:
        return None
    for layer_type in types:
        if layer_type not in LAYER_TYPES:
            raise reader.error("layer_types", layer_type, " or ".join(map(repr, LAYER_TYPES)))
    if len(types) != num_layers:
        raise reader.error("layer_types", types, f"one for each of {num_layers} layers")
    return tuple(layer_type == LAYER_TYPES[1] for layer_type in types)


def write_windows(
    family: Family, window: int | None, local_layers: tuple[bool, ...]
) -> dict[str, Any]:
    """Returns the fields from which `read_windows` reads this."""
    config: dict[str, Any] = {}
    if "sliding_window" in family.defaults:
        config["sliding_window"] = window
    if "use_sliding_window" in family.defaults:
        config["use_sliding_window"] = window is not None
    if window is not None and family.window != "all":
        config["layer_types"] = [LAYER_TYPES[local] for local in local_layers]
        # For readers that do not know layer_types.
        if family.window == "last":
            config["max_window_layers"] = local_layers.index(True)
        if "sliding_window_pattern" in family.defaults:
            whole = [layer for layer, local in enumerate(local_layers) if not local]
            config["sliding_window_pattern"] = (whole or [len(local_layers)])[0] + 1
    return config
