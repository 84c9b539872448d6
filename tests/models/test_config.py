"""config.json: what transformers reads, we read alike; what we write, it reads alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.config import DecoderConfig, Llama3Scaling, load_config
from tests.support.models import FAMILIES, LLAMA3_SCALING, hf_config

SCALING = Llama3Scaling(8.0, 1.0, 4.0, 32)


def read(config: dict[str, Any]) -> DecoderConfig:
    return DecoderConfig.from_hf(config, "here/config.json")


def theirs(config: dict[str, Any]) -> Any:
    return CONFIG_MAPPING[config["model_type"]].from_dict(json.loads(json.dumps(config)))


def assert_same(ours: DecoderConfig, config: Any) -> None:
    assert ours.num_kv_heads == config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None)
    assert ours.head_dim == (head_dim or config.hidden_size // config.num_attention_heads)
    assert ours.tie_embeddings == config.tie_word_embeddings
    assert ours.rms_norm_eps == config.rms_norm_eps
    assert ours.rope_theta == config.rope_parameters["rope_theta"]
    kind = config.rope_parameters["rope_type"]
    assert kind == ("default" if ours.rope_scaling is None else "llama3")
    if ours.rope_scaling is not None:
        context = config.rope_parameters["original_max_position_embeddings"]
        assert ours.rope_scaling.original_max_positions == context
        assert ours.rope_scaling.factor == config.rope_parameters["factor"]
    if config.model_type == "smollm3":
        assert ours.rope_layers == tuple(bool(x) for x in config.no_rope_layers)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    """Fields that a config.json leaves out mean what transformers takes them to mean."""
    config = hf_config(model_type, num_attention_heads=32, hidden_size=64)
    optional = "num_key_value_heads head_dim tie_word_embeddings rms_norm_eps rope_parameters"
    for field in optional.split():
        del config[field]
    assert_same(read(config), theirs(config))
    config["num_key_value_heads"] = None
    assert read(config).num_kv_heads == theirs(config).num_key_value_heads == 32


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("scaling", [None, LLAMA3_SCALING])
def test_both_schemas_of_rope_are_read_and_written(
    model_type: str, scaling: dict[str, Any] | None
) -> None:
    new = {"rope_theta": 5e5, **(scaling or {"rope_type": "default"})}
    config = hf_config(model_type, rope_parameters=new)
    before_5 = hf_config(model_type, rope_theta=5e5, rope_scaling=scaling)
    del before_5["rope_parameters"]
    ours = read(config)
    assert ours == read(before_5)
    assert ours.rope_theta == 5e5
    assert ours.rope_scaling == (SCALING if scaling else None)
    for form in (config, before_5, ours.to_hf()):
        assert_same(ours, theirs(form))
        assert read(theirs(form).to_dict()) == ours
    written = ours.to_hf()
    assert read(written) == ours
    for schema in (("rope_parameters",), ("rope_theta", "rope_scaling")):
        assert read({k: v for k, v in written.items() if k not in schema}) == ours


def test_precedence_of_conflicting_rope_settings_is_that_of_transformers() -> None:
    inside = {"rope_type": "default", "rope_theta": 300.0}
    for changes in (
        {"rope_parameters": inside, "rope_theta": 7.0},
        {"rope_parameters": inside, "rope_theta": 7.0, "rope_scaling": dict(LLAMA3_SCALING)},
        {"rope_parameters": None, "rope_theta": 7.0, "rope_scaling": {**inside}},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 7.0},
    ):
        config = hf_config(**changes)
        assert_same(read(config), theirs(config))


def test_layers_without_positions() -> None:
    assert read(hf_config("smollm3")).rope_layers == (True, True, True, False)
    config = hf_config("smollm3", no_rope_layers=[0, 1, 1, 1, 0])  # longer than the model
    assert read(config).rope_layers == (False, True, True, True)
    assert read(hf_config("llama")).rope_layers == (True,) * 4


def test_end_of_sequence_ids() -> None:
    for ids, expected in ((2, (2,)), ([2, 3], (2, 3)), (None, ())):
        config = read(hf_config(eos_token_id=ids))
        assert config.eos_token_ids == expected
        assert config.to_hf()["eos_token_id"] == ids


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("eos_token_id", -1, ()),
        ("eos_token_id", [2, -1], (2,)),
        ("eos_token_id", [101, 3, 2], (3, 2)),
        ("eos_token_id", 10**12, ()),
        ("bos_token_id", -1, None),
        ("bos_token_id", 101, None),
        ("bos_token_id", [-1, 4], 4),
    ],
)
def test_ids_outside_of_the_vocabulary_name_no_token(
    field: str, value: Any, expected: Any, caplog: pytest.LogCaptureFixture
) -> None:
    place = f"{field} {value}/config.json"
    configs = [DecoderConfig.from_hf(hf_config(**{field: value}), place) for _ in range(2)]
    found = configs[0].eos_token_ids if field == "eos_token_id" else configs[0].bos_token_id
    assert found == expected
    assert caplog.text.count(f"{place}: {field}: ") == 1  # It is read several times in a run.
    assert "outside of the vocabulary (vocab_size is 101)" in caplog.text


@pytest.mark.parametrize("value", [True, 2.0, "2", [2, None], [[2]], {"a": 2}])
def test_ids_that_are_no_integers_are_refused(value: Any) -> None:
    for field in ("eos_token_id", "bos_token_id"):
        with pytest.raises(UserError, match=rf"{field}: found .*, expected an integer or a list"):
            read(hf_config(**{field: value}))


def test_a_pad_id_that_is_none_is_not_read() -> None:
    for value in (-1, None, 10**6):
        assert read(hf_config(pad_token_id=value)) == read(hf_config())


def test_configs_of_the_real_models(real_data: Path) -> None:
    found = {}
    for path in sorted(real_data.glob("tokenizers/*/config.*.json")):
        config = json.loads(path.read_text())
        found[path.name] = read(config)
        assert_same(found[path.name], theirs(config))
    assert len(found) == 5
    llama = found["config.Llama-3.2-3B-Instruct.json"]
    assert (llama.rope_theta, llama.rope_scaling) == (5e5, Llama3Scaling(32.0, 1.0, 4.0, 8192))
    assert found["config.Qwen3-0.6B.json"].qk_norm
    assert not found["config.SmolLM3-3B.json"].rope_layers[3]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"model_type": "mistral"}, ["model_type", "'mistral'", "llama, qwen3, smollm3"]),
        ({"model_type": None}, ["model_type", "None"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequence", "CausalLM"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"model_type": "qwen3", "use_sliding_window": True}, ["use_sliding_window"]),
        ({"sliding_window": 128}, ["sliding_window", "128"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "sliding"]),
        ({"rope_parameters": {"rope_type": "yarn"}}, ["rope_type", "'yarn'", "'llama3'"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling.rope_type", "linear"]),
        ({"rope_parameters": {"rope_type": "llama3"}}, ["low_freq_factor", "None"]),
        (
            {"rope_parameters": LLAMA3_SCALING | {"low_freq_factor": 4.0}},
            ["high_freq_factor", "4.0"],
        ),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config", "unquantized original"]),
        ({"hidden_size": None}, ["hidden_size", "None", "positive integer"]),
        ({"vocab_size": "101"}, ["vocab_size", "'101'"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "3", "divisor of 4"]),
        ({"head_dim": 15}, ["head_dim", "15", "even"]),
        ({"rms_norm_eps": -1}, ["rms_norm_eps", "-1"]),
        ({"tie_word_embeddings": "no"}, ["tie_word_embeddings", "'no'"]),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, ["no_rope_layers", "at least 4"]),
    ],
)
def test_what_the_decoder_does_not_compute_is_an_error(
    changes: dict[str, Any], names: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        read(hf_config() | changes)
    message = str(error.value)
    assert "\n" not in message
    for name in ["here/config.json", *names]:
        assert name in message


def test_load_config(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for content, words in ((None, "no config.json"), ("{", "invalid JSON"), ("[]", "found list")):
        if content is not None:
            path.write_text(content)
        with pytest.raises(UserError, match=words) as error:
            load_config(tmp_path)
        assert str(tmp_path) in str(error.value)
    path.write_text(json.dumps(hf_config()))
    assert load_config(tmp_path) == read(hf_config())
