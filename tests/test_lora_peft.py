"""Adapters in PEFT's format against PyTorch: W + alpha / rank B A, by hand.

PEFT itself reads them in `tests/peft_check.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models_for_tests import VOCABULARY, hf_config, random_decoder, random_tensors, write_weights
from safetensors.numpy import load_file, save_file

from mass_dpo_jax.errors import UserError
from mass_dpo_jax.models import attention
from mass_dpo_jax.models.adapters import Lora
from mass_dpo_jax.models.config import load_config, parse_targets
from mass_dpo_jax.models.lora import load_peft, load_peft_settings, save_peft
from mass_dpo_jax.models.weights import load_hf


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
        hidden, _ = decoder(tokens, positions, attention.causal)
        return jax.nn.log_softmax(hidden @ decoder.vocabulary_weights().T)

    return tokens, np.asarray(logps(params))


@pytest.mark.parametrize(
    ("model_type", "targets"),
    [("llama", "all"), ("qwen3", "q_proj,v_proj,down_proj"), ("smollm3", "all")],
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


def test_folders_that_are_refused(tmp_path: Path) -> None:
    write_both(tmp_path, "llama", "q_proj")
    folder = tmp_path / "peft"
    settings = json.loads((folder / "adapter_config.json").read_text())
    lora = load_peft_settings(folder)
    assert lora == Lora(4, 6.0, ("query",))
    for changes, message in (
        ({"use_dora": True}, "use_dora: found True, expected False"),
        ({"use_rslora": True}, "use_rslora: found True, expected False"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: found True, expected False"),
        ({"bias": "all"}, "bias: found 'all', expected 'none'"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"target_modules": ["q_proj", "lm_head"]}, "found 'lm_head', expected some of"),
        ({"r": 0}, "r: found 0, expected a positive integer"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(settings | changes))
        with pytest.raises(UserError, match=message):
            load_peft_settings(folder)

    model = load_config(tmp_path / "base")
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {
        "query": {
            "a": jax.ShapeDtypeStruct((4, 48, 4), np.float32, sharding=place),
            "b": jax.ShapeDtypeStruct((4, 4, 64), np.float32, sharding=place),
        }
    }
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    assert load_peft(folder, model, like)["query"]["b"].shape == (4, 4, 64)
    name = "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != name}, f"missing tensor {name}, shape .4, 48."),
        (tensors | {name: tensors[name][:3].copy()}, r"found shape \[3, 48\], expected \[4, 48\]"),
        (tensors | {"other": tensors[name]}, "unexpected tensor other"),
    ):
        save_file(changed, path)
        with pytest.raises(UserError, match=message):
            load_peft(folder, model, like)
    path.write_bytes(b"short")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_peft(folder, model, like)
