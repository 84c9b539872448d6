"""The model families: what each lacks or has beside Llama's architecture, as data, without JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

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
# Matrices that hold several projections, one below the other, in some families.
FUSED = {"self_attn.qkv_proj": ("query", "key", "value"), "mlp.gate_up_proj": ("gate", "up")}
# A layer's norms, likewise: before attention and MLP ...
NORMS_BEFORE = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}
# ... before and after each of them ...
NORMS_AROUND = {
    "attention_norm": "input_layernorm",
    "attention_output_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
# ... after each alone ...
NORMS_AFTER = {
    "attention_output_norm": "post_attention_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
# ... and of queries and keys.
HEAD_NORMS = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}


@dataclasses.dataclass(frozen=True)
class Family:
    """What a `model_type` means.

    Attributes:
        architecture: the class of transformers.
        defaults: fields that transformers assumes where `config.json` is silent.
        projections: Hugging Face's names of projections; those of the same name are one matrix.
        norms: the norms of a layer, by our names, and Hugging Face's names within a layer.
        norms_all_heads: whether queries and keys are normed over all heads together.
        norm_offset: what is added to the weights of a norm.
        biases: projections with a bias.
        scales_embeddings: whether hidden states start as embeddings times sqrt(hidden_size).
        activation_field: the field that names the activation of the MLP's gate.
        window: the layers in which a token sees no more than `sliding_window` tokens, unless
            `layer_types` lists them: "none", "all", "last" (from `max_window_layers` on), "no_rope"
            (those without rotary positions) or "interval" (all but every n-th).
        rope_types: the kinds of rotary positions that may be computed.
    """

    architecture: str
    defaults: Mapping[str, Any]
    projections: Mapping[str, str] = dataclasses.field(default_factory=lambda: PROJECTIONS)
    norms: Mapping[str, str] = dataclasses.field(default_factory=lambda: NORMS_BEFORE)
    norms_all_heads: bool = False
    norm_offset: float = 0.0
    biases: tuple[str, ...] = ()
    scales_embeddings: bool = False
    activation_field: str = "hidden_act"
    window: str = "none"
    rope_types: tuple[str, ...] = ("default", "linear", "llama3")


GEMMA: dict[str, Any] = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        {"rope_theta": 10_000.0, "tie_word_embeddings": False, "num_key_value_heads": None},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {
            "rope_theta": 10_000.0,
            "tie_word_embeddings": False,
            "num_key_value_heads": 32,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        biases=("query", "key", "value"),
        window="last",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {
            "rope_theta": 10_000.0,
            "tie_word_embeddings": False,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        norms=NORMS_BEFORE | HEAD_NORMS,
        window="last",
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "no_rope_layer_interval": 4,
            "use_sliding_window": False,
            "sliding_window": None,
        },
        window="no_rope",
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {
            "rope_theta": 10_000.0,
            "tie_word_embeddings": False,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        window="all",
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        {
            "vocab_size": 32_064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": None,
            "max_position_embeddings": 4096,
            "rope_theta": 10_000.0,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "sliding_window": None,
            "bos_token_id": 1,
            "eos_token_id": 32_000,
        },
        projections=PROJECTIONS | {ours: name for name in FUSED for ours in FUSED[name]},
        window="all",
        rope_types=("default",),  # And LongRoPE, which is not computed.
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        {
            "rope_theta": 10_000.0,
            "tie_word_embeddings": False,
            "num_key_value_heads": None,
            "rms_norm_eps": 1e-5,
        },
        norms=NORMS_AFTER | HEAD_NORMS,
        norms_all_heads=True,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        norms=NORMS_AROUND,
        norm_offset=1.0,
        scales_embeddings=True,
        activation_field="hidden_activation",
        window="interval",
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        GEMMA
        | {
            "vocab_size": 262_208,
            "max_position_embeddings": 131_072,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "sliding_window_pattern": 6,
            "final_logit_softcapping": None,
        },
        norms=NORMS_AROUND | HEAD_NORMS,
        norm_offset=1.0,
        scales_embeddings=True,
        activation_field="hidden_activation",
        window="interval",
    ),
}
# Models of which the text model alone is read: their class, and the family of their `text_config`.
MULTIMODAL = {"gemma3": ("Gemma3ForConditionalGeneration", "gemma3_text")}
