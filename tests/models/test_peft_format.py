"""Adapters in PEFT's format against PyTorch: W + alpha / rank B A, by hand.

PEFT itself reads them in `tests/scripts/peft_check.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from mass_dpo_jax.config import default
from mass_dpo_jax.data.tokenizer import train_tokenizer
from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models import attention
from mass_dpo_jax.models.config import load_config, parse_targets
from mass_dpo_jax.models.lora import Lora
from mass_dpo_jax.models.peft_format import (
    check_exportable,
    load_peft,
    load_peft_settings,
    save_peft,
)
from mass_dpo_jax.models.weights import load_hf
from mass_dpo_jax.training.mesh import make_mesh
from mass_dpo_jax.training.open_policy import open_policy
from tests.support.models import (
    FAMILIES,
    VOCABULARY,
    hf_config,
    random_decoder,
    random_tensors,
    tiny_config,
    write_weights,
)


def write_both(folder: Path, model_type: str, targets: str) -> tuple[Any, np.ndarray]:
    """A base in `folder`/base, adapters in `folder`/peft; tokens, and our log-probs of them."""
    base = folder / "base"
    base.mkdir(parents=True)
    config = hf_config(model_type, tie_word_embeddings=model_type == "smollm3")
    (base / "config.json").write_text(json.dumps(config))
    model = load_config(base)
    write_weights(base, {k: 0.2 * x for k, x in random_tensors(model).items()})
    lora = Lora(rank=4, alpha=6.0, targets=parse_targets(targets))
    decoder = random_decoder(model, lora=lora)
    adapters = nnx.to_pure_dict(nnx.state(decoder, nnx.Param))["adapters"]
    save_peft(folder / "peft", adapters, lora, str(base))

    params = {**nnx.to_pure_dict(load_hf(base, model)), "adapters": adapters}
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, (2, 17)).astype(np.int32)
    positions = jnp.broadcast_to(jnp.arange(17), tokens.shape)
    graphdef = nnx.graphdef(decoder)

    @jax.jit
    def logps(params: Any) -> jax.Array:
        decoder = nnx.merge(graphdef, params)
        hidden, _ = decoder(tokens, positions, attention.attend_causally)
        logits = hidden @ decoder.vocabulary_weights().T
        cap = model.logit_soft_cap
        return jax.nn.log_softmax(logits if cap is None else cap * jnp.tanh(logits / cap))

    return tokens, np.asarray(logps(params))


@pytest.mark.parametrize(
    ("model_type", "targets"),
    [
        ("llama", "all"),
        ("qwen2", "q_proj,v_proj"),
        ("qwen3", "q_proj,v_proj,down_proj"),
        ("smollm3", "all"),
        ("mistral", "all"),
        ("olmo2", "o_proj,gate_proj"),
        ("gemma2", "all"),
        ("gemma3_text", "all"),
    ],
)
def test_log_probs_equal_pytorchs(
    tmp_path: Path, torch: ModuleType, model_type: str, targets: str
) -> None:
    transformers = pytest.importorskip("transformers")
    tokens, ours = write_both(tmp_path, model_type, targets)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float32")
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    scale = settings["lora_alpha"] / settings["r"]
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    weights = dict(model.named_parameters())
    with torch.no_grad():
        before = model(torch.tensor(tokens, dtype=torch.long)).logits.log_softmax(-1).numpy()
        names = [name for name in tensors if ".lora_A." in name]
        for name in names:
            a, b = tensors[name], tensors[name.replace(".lora_A.", ".lora_B.")]
            adapted = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
            weights[adapted] += scale * torch.tensor(b @ a)
        theirs = model(torch.tensor(tokens, dtype=torch.long)).logits.log_softmax(-1).numpy()
    assert len(names) == len(tensors) // 2 == 4 * len(settings["target_modules"])
    assert np.abs(theirs - before).max() > 0.5  # They matter.
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in PEFT's format, rank 4 and alpha 6, of q_proj; its base lies beside it."""
    folder = tmp_path_factory.mktemp("adapters")
    write_both(folder, "llama", "q_proj")
    return folder / "peft"


@pytest.fixture
def folder(adapters: Path, tmp_path: Path) -> Path:
    return shutil.copytree(adapters, tmp_path / "peft")


def change(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def read_tensors(folder: Path) -> Any:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {
        "query": {
            "a": jax.ShapeDtypeStruct((4, 48, 4), np.float32, sharding=place),
            "b": jax.ShapeDtypeStruct((4, 4, 64), np.float32, sharding=place),
        }
    }
    return load_peft(folder, tiny_config("llama"), like)


# What PEFT 0.21 writes beside what we do, with its defaults.
DEFAULTS = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None,
    "auto_mapping": None, "corda_config": None, "ensure_weight_tying": False, "eva_config": None,
    "exclude_modules": None, "fan_in_fan_out": False, "init_lora_weights": True,
    "kasa_config": None, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_bias": False, "lora_ga_config": None,
    "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
    "monteclora_config": None, "peft_version": "0.21.2", "qalora_group_size": 16,
    "rank_pattern": {}, "revision": None, "target_parameters": None,
    "trainable_token_indices": None, "use_bdlora": None, "use_dora": False, "use_qalora": False,
    "use_rslora": False, "velora_config": None,
}  # fmt: skip
HARMLESS = (
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.99}},
    {"init_lora_weights": False},
    {"init_lora_weights": None},
    {"inference_mode": False, "revision": "main"},
    {"auto_mapping": {"base_model_class": "LlamaForCausalLM"}, "task_type": None},
    {"ensure_weight_tying": True},
    {"layers_to_transform": []},
    {"exclude_modules": ["lm_head"]},
    {"fan_in_fan_out": True},
    {"target_modules": ["self_attn.q_proj"]},
    {"target_modules": r"^(?!.*lm_head).*\.(q_proj|c_attn)$"},
    {"one_day": None, "another_day": False, "a_third_day": []},
)


def test_settings_that_change_nothing_are_accepted(folder: Path) -> None:
    change(folder, **DEFAULTS)
    assert load_peft_settings(folder) == Lora(4, 6.0, ("query",))
    for changes in HARMLESS:
        change(folder, **(DEFAULTS | changes))
        assert load_peft_settings(folder) == Lora(4, 6.0, ("query",))


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"task_type": "SEQ_CLS"},
        {"peft_type": "ADALORA"},
        {"peft_type": None, "init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
        {"init_lora_weights": "lora_ga"},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": ["gaussian"]},
        {"init_lora_weights": 1},
        {"alora_invocation_tokens": [4, 5]},
        {"alpha_pattern": {"q_proj": 2}},
        {"rank_pattern": {"q_proj": 2}},
        {"arrow_config": {"top_k": 3}},
        {"corda_config": {"corda_method": "kpm"}},
        {"kasa_config": {"beta": 1e-4}},
        {"layer_replication": [[0, 4], [2, 5]]},
        {"layers_to_transform": 0},
        {"layers_to_transform": [0, 1]},
        {"loftq_config": {"loftq_bits": 4}},
        {"lora_bias": True},
        {"megatron_config": {"a": 1}},
        {"modules_to_save": ["embed_tokens"]},
        {"monteclora_config": {"num_samples": 8}},
        {"target_parameters": ["experts"]},
        {"trainable_token_indices": {"embed_tokens": [1]}},
        {"use_bdlora": {"nblocks": 2}},
        {"use_qalora": True},
        {"velora_config": {"scale": 1.0}},
        {"of_the_future": 0},
        {"of_the_future": "x"},
        {"of_the_future": {"a": None}},
    ],
    ids=str,
)
def test_settings_that_compute_something_else_or_are_unknown_are_refused(
    folder: Path, changes: dict[str, Any]
) -> None:
    change(folder, **(DEFAULTS | changes))
    with pytest.raises(UserError) as error:
        load_peft_settings(folder)
    assert any(
        f"{field}: found {value!r}, expected" in str(error.value)
        for field, value in changes.items()
    )
    assert "merge_and_unload" in str(error.value)


def test_values_that_are_none(folder: Path) -> None:
    for changes, message in (
        ({"target_modules": ["q_proj", "lm_head"]}, "found 'lm_head', expected some of"),
        ({"target_modules": ["mlp.q_proj"]}, "found 'mlp.q_proj', expected some of"),
        ({"target_modules": ["proj"]}, "found 'proj', expected some of"),
        ({"target_modules": {"q_proj": 1}}, "expected a list of names"),
        ({"target_modules": []}, "expected a list of names"),
        ({"target_modules": ["qkv_proj"]}, "one each of q_proj, k_proj, v_proj here"),
        ({"target_modules": ["mlp.gate_up_proj"]}, "one each of gate_proj, up_proj here"),
        ({"r": 0}, "r: found 0, expected a positive integer"),
        ({"r": 4.0}, "r: found 4.0, expected a positive integer"),
        ({"r": 10**400, "use_rslora": True}, "r: found 1000"),
        ({"target_modules": ["q_proj", ["v_proj"]]}, r"found \['v_proj'\], expected some of"),
        ({"r": True}, "r: found True, expected a positive integer"),
        ({"lora_alpha": float("nan")}, "lora_alpha: found nan, expected a positive number"),
        ({"lora_alpha": float("inf")}, "lora_alpha: found inf, expected a positive number"),
        ({"lora_alpha": 10**400}, "lora_alpha: found 1000"),
        ({"lora_alpha": "8"}, "lora_alpha: found '8', expected a positive number"),
        ({"use_rslora": "yes"}, "use_rslora: found 'yes', expected true or false"),
    ):
        change(folder, **({"r": 4, "lora_alpha": 6, "use_rslora": False} | changes))
        with pytest.raises(UserError, match=message):
            load_peft_settings(folder)


def test_adapters_of_models_with_fused_projections_are_not_written_for_peft() -> None:
    for model_type in FAMILIES:
        if model_type != "phi3":
            check_exportable(tiny_config(model_type))
    with pytest.raises(UserError, match=r"a phi3 model .* \(gate_up_proj, qkv_proj\).* merged"):
        check_exportable(tiny_config("phi3"))


def test_rank_stabilized_adapters_are_scaled_by_the_root_and_written_as_plain_ones(
    folder: Path, tmp_path: Path
) -> None:
    change(folder, use_rslora=True, lora_alpha=5)
    lora = load_peft_settings(folder)
    tensors = read_tensors(folder)
    scaled = lora.scale_adapters(tensors)["query"]["b"]
    np.testing.assert_allclose(scaled, tensors["query"]["b"] * 5 / 4**0.5, rtol=1e-6)
    save_peft(tmp_path / "again", tensors, lora, "base")
    settings = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert settings["lora_alpha"] / settings["r"] == 5 / 4**0.5
    assert not settings.get("use_rslora")
    assert load_peft_settings(tmp_path / "again") == lora


def test_a_dropout_that_training_leaves_out_is_said_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change(folder, lora_dropout=0.05)
    for _ in range(3):
        load_peft_settings(folder)
    assert caplog.text.count("lora_dropout=0.05") == 1


def test_folders_of_other_kinds_are_told(folder: Path) -> None:
    weights = (folder / "adapter_model.safetensors").rename(folder / "weights")
    for name, message in (
        ("other", "no adapter_model.safetensors; expected adapters .* found other, weights"),
        ("adapter_model.bin", "found adapter_model.bin: pickles are not read; load it with PEFT"),
    ):
        (folder / name).touch()
        with pytest.raises(UserError, match=message):
            load_peft_settings(folder)
    (folder / "adapter_model.safetensors").symlink_to("/nowhere/x")
    with pytest.raises(UserError, match="a link to /nowhere/x, which is not there"):
        load_peft_settings(folder)
    (folder / "adapter_model.safetensors").unlink()
    weights.rename(folder / "adapter_model.safetensors")
    path = folder / "adapter_config.json"
    path.write_text('{"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.0}}')
    with pytest.raises(UserError, match=r"not PEFT's format.*found fine_tune_type, lora_"):
        load_peft_settings(folder)
    path.write_text("[]")
    with pytest.raises(UserError, match="found list, expected a JSON object"):
        load_peft_settings(folder)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(UserError, match=r"adapter_config.json: a Git LFS pointer"):
        load_peft_settings(folder)
    path.rename(folder.parent / "secret")
    path.symlink_to(folder.parent / "secret")
    with pytest.raises(UserError, match=r"adapter_config.json: a link to .*secret"):
        load_peft_settings(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"no adapter_config.json; expected .* or a run; found a"):
        load_peft_settings(folder)
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        load_peft_settings(folder / "nowhere")


def test_folders_around_adapters_and_of_models_are_told(tmp_path: Path, folder: Path) -> None:
    outer = tmp_path / "outer"
    shutil.copytree(folder, outer / "checkpoint-7")
    with pytest.raises(UserError, match="checkpoint-7 in it has one: give that folder"):
        load_peft_settings(outer)
    shutil.copytree(folder, tmp_path / "cache" / "snapshots" / "0a")
    with pytest.raises(UserError, match=r"files lie in .*snapshots/0a: give that folder"):
        load_peft_settings(tmp_path / "cache")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"a whole model .*: that is for --config.model.path"):
        load_peft_settings(tmp_path / "model")
    with pytest.raises(UserError, match=r"no adapter_config.json; 0a in it has one"):
        load_peft_settings(tmp_path / "cache" / "snapshots")


def test_names_of_adapters_in_names_of_tensors(folder: Path) -> None:
    """A model's own state has them, PEFT's files do not."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    expected = read_tensors(folder)

    def named(name: str) -> dict[str, np.ndarray]:
        return {k.replace(".weight", f".{name}.weight"): x for k, x in tensors.items()}

    for name in ("default", "my adapter-2"):
        save_file(named(name), path)
        jax.tree.map(np.testing.assert_array_equal, read_tensors(folder), expected)
    save_file(named("default") | named("reference"), path)
    with pytest.raises(UserError, match="several adapters in one file: default, reference"):
        read_tensors(folder)


def test_adapters_of_another_model_are_refused_before_weights_are_read(
    adapters: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    train_tokenizer(["amber"], 270, base)
    wider = hf_config("llama", hidden_size=32, vocab_size=300)
    (base / "config.json").write_text(json.dumps(wider))
    write_weights(base, random_tensors(load_config(base)))
    config = default()
    config.model.update(path=str(base))
    config.model.lora.update(path=str(adapters), rank=0)
    with pytest.raises(UserError, match=r"found shape \[4, 48\], expected \[4, 32\] .are these"):
        open_policy(config.model, make_mesh(config.mesh), None)


def test_tensors_that_are_refused(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    assert read_tensors(folder)["query"]["b"].shape == (4, 4, 64)
    name = "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"
    unprefixed = {k.removeprefix("base_model.model."): x for k, x in tensors.items()}
    bad = tensors[name].copy()
    bad[1, 2] = np.nan
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != name}, f"missing tensor {name}, shape .4, 48."),
        (unprefixed, r"missing tensor .* \(found model.layers.0.self_attn.q_proj.lora_A.weight"),
        (tensors | {name: tensors[name][:3].copy()}, r"found shape \[3, 48\], expected \[4, 48\]"),
        (tensors | {"other": tensors[name]}, "unexpected tensor other"),
        (tensors | {name: bad}, f"{path}: tensor {name} holds NaN or infinity"),
        (tensors | {name: (bad * np.inf).astype(np.float16)}, f"{name} holds NaN or infinity"),
        (tensors | {name: np.ones((4, 48), np.int8)}, f"{name}: found type I8, expected F64, F32"),
        ({}, "the file has none"),
    ):
        save_file(changed, path)
        with pytest.raises(UserError, match=message):
            read_tensors(folder)
    path.write_bytes(b"short")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        read_tensors(folder)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(UserError, match="not a readable safetensors file: a Git LFS pointer"):
        read_tensors(folder)
