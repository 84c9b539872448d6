"""PEFT reads the adapters that we write, and computes the same log-probabilities.

    pip install peft
    python -m tests.scripts.peft_check

No test of the suite, since nothing else needs PEFT and accelerate, which it brings. What PEFT
writes again is read by us, and is what was written.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

os.environ.update(JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1")

import jax
import numpy as np
import peft
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file

from mass_dpo_jax.models.config import load_config
from mass_dpo_jax.models.peft_format import load_peft, load_peft_settings
from tests.models.test_peft_format import HARMLESS, write_both
from tests.support.models import random_decoder


def check_settings(folder: Path, tokens: np.ndarray, ours: np.ndarray) -> None:
    """What we take for harmless is, and rank-stabilized adapters are those of our scale."""
    path = folder / "peft" / "adapter_config.json"
    written = json.loads(path.read_text())
    root = {"use_rslora": True, "lora_alpha": written["lora_alpha"] / written["r"] ** 0.5}
    for changes in (*HARMLESS, root):
        path.write_text(json.dumps(written | changes))
        assert load_peft_settings(folder / "peft").alpha == written["lora_alpha"]
        difference = np.abs(theirs(folder, tokens) - ours).max()
        print(f"  {changes}: {difference:.1e}")
        assert difference < 1e-4
    path.write_text(json.dumps(written))


def theirs(folder: Path, tokens: np.ndarray) -> np.ndarray:
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype="float32")
    model = peft.PeftModel.from_pretrained(base, folder / "peft")
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.log_softmax(-1).numpy()


def main() -> None:
    print(", ".join(f"{x.__name__} {x.__version__}" for x in (peft, transformers, torch, jax)))
    for model_type, targets in (("llama", "all"), ("qwen3", "q_proj,v_proj"), ("smollm3", "all")):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tokens, ours = write_both(folder, model_type, targets)
            base = transformers.AutoModelForCausalLM.from_pretrained(
                folder / "base", dtype="float32"
            )
            model = peft.PeftModel.from_pretrained(base, folder / "peft")
            with torch.no_grad():
                logits = model(torch.tensor(tokens, dtype=torch.long)).logits
            difference = np.abs(logits.log_softmax(-1).numpy() - ours).max()
            print(f"{model_type}, {targets}: largest difference {difference:.1e}")
            assert difference < 1e-4
            check_settings(folder, tokens, ours)

            model.save_pretrained(folder / "again")
            lora, config = load_peft_settings(folder / "again"), load_config(folder / "base")
            state = nnx.to_pure_dict(nnx.state(random_decoder(config, lora=lora), nnx.Param))
            place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            like = jax.tree.map(
                lambda x, place=place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                state["adapters"],
            )
            load_peft(folder / "again", config, like)
            before, after = (
                load_file(folder / which / "adapter_model.safetensors")
                for which in ("peft", "again")
            )
            assert before.keys() == after.keys()
            for key, value in before.items():
                np.testing.assert_array_equal(after[key], value)
    print("PEFT agrees")


if __name__ == "__main__":
    main()
