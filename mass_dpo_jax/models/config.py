"""The shape of a decoder, read from and written to a Hugging Face `config.json`, without JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mass_dpo_jax.config import split_targets
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.fields import FieldReader
from mass_dpo_jax.models.folder import explain_missing_config
from mass_dpo_jax.utils.files import read_json

EXPORT_DTYPES = ("bfloat16", "float32")  # Types of written weights.
UNQUANTIZED = (
    "the unquantized original (to train adapters beside weights of 4 bits, --config=qlora "
    "quantizes it by itself)"
)
MAX_LAYERS = 10_000  # A list of as many names is made before the weights are looked at.


@dataclasses.dataclass(frozen=True)
class Family:
    """What transformers assumes about a `model_type` where its `config.json` is silent."""

    architecture: str
    tie_embeddings: bool
    rope_theta: float
    head_dim: int | None = None  # None: hidden_size // num_heads
    num_kv_heads: int | None = None  # None: num_heads
    qk_norm: bool = False
    no_rope_interval: int | None = None  # every such layer has no positions


FAMILIES = {
    "llama": Family("LlamaForCausalLM", tie_embeddings=False, rope_theta=10000.0),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        tie_embeddings=False,
        rope_theta=10000.0,
        head_dim=128,
        num_kv_heads=32,
        qk_norm=True,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        tie_embeddings=True,
        rope_theta=2000000.0,
        num_kv_heads=4,
        no_rope_interval=4,
    ),
}


# A layer's projections: our names, and Hugging Face's within a layer.
PROJECTIONS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
# The names of projections in settings and in PEFT's files -> ours.
TARGETS = {theirs.rpartition(".")[2]: ours for ours, theirs in PROJECTIONS.items()}


def parse_targets(text: str) -> tuple[str, ...]:
    """Translates "all" or "q_proj,v_proj" into our names, in the order of `PROJECTIONS`.

    Raises:
        UserError: the text names something else.
    """
    names = split_targets(text)
    return tuple(ours for theirs, ours in TARGETS.items() if theirs in names)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's scaling of the rotary frequencies; it changes short contexts too."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


# Fields in which a model and one tuned from it often differ.
NOT_COMPUTED = ("initializer_range", "max_positions", "bos_token_id", "eos_token_ids")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder: sizes, rotary positions, and which family's details it has."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    qk_norm: bool
    rope_layers: tuple[bool, ...]  # [num_layers], False: this layer sees no positions
    tie_embeddings: bool
    initializer_range: float
    max_positions: int
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def computed(self) -> dict[str, Any]:
        """Returns the fields that change what is computed.

        Two models that are equal in these are the same function of their weights.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if name not in NOT_COMPUTED}

    @property
    def projections(self) -> dict[str, tuple[tuple[int, int], tuple[str, str]]]:
        """The sizes, in and out, of each projection, and the names of these dimensions."""
        embed, mlp = (self.hidden_size, "embed"), (self.intermediate_size, "mlp")
        heads = self.num_heads * self.head_dim, "heads"
        kv_heads = self.num_kv_heads * self.head_dim, "kv_heads"
        pairs = {
            "query": (embed, heads),
            "key": (embed, kv_heads),
            "value": (embed, kv_heads),
            "output": (heads, embed),
            "gate": (embed, mlp),
            "up": (embed, mlp),
            "down": (mlp, embed),
        }
        return {
            name: ((inputs[0], outputs[0]), (inputs[1], outputs[1]))
            for name, (inputs, outputs) in pairs.items()
        }

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], location: str) -> DecoderConfig:
        """Reads the contents of a `config.json`, named `location` in messages.

        Both schemas of rotary settings are read: `rope_parameters` (transformers 5) and
        `rope_theta` with `rope_scaling` (before).

        Raises:
            UserError: the decoder does not compute exactly this: better no model than a subtly
                different one.
        """
        reader = FieldReader(config, location)
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            expected = f"one of {', '.join(FAMILIES)} (other families are not supported)"
            raise reader.error("model_type", model_type, expected)
        family = FAMILIES[model_type]
        for name in reader.read_list("architectures"):
            if name != family.architecture:
                raise reader.error("architectures", name, family.architecture)
        _check_supported(reader)

        num_layers = reader.read_integer("num_hidden_layers", maximum=MAX_LAYERS)
        num_heads = reader.read_integer("num_attention_heads")
        hidden_size = reader.read_integer("hidden_size")
        num_kv_heads = reader.read_integer(
            "num_key_value_heads", family.num_kv_heads, none=num_heads
        )
        if num_heads % num_kv_heads:
            raise reader.error("num_key_value_heads", num_kv_heads, f"a divisor of {num_heads}")
        head_dim = reader.read_integer("head_dim", family.head_dim, none=hidden_size // num_heads)
        if head_dim % 2:
            raise reader.error("head_dim", head_dim, "an even number")
        max_positions = reader.read_integer("max_position_embeddings")
        rope_theta, rope_scaling = _read_rope(reader, family, max_positions)
        vocab_size = reader.read_integer("vocab_size")
        bos, eos = (
            reader.read_token_ids(f"{name}_token_id", vocab_size) for name in ("bos", "eos")
        )
        return cls(
            model_type=model_type,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=reader.read_integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=reader.read_number("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            qk_norm=family.qk_norm,
            rope_layers=_read_rope_layers(reader, family, num_layers),
            tie_embeddings=reader.read_flag("tie_word_embeddings", family.tie_embeddings),
            initializer_range=reader.read_number("initializer_range", 0.02),
            max_positions=max_positions,
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=eos,
        )

    def to_hf(self) -> dict[str, Any]:
        """Returns the contents of a `config.json` for transformers, before and after version 5.

        Readers before 5 look only at `rope_theta` and `rope_scaling` and silently fall back to
        10000 without them, so both schemas are written; they say the same thing.
        """
        family = FAMILIES[self.model_type]
        scaling: dict[str, Any] | None = None
        if self.rope_scaling is not None:
            scaling = {
                "rope_type": "llama3",
                "factor": self.rope_scaling.factor,
                "low_freq_factor": self.rope_scaling.low_freq_factor,
                "high_freq_factor": self.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": self.rope_scaling.original_max_positions,
            }
        eos = self.eos_token_ids
        config: dict[str, Any] = {
            "architectures": [family.architecture],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": {"rope_theta": self.rope_theta}
            | (scaling or {"rope_type": "default"}),
            "tie_word_embeddings": self.tie_embeddings,
            "attention_bias": False,
            "mlp_bias": False,
            "initializer_range": self.initializer_range,
            "max_position_embeddings": self.max_positions,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        }
        if family.no_rope_interval is not None:
            config["no_rope_layers"] = [int(used) for used in self.rope_layers]
        if self.model_type != "llama":
            config |= {"use_sliding_window": False, "sliding_window": None}
        return config


def load_config(folder: str | Path) -> DecoderConfig:
    """Reads `config.json` of a Hugging Face folder.

    Raises:
        UserError: it is missing or malformed, or not supported.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: {explain_missing_config(Path(folder))}")
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path}: found {type(config).__name__}, expected a JSON object")
    return DecoderConfig.from_hf(config, str(path))


def _check_supported(reader: FieldReader) -> None:
    """Raises UserError for settings of models that the decoder does not compute."""
    config = reader.config
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise reader.error("hidden_act", activation, "'silu'")
    for field in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if config.get(field):
            raise reader.error(field, config[field], "false (true is not supported)")
    # Llama has no sliding window: a file that sets one means another model than ours. Qwen3 and
    # SmolLM3 ignore the number while use_sliding_window is false.
    if config["model_type"] == "llama" and config.get("sliding_window") is not None:
        raise reader.error("sliding_window", config["sliding_window"], "null")
    for layer_type in reader.read_list("layer_types"):
        if layer_type != "full_attention":
            raise reader.error("layer_types", layer_type, "'full_attention'")
    for field in ("quantization_config", "quantization", "compression_config"):
        if config.get(field) is not None:
            raise reader.error(field, f"{_name_quantization(config[field])} weights", UNQUANTIZED)
    if config.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        raise reader.error("partial_rotary_factor", config["partial_rotary_factor"], "1.0")


def _name_quantization(settings: Any) -> str:
    """Returns the method by which weights were quantized, as their writer calls it."""
    if not isinstance(settings, Mapping):
        return "quantized"
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    return str(settings.get("quant_method") or settings.get("format") or "quantized")


def _read_rope(
    reader: FieldReader, family: Family, max_positions: int
) -> tuple[float, Llama3Scaling | None]:
    """Reads the rotary base and its scaling.

    As in transformers 5, a scaling outside wins over one in `rope_parameters`, and a base inside
    wins over one outside.
    """
    config = reader.config
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(field) or {}
    if not isinstance(rope, Mapping):
        raise reader.error(field, rope, "an object")
    default_theta = config.get("rope_theta", family.rope_theta)
    theta = reader.check_positive("rope_theta", rope.get("rope_theta", default_theta))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise reader.error(f"{field}.rope_type", rope_type, "'default' or 'llama3'")
    if rope.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        raise reader.error(f"{field}.partial_rotary_factor", rope["partial_rotary_factor"], "1.0")
    if rope_type == "default":
        return theta, None

    def read_number(name: str, default: Any = None) -> float:
        return reader.check_positive(f"{field}.{name}", rope.get(name, default))

    low, high = read_number("low_freq_factor"), read_number("high_freq_factor")
    if high <= low:
        raise reader.error(f"{field}.high_freq_factor", high, f"more than low_freq_factor, {low}")
    original = read_number("original_max_position_embeddings", max_positions)
    return theta, Llama3Scaling(read_number("factor"), low, high, int(original))


def _read_rope_layers(reader: FieldReader, family: Family, num_layers: int) -> tuple[bool, ...]:
    if family.no_rope_interval is None:
        return (True,) * num_layers
    layers = reader.config.get("no_rope_layers")  # 1 means "has positions" in transformers, too.
    if layers is None:
        interval = reader.read_integer("no_rope_layer_interval", family.no_rope_interval)
        return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    if not isinstance(layers, list) or len(layers) < num_layers:
        raise reader.error("no_rope_layers", layers, f"a list of at least {num_layers} 0s and 1s")
    return tuple(bool(used) for used in layers[:num_layers])
