"""The shape of a decoder, read from and written to a Hugging Face `config.json`, without JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mass_dpo_jax.config_values import split_targets
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.families import FAMILIES, MULTIMODAL, PROJECTIONS, Family
from mass_dpo_jax.models.fields import FieldReader
from mass_dpo_jax.models.folder import explain_missing_config
from mass_dpo_jax.models.positions import (
    Rope,
    read_rope,
    read_rope_layers,
    read_windows,
    write_rope,
    write_windows,
)
from mass_dpo_jax.utils.files import read_json

EXPORT_DTYPES = ("bfloat16", "float32")  # Types of written weights.
UNQUANTIZED = (
    "the unquantized original (to train adapters beside weights of 4 bits, --config=qlora "
    "quantizes it by itself)"
)
MAX_LAYERS = 10_000  # A list of as many names is made before the weights are looked at.


# The names of projections in settings and in PEFT's files -> ours.
TARGETS = {theirs.rpartition(".")[2]: ours for ours, theirs in PROJECTIONS.items()}


def parse_targets(text: str) -> tuple[str, ...]:
    """Translates "all" or "q_proj,v_proj" into our names, in the order of `PROJECTIONS`.

    Raises:
        UserError: the text names something else.
    """
    names = split_targets(text)
    return tuple(ours for theirs, ours in TARGETS.items() if theirs in names)


ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
# Fields that change what some families compute, and that transformers ignores in the others.
COMPUTED_IN_SOME = (
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rope_local_base_freq",
)
QUANTIZED = ("quantization_config", "quantization", "compression_config")
OF_THE_WHOLE = ("bos_token_id", "eos_token_id")  # Fields that a multimodal model has outside.
# Fields in which a model and one tuned from it often differ.
NOT_COMPUTED = (
    "initializer_range",
    "max_positions",
    "bos_token_id",
    "eos_token_ids",
    "part_of",
)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder: sizes, positions, and which family's details it has.

    Attributes:
        activation: the nonlinear function of the MLP's gate.
        query_pre_attn_scalar: scores are divided by its square root.
        attention_soft_cap: the bound of scores, see `interfaces.Limits`; None: there is none.
        logit_soft_cap: that of logits.
        rope: rotary settings.
        rope_layers: [num_layers], False: this layer sees no positions.
        window: the tokens that a token of a local layer sees, itself included; None: all.
        local_layers: [num_layers], which layers have the window.
        part_of: the `model_type` of the multimodal model whose text model this is, if any.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    activation: str
    query_pre_attn_scalar: int
    attention_soft_cap: float | None
    logit_soft_cap: float | None
    rope: Rope
    rope_layers: tuple[bool, ...]
    window: int | None
    local_layers: tuple[bool, ...]
    tie_embeddings: bool
    initializer_range: float
    max_positions: int
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    part_of: str = ""

    @property
    def family(self) -> Family:
        """What `model_type` means."""
        return FAMILIES[self.model_type]

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
        `rope_theta` with `rope_scaling` (before). Of a multimodal model, the text model is read.

        Raises:
            UserError: the decoder does not compute exactly this: better no model than a subtly
                different one.
        """
        model_type = config.get("model_type")
        if isinstance(model_type, str) and model_type in MULTIMODAL:
            return _read_text_model(FieldReader(config, location))
        family = _find_family(FieldReader(config, location))
        reader = FieldReader({**family.defaults, **config}, location)
        _check_supported(reader, family)
        num_layers = reader.read_integer("num_hidden_layers", maximum=MAX_LAYERS)
        num_heads = reader.read_integer("num_attention_heads")
        hidden_size = reader.read_integer("hidden_size")
        num_kv_heads = reader.read_integer("num_key_value_heads", none=num_heads)
        if num_heads % num_kv_heads:
            raise reader.error("num_key_value_heads", num_kv_heads, f"a divisor of {num_heads}")
        head_dim = reader.read_integer("head_dim", none=hidden_size // num_heads)
        if head_dim % 2:
            raise reader.error("head_dim", head_dim, "an even number")
        max_positions = reader.read_integer("max_position_embeddings")
        rope_layers = read_rope_layers(reader, family, num_layers)
        window, local_layers = read_windows(reader, family, rope_layers)
        vocab_size = reader.read_integer("vocab_size")
        bos, eos = (
            reader.read_token_ids(f"{name}_token_id", vocab_size) for name in ("bos", "eos")
        )
        return cls(
            model_type=config["model_type"],
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=reader.read_integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=reader.read_number("rms_norm_eps", 1e-6),
            activation=_read_activation(reader, family),
            query_pre_attn_scalar=reader.read_integer("query_pre_attn_scalar", head_dim),
            attention_soft_cap=reader.read_optional_number("attn_logit_softcapping"),
            logit_soft_cap=reader.read_optional_number("final_logit_softcapping"),
            rope=read_rope(reader, family, max_positions),
            rope_layers=rope_layers,
            window=window,
            local_layers=local_layers,
            tie_embeddings=reader.read_flag("tie_word_embeddings"),
            initializer_range=reader.read_number("initializer_range", 0.02),
            max_positions=max_positions,
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=eos,
        )

    def to_hf(self) -> dict[str, Any]:
        """Returns the contents of a `config.json` for transformers, before and after version 5.

        Of a multimodal model's text model it is that of the whole, without its other parts.

        Readers before 5 look only at `rope_theta` and `rope_scaling` and silently fall back to
        10000 without them, so both schemas are written; they say the same thing.
        """
        family, eos = self.family, self.eos_token_ids
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
            family.activation_field: self.activation,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": self.initializer_range,
            "max_position_embeddings": self.max_positions,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        }
        if not family.biases:  # They are no setting there.
            config |= {"attention_bias": False, "mlp_bias": False}
        if "no_rope_layer_interval" in family.defaults:
            config["no_rope_layers"] = [int(used) for used in self.rope_layers]
        for field, value in (
            ("query_pre_attn_scalar", self.query_pre_attn_scalar),
            ("attn_logit_softcapping", self.attention_soft_cap),
            ("final_logit_softcapping", self.logit_soft_cap),
        ):
            if field in family.defaults:
                config[field] = value
        config |= write_rope(self.rope) | write_windows(family, self.window, self.local_layers)
        if not self.part_of:
            return config
        return {
            "architectures": [MULTIMODAL[self.part_of][0]],
            "model_type": self.part_of,
            "tie_word_embeddings": self.tie_embeddings,
            "text_config": config,
        }


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


def _read_text_model(reader: FieldReader) -> DecoderConfig:
    """Reads the text model of a multimodal one."""
    config, model_type = reader.config, reader.config["model_type"]
    architecture, text_type = MULTIMODAL[model_type]
    for name in reader.read_list("architectures"):
        if name != architecture:
            raise reader.error("architectures", name, architecture)
    text = {"model_type": text_type, **reader.read_object("text_config"), "architectures": None}
    if text["model_type"] != text_type:
        raise reader.error("text_config.model_type", text["model_type"], repr(text_type))
    # The whole model's settings.
    default = FAMILIES[text_type].defaults["tie_word_embeddings"]
    tied = reader.read_flag("tie_word_embeddings", default)
    if (found := text.get("tie_word_embeddings", tied)) != tied:
        raise reader.error("text_config.tie_word_embeddings", found, f"{tied}, as outside of it")
    whole = {name: config[name] for name in (*OF_THE_WHOLE, *QUANTIZED) if name in config}
    text |= {"tie_word_embeddings": tied, **whole}
    read = DecoderConfig.from_hf(text, f"{reader.location}: text_config")
    return dataclasses.replace(read, part_of=model_type)


def _find_family(reader: FieldReader) -> Family:
    """Returns the family that `model_type` names; UserError if it is not supported."""
    model_type = reader.config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        expected = f"one of {', '.join((*FAMILIES, *MULTIMODAL))} (others are not supported)"
        raise reader.error("model_type", model_type, expected)
    family = FAMILIES[model_type]
    for name in reader.read_list("architectures"):
        if name != family.architecture:
            raise reader.error("architectures", name, family.architecture)
    return family


def _check_supported(reader: FieldReader, family: Family) -> None:
    """Raises UserError for settings of models that the decoder does not compute."""
    config = reader.config
    for field in COMPUTED_IN_SOME:
        if config.get(field) is not None and field not in family.defaults:
            raise reader.error(field, config[field], f"null in a {config['model_type']} model")
    if config.get("use_bidirectional_attention"):
        raise reader.error("use_bidirectional_attention", True, "false (true is not supported)")
    # Where a family has biases of its own, transformers does not read these.
    for field in ("attention_bias", "mlp_bias"):
        if config.get(field) and not family.biases:
            raise reader.error(field, config[field], "false (true is not supported)")
    for field in QUANTIZED:
        if config.get(field) is not None:
            raise reader.error(field, f"{_name_quantization(config[field])} weights", UNQUANTIZED)
    if config.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        raise reader.error("partial_rotary_factor", config["partial_rotary_factor"], "1.0")


def _read_activation(reader: FieldReader, family: Family) -> str:
    activation = reader.config.get(family.activation_field, "silu")
    if activation not in ACTIVATIONS:
        raise reader.error(family.activation_field, activation, " or ".join(map(repr, ACTIVATIONS)))
    return activation


def _name_quantization(settings: Any) -> str:
    """Returns the method by which weights were quantized, as their writer calls it."""
    if not isinstance(settings, Mapping):
        return "quantized"
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    return str(settings.get("quant_method") or settings.get("format") or "quantized")
