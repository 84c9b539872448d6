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
# A layer's norms, likewise: before attention and MLP ...
NORMS_BEFORE = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}
# ... and of each head of queries and keys.
HEAD_NORMS = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}


@dataclasses.dataclass(frozen=True)
class Family:
    """What a `model_type` means.

    Attributes:
        architecture: the class of transformers.
        defaults: fields that transformers assumes where `config.json` is silent.
        norms: the norms of a layer, by our names, and Hugging Face's names within a layer.
        biases: projections with a bias.
        window: the layers in which a token sees no more than `sliding_window` tokens, unless
            `layer_types` lists them: "none", "all", "last" (from `max_window_layers` on) or
            "no_rope" (those without rotary positions).
    """

    architecture: str
    defaults: Mapping[str, Any]
    norms: Mapping[str, str] = dataclasses.field(default_factory=lambda: NORMS_BEFORE)
    biases: tuple[str, ...] = ()
    window: str = "none"


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
}
