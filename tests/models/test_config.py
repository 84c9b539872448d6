"""config.json: what transformers reads, we read alike; what we write, it reads alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models.config import DecoderConfig, load_config
from mass_dpo_jax.models.families import HEAD_NORMS
from mass_dpo_jax.models.positions import LinearScaling, Llama3Scaling
from tests.support.models import FAMILIES, LLAMA3_SCALING, hf_config

SCALING = Llama3Scaling(8.0, 1.0, 4.0, 32)
LINEAR = {"rope_type": "linear", "factor": 4.0}
FULL, SLIDING = ["full_attention"] * 4, ["sliding_attention"]


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
    rope, scaling = config.rope_parameters, ours.rope.scaling
    if ours.model_type == "gemma3_text":
        local = rope["sliding_attention"]
        assert local == {"rope_type": "default", "rope_theta": ours.rope.local_theta}
        rope = rope["full_attention"]
    assert ours.rope.theta == rope["rope_theta"]
    kind = rope["rope_type"]
    assert kind == ("default" if scaling is None else scaling.to_hf()["rope_type"])
    if scaling is not None:
        assert scaling.factor == rope["factor"]
    if isinstance(scaling, Llama3Scaling):
        context = rope["original_max_position_embeddings"]
        assert scaling.original_max_positions == context
    if config.model_type == "smollm3":
        assert ours.rope_layers == tuple(bool(x) for x in config.no_rope_layers)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    """Fields that a config.json leaves out mean what transformers takes them to mean."""
    config = hf_config(model_type, num_attention_heads=32, hidden_size=64)
    optional = "num_key_value_heads head_dim tie_word_embeddings rms_norm_eps rope_parameters"
    if model_type.startswith("gemma"):
        optional = " ".join(config.keys() - {"model_type", "pad_token_id"})
    for field in optional.split():
        del config[field]
    assert_same(read(config), theirs(config))
    config["num_key_value_heads"] = None
    if model_type in ("mistral", "gemma2", "gemma3_text"):
        return  # transformers refuses it.
    assert read(config).num_kv_heads == theirs(config).num_key_value_heads == 32


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("scaling", [None, LLAMA3_SCALING, LINEAR])
def test_both_schemas_of_rope_are_read_and_written(
    model_type: str, scaling: dict[str, Any] | None
) -> None:
    if model_type == "phi3" and scaling:
        with pytest.raises(UserError, match=r"rope_scaling.rope_type: .* expected 'default'"):
            read(hf_config(model_type, rope_scaling=scaling))
        return
    new: Any = {"rope_theta": 5e5, **(scaling or {"rope_type": "default"})}
    local = {"rope_theta": 2e4, "rope_type": "default"}
    if model_type == "gemma3_text":
        new = {"full_attention": new, "sliding_attention": local}
    config = hf_config(model_type, rope_parameters=new)
    before_5 = hf_config(model_type, rope_theta=5e5, rope_scaling=scaling)
    del before_5["rope_parameters"]
    if model_type == "gemma3_text":
        before_5["rope_local_base_freq"] = 2e4
    ours = read(config)
    assert ours == read(before_5)
    assert ours.rope.theta == 5e5
    assert ours.rope.local_theta == (2e4 if model_type == "gemma3_text" else None)
    expected = {None: None, "llama3": SCALING, "linear": LinearScaling(4.0)}
    assert ours.rope.scaling == expected[scaling and scaling["rope_type"]]
    for form in (config, before_5, ours.to_hf()):
        assert_same(ours, theirs(form))
        assert read(theirs(form).to_dict()) == ours
    written = ours.to_hf()
    assert read(written) == ours
    before = ("rope_theta", "rope_scaling", "rope_local_base_freq")
    for schema in (("rope_parameters",), before):
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


def test_windows() -> None:
    """Which layers are local, as transformers lists them; a window nobody uses is none."""
    used = {"use_sliding_window": True, "sliding_window": 5}
    for model_type, changes in (
        ("qwen2", {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0}),
        ("qwen2", {**used, "max_window_layers": 3}),
        ("qwen2", {**used, "max_window_layers": 9}),
        ("qwen3", {**used, "sliding_window": None}),
        ("qwen3", {**used, "layer_types": [*SLIDING, *FULL[1:]]}),
        ("smollm3", used),
        ("smollm3", {**used, "layer_types": [*FULL[2:], *SLIDING * 2]}),
        ("smollm3", {"sliding_window": 5}),
    ):
        config = hf_config(model_type, **changes)
        ours = read(config)
        local = tuple(x == "sliding_attention" for x in theirs(config).layer_types)
        assert ours.local_layers == local
        assert ours.window == (5 if any(local) else None)
        assert read(ours.to_hf()) == ours
        assert tuple(x == "sliding_attention" for x in theirs(ours.to_hf()).layer_types) == local
    for window in (5, None):
        ours = read(hf_config("mistral", sliding_window=window))
        assert (ours.window, ours.local_layers) == (window, (window is not None,) * 4)
        assert read(ours.to_hf()) == ours
        assert theirs(ours.to_hf()).sliding_window == window
    for model_type, changes in (
        ("gemma2", {}),
        ("gemma2", {"layer_types": [*FULL[2:], *SLIDING * 2]}),
        ("gemma2", {"layer_types": FULL}),
        ("gemma3_text", {}),
        ("gemma3_text", {"sliding_window_pattern": 5}),
        ("gemma3_text", {"layer_types": [*SLIDING * 2, *FULL[2:]]}),
    ):
        config = hf_config(model_type, **changes)
        ours = read(config)
        assert ours.local_layers == tuple(
            x == "sliding_attention" for x in theirs(config).layer_types
        )
        assert ours.window == theirs(config).sliding_window == 6
        assert read(ours.to_hf()) == ours
    silent = hf_config("mistral")
    del silent["sliding_window"]
    assert read(silent).window == theirs(silent).sliding_window == 4096


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
    assert llama.rope == (5e5, Llama3Scaling(32.0, 1.0, 4.0, 8192), None)
    assert found["config.Qwen3-0.6B.json"].family.norms.keys() > HEAD_NORMS.keys()
    assert not found["config.SmolLM3-3B.json"].rope_layers[3]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"model_type": "mixtral"}, ["model_type", "'mixtral'", "llama, qwen2, qwen3, smollm3"]),
        ({"model_type": None}, ["model_type", "None"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequence", "CausalLM"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
        ({"model_type": "gemma2", "hidden_activation": None}, ["hidden_activation", "None"]),
        ({"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping", "null in a llama model"]),
        (
            {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0},
            ["attn_logit_softcapping", "null in a gemma3_text"],
        ),
        ({"model_type": "gemma2", "final_logit_softcapping": 0}, ["final_logit_softcapping", "0"]),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, ["bidirectional"]),
        ({"model_type": "gemma2", "sliding_window": None}, ["sliding_window", "None"]),
        ({"model_type": "gemma2", "sliding_window_pattern": 3}, ["sliding_window_pattern", "3"]),
        ({"model_type": "gemma3_text"}, ["rope_parameters", "rope_", "full_attention and sliding"]),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"sliding_attention": LINEAR}},
            ["rope_parameters.sliding_attention.rope_type", "'linear'"],
        ),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": None,
                "rope_scaling": {"type": "linear", "factor": 8.0},
            },
            ["rope_scaling.type", "'linear'", "rope_type"],
        ),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"use_sliding_window": True}, ["use_sliding_window"]),
        ({"sliding_window": 128}, ["sliding_window", "128"]),
        ({"layer_types": FULL[1:] + SLIDING}, ["layer_types", "sliding"]),
        ({"model_type": "qwen3", "layer_types": FULL[1:] + SLIDING}, ["layer_types", "None"]),
        ({"model_type": "mistral", "layer_types": FULL}, ["layer_types", "sliding_window is 4096"]),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": SLIDING},
            ["layer_types", "each of 4"],
        ),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 4}, ["chunked_attention"]),
        ({"model_type": "mistral", "sliding_window": 0}, ["sliding_window", "0"]),
        ({"model_type": "qwen3", "use_sliding_window": 1}, ["use_sliding_window", "1"]),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": -1},
            ["max_window_layers", "-1"],
        ),
        ({"rope_parameters": {"full_attention": {}}}, ["rope_parameters.full_attention"]),
        ({"rope_parameters": {"rope_type": "yarn"}}, ["rope_type", "'yarn'", "'llama3'"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_scaling.rope_type", "dyn"]),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, ["rope_scaling.factor", "0"]),
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
