"""Random `config.json` files: read as transformers' classes read them, or a field is refused."""

from __future__ import annotations

import json
import random
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.block import ACTIVATIONS
from mass_dpo_jax.models.config import DecoderConfig
from mass_dpo_jax.models.decoder import abstract_decoder
from mass_dpo_jax.models.rotary import compute_rope_frequencies
from mass_dpo_jax.models.weights import list_entries
from tests.support.helpers import slow
from tests.support.models import FAMILIES, LLAMA3_SCALING, hf_config

ABSENT = object()
FULL, SLIDING = "full_attention", "sliding_attention"
LINEAR = {"rope_type": "linear", "factor": 4.0}
ROPES = [
    {"rope_type": "default", "rope_theta": 5e5},
    {"rope_type": "default"},
    {"type": "default"},
    LINEAR,
    {"type": "linear", "factor": 2.0},
    {"type": "linear", "rope_type": "linear", "factor": 2.0},
    {**LLAMA3_SCALING, "rope_theta": 5e5},
    LLAMA3_SCALING,
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "dynamic", "factor": 2.0},
]
BY_TYPE = [
    {FULL: {"rope_theta": 1e5, "rope_type": "default"}, SLIDING: {"rope_type": "default"}},
    {FULL: {**LINEAR, "rope_theta": 1e6}, SLIDING: {"rope_theta": 2e4, "rope_type": "default"}},
    {FULL: LINEAR},
    {SLIDING: {"rope_theta": 2e4, "rope_type": "default"}},
    {FULL: {"rope_type": "default"}, SLIDING: LINEAR},
]
# Values that a field is given, as often right as strange.
VALUES: dict[str, list[Any]] = {
    "vocab_size": [97, 101, ABSENT],
    "hidden_size": [48, 64, 24],
    "intermediate_size": [80, 40, ABSENT],
    "num_hidden_layers": [1, 2, 4, 7],
    "num_attention_heads": [2, 4, 8, ABSENT],
    "num_key_value_heads": [1, 2, 3, 4, None, ABSENT, "2"],
    "head_dim": [8, 16, 15, None, ABSENT],
    "rms_norm_eps": [1e-6, 1e-3, ABSENT],
    "tie_word_embeddings": [True, False, ABSENT],
    "hidden_act": ["silu", "gelu", "gelu_pytorch_tanh", ABSENT],
    "hidden_activation": ["gelu_pytorch_tanh", "silu", "gelu", None, ABSENT],
    "rope_parameters": [*ROPES, *BY_TYPE, None, ABSENT],
    "rope_scaling": [*ROPES, None, ABSENT],
    "rope_theta": [7.0, 5e5, ABSENT],
    "rope_local_base_freq": [2e4, None, ABSENT],
    "partial_rotary_factor": [1.0, 0.5, None, ABSENT],
    "original_max_position_embeddings": [16, ABSENT],
    "max_position_embeddings": [64, 256, ABSENT],
    "sliding_window": [3, 4096, None, ABSENT],
    "use_sliding_window": [True, False, ABSENT],
    "max_window_layers": [0, 1, 2, 9, ABSENT],
    "layer_types": [[FULL], [SLIDING], [SLIDING, FULL], [FULL, SLIDING], None, ABSENT],
    "sliding_window_pattern": [1, 2, 3, ABSENT],
    "no_rope_layers": [[1, 0], [0, 1], None, ABSENT],
    "no_rope_layer_interval": [1, 2, 3, ABSENT],
    "attention_bias": [True, False, ABSENT],
    "mlp_bias": [True, False, ABSENT],
    "query_pre_attn_scalar": [7, 24, ABSENT],
    "attn_logit_softcapping": [5.0, None, ABSENT],
    "final_logit_softcapping": [5.0, None, ABSENT],
    "use_bidirectional_attention": [True, False, None, ABSENT],
    "initializer_range": [0.1, ABSENT],
    "attention_dropout": [0.0, 0.1, ABSENT],
}
PER_LAYER = ("layer_types", "no_rope_layers")  # Patterns, repeated to the number of layers.


def draw(rng: random.Random, model_type: str) -> dict[str, Any]:
    """Changes some fields of a small model's config.json."""
    config = hf_config(model_type)
    if rng.random() < 0.5:
        config.pop("rope_parameters")
    for field in rng.sample(sorted(VALUES), rng.randint(1, 5)):
        value = rng.choice(VALUES[field])
        if value is ABSENT:
            config.pop(field, None)
            continue
        if field in PER_LAYER and value:
            value = (value * config.get("num_hidden_layers", 4))[: config["num_hidden_layers"]]
        config[field] = json.loads(json.dumps(value))
    return config


def theirs(torch: ModuleType, config: dict[str, Any]) -> Any:
    """The model of transformers; None where it refuses the file."""
    try:
        settings = CONFIG_MAPPING[config["model_type"]].from_dict(json.loads(json.dumps(config)))
        return AutoModelForCausalLM.from_config(settings, attn_implementation="eager")
    except Exception:  # Of many kinds: whatever it is, it accepts nothing.
        return None


def expect_the_same(torch: ModuleType, ours: DecoderConfig, model: Any) -> None:
    settings, layers = model.config, model.model.layers
    assert ours.num_layers == len(layers)
    abstract = nnx.to_pure_dict(nnx.state(abstract_decoder(ours), nnx.Param))
    shapes = {}
    for entry in list_entries(ours):
        leaf = abstract
        for key in entry.path:
            leaf = leaf[key]
        shape = leaf.shape[1:] if entry.is_stacked else leaf.shape
        shape = shape[::-1] if entry.transposed else shape
        shape = (shape[0] + entry.first_row, *shape[1:])
        shapes |= dict.fromkeys(entry.list_names(ours), tuple(shape))
    assert shapes == {name: tuple(x.shape) for name, x in model.named_parameters()}

    act_fn = getattr(layers[0].mlp, "act_fn", None) or layers[0].mlp.activation_fn
    x = torch.linspace(-3.0, 3.0, 13)
    activation = ACTIVATIONS[ours.activation](jax.numpy.asarray(x.numpy()))
    np.testing.assert_allclose(activation, act_fn(x).numpy(), atol=1e-6)
    norm = model.model.norm
    assert ours.rms_norm_eps == getattr(norm, "variance_epsilon", getattr(norm, "eps", None))

    def frequencies(theta: float, scaling: Any = None) -> np.ndarray:
        return np.asarray(compute_rope_frequencies(ours.head_dim, theta, scaling))

    rotary = model.model.rotary_emb
    whole = frequencies(ours.rope.theta, ours.rope.scaling)
    expected = {name: x.numpy() for name, x in rotary.named_buffers() if "original" not in name}
    if ours.rope.local_theta is None:
        assert ours.window is None or len(expected) == 1
        np.testing.assert_allclose(whole, expected["inv_freq"], rtol=1e-5)
    else:
        local = frequencies(ours.rope.local_theta)
        for name, x in expected.items():
            np.testing.assert_allclose(local if SLIDING in name else whole, x, rtol=1e-5)
    kinds = ours.rope_layers, ours.local_layers
    for layer, has_positions, is_local in zip(layers, *kinds, strict=True):
        attention = layer.self_attn
        assert ours.query_pre_attn_scalar**-0.5 == pytest.approx(attention.scaling)
        assert has_positions == getattr(attention, "use_rope", True)
        window = settings.sliding_window if ours.model_type in ("mistral", "phi3") else None
        window = getattr(attention, "sliding_window", window)
        assert (ours.window if is_local else None) == window
    capped = ours.model_type == "gemma2"
    assert ours.attention_soft_cap == (settings.attn_logit_softcapping if capped else None)
    capped = ours.model_type.startswith("gemma")
    assert ours.logit_soft_cap == (settings.final_logit_softcapping if capped else None)


@pytest.mark.parametrize("count", [40, slow(1000)])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_random_configs(torch: ModuleType, model_type: str, count: int) -> None:
    rng = random.Random(f"{model_type} {count}")
    equal = refused = 0
    for _ in range(count):
        config = draw(rng, model_type)
        try:
            ours = DecoderConfig.from_hf(config, "config.json")
        except UserError as error:
            field = str(error).removeprefix("config.json: ").partition(":")[0].partition(".")[0]
            assert field in VALUES, (str(error), config)
            refused += 1
            continue
        if (model := theirs(torch, config)) is None:
            continue
        try:
            expect_the_same(torch, ours, model)
        except AssertionError as difference:
            raise AssertionError(f"{config}\n{ours}") from difference
        assert DecoderConfig.from_hf(ours.to_hf(), "config.json") == ours, config
        equal += 1
    assert equal > 0.2 * count and refused > 0.1 * count, (equal, refused)
