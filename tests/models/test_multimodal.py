"""The text model of a multimodal Gemma 3: read, trained by adapters, never written as a whole."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models import hf_folder
from mass_dpo_jax.models.config import DecoderConfig, load_config, parse_targets
from mass_dpo_jax.models.decoder import abstract_decoder
from mass_dpo_jax.models.lora import Lora, merge_adapters
from mass_dpo_jax.models.peft_format import load_peft, load_peft_settings, save_peft
from mass_dpo_jax.models.weights import load_hf
from tests.models.test_transformers import load, reference, relative_error
from tests.support.models import hf_config, random_candidates, random_decoder, scored

VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip
TEXT = hf_config("gemma3_text", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def whole(torch: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A random model with vision, and its folder."""
    folder = tmp_path_factory.mktemp("gemma3")
    config = Gemma3Config(
        text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, image_token_index=98,
        boi_token_index=99, eoi_token_index=100,
    )  # fmt: skip
    model = Gemma3ForConditionalGeneration(config).float().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    model.save_pretrained(folder, max_shard_size="100KB")
    model.config.hidden_size = TEXT["hidden_size"]  # Where `reference` looks for it.
    return folder, model


def renamed(folder: Path, new: Path) -> Path:
    """The same with the names that modules have since transformers 4.52."""
    new.mkdir()
    (new / "config.json").write_text((folder / "config.json").read_text())
    tensors = {}
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            name = name.replace("language_model.model.", "model.language_model.")
            name = re.sub(r"^(vision_tower|multi_modal)", r"model.\1", name)
            tensors[name] = tensor
    save_file(tensors, new / "model.safetensors")
    return new


@pytest.mark.parametrize("names", ["of files", "of modules"])
def test_log_probs_of_text(
    torch: ModuleType,
    tmp_path: Path,
    whole: tuple[Path, Any],
    names: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, model = whole
    if names == "of modules":
        folder = renamed(folder, tmp_path / "renamed")
    ours = load(folder)
    assert ours.config.part_of == "gemma3" and ours.config.model_type == "gemma3_text"
    [line] = [line for line in caplog.messages if "left alone" in line]
    count = sum("vision" in x or "multi_modal" in x for x, _ in model.named_parameters())
    assert f"{folder}: only the text model of a gemma3 model is read; {count} tensors" in line
    assert "(multi_modal_projector, vision_tower)" in line
    pool = random_candidates(seed=1)
    logps, features = reference(torch, model, pool)
    found = scored(ours, pool, pooling="response")
    assert relative_error(found.logps, logps) < 1e-4
    assert relative_error(found.features, features[0]) < 1e-4


def test_its_description_says_what_it_is_part_of(whole: tuple[Path, Any]) -> None:
    config = load_config(whole[0])
    assert DecoderConfig.from_hf(config.to_hf(), "a run") == config
    text = DecoderConfig.from_hf(TEXT, "a folder of its own")
    assert config.computed() == text.computed() and text.part_of == ""


def test_it_is_not_written_without_its_other_parts(whole: tuple[Path, Any]) -> None:
    with pytest.raises(UserError, match=r"text model of a gemma3 model.*adapters.*docs/models.md"):
        hf_folder.check_whole(load_config(whole[0]))


def test_adapters_carry_the_names_of_the_whole_model(
    torch: ModuleType, tmp_path: Path, whole: tuple[Path, Any]
) -> None:
    folder, model = whole
    config, lora = load_config(folder), Lora(4, 6.0, parse_targets("q_proj,down_proj"))
    decoder = random_decoder(config, lora=lora)
    adapters = nnx.to_pure_dict(nnx.state(decoder, nnx.Param))["adapters"]
    save_peft(tmp_path, adapters, lora, str(folder), config.part_of)
    # What PEFT would adapt: modules whose whole name matches.
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    modules = {
        name
        for name, module in model.named_modules()
        if re.fullmatch(settings["target_modules"], name) and hasattr(module, "weight")
    }
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.split(".lora_")[0] for name in tensors} == {
        f"base_model.model.{name}" for name in modules
    }
    assert len(modules) == 2 * 4 and all("language_model" in name for name in modules)

    params = {**nnx.to_pure_dict(load_hf(folder, config)), "adapters": adapters}
    merged = nnx.merge(nnx.graphdef(abstract_decoder(config)), merge_adapters(params, lora))
    pool = random_candidates(seed=1)
    weights = dict(model.named_parameters())
    before = {name: weights[f"{name}.weight"].detach().clone() for name in modules}
    with torch.no_grad():
        for name in modules:
            a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
            weights[f"{name}.weight"] += 1.5 * torch.tensor(b @ a)
    logps, _ = reference(torch, model, pool)
    with torch.no_grad():
        for name, weight in before.items():
            weights[f"{name}.weight"].copy_(weight)
    assert relative_error(scored(merged, pool, pooling=None).logps, logps) < 1e-4

    # Back, by these names and by those of versions before.
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), adapters
    )
    now, before_4_52 = "model.language_model.", "language_model.model."
    for start in (now, before_4_52):
        again = {name.replace(now, start): x for name, x in tensors.items()}
        save_file(again, tmp_path / "adapter_model.safetensors")
        assert load_peft_settings(tmp_path) == lora
        found = load_peft(tmp_path, config, abstract)
        for name, parts in adapters.items():
            for part, x in parts.items():
                np.testing.assert_array_equal(found[name][part], x)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_config": {"model_type": "llama"}}, ["text_config.model_type", "'gemma3_text'"]),
        ({"text_config": {**TEXT, "tie_word_embeddings": False}}, ["text_config.tie_word"]),
        ({"text_config": {**TEXT, "head_dim": 15}}, ["config.json: text_config: head_dim"]),
        ({"architectures": ["Gemma3ForCausalLM"]}, ["architectures", "ConditionalGeneration"]),
        ({"quantization_config": {"bits": 4}}, ["text_config: quantization_config"]),
        ({"text_config": [1]}, ["text_config", "an object"]),
    ],
)
def test_what_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    config = {"model_type": "gemma3", "text_config": TEXT, "vision_config": VISION} | changes
    with pytest.raises(UserError) as error:
        DecoderConfig.from_hf(config, "config.json")
    for word in words:
        assert word in str(error.value)


def test_ends_are_those_outside() -> None:
    config = {"model_type": "gemma3", "text_config": TEXT, "eos_token_id": [1, 96]}
    assert DecoderConfig.from_hf(config, "config.json").eos_token_ids == (1, 96)
